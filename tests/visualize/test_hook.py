"""Pictures in a run of Detectron2, and what they are made of."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("detectron2")

from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from kd_det.app.train import make_pictures
from kd_det.hosts.base import open_bench
from kd_det.hosts.detectron2.datasets import register_datasets
from kd_det.hosts.detectron2.train import run_in_process
from kd_det.visualize.draw import draw
from kd_det.visualize.run import visualize
from kd_det.visualize.watch import watching
from tests.hosts.detectron2.models import all_terms, batch, build, distilled_cfg, write_teacher

pytestmark = pytest.mark.detectron2

SOFT = {"soft": {"LOSS": "KD", "TAPS": ["box_logits"]}}


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """``teachers(architecture)``: its config and weights."""
    folder = tmp_path_factory.mktemp("teachers")
    return lambda name: write_teacher(folder, name)


def make_small(cfg, digits, tmp_path):
    cfg.DATASETS.COCO_JSON[tmp_path.name] = digits
    register_datasets(cfg)
    cfg.merge_from_list(
        [
            *("DATASETS.TRAIN", (tmp_path.name,), "DATASETS.TEST", (), "SEED", 7),
            *("INPUT.MIN_SIZE_TRAIN", (96,), "INPUT.RANDOM_FLIP", "none"),
            *("SOLVER.IMS_PER_BATCH", 2, "SOLVER.MAX_ITER", 3, "SOLVER.STEPS", ()),
            *("DATALOADER.NUM_WORKERS", 0),
        ]
    )
    return cfg


def test_a_detector_trains_bit_identically_with_pictures(teachers, digits, tmp_path):
    weights = []
    for name, period in (("plain", 0), ("drawn", 2)):
        cfg = make_small(distilled_cfg("faster", teachers("faster"), SOFT), digits, tmp_path)
        cfg.merge_from_list(["OUTPUT_DIR", str(tmp_path / name), "VIS_PERIOD", period])
        (tmp_path / name).mkdir()
        seed_all_rng(cfg.SEED)
        run_in_process(cfg, pictures=make_pictures)
        weights.append(torch.load(tmp_path / name / "model_final.pth", weights_only=False)["model"])
    plain, drawn = weights
    assert plain.keys() == drawn.keys()
    assert all(torch.equal(torch.as_tensor(plain[k]), torch.as_tensor(drawn[k])) for k in plain)
    events = EventAccumulator(str(tmp_path / "drawn")).Reload()
    tags = [tag for tag in events.Tags()["images"] if tag.startswith("distilled/")]
    assert tags == ["distilled/rois"]


@pytest.mark.parametrize(("name", "kinds"), [("cascade", 3), ("retinanet", 0)])
def test_every_meta_architecture_can_be_drawn(teachers, name, kinds):
    cfg = distilled_cfg(name, teachers(name), all_terms(name, 1.0))
    model = build(cfg)
    bench = open_bench(cfg, model=model)
    inputs = batch()
    with watching(bench, 2) as recordings, EventStorage():
        model(inputs)
    (recording,) = recordings
    for picture, x in zip(recording.pictures.images, inputs, strict=True):
        rgb = x["image"].flip(0) if cfg.INPUT.FORMAT == "BGR" else x["image"]
        assert torch.equal(picture, rgb)
    assert len(recording.boxes) == kinds
    figures = draw(bench, recording)
    assert {"features_p3", "fgfi_mask"} <= figures.keys()
    assert len([f for f in figures if f.startswith("rois_stage")]) >= kinds


def test_images_of_nobodys_annotation_pass_a_training_forward(teachers, digits, tmp_path):
    cfg = make_small(distilled_cfg("mask", teachers("mask"), SOFT), digits, tmp_path)
    bench = open_bench(cfg)
    pictures = [
        torch.randint(0, 256, (3, *size), dtype=torch.uint8) for size in ((90, 70), (64, 96))
    ]
    with watching(bench, 2) as recordings:
        losses = bench.losses(bench.unannotated(pictures))
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert losses["loss_box_reg"] == losses["loss_mask"] == 0
    assert set(draw(bench, recordings[0])) == {"rois"}


def test_a_stock_meta_architecture_does_not_distil(tmp_path, refuses):
    options = ["MODEL.META_ARCHITECTURE", "GeneralizedRCNN", "MODEL.DEVICE", "cpu"]
    with refuses("GeneralizedRCNN", "DistilledRCNN"):
        visualize("configs/digits/kd_frcnn.yaml", options, output=tmp_path)
