"""Every mistake is one clear error before anything is trained."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from kd_det.core.checkpoint import read_weights
from kd_det.core.errors import KDError
from kd_det.hosts.torchvision_detection.config import get_cfg, load_config
from kd_det.hosts.torchvision_detection.export import export_student
from kd_det.hosts.torchvision_detection.model import DistilledDetector
from kd_det.hosts.torchvision_detection.models import build_model
from kd_det.hosts.torchvision_detection.teacher import build_teacher
from kd_det.hosts.torchvision_detection.train import run
from kd_det.run.plan import Start
from tests.hosts.torchvision_detection.models import (
    LEVELS,
    student_model,
    teacher_model,
    tiny_cfg,
    write_teacher,
)

KD = {"LOSS": "KD", "TAPS": ["box_logits"]}
DENSE = {"LOSS": "KD", "TAPS": ["cls_logits"], "ACTIVATION": "sigmoid"}


def refused(expected, build):
    with pytest.raises(KDError, match=r"expected .*; received .*; remedy: .+") as error:
        build()
    for part in expected:
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("student", "teacher", "terms", "expected"),
    [
        ("FasterRCNN", "FasterRCNN", {}, ["KD.TERMS", "KD.ENABLED False"]),
        ("FasterRCNN", "FasterRCNN", {"loss_classifier": KD}, ["task loss"]),
        ("FasterRCNN", "FasterRCNN", {"x": {**KD, "TAPS": ["p9"]}}, ["'p9'", "p4"]),
        ("FasterRCNN", "FasterRCNN", {"x": {**KD, "TAPS": ["backbone.body.layer9"]}}, ["layer3"]),
        ("FasterRCNN", "FasterRCNN", {"x": {**KD, "TAPS": ["cls_logits"]}}, ["'cls_logits'"]),
        ("FasterRCNN", "RetinaNet", {"x": KD}, ["RetinaNet", "'box_logits'"]),
        ("FasterRCNN", "FasterRCNN", {"x": {**KD, "TAPS": [["box_logits", "p3"]]}}, ["p3"]),
        ("FasterRCNN", "FasterRCNN", {"x": {"LOSS": "FGFI", "TAPS": ["c3"]}}, ["'c3'", "p2"]),
        (
            "FasterRCNN",
            "FasterRCNN",
            {"x": {"LOSS": "FitNet", "TAPS": [["c3", "c4"]]}},
            ["stride 8", "stride 16"],
        ),
        (
            "RetinaNet",
            "RetinaNet",
            {"x": {"LOSS": "KD", "TAPS": ["cls_logits"]}},
            ["softmax", "sigmoid"],
        ),
        (
            "MaskRCNN",
            "MaskRCNN",
            {"x": {"LOSS": "KD", "TAPS": ["mask_logits"]}},
            ["mask_logits", "sigmoid"],
        ),
        ("RetinaNet", "FCOS", {"x": DENSE}, ["same anchors"]),
        (
            "FasterRCNN",
            "FasterRCNN",
            {"x": {"LOSS": "IRG", "TAPS": [["box_features", "p3"]], "VERTICES": False}},
            ["RoIs", "images", "p3"],
        ),
        (
            "FasterRCNN",
            "FasterRCNN",
            {"x": {"LOSS": "MHGD", "TAPS": ["p4", "box_features"]}},
            ["p4: images", "box_features: RoIs"],
        ),
        (
            "FasterRCNN",
            "FasterRCNN",
            {"x": {"LOSS": "MHGD", "TAPS": ["p3", "p4"], "CLIP": "task_norm"}},
            ["task_norm", "REDUCTION: mean", "WEIGHT"],
        ),
    ],
)
def test_terms_that_cannot_work_are_refused(student, teacher, terms, expected):
    refused(
        expected,
        lambda: DistilledDetector(student_model(student), teacher_model(teacher), terms),
    )


def test_a_negative_task_weight_is_refused():
    terms = {"x": {"LOSS": "ReviewKD", "TAPS": LEVELS}}
    refused(
        ["TASK_WEIGHT", "-1"],
        lambda: DistilledDetector(
            student_model("FasterRCNN"), teacher_model("FasterRCNN"), terms, task_weight=-1.0
        ),
    )


def test_class_counts_that_differ_are_refused_only_where_logits_are_compared():
    def build(terms):
        teacher = teacher_model("FasterRCNN", ["MODEL.ROI_HEADS.NUM_CLASSES", 7])
        return DistilledDetector(student_model("FasterRCNN"), teacher, terms)

    refused(["student 10 classes", "teacher 7 classes"], lambda: build({"x": KD}))
    build({"x": {"LOSS": "ReviewKD", "TAPS": LEVELS}})


def distilled_cfg(tmp_path, config, weights):
    cfg = tiny_cfg("FasterRCNN")
    cfg.KD.ENABLED = True
    cfg.KD.TEACHER.CONFIG_FILE, cfg.KD.TEACHER.WEIGHTS = str(config), str(weights)
    cfg.KD.TERMS.logits = type(cfg)(dict(KD))
    cfg.OUTPUT_DIR = str(tmp_path / "output")
    return cfg


def partial(weights):
    state = torch.load(weights)["model"]
    torch.save({k: v for k, v in state.items() if "box_predictor" not in k}, weights)


def emptied(weights):
    torch.save({"model": {}}, weights)


def deeper(weights):
    torch.save(
        teacher_model("FasterRCNN", ["MODEL.BACKBONE.BLOCKS", [2, 1, 1]]).state_dict(), weights
    )


def other_classes(weights):
    torch.save(
        teacher_model("FasterRCNN", ["MODEL.ROI_HEADS.NUM_CLASSES", 7]).state_dict(), weights
    )


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        (partial, ["4 missing", "roi_heads.box_predictor.cls_score.weight"]),
        (emptied, ["tensors in"]),
        (deeper, ["unexpected", "backbone.body.layer1.1.conv1.weight"]),
        (other_classes, ["mis-shaped", "(file (8, 128), model (11, 128))"]),
        (lambda weights: weights.unlink(), ["does not exist"]),
        (lambda weights: weights.write_bytes(b"no"), ["readable"]),
    ],
)
def test_planted_teacher_faults_stop_before_anything_is_written(tmp_path, fault, expected):
    config, weights = write_teacher(tmp_path, "FasterRCNN")
    fault(weights)
    cfg = distilled_cfg(tmp_path, config, weights)
    cfg.DATASETS.COCO_JSON = type(cfg)(coco(tmp_path))
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ("one",)
    refused(expected, lambda: run(cfg))
    assert not (tmp_path / "output").exists()


def test_a_teacher_without_config_or_weights_is_refused(tmp_path):
    config, weights = write_teacher(tmp_path, "FasterRCNN")
    refused(["CONFIG_FILE"], lambda: build_teacher(distilled_cfg(tmp_path, "", weights)))
    refused(["CONFIG_FILE"], lambda: build_teacher(distilled_cfg(tmp_path, "no.yaml", weights)))
    cfg = distilled_cfg(tmp_path, config, "")
    refused(["WEIGHTS", "ALLOW_RANDOM"], lambda: build_teacher(cfg))
    cfg.KD.TEACHER.ALLOW_RANDOM = True
    build_teacher(cfg)


def test_a_teacher_saved_by_a_distilled_run_loads_without_its_adaptors(tmp_path):
    config, weights = write_teacher(tmp_path, "FasterRCNN")
    state = torch.load(weights)["model"]
    torch.save({"model": {**state, "distiller.step": torch.zeros(())}}, weights)
    loaded = build_teacher(distilled_cfg(tmp_path, config, weights)).frozen.model.state_dict()
    assert loaded.keys() == read_weights(weights).keys() == state.keys()
    assert all(torch.equal(loaded[k], v) for k, v in state.items())


@pytest.mark.parametrize(
    ("opts", "expected"),
    [
        (["MODEL.META_ARCHITECTURE", "FastRCNN"], ["did you mean 'FasterRCNN'"]),
        (["MODEL.BACKBONE.NAME", "resnet5"], ["did you mean 'resnet50'"]),
        (["MODEL.BACKBONE.NAME", "swin_t"], ["deliver", "swin_t"]),
        (["MODEL.BACKBONE.BLOCKS", "[1]", "MODEL.FPN.LEVELS", "[3, 4, 5]"], ["levels [1, 2]"]),
        (["MODEL.BACKBONE.BLOCKS", "[0, 1, 1]"], ["BLOCKS"]),
        (["MODEL.FPN.LEVELS", "[2, 4]"], ["consecutive"]),
        (["MODEL.FPN.LEVELS", "[2, 3, 4, 5]"], ["SIZES", "3 entries for 4 levels"]),
        (["MODEL.ANCHOR_GENERATOR.SIZE", "1"], ["'MODEL.ANCHOR_GENERATOR.SIZE'"]),
        (["INPUT.RANDOM_FLIP", "vertical"], ["'vertical'"]),
        (["SOLVER.MAX_ITER", "0"], ["MAX_ITER"]),
        (["MODEL.META_ARCHITECTURE", "FCOS", "MODEL.FPN.OUT_CHANNELS", "24"], ["multiple of 32"]),
        (["KD.KCD.MIN_PER_CLASS", "3"], ["MIN_PER_CLASS", "many classes"]),
        (["KD.KCD.EPSILON", "0.5"], ["EPSILON", "0.3", "0.5"]),
    ],
)
def test_configs_that_cannot_work_are_refused(opts, expected):
    refused(
        expected,
        lambda: build_model(load_config("configs/digits_torchvision/kcd_frcnn.yaml", opts)),
    )


def test_a_config_of_several_runs_is_refused_by_a_single_one():
    cfg = load_config("configs/digits_torchvision/fsp_frcnn.yaml")
    refused(["2 STAGES", "tools/train_net.py"], lambda: run(cfg))


def test_a_config_of_another_host_is_refused():
    cfg = get_cfg()
    cfg.HOST = "detectron2"
    refused(["torchvision_detection", "detectron2"], lambda: run(cfg))


def coco(folder, categories=10, boxes=((5, 5, 20, 20),), **fields):
    """A data set of one image, as the value of DATASETS.COCO_JSON."""
    Image.new("RGB", (64, 64)).save(folder / "0.png")
    content = {
        "images": [{"id": 1, "file_name": "0.png", "width": 64, "height": 64}],
        "annotations": [
            {"id": i + 1, "image_id": 1, "category_id": 1, "bbox": list(box), "area": 9, **fields}
            for i, box in enumerate(boxes)
        ],
        "categories": [{"id": c + 1, "name": str(c)} for c in range(categories)],
    }
    (folder / "one.json").write_text(json.dumps(content))
    return {"one": [str(folder / "one.json"), str(folder)]}


@pytest.mark.parametrize(
    ("arch", "data", "expected"),
    [
        ("FasterRCNN", {"categories": 7}, ["10 classes", "7 categories", "NUM_CLASSES 7"]),
        ("FasterRCNN", {"boxes": ((50, 5, 20, 20),)}, ["inside their image"]),
        ("MaskRCNN", {}, ["segmentation", "1 annotations without"]),
    ],
)
def test_data_that_does_not_fit_is_refused(tmp_path, arch, data, expected):
    cfg = tiny_cfg(arch, ["OUTPUT_DIR", str(tmp_path / "output")])
    cfg.DATASETS.COCO_JSON = type(cfg)(coco(tmp_path, **data))
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ("one",)
    refused(expected, lambda: run(cfg))
    assert not (tmp_path / "output").exists()


def test_missing_data_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    for name, expected in (
        ("coco_2017_train", ["coco/annotations/instances_train2017.json", "DETECTRON2_DATASETS"]),
        ("digit_train", ["did you mean 'digits_train'"]),
    ):
        cfg = tiny_cfg("FasterRCNN", ["OUTPUT_DIR", str(tmp_path / "output")])
        cfg.DATASETS.TRAIN = (name,)
        refused(expected, lambda cfg=cfg: run(cfg))
    cfg.DATASETS.TRAIN = ()
    refused(["DATASETS.TRAIN"], lambda: run(cfg))


def test_hardware_that_is_not_there_is_refused(tmp_path):
    cfg = tiny_cfg("FasterRCNN", ["OUTPUT_DIR", str(tmp_path / "output")])
    refused(["--num-gpus 2", "torchrun"], lambda: run(cfg, Start(num_gpus=2)))
    cfg.MODEL.DEVICE = "cuda"
    more = torch.cuda.device_count() + 1
    named = f"--num-gpus {more}" if more > 1 else "MODEL.DEVICE cpu"
    refused([named], lambda: run(cfg, Start(num_gpus=more)))


@pytest.mark.parametrize("file", ["last.ckpt", "model_final.pth", "metrics.json"])
def test_the_folder_of_another_run_is_left_alone(tmp_path, file):
    (tmp_path / file).write_text("theirs")
    cfg = tiny_cfg("FasterRCNN", ["OUTPUT_DIR", str(tmp_path)])
    refused([file, "--resume"], lambda: run(cfg))
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {file: "theirs"}


def test_an_export_is_the_stock_student_and_overwrites_nothing(tmp_path):
    config, weights = write_teacher(tmp_path, "FasterRCNN")
    state = torch.load(weights)["model"]
    torch.save({"model": {**state, "distiller.step": torch.zeros(())}}, weights)
    out = tmp_path / "student"
    model_path, config_path = export_student(load_config(str(config)), weights, out)
    cfg = load_config(str(config_path))
    assert not cfg.KD.ENABLED
    build_model(cfg).load_state_dict(torch.load(model_path), strict=True)
    refused(["earlier export"], lambda: export_student(cfg, weights, out))
    refused(
        ["mis-shaped"],
        lambda: export_student(tiny_cfg("FasterRCNN"), weights, tmp_path / "other"),
    )
    assert not (tmp_path / "other").exists()


def test_evaluating_nothing_is_refused(tmp_path):
    cfg = tiny_cfg("FasterRCNN", ["OUTPUT_DIR", str(tmp_path)])
    refused(["MODEL.WEIGHTS"], lambda: run(cfg, Start(eval_only=True)))


def test_all_configs_read_and_describe_the_same_student():
    students = {}
    files = sorted(Path("configs/digits_torchvision").glob("*.yaml"))
    assert len(files) == 27
    for file in files:
        cfg = load_config(str(file))
        method, _, arch = file.stem.rpartition("_")
        if method in ("base", "teacher"):
            continue
        output, enabled = cfg.OUTPUT_DIR, cfg.KD.ENABLED
        assert output == f"outputs/digits_torchvision/{file.stem}"
        assert enabled == (method != "baseline")
        plain = yaml.safe_load(re.sub(r"\nOUTPUT_DIR.*", "", cfg.dump()))
        for key in ("KD", "STAGES"):
            plain.pop(key)
        assert students.setdefault(arch, plain) == plain, file
