"""A teacher of other classes: what the losses receive is what the names say."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from kd_det.core.class_map import match_classes
from kd_det.data.subset_json import write_subset
from kd_det.hosts.torchvision_detection.classes import (
    build_class_map,
    class_names,
)
from kd_det.hosts.torchvision_detection.config import load_config
from kd_det.hosts.torchvision_detection.model import DistilledDetector
from kd_det.hosts.torchvision_detection.models import num_classes
from kd_det.hosts.torchvision_detection.teacher import teacher_config
from kd_det.hosts.torchvision_detection.train import build_training_model, run
from tests.hosts.torchvision_detection.models import (
    ARCHITECTURES,
    all_terms,
    batch,
    student_model,
    teacher_model,
)

TEACHER = [str(k) for k in (7, 2, 0, 9, 4, 1, 8, 3, 6, 5)]
STUDENT = ["3", "7", "1", "9"]
FOUR = ["MODEL.ROI_HEADS.NUM_CLASSES", 4, "MODEL.RETINANET.NUM_CLASSES", 4]


def four_of_ten(name):
    found = match_classes(STUDENT, TEACHER)
    student = student_model(name, FOUR)
    return DistilledDetector(student, teacher_model(name), all_terms(name), class_map=found)


def four_classes(seed=0):
    images, targets = batch(seed)
    return images, [{**t, "labels": (t["labels"] - 1) % 4 + 1} for t in targets]


def listen(model, module, pick=lambda output: output):
    """Whatever a module computes, from then on."""
    seen = []
    module.register_forward_hook(lambda m, args, output: seen.append(pick(output).detach()))
    return seen


def received(model):
    seen = {}
    model.distiller.register_forward_pre_hook(lambda m, args: seen.update(s=args[0], t=args[1]))
    return seen


def by_name(row, exclusive):
    """Logits of the student's classes from one row of the teacher's, background first."""
    ground, named = float(row[0]), dict(zip(TEACHER, row[1:].tolist(), strict=True))
    if exclusive:
        rest = [value for name, value in named.items() if name not in STUDENT]
        ground = math.log(math.exp(ground) + sum(map(math.exp, rest)))
    return torch.tensor([ground, *(named[name] for name in STUDENT)])


@pytest.mark.parametrize("name", ["FasterRCNN", "MaskRCNN"])
def test_roi_logits_are_the_teachers_by_name(name):
    model = four_of_ten(name).train()
    raw = listen(model, model.teacher.model.roi_heads.box_predictor, lambda output: output[0])
    seen = received(model)
    losses = model(*four_classes())
    assert raw[0].shape[1] == 11
    expected = torch.stack([by_name(row, exclusive=True) for row in raw[0]])
    torch.testing.assert_close(seen["t"]["box_logits"], expected)
    student = seen["s"]["box_logits"]
    assert student.shape == expected.shape
    divergence = F.kl_div(student.log_softmax(-1), expected.softmax(-1), reduction="batchmean")
    torch.testing.assert_close(losses["logits"], divergence)
    assert torch.isfinite(losses["relations"])


def test_masks_are_those_of_the_class_of_the_same_name():
    model = four_of_ten("MaskRCNN").train()
    own = listen(model, model.student.roi_heads.mask_predictor)
    raw = listen(model, model.teacher.model.roi_heads.mask_predictor)
    seen = received(model)
    model(*four_classes())
    assert len(raw[0]) > 0
    labels = set()
    for mine, student, theirs, teacher in zip(
        own[0], seen["s"]["mask_logits"], raw[0], seen["t"]["mask_logits"], strict=True
    ):
        (label,) = [k for k in range(1, 5) if torch.equal(mine[k], student)]
        assert torch.equal(teacher, theirs[1 + TEACHER.index(STUDENT[label - 1])])
        labels.add(label)
    assert len(labels) > 1


@pytest.mark.parametrize("name", ["RetinaNet", "FCOS"])
def test_dense_logits_are_selected_by_name_anchor_by_anchor(name):
    model = four_of_ten(name).train()
    raw = listen(model, model.teacher.model.head.classification_head)
    seen = received(model)
    losses = model(*four_classes())
    expected = [by_name(row, exclusive=False) for image in raw[0] for row in image]
    assert torch.equal(seen["t"]["cls_logits"], torch.stack(expected))
    assert seen["s"]["cls_logits"].shape == (len(expected), 5)
    assert torch.isfinite(losses["logits"])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_permuted_teacher_that_is_mapped_back_teaches_the_same(name):
    """Permuting a teacher's outputs and its names together changes no loss."""
    names = [str(k) for k in range(10)]
    order = torch.tensor([int(k) for k in TEACHER])
    plain, permuted = teacher_model(name), teacher_model(name)
    permute_head(permuted, order)
    terms = all_terms(name)
    student = student_model(name)
    found = match_classes(names, TEACHER)
    models = [
        DistilledDetector(student, plain, terms).train(),
        DistilledDetector(student, permuted, terms, class_map=found).train(),
    ]
    for adaptors in (models[0].distiller, models[1].distiller):
        for parameter in adaptors.parameters():
            torch.nn.init.constant_(parameter, 0.01)
    losses = []
    for model in models:
        torch.manual_seed(3)
        losses.append(model(*batch()))
    assert losses[0].keys() == losses[1].keys()
    for key, value in losses[0].items():
        torch.testing.assert_close(losses[1][key], value, msg=key)


