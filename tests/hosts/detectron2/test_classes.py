"""A teacher of other classes: what the losses receive is what the names say."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("detectron2")

from detectron2.data import MetadataCatalog
from detectron2.utils.events import EventStorage

from kd_det.hosts.detectron2 import get_cfg
from kd_det.hosts.detectron2.classes import (
    build_class_map,
    class_names,
    num_classes,
)
from kd_det.hosts.detectron2.teacher import teacher_config
from kd_det.run.config import merge_config
from tests.hosts.detectron2.models import (
    ARCHITECTURES,
    all_terms,
    batch,
    build,
    distilled_cfg,
    tiny_cfg,
    write_teacher,
)

pytestmark = pytest.mark.detectron2

TEACHER = [str(k) for k in (7, 2, 0, 9, 4, 1, 8, 3, 6, 5)]
STUDENT = ["3", "7", "1", "9"]
FOUR = ["MODEL.ROI_HEADS.NUM_CLASSES", 4, "MODEL.RETINANET.NUM_CLASSES", 4]
FOUR += ["MODEL.FCOS.NUM_CLASSES", 4]
SIGMOID = ["MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE", True]


@pytest.fixture
def four(tmp_path):
    """Options of a student of four digits, by the categories of its data set."""
    path = tmp_path / "four.json"
    # Ids decide the order, not the place in the file.
    categories = [{"id": k + 1, "name": name} for k, name in enumerate(STUDENT)][::-1]
    path.write_text(json.dumps({"categories": categories}))
    return [*FOUR, "DATASETS.TRAIN", ("four",), "DATASETS.COCO_JSON.four", [str(path), "."]]


def student_cfg(name, four, teacher, terms=None, opts=()):
    coco = dict(zip(four[::2], four[1::2], strict=True))
    entry = coco.pop("DATASETS.COCO_JSON.four")
    flat = [part for pair in coco.items() for part in pair]
    cfg = distilled_cfg(name, teacher, terms or all_terms(name, 1.0), [*flat, *opts])
    cfg.DATASETS.COCO_JSON.four = entry
    cfg.KD.TEACHER.CLASS_NAMES = list(TEACHER)
    return cfg


def listen(module, pick=lambda output: output):
    seen = []
    module.register_forward_hook(lambda m, args, output: seen.append(pick(output)))
    return seen


def step(model):
    """What the distiller receives in one training step, and the losses."""
    seen = {}
    hook = model.distiller.register_forward_pre_hook(
        lambda m, args: seen.update(s=args[0], t=args[1])
    )
    with EventStorage():
        losses = model(batch())
    hook.remove()
    return seen, losses


def by_name(row, exclusive=True):
    """Logits of the student's classes from one row of the teacher's, background last."""
    named, ground = dict(zip(TEACHER, row[:-1].tolist(), strict=True)), row[-1:]
    if exclusive:
        rest = [value for name, value in named.items() if name not in STUDENT]
        ground = torch.cat([ground, torch.tensor(rest)]).exp().sum().log()[None]
    return torch.cat([torch.tensor([named[name] for name in STUDENT]), ground])


@pytest.mark.parametrize("name", ["faster", "mask", "cascade"])
def test_roi_logits_of_every_stage_are_the_teachers_by_name(name, four, tmp_path):
    model = build(student_cfg(name, four, write_teacher(tmp_path, name)))
    predictors = model.teacher.frozen.model.roi_heads.box_predictor
    stages = list(predictors) if name == "cascade" else [predictors]
    raw = [listen(stage, lambda output: output[0]) for stage in stages]
    seen, losses = step(model)
    assert len(seen["t"]["box_logits"]) == len(stages)
    for own, found, mine in zip(raw, seen["t"]["box_logits"], seen["s"]["box_logits"], strict=True):
        assert own[0].shape[1] == 11
        torch.testing.assert_close(found, torch.stack([by_name(row) for row in own[0]]))
        assert found.shape == mine.shape
    assert losses["logits"] > 0


def test_a_cascade_teaches_one_stage_with_the_marginals_of_its_mean(four, tmp_path):
    teacher = write_teacher(tmp_path, "cascade")
    model = build(student_cfg("faster", four, teacher))
    stages = model.teacher.frozen.model.roi_heads.box_predictor
    raw = [listen(stage, lambda output: output[0]) for stage in stages]
    seen, _ = step(model)
    mean = sum(stage[0].softmax(dim=-1) for stage in raw) / len(raw)
    found = seen["t"]["box_logits"][0].exp()
    for k, name in enumerate(STUDENT):
        torch.testing.assert_close(found[:, k], mean[:, TEACHER.index(name)])
    others = [TEACHER.index(name) for name in TEACHER if name not in STUDENT]
    torch.testing.assert_close(found[:, 4], mean[:, [*others, 10]].sum(dim=-1))


def test_sigmoid_heads_are_selected_and_nothing_is_added_up(four, tmp_path):
    terms = {"logits": {"LOSS": "KD", "TAPS": ["box_logits"], "ACTIVATION": "sigmoid"}}
    teacher = write_teacher(tmp_path, "faster", SIGMOID)
    model = build(student_cfg("faster", four, teacher, terms, SIGMOID))
    raw = listen(model.teacher.frozen.model.roi_heads.box_predictor, lambda output: output[0])
    seen, _ = step(model)
    # The last column is the background, which such heads do not train.
    expected = torch.stack([by_name(row, exclusive=False)[:-1] for row in raw[0]])
    assert torch.equal(seen["t"]["box_logits"][0], expected)
    assert seen["s"]["box_logits"][0].shape == expected.shape


def test_a_sigmoid_cascade_answers_a_single_stage_with_its_mean_probability(tmp_path):
    terms = {"logits": {"LOSS": "KD", "TAPS": ["box_logits"], "ACTIVATION": "sigmoid"}}
    teacher = write_teacher(tmp_path, "cascade", SIGMOID)
    model = build(distilled_cfg("faster", teacher, terms, SIGMOID))
    predictors = model.teacher.frozen.model.roi_heads.box_predictor
    raw = [listen(predictor, lambda output: output[0]) for predictor in predictors]
    seen, _ = step(model)
    mean = sum(stage[0].sigmoid() for stage in raw) / len(raw)
    torch.testing.assert_close(seen["t"]["box_logits"][0].sigmoid(), mean[:, :-1])


def test_softmax_and_sigmoid_box_heads_are_not_compared(tmp_path, refuses):
    terms = {"logits": {"LOSS": "KD", "TAPS": ["box_logits"], "ACTIVATION": "sigmoid"}}
    teacher = write_teacher(tmp_path, "faster", SIGMOID)
    with refuses("heads of one kind", "(box_logits)", "USE_SIGMOID_CE"):
        build(distilled_cfg("faster", teacher, terms))


def test_masks_are_those_of_the_class_of_the_same_name(four, tmp_path):
    model = build(student_cfg("mask", four, write_teacher(tmp_path, "mask")))
    own = listen(model.roi_heads.mask_head.predictor)
    raw = listen(model.teacher.frozen.model.roi_heads.mask_head.predictor)
    seen, _ = step(model)
    assert raw[0].shape[1] == 10
    assert len(raw[0]) > 0
    for mine, student, theirs, teacher in zip(
        own[0], seen["s"]["mask_logits"], raw[0], seen["t"]["mask_logits"], strict=True
    ):
        (label,) = [k for k in range(4) if torch.equal(mine[k], student)]
        assert torch.equal(teacher, theirs[TEACHER.index(STUDENT[label])])


@pytest.mark.parametrize("name", ["retinanet", "fcos"])
def test_dense_logits_are_selected_by_name_anchor_by_anchor(name, four, tmp_path):
    model = build(student_cfg(name, four, write_teacher(tmp_path, name)))
    raw = listen(model.teacher.frozen.model.head, lambda output: output[0])
    seen, losses = step(model)
    rows = []
    for level in raw[0]:
        for image in level:  # [A * 10, H, W]
            anchors = image.view(-1, 10, *image.shape[1:])
            for y in range(image.shape[1]):
                for x in range(image.shape[2]):
                    for anchor in anchors:
                        named = dict(zip(TEACHER, anchor[:, y, x].tolist(), strict=True))
                        rows.append([named[digit] for digit in STUDENT])
    assert torch.equal(seen["t"]["cls_logits"], torch.tensor(rows))
    assert seen["s"]["cls_logits"].shape == (len(rows), 4)
    assert torch.isfinite(losses["logits"])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_equal_names_build_no_map(name, tmp_path):
    cfg = distilled_cfg(name, write_teacher(tmp_path, name), all_terms(name))
    assert build_class_map(cfg) is None
    assert build(cfg).class_map is None


def test_the_model_says_what_is_mapped(four, tmp_path):
    model = build(student_cfg("faster", four, write_teacher(tmp_path, "faster")))
    assert model.class_map.indices == (7, 0, 5, 3)


# Names


def test_names_are_found_without_registering_anything(four, tmp_path):
    cfg = student_cfg("faster", four, write_teacher(tmp_path, "faster"))
    assert class_names(cfg) == STUDENT
    assert class_names(teacher_config(cfg)) == [str(k) for k in range(10)]
    assert "four" not in MetadataCatalog.list()


def test_detectron2_knows_the_names_of_coco_by_heart():
    cfg = tiny_cfg("faster", ["DATASETS.TRAIN", ("coco_2017_train",)])
    names = class_names(cfg)
    assert names is not None
    assert (len(names), names[0], names[79]) == (80, "person", "toothbrush")


@pytest.mark.parametrize("train", [(), ("nowhere_train",), ("absent",)])
def test_other_data_has_no_names(train, tmp_path):
    cfg = tiny_cfg("faster", ["DATASETS.TRAIN", train])
    cfg.DATASETS.COCO_JSON.absent = [str(tmp_path / "absent.json"), "."]
    assert class_names(cfg) is None


def test_a_coco_teacher_teaches_three_classes(four, tmp_path):
    teacher = write_teacher(
        tmp_path,
        "faster",
        ["MODEL.ROI_HEADS.NUM_CLASSES", 80, "DATASETS.TRAIN", ("coco_2017_train",)],
    )
    cfg = student_cfg("faster", four, teacher, opts=["MODEL.ROI_HEADS.NUM_CLASSES", 3])
    cfg.KD.TEACHER.CLASS_NAMES = []
    path = tmp_path / "four.json"
    names = ["dog", "person", "lorry"]
    categories = [{"id": k, "name": name} for k, name in enumerate(names)]
    path.write_text(json.dumps({"categories": categories}))
    cfg.KD.CLASS_MAP.lorry = "truck"
    model = build(cfg)
    assert [name for _, name, _ in model.class_map.pairs()] == ["dog", "person", "truck"]
    assert model.class_map.teacher_classes == 80
    seen, losses = step(model)
    assert seen["t"]["box_logits"][0].shape[1] == 4
    assert torch.isfinite(losses["logits"])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_classes_are_counted_where_the_architecture_keeps_them(name):
    assert num_classes(tiny_cfg(name)) == 10
    assert num_classes(tiny_cfg(name, FOUR)) == 4


@pytest.mark.parametrize("name", ["kd", "reviewkd_kd"])
def test_the_shipped_configs_put_a_teacher_of_ten_above_a_student_of_four(name):
    folder = "configs/digits/class_map"
    cfg, plain = (merge_config(get_cfg(), f"{folder}/{n}.yaml") for n in (name, "baseline"))
    teacher = teacher_config(cfg)
    assert (num_classes(cfg), num_classes(teacher)) == (4, 10)
    assert cfg.KD.ENABLED
    assert cfg.KD.TEACHER.WEIGHTS == f"{teacher.OUTPUT_DIR}/model_final.pth"
    assert not plain.KD.ENABLED
