"""Boxes as nodes: what enters and leaves the box heads, on both sides, for the same boxes."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("detectron2")

from detectron2.modeling import build_model
from detectron2.structures import Boxes
from detectron2.utils.events import EventStorage

from kd_det.hosts.detectron2.family import FAMILY
from tests.hosts.detectron2.models import (
    all_terms,
    batch,
    build,
    distilled_cfg,
    tiny_cfg,
    write_teacher,
)

pytestmark = pytest.mark.detectron2

BOX = ["box_pooled", "box_features"]
EDGES = {"edges": {"LOSS": "IRG", "VERTICES": False, "TAPS": BOX}}


def spy(model):
    """What the distiller will get: ``{"s": student values, "t": teacher values}``."""
    seen = {}
    model.distiller.register_forward_pre_hook(
        lambda module, args: seen.update(zip("st", args, strict=False))
    )
    return seen


def record_boxes(model):
    """Per stage, per image, the boxes that enter the student's pooler, as copies."""
    boxes = []
    model.roi_heads.box_pooler.register_forward_pre_hook(
        lambda module, args: boxes.append([Boxes(b.tensor.clone()) for b in args[1]])
    )
    return boxes


def first_stage(roi_heads):
    stages = isinstance(roi_heads.box_head, torch.nn.ModuleList)
    return roi_heads.box_head[0] if stages else roi_heads.box_head


def by_hand(model, inputs, boxes):
    """The stock modules, called one by one on the given boxes."""
    heads = model.roi_heads
    with torch.no_grad():
        features = model.backbone(model.preprocess_image(inputs).tensor)
        pooled = heads.box_pooler([features[name] for name in heads.box_in_features], boxes)
        return {"box_pooled": pooled, "box_features": first_stage(heads)(pooled)}


@pytest.mark.parametrize("student", ["faster", "cascade"])
@pytest.mark.parametrize("teacher", ["faster", "cascade"])
def test_box_taps_are_the_stock_modules_outputs_on_the_sampled_boxes(student, teacher, tmp_path):
    files = write_teacher(tmp_path, teacher)
    model = build(distilled_cfg(student, files, EDGES))
    seen, boxes, inputs = spy(model), record_boxes(model), batch()
    frozen = model.teacher.frozen.model
    calls = []
    for path in ("backbone", "roi_heads.box_pooler", "roi_heads.box_predictor"):
        frozen.get_submodule(path).register_forward_hook(lambda *_, path=path: calls.append(path))
    with EventStorage():
        losses = model(inputs)
        sum(losses.values()).backward()
    # One pass: nothing twice, and nothing of the teacher that no tap asks for.
    assert calls == ["backbone", "roi_heads.box_pooler"]
    # BatchNorm has moved its statistics, but normalises by the batch in training.
    own = by_hand(model, inputs, boxes[0])
    wide = ["MODEL.BASIC_RESNET.WIDTH", 8, "MODEL.FPN.OUT_CHANNELS", 16]
    stock = build_model(tiny_cfg(teacher, wide)).eval()
    stock.load_state_dict(torch.load(files[1])["model"])
    theirs = by_hand(stock, inputs, boxes[0])
    count = sum(map(len, boxes[0]))
    for name in BOX:
        assert seen["s"][name].requires_grad
        assert not seen["t"][name].requires_grad
        assert len(seen["s"][name]) == len(seen["t"][name]) == count
        torch.testing.assert_close(seen["s"][name].detach(), own[name])
        assert torch.equal(seen["t"][name], theirs[name])


def test_specs_are_the_tapped_shapes(tmp_path):
    model = build(distilled_cfg("faster", write_teacher(tmp_path, "faster"), EDGES))
    seen = spy(model)
    with EventStorage():
        model(batch())
    specs = FAMILY.tap_table(model).specs
    pooled, vectors = seen["s"]["box_pooled"], seen["s"]["box_features"]
    assert pooled.shape[1:] == (specs["box_pooled"].channels, *specs["box_pooled"].size)
    assert vectors.shape[1:] == (specs["box_features"].channels,)


def test_logits_and_features_come_from_one_run_of_the_teachers_branch(tmp_path):
    terms = {
        "graph": {"LOSS": "IRG", "TAPS": ["box_logits", "box_features"]},
        "kd": {"LOSS": "KD", "TAPS": ["box_logits"]},
    }
    model = build(distilled_cfg("faster", write_teacher(tmp_path, "faster"), terms))
    calls = []
    frozen = model.teacher.frozen.model
    for path in ("box_pooler", "box_head", "box_predictor"):
        frozen.roi_heads.get_submodule(path).register_forward_hook(
            lambda *_, path=path: calls.append(path)
        )
    with EventStorage():
        losses = model(batch())
    assert calls == ["box_pooler", "box_head", "box_predictor"]
    assert losses["graph"] > 0