@torch.no_grad()
def permute_head(model, order):
    """Reorder the outputs of a detector's class head: new class k is the old ``order[k]``."""
    rows = torch.cat([torch.zeros(1, dtype=torch.long), order + 1])
    if hasattr(model, "roi_heads"):
        layers = [model.roi_heads.box_predictor.cls_score]
        if model.roi_heads.has_mask():
            layers.append(model.roi_heads.mask_predictor.mask_fcn_logits)
    else:
        layers = [model.head.classification_head.cls_logits]
    for layer in layers:
        for parameter in (layer.weight, layer.bias):
            parts = parameter.view(-1, 11, *parameter.shape[1:])
            parameter.copy_(parts[:, rows].reshape(parameter.shape))


def test_a_map_of_another_teacher_is_refused(refuses):
    found = match_classes(["a"], ["a", "b"])
    with refuses("the teacher's 10 classes", "one for 2"):
        DistilledDetector(
            student_model("FasterRCNN", FOUR),
            teacher_model("FasterRCNN"),
            all_terms("FasterRCNN"),
            class_map=found,
        )


# From configs

KD = "KD.TERMS.roi_logits"
BASELINE = "configs/digits_torchvision/baseline_frcnn.yaml"
TEACHER_CONFIG = Path("configs/digits_torchvision/teacher_frcnn.yaml")
LOGITS = [f"{KD}.LOSS", "KD", f"{KD}.TAPS", "['box_logits']"]


