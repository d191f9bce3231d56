"""KCD on this host: values of images, blends, the shorter run, and exact resuming."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from torchvision.ops import box_iou

from kd_det.core.errors import KDError
from kd_det.hosts.detection.heads import recorded_calls
from kd_det.hosts.detection.uncertainty import anchor_values, roi_values
from kd_det.hosts.lightning.optim import learning_rate_factor
from kd_det.hosts.torchvision_detection import family
from kd_det.hosts.torchvision_detection.data import CocoDataset, collate, train_loader
from kd_det.hosts.torchvision_detection.train import run
from kd_det.procedures.base import TrainingSet, build_procedures
from kd_det.run.plan import Start
from tests.hosts.torchvision_detection.models import (
    ARCHITECTURES,
    Stop,
    batch,
    distilled,
    student_model,
    tiny_cfg,
)


def build(cfg, images):
    """The one procedure of a run, KCD."""
    (kcd,) = build_procedures(cfg, lambda: TrainingSet(images))
    return kcd


def test_the_value_of_an_image_is_the_mean_entropy_of_its_rois(randn):
    logits, counts = randn(7, 5) * 3, [3, 0, 4]
    expected, start = [], 0
    for count in counts:
        entropies = []
        for row in logits[start : start + count].numpy():
            p = np.exp(row) / np.exp(row).sum()
            entropies.append(-sum(x * math.log(x) for x in p))
        expected.append(sum(entropies) / (len(entropies) or 1) / math.log(5))
        start += count
    values = roi_values([logits], [counts], mean_first=True)
    np.testing.assert_allclose(values.numpy(), expected, rtol=1e-12)
    assert values[1] == 0  # no RoIs, nothing to be uncertain about
    np.testing.assert_allclose(roi_values([torch.zeros(4, 11)], [[1, 3]]).numpy(), 1, rtol=1e-6)


def test_dense_values_are_means_over_positive_and_best_scoring_background_anchors(randn):
    logits = randn(2, 9, 4) * 2
    matches = [
        torch.tensor([0, -1, -2, -1, 2, -1, -1, -1, -1]),  # -2: between the thresholds
        torch.tensor([-1, -2, 1, -2, -2, -2, -2, -2, -2]),  # fewer background than asked for
    ]
    expected = []
    for image, matched in zip(logits[..., 1:].numpy(), matches, strict=True):
        background = [a for a in range(9) if matched[a] == -1]
        background.sort(key=lambda a: -image[a].max())
        chosen = [a for a in range(9) if matched[a] >= 0] + background[:3]
        total = 0.0
        for anchor in chosen:
            for p in 1 / (1 + np.exp(-image[anchor])):
                total -= p * math.log(p) + (1 - p) * math.log(1 - p)
        expected.append(total / len(chosen) / (3 * math.log(2)))
    matched = torch.stack(matches)
    values = anchor_values(
        logits[..., 1:], matched >= 0, matched == -1, negatives=3, mean_first=True
    )
    np.testing.assert_allclose(values.numpy(), expected, rtol=1e-12)


def test_the_matches_of_a_dense_detector_are_its_own():
    model = student_model("RetinaNet", ["INPUT.MIN_SIZE_TRAIN", (80,)]).train()
    images, targets = batch()
    calls = {"matches": family.DenseHead().uncertainty_places(model)["matches"]}
    with recorded_calls(model, calls) as seen:
        model(images, targets)
    assert "compute_loss" not in vars(model.head)
    assert model.head.compute_loss.__self__ is model.head
    padded, scaled = model.transform(images, targets)
    anchors = model.anchor_generator(padded, list(model.backbone(padded.tensors).values()))
    for found, own, target in zip(seen["matches"], anchors, scaled, strict=True):
        expected = model.proposal_matcher(box_iou(target["boxes"], own))
        assert torch.equal(found, expected)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_training_step_leaves_a_value_of_every_image(name, monkeypatch):
    model = distilled(name, values=True)
    seen = {}

    def spy_on(function):
        original = getattr(family, function)

        def spy(logits, other, *rest, **more):
            seen["logits"], seen["other"] = logits, other
            return original(logits, other, *rest, **more)

        monkeypatch.setattr(family, function, spy)

    spy_on("roi_values")
    spy_on("anchor_values")
    assert model.image_values is None
    model(*batch())
    values = model.image_values
    assert values.shape == (2,)
    assert not values.requires_grad
    assert ((values > 0) & (values <= 1)).all()
    if "RCNN" in name:
        assert sum(seen["other"][0]) == len(seen["logits"][0])
    else:
        assert len(seen["other"]) == 2
    assert distilled(name)._uncertain is None


def test_blended_images_keep_their_own_boxes_and_are_flipped_as_one(digits):
    plain = CocoDataset(*digits["digits_train"], masks=True)
    blended = CocoDataset(*digits["digits_train"], masks=True, flip=True)
    cfg = tiny_cfg("FasterRCNN")
    cfg.KD.ENABLED = cfg.KD.KCD.ENABLED = True
    kcd = build(cfg, len(plain))
    condensation = kcd.condensation
    blended.image_change = kcd.image_change()
    assert [plain[i][1]["index"] for i in range(3)] == [0, 1, 2]
    condensation.partners[2], condensation.epsilons[2] = 4, 0.25
    expected = 0.75 * plain[2][0] + 0.25 * plain[4][0]
    torch.manual_seed(0)
    flips = set()
    for image, target in (blended[2] for _ in range(6)):
        mirrored = not torch.allclose(image, expected)
        flips.add(mirrored)
        torch.testing.assert_close(image, expected.flip(-1) if mirrored else expected)
        assert torch.equal(target["labels"], plain[2][1]["labels"])
        if not mirrored:
            assert torch.equal(target["boxes"], plain[2][1]["boxes"])
    assert flips == {True, False}
    while not torch.equal(image := blended[3][0], plain[3][0]):
        assert torch.equal(image, plain[3][0].flip(-1))


def test_the_plan_shortens_the_run_and_moves_its_learning_rate_steps():
    opts = ["SOLVER.MAX_ITER", 600, "SOLVER.STEPS", (450, 550), "SOLVER.WARMUP_ITERS", 100]
    cfg = tiny_cfg("FasterRCNN", opts)
    assert not build_procedures(cfg, lambda: TrainingSet(1500))
    cfg.KD.ENABLED = cfg.KD.KCD.ENABLED = True
    cfg.KD.KCD.PERIOD = 200
    planned = build(cfg, 1500).planned_config(cfg).SOLVER
    # Three stages that keep 1, 0.7^(1/3) and 0.7^(2/3) of the images.
    shares = [1, 0.7 ** (1 / 3), 0.7 ** (2 / 3)]
    assert planned.MAX_ITER == pytest.approx(200 * sum(shares), abs=1.5)
    assert planned.WARMUP_ITERS == 100
    steps = [200 + 200 * shares[1] + share * 200 * shares[2] for share in (0.25, 0.75)]
    assert planned.STEPS == pytest.approx(steps, abs=2)
    assert learning_rate_factor(planned, planned.MAX_ITER - 1) == pytest.approx(0.01)
    assert (cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS) == (600, (450, 550))


def test_every_period_reads_its_own_images_only(digits):
    cfg = tiny_cfg("FasterRCNN", ["SOLVER.IMS_PER_BATCH", 2, "SOLVER.MAX_ITER", 9])
    cfg.KD.ENABLED = cfg.KD.KCD.ENABLED = True
    cfg.KD.KCD.RHO, cfg.KD.KCD.PERIOD, cfg.KD.KCD.POOL = 0.3, 3, "active"
    dataset = CocoDataset(*digits["digits_train"])

    def trained(world, workers):
        cfg.DATALOADER.NUM_WORKERS = workers
        procedures = [
            build_procedures(cfg, lambda: TrainingSet(len(dataset))) for _ in range(world)
        ]
        condensations = [kcd.condensation for (kcd,) in procedures]
        loaders = [
            iter(train_loader(cfg, dataset, 3, 0, rank, world, own))
            for rank, own in enumerate(procedures)
        ]
        seen = []
        for _ in range(condensations[0].planned_steps()):
            batches = [[t["index"] for t in next(loader)[1]] for loader in loaders]
            images = [index for batch in batches for index in batch]
            assert set(images) <= set(condensations[0].active.tolist())
            seen.append(sorted(images))
            for own in condensations:
                values = torch.tensor(images) / 10
                own.update(torch.tensor(images), values)
                own.step()
        assert condensations[0].current_period == 2
        assert [len(b) for b in batches] == [2 // world] * world
        return seen

    alone = trained(1, 0)
    assert trained(2, 0) == alone
    assert trained(1, 1) == alone  # although workers fetch ahead


KCD = ["KD.KCD.PERIOD", "2", "KD.KCD.RHO", "0.4", "SOLVER.MAX_ITER", "8", "SOLVER.STEPS", "(6,)"]


def test_an_interrupted_run_selects_what_the_uninterrupted_one_does(digits_config, tmp_path):
    results = run(digits_config("kcd_frcnn", *KCD), progress=lambda *_: None)
    whole = torch.load(tmp_path / "run" / "last.ckpt", weights_only=False)
    kcd = whole["procedures"]["KCD"]
    assert kcd["current_period"] == len(kcd["lengths"]) - 1 == 3
    assert len(kcd["active"]) == kcd["counts"][3] < 6
    assert whole["global_step"] == sum(kcd["lengths"]) < 8
    # What was measured is what was counted: two images in every iteration.
    assert int(kcd["ledger"]["count"].sum()) == 2 * sum(kcd["lengths"])
    assert results["cost"]["measured"] == pytest.approx(100 * sum(kcd["lengths"]) / 8)
    formula = sum(0.4 ** (t / 4) for t in (1, 2, 3, 4)) / 4
    assert results["cost"]["formula"] == pytest.approx(100 * formula)
    assert results["bbox"].keys() >= {"AP"}
    lines = (tmp_path / "run" / "metrics.json").read_text().splitlines()
    metrics = {k: v for line in lines for k, v in json.loads(line).items()}
    assert {k: metrics[f"cost/{k}"] for k in ("formula", "measured")} == results["cost"]
    assert metrics["kcd/images"] == len(kcd["active"])

    # Switched off within a period, and at its end.
    cfg = digits_config("kcd_frcnn", *KCD, output="again")
    for after in (2, 5):
        with pytest.raises(ConnectionError):
            run(cfg, Start(resume=after > 2), callbacks=[Stop(after)], progress=lambda *_: None)
    resumed = run(cfg, Start(resume=True), progress=lambda *_: None)
    assert resumed["cost"] == results["cost"]
    theirs = torch.load(tmp_path / "again" / "last.ckpt", weights_only=False)
    for key in ("active", "partners", "epsilons"):
        assert torch.equal(theirs["procedures"]["KCD"][key], kcd[key]), key
    for key, value in kcd["ledger"].items():
        assert torch.equal(theirs["procedures"]["KCD"]["ledger"][key], value), key
    for key, value in whole["state_dict"].items():
        assert torch.equal(theirs["state_dict"][key], value), key

    for change, parts in (
        (["KD.KCD.ENABLED", "False"], ["KCD", "resume"]),
        (["KD.KCD.RHO", "0.7"], ["counts"]),
    ):
        with pytest.raises(KDError) as error:
            run(
                digits_config("kcd_frcnn", *KCD, *change, output="again"),
                Start(resume=True),
                progress=lambda *_: None,
            )
        for part in parts:
            assert part in str(error.value)


def test_a_batch_names_its_images(digits):
    dataset = CocoDataset(*digits["digits_train"])
    _, targets = collate([dataset[4], dataset[1]])
    assert [target["index"] for target in targets] == [4, 1]