def test_a_pair_may_name_different_box_taps(tmp_path):
    """IRG's one-to-many: the teacher's last layer supervises two layers of the student."""
    taps = [["box_pooled", "box_features"], "box_features"]
    terms = {"edges": {"LOSS": "IRG", "VERTICES": False, "TAPS": taps}}
    model = build(distilled_cfg("faster", write_teacher(tmp_path, "faster"), terms))
    with EventStorage():
        losses = model(batch())
        sum(losses.values()).backward()
    assert losses["edges"] > 0
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_no_boxes_at_all_give_a_zero_in_the_graph(tmp_path):
    """Neither proposals nor ground truth: the strictest of empty selections."""
    nothing = ["MODEL.RPN.POST_NMS_TOPK_TRAIN", 0]
    model = build(distilled_cfg("faster", write_teacher(tmp_path, "faster"), EDGES, nothing))
    seen = spy(model)
    with EventStorage():
        losses = model(batch(empty=True))
        sum(losses.values()).backward()
    assert len(seen["s"]["box_features"]) == len(seen["t"]["box_features"]) == 0
    assert losses["edges"] == 0
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert torch.isfinite(parameter.grad).all(), key


@pytest.mark.parametrize(
    ("term", "named"),
    [
        ({"LOSS": "IRG", "TAPS": ["box_logits", "p3"]}, "p3: images"),
        ({"LOSS": "MHGD", "TAPS": ["p3", "box_features"]}, "box_features: RoIs"),
        ({"LOSS": "AT", "TAPS": [["box_pooled", "p3"]]}, "student box_pooled with teacher p3"),
        ({"LOSS": "MHGD", "TAPS": BOX, "CLIP": "task_norm"}, "REDUCTION: mean"),
        ({"LOSS": "FSP", "TAPS": ["p2", "p3"]}, "student channels [8, 8], teacher channels"),
    ],
)
def test_terms_that_compare_nothing_are_refused(term, named, tmp_path, refuses):
    with refuses(named):
        build(distilled_cfg("faster", write_teacher(tmp_path, "faster"), {"term": term}))


def test_dense_detectors_have_no_box_taps(tmp_path, refuses):
    with refuses("'box_pooled'", "known"):
        build(distilled_cfg("retinanet", write_teacher(tmp_path, "retinanet"), EDGES))


@pytest.mark.parametrize("weight", [0.5, 1.0])
def test_the_task_weight_scales_the_students_own_losses_only(weight, tmp_path):
    files = write_teacher(tmp_path, "faster")
    values = []
    for task_weight in (1.0, weight):
        cfg = distilled_cfg("faster", files, all_terms("faster", 1.0))
        cfg.KD.TASK_WEIGHT = task_weight
        model = build(cfg)
        torch.manual_seed(3)
        with EventStorage():
            values.append({k: v.item() for k, v in model(batch()).items()})
    full, scaled = values
    terms = all_terms("faster")
    assert scaled == {k: v if k in terms else weight * v for k, v in full.items()}


@pytest.mark.parametrize("name", ["faster", "retinanet"])
def test_task_weight_zero_leaves_the_terms_and_a_gradient_everywhere(name, tmp_path):
    files = write_teacher(tmp_path, name)
    cfg = distilled_cfg(name, files, {"look": {"LOSS": "AT", "TAPS": ["p2", "p3"]}})
    cfg.KD.TASK_WEIGHT = 0.0
    model = build(cfg)
    with EventStorage():
        losses = model(batch())
        sum(losses.values()).backward()
    assert {k for k, v in losses.items() if v != 0} == {"look"}
    gradients = {k: p.grad for k, p in model.named_parameters() if p.requires_grad}
    assert all(gradient is not None for gradient in gradients.values())
    moved = {k for k, gradient in gradients.items() if gradient.any()}
    assert moved
    assert all(key.startswith("backbone.") for key in moved)


@pytest.mark.parametrize("weight", [-1.0, float("nan")])
def test_a_task_weight_below_zero_is_refused(weight, tmp_path, refuses):
    cfg = distilled_cfg("faster", write_teacher(tmp_path, "faster"), EDGES)
    cfg.KD.TASK_WEIGHT = weight
    with refuses("KD.TASK_WEIGHT", str(weight)):
        build(cfg)
