"""Weight 0 changes nothing, and what is recorded is what the stock model computed."""

from __future__ import annotations

import ast
import copy
import math
import pickle
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from kd_det.core.checkpoint import strip_distiller
from kd_det.hosts.torchvision_detection.family import FAMILY
from kd_det.hosts.torchvision_detection.model import DistilledDetector
from tests.hosts.torchvision_detection.models import (
    ARCHITECTURES,
    all_terms,
    batch,
    distilled,
    student_model,
    teacher_model,
)

STEPS = 3


def trained(model):
    """Task losses and gradients of every step, and the weights after the last."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
    history = []
    torch.manual_seed(1)
    for step in range(STEPS):
        losses = model(*batch(step))
        optimizer.zero_grad()
        sum(losses.values()).backward()
        gradients = {k: p.grad.clone() for k, p in model.named_parameters()}
        history.append(({k: v.detach() for k, v in losses.items()}, gradients))
        optimizer.step()
    return history, model.state_dict()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_zero_weights_are_bit_identical_to_the_stock_model(name):
    theirs, their_weights = trained(student_model(name))
    ours, our_weights = trained(distilled(name, weight=0.0, values=True))
    terms = set(all_terms(name))
    for (stock_losses, stock_gradients), (losses, gradients) in zip(theirs, ours, strict=True):
        assert losses.keys() == stock_losses.keys() | terms
        assert all(losses[term] == 0 for term in terms)
        for key, value in stock_losses.items():
            assert torch.equal(losses[key], value), key
        for key, value in stock_gradients.items():
            assert torch.equal(gradients[f"student.{key}"], value), key
    assert strip_distiller(our_weights).keys() == their_weights.keys()
    for key, value in their_weights.items():
        assert torch.equal(our_weights[key], value), key


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_term_has_a_value_and_every_parameter_a_gradient(name):
    model = distilled(name)
    losses = model(*batch())
    sum(losses.values()).backward()
    for term in all_terms(name):
        assert torch.isfinite(losses[term]), term
        assert losses[term] > 0, term
    assert not [k for k, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert all(p.grad is None for p in model.teacher.model.parameters())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_batch_without_boxes_is_normal(name):
    model = distilled(name)
    losses = model(*batch(empty=True))
    sum(losses.values()).backward()
    assert losses["imitation"] == 0
    assert losses.get("masks", 0) == 0
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert torch.isfinite(parameter.grad).all(), key


def test_every_branch_runs_once_per_step():
    model = distilled("MaskRCNN")
    calls = Counter()
    parts = ("backbone", "rpn", "roi_heads", "roi_heads.box_roi_pool", "roi_heads.box_head")
    parts += ("roi_heads.box_predictor", "roi_heads.mask_head", "roi_heads.mask_predictor")
    for side, detector in (("student", model.student), ("teacher", model.teacher.model)):
        for path in parts:
            key = f"{side} {path}"
            detector.get_submodule(path).register_forward_hook(
                lambda *_, key=key: calls.update([key])
            )
    model(*batch())
    expected = Counter(f"{side} {path}" for side in ("student", "teacher") for path in parts)
    # These two would choose other boxes.
    expected -= Counter(["teacher rpn", "teacher roi_heads"])
    assert calls == expected


@pytest.fixture
def seen(monkeypatch):
    """Student's recorded forward and the teacher's values of the last step."""
    store = {}
    original = DistilledDetector.teacher_values

    def spy(self, step):
        store["step"], store["recorded"] = step, dict(step.recorded)
        store["teacher"] = original(self, step)
        return store["teacher"]

    monkeypatch.setattr(DistilledDetector, "teacher_values", spy)
    return store


def by_hand(name, images, sizes):
    """The stock teacher and its features, prepared without any of our code."""
    model = teacher_model(name).eval()
    mean, std = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.25] * 3)
    side = [64 * math.ceil(max(size[axis] for size in sizes) / 64) for axis in (0, 1)]
    x = torch.zeros(len(images), 3, *side)
    for row, image, (h, w) in zip(x, images, sizes, strict=True):
        image = (image - mean[:, None, None]) / std[:, None, None]
        row[:, :h, :w] = F.interpolate(image[None], (h, w), mode="bilinear")[0]
    with torch.no_grad():
        return model, model.backbone(x)


@pytest.mark.parametrize("name", ["FasterRCNN", "MaskRCNN"])
def test_teacher_logits_are_those_of_the_stock_teacher_on_the_students_boxes(name, seen):
    images, targets = batch()
    distilled(name)(images, targets)
    recorded = seen["recorded"]
    sizes = recorded["transformed"][0].image_sizes
    assert {tuple(s) for s in sizes} != {tuple(i.shape[-2:]) for i in images}  # resized
    stock, features = by_hand(name, images, sizes)
    heads = stock.roi_heads
    with torch.no_grad():
        pooled = heads.box_roi_pool(features, recorded["boxes"], sizes)
        vectors = heads.box_head(pooled)
        logits = heads.box_predictor(vectors)[0]
    assert len(logits) == sum(map(len, recorded["boxes"])) > 10
    for tap, value in (("pooled", pooled), ("features", vectors), ("logits", logits)):
        found = seen["teacher"][f"box_{tap}"]
        torch.testing.assert_close(found, value, rtol=0, atol=1e-5)
    if name == "MaskRCNN":
        boxes = recorded["mask_boxes"]
        with torch.no_grad():
            masks = heads.mask_roi_pool(features, boxes, sizes)
            masks = heads.mask_predictor(heads.mask_head(masks))
        labels = []
        for found, target in zip(boxes, recorded["transformed"][1], strict=True):
            for box in found:  # the ground truth it overlaps most, by a slow loop
                overlaps = [iou(box.tolist(), gt.tolist()) for gt in target["boxes"]]
                labels.append(int(target["labels"][overlaps.index(max(overlaps))]))
        expected = torch.stack([m[label] for m, label in zip(masks, labels, strict=True)])
        torch.testing.assert_close(seen["teacher"]["mask_logits"], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["FasterRCNN", "MaskRCNN"])
def test_box_taps_are_the_stock_students_modules_on_its_own_boxes(name, seen):
    images, targets = batch()
    model = distilled(name)
    model(images, targets)
    recorded = seen["recorded"]
    stock = student_model(name).train()
    heads, sizes = stock.roi_heads, recorded["transformed"][0].image_sizes
    pooled = heads.box_roi_pool(stock.backbone(recorded["images"]), recorded["boxes"], sizes)
    vectors = heads.box_head(pooled)
    logits = heads.box_predictor(vectors)[0]
    specs = FAMILY.tap_table(stock).specs
    for tap, value in (("pooled", pooled), ("features", vectors), ("logits", logits)):
        found = recorded[f"box_{tap}"]
        assert found.requires_grad
        assert found.shape[1] == specs[f"box_{tap}"].channels
        torch.testing.assert_close(found, value, rtol=0, atol=1e-5)
    assert specs["box_pooled"].size == tuple(pooled.shape[2:])


def test_without_rois_every_box_term_is_zero_in_the_graph(seen):
    terms = {
        "pooled": {"LOSS": "FitNet", "TAPS": ["box_pooled"]},
        "relations": {"LOSS": "IRG", "TAPS": ["box_logits", "box_features"]},
        "logits": {"LOSS": "KD", "TAPS": ["box_logits"]},
        "graph": {"LOSS": "MHGD", "TAPS": ["box_pooled", "box_features"]},
    }
    model = distilled("FasterRCNN", terms=terms)
    model.distiller.terms["graph"].finish_pre_stage()
    images, targets = batch()
    model(images, targets)
    recorded = dict(seen["recorded"])
    recorded["boxes"] = [boxes[:0] for boxes in recorded["boxes"]]
    student = {tap: recorded[tap][:0] for tap in ("box_pooled", "box_features", "box_logits")}
    teacher = model.teacher_values(replace(seen["step"], recorded=recorded))
    assert {tap: len(value) for tap, value in teacher.items()} == dict.fromkeys(student, 0)
    losses = model.distiller(student, teacher)
    assert all(loss == 0 for loss in losses.values())
    model.zero_grad()
    sum(losses.values()).backward()
    assert not [
        k for k, p in model.distiller.named_parameters() if p.requires_grad and p.grad is None
    ]
    assert all(p.grad is not None for p in model.student.roi_heads.box_head.parameters())


def test_the_teachers_branch_runs_only_as_far_as_terms_need():
    model = distilled("FasterRCNN", terms={"x": {"LOSS": "FitNet", "TAPS": ["box_pooled"]}})
    ran = []
    for part in ("box_roi_pool", "box_head", "box_predictor"):
        module = model.teacher.model.roi_heads.get_submodule(part)
        module.register_forward_hook(lambda *_, part=part: ran.append(part))
    model(*batch())
    assert ran == ["box_roi_pool"]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_without_task_losses_the_terms_alone_give_the_gradient(name):
    def gradients(**arguments):
        model = distilled(name, **arguments)
        torch.manual_seed(1)
        losses = model(*batch())
        return model, losses

    model, losses = gradients(task_weight=0.0)
    terms = all_terms(name)
    task = losses.keys() - terms
    assert task
    assert all(losses[key] == 0 for key in task)
    sum(losses.values()).backward()
    assert not [k for k, p in model.named_parameters() if p.requires_grad and p.grad is None]
    head = "rpn.head" if "RCNN" in name else "head.regression_head"
    assert all((p.grad == 0).all() for p in model.student.get_submodule(head).parameters())

    other, whole = gradients()
    sum(whole[key] for key in terms).backward()
    for (key, ours), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        expected = torch.zeros_like(theirs) if theirs.grad is None else theirs.grad
        assert torch.equal(ours.grad, expected), key


def test_a_task_weight_multiplies_the_task_losses_only():
    losses = []
    for weight in (1.0, 0.25):
        torch.manual_seed(1)
        losses.append(distilled("FasterRCNN", task_weight=weight)(*batch()))
    terms = all_terms("FasterRCNN")
    for key, value in losses[0].items():
        assert torch.equal(losses[1][key], value if key in terms else value * 0.25), key


def iou(a, b):
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    areas = [(r[2] - r[0]) * (r[3] - r[1]) for r in (a, b)]
    return width * height / (sum(areas) - width * height)


@pytest.mark.parametrize("name", ["RetinaNet", "FCOS"])
def test_dense_teacher_logits_are_those_of_the_stock_teacher(name, seen):
    images, targets = batch()
    distilled(name)(images, targets)
    recorded = seen["recorded"]
    stock, features = by_hand(name, images, recorded["transformed"][0].image_sizes)
    height, width = recorded["images"].shape[-2:]
    levels = [
        f[..., : math.ceil(height / s), : math.ceil(width / s)]
        for f, s in zip(features.values(), (4, 8, 16), strict=True)
    ]
    with torch.no_grad():
        logits = stock.head.classification_head(levels)
    torch.testing.assert_close(
        seen["teacher"]["cls_logits"], logits.reshape(-1, 11), rtol=0, atol=1e-5
    )


def test_teacher_maps_are_cut_to_the_students_padding(seen):
    model = distilled("FasterRCNN")
    model(*batch())
    recorded = seen["recorded"]
    # 96 x 96 padded by the student, 128 x 128 by a teacher with divisor 64.
    for name in ("p2", "p3", "p4", "c3"):
        assert seen["teacher"][name].shape[-2:] == recorded[name].shape[-2:]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_checkpoint_is_a_student(name):
    model = distilled(name)
    state = model.state_dict()
    stock = student_model(name)
    assert {k for k in state if not k.startswith("distiller.")} == stock.state_dict().keys()
    assert any(k.startswith("distiller.terms.review.") for k in state)
    stock.load_state_dict(strip_distiller(state), strict=True)
    model.load_state_dict(state, strict=True)


def test_inference_is_the_stock_models():
    model = distilled("MaskRCNN").eval()
    stock = student_model("MaskRCNN").eval()
    images, _ = batch()
    with torch.no_grad():
        for ours, theirs in zip(model(images), stock(images), strict=True):
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[k], theirs[k]) for k in theirs)


def test_train_mode_optimiser_copies_and_pickles_leave_the_teacher_alone():
    model = distilled("FasterRCNN").train()
    teacher = model.teacher.model
    assert not any(m.training for m in teacher.modules())
    assert not any(p.requires_grad for p in teacher.parameters())
    held = {id(p) for p in teacher.parameters()}
    assert not held & {id(p) for p in model.parameters()}
    teacher.train()  # somebody else's mistake
    statistics = copy.deepcopy(teacher.state_dict())
    model(*batch())
    assert not any(m.training for m in teacher.modules())
    assert all(torch.equal(v, statistics[k]) for k, v in teacher.state_dict().items())

    twin = copy.deepcopy(model)
    assert twin.teacher is model.teacher
    torch.manual_seed(3)
    ours = model(*batch())
    torch.manual_seed(3)
    theirs = twin(*batch())
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert pickle.loads(pickle.dumps(model)).student is not model.student


def test_random_number_streams_are_left_alone():
    student, teacher = student_model("FasterRCNN"), teacher_model("FasterRCNN")
    before = torch.get_rng_state()
    DistilledDetector(student, teacher, all_terms("FasterRCNN"))
    assert torch.equal(before, torch.get_rng_state())


def test_no_forward_of_a_stock_model_is_copied():
    parts = ["backbone", "rpn", "roi_heads"]
    for path in Path("kd_det/hosts/torchvision_detection").glob("*.py"):
        for function in ast.walk(ast.parse(path.read_text())):
            if isinstance(function, ast.FunctionDef):
                called = {
                    node.func.attr
                    for node in ast.walk(function)
                    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
                }
                assert not set(parts[1:]) & called, (path, function.name)