@pytest.fixture
def permuted(digits, tmp_path):
    """A teacher's config on the small digits in another order, and the student's options."""
    (json_file, images), (val, val_images) = digits["digits_train"], digits["digits_val"]
    teacher = tmp_path / "teacher.yaml"
    ten = write_subset(json_file, tmp_path / "ten.json", TEACHER)
    teacher.write_text(
        "_BASE_: " + str(TEACHER_CONFIG.resolve()) + "\n"
        "DATASETS:\n  TRAIN: ('ten',)\n"
        f"  COCO_JSON: {{ten: ['{ten}', '{images}']}}\n"
        "MODEL: {BACKBONE: {WIDTH: 4}, FPN: {OUT_CHANNELS: 8}}\n"
    )
    options = ["MODEL.BACKBONE.WIDTH", 4, "MODEL.FPN.OUT_CHANNELS", 8, "SOLVER.IMS_PER_BATCH", 2]
    options += ["SOLVER.MAX_ITER", 2, "MODEL.ROI_HEADS.NUM_CLASSES", 4, "KD.ENABLED", True]
    options += ["KD.TEACHER.CONFIG_FILE", teacher, "KD.TEACHER.WEIGHTS", ""]
    options += ["KD.TEACHER.ALLOW_RANDOM", True, "OUTPUT_DIR", tmp_path / "run", *LOGITS]
    for key, name, source, root in (
        ("TRAIN", "four", json_file, images),
        ("TEST", "four_val", val, val_images),
    ):
        subset = write_subset(source, tmp_path / f"{name}.json", STUDENT)
        options += [f"DATASETS.{key}", f"('{name}',)"]
        options += [f"DATASETS.COCO_JSON.{name}", repr([str(subset), str(root)])]
    return [*map(str, options)]


def test_a_run_maps_the_names_of_its_data(permuted, tmp_path):
    cfg = load_config(BASELINE, permuted)
    assert class_names(cfg) == STUDENT
    assert class_names(teacher_config(cfg)) == TEACHER
    model = build_training_model(cfg)
    assert model.class_map is not None
    assert model.class_map.indices == (7, 0, 5, 3)
    results = run(cfg)
    assert results["bbox"]["AP"] >= 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.json").open()]
    assert any(line.get("roi_logits", 0) > 0 for line in lines)


def test_data_of_the_same_names_needs_no_map(digits_config):
    assert build_class_map(digits_config("kd_frcnn")) is None
    assert class_names(load_config(BASELINE)) == [str(k) for k in range(10)]


def test_features_of_a_teacher_of_other_classes_need_no_map(permuted):
    cfg = load_config(BASELINE, [*permuted, "KD.TEACHER.CLASS_NAMES", str(["x"] * 10)])
    cfg.defrost()
    cfg.KD.TERMS.roi_logits.LOSS, cfg.KD.TERMS.roi_logits.TAPS = "FitNet", ["p3"]
    assert build_training_model(cfg).class_map is None


def test_names_of_absent_data_can_be_given(permuted, refuses, tmp_path):
    (tmp_path / "ten.json").unlink()
    cfg = load_config(BASELINE, permuted)
    assert class_names(teacher_config(cfg)) is None
    with refuses("student 4 classes, teacher 10 classes", "'ten' is not at hand", "CLASS_NAMES"):
        build_training_model(cfg)
    given = load_config(BASELINE, [*permuted, "KD.TEACHER.CLASS_NAMES", str(TEACHER)])
    found = build_class_map(given)
    assert found is not None
    assert found.indices == (7, 0, 5, 3)


def test_a_class_that_the_teacher_lacks_is_named(permuted, refuses):
    names = ["three" if name == "3" else name for name in TEACHER]
    opts = [*permuted, "KD.TEACHER.CLASS_NAMES", str(names)]
    with refuses("1 of 4", "'3'", "KD.CLASS_MAP"):
        build_training_model(load_config(BASELINE, opts))
    found = build_class_map(load_config(BASELINE, [*opts, "KD.CLASS_MAP.3", "three"]))
    assert found is not None
    assert found.indices == (7, 0, 5, 3)


@pytest.mark.parametrize("name", ["kd", "reviewkd_kd"])
def test_the_shipped_configs_put_a_teacher_of_ten_above_a_student_of_four(name):
    cfg = load_config(f"configs/digits_torchvision/class_map/{name}.yaml")
    teacher = teacher_config(cfg)
    assert (num_classes(cfg), num_classes(teacher)) == (4, 10)
    assert cfg.KD.ENABLED
    assert cfg.KD.TEACHER.WEIGHTS == f"{teacher.OUTPUT_DIR}/model_final.pth"
    assert not load_config("configs/digits_torchvision/class_map/baseline.yaml").KD.ENABLED
