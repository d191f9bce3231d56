"""Weight 0 changes nothing, and what is recorded is what the stock model computed."""

from __future__ import annotations

import ast
import copy
import pickle
from pathlib import Path

import pytest
import torch

pytest.importorskip("detectron2")

from detectron2.modeling import build_model
from detectron2.solver import build_optimizer
from detectron2.structures import Boxes
from detectron2.utils.events import EventStorage

from kd_det.core.checkpoint import strip_distiller
from kd_det.hosts.detectron2 import export
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

WARM_UP = 3  # steps after which RetinaNet's TorchScript focal loss has settled on its kernels
STEPS = 3


def losses_gradients_weights(model, cfg):
    """Task losses and gradients of every step, and the weights after the last."""
    optimizer = build_optimizer(cfg, model)
    history = []
    with EventStorage():
        torch.manual_seed(1)
        for step in range(STEPS):
            losses = model(batch(step))
            optimizer.zero_grad()
            sum(losses.values()).backward()
            gradients = {
                k: p.grad.clone() for k, p in model.named_parameters() if "distiller" not in k
            }
            history.append(({k: v.detach() for k, v in losses.items()}, gradients))
            optimizer.step()
    return history, strip_distiller(model.state_dict())


@pytest.fixture(scope="module")
def settled_kernels():
    """Run the stock dense losses until TorchScript no longer changes kernels."""
    for name in ("retinanet", "fcos"):
        model = build(tiny_cfg(name))
        with EventStorage():
            for step in range(WARM_UP):
                sum(model(batch(step)).values()).backward()


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.usefixtures("settled_kernels")
def test_zero_weights_are_bit_identical_to_the_stock_model(name, tmp_path):
    plain = tiny_cfg(name)
    distilled = distilled_cfg(name, write_teacher(tmp_path, name), all_terms(name))
    theirs, their_weights = losses_gradients_weights(build(plain), plain)
    model = build(distilled)
    ours, our_weights = losses_gradients_weights(model, distilled)
    terms = set(all_terms(name))
    for (stock_losses, stock_gradients), (losses, gradients) in zip(theirs, ours, strict=True):
        assert losses.keys() == stock_losses.keys() | terms
        assert all(losses[term] == 0 for term in terms)
        for key, value in stock_losses.items():
            assert torch.equal(losses[key], value), key
        assert gradients.keys() == stock_gradients.keys()
        for key, value in stock_gradients.items():
            assert torch.equal(gradients[key], value), key
    assert our_weights.keys() == their_weights.keys()
    for key, value in their_weights.items():
        assert torch.equal(our_weights[key], value), key


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_term_has_a_value_and_every_parameter_a_gradient(name, tmp_path):
    model = build(distilled_cfg(name, write_teacher(tmp_path, name), all_terms(name, 1.0)))
    with EventStorage():
        losses = model(batch())
        sum(losses.values()).backward()
    for term in all_terms(name):
        assert torch.isfinite(losses[term]), term
        assert losses[term] > 0, term
    missing = [k for k, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing
    assert all(p.grad is None for p in model.teacher.frozen.model.parameters())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_batch_without_boxes_is_normal(name, tmp_path):
    model = build(distilled_cfg(name, write_teacher(tmp_path, name), all_terms(name, 1.0)))
    with EventStorage():
        losses = model(batch(empty=True))
        sum(losses.values()).backward()
    assert losses["imitation"] == 0
    if name == "mask":
        assert losses["masks"] == 0
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None, key
        assert torch.isfinite(parameter.grad).all(), key


def test_the_box_branch_of_the_student_runs_once_per_step(tmp_path):
    model = build(
        distilled_cfg("faster", write_teacher(tmp_path, "faster"), all_terms("faster", 1.0))
    )
    calls = []
    for path in (
        "backbone",
        "roi_heads.box_pooler",
        "roi_heads.box_head",
        "roi_heads.box_predictor",
    ):
        model.get_submodule(path).register_forward_hook(lambda *_, path=path: calls.append(path))
    with EventStorage():
        model(batch())
    assert sorted(calls) == sorted(set(calls))
    assert len(calls) == 4


@pytest.mark.parametrize("pred_boxes", [False, True])
@pytest.mark.parametrize("name", ["faster", "cascade"])
def test_teacher_logits_are_those_of_the_stock_teacher_on_the_students_boxes(
    name, pred_boxes, tmp_path
):
    opts = ["MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES", pred_boxes] if name == "faster" else []
    teacher_files = write_teacher(tmp_path, name)
    model = build(distilled_cfg(name, teacher_files, all_terms(name, 1.0), opts))
    seen = {}
    model.distiller.register_forward_pre_hook(
        lambda module, args: seen.update(zip("st", args, strict=False))
    )
    boxes = []
    model.roi_heads.box_pooler.register_forward_pre_hook(
        lambda module, args: boxes.append([Boxes(b.tensor.clone()) for b in args[1]])
    )
    inputs = batch()
    with EventStorage():
        model(inputs)
    stock = build_model(
        tiny_cfg(name, ["MODEL.BASIC_RESNET.WIDTH", 8, "MODEL.FPN.OUT_CHANNELS", 16])
    )
    stock.load_state_dict(torch.load(teacher_files[1])["model"])
    stock.eval()
    with torch.no_grad():
        features = stock.backbone(stock.preprocess_image(inputs).tensor)
        for stage, stage_boxes in enumerate(boxes):
            heads = stock.roi_heads
            head, predictor = heads.box_head, heads.box_predictor
            if name == "cascade":
                head, predictor = head[stage], predictor[stage]
            pooled = heads.box_pooler([features[f] for f in heads.box_in_features], stage_boxes)
            assert torch.equal(seen["t"]["box_logits"][stage], predictor(head(pooled))[0])
            assert seen["s"]["box_logits"][stage].shape == seen["t"]["box_logits"][stage].shape


def test_a_cascade_teaches_a_single_stage_by_its_mean_probability(tmp_path):
    teacher = write_teacher(tmp_path, "cascade")
    model = build(distilled_cfg("faster", teacher, all_terms("faster", 1.0)))
    seen = {}
    model.distiller.register_forward_pre_hook(
        lambda module, args: seen.update(zip("st", args, strict=False))
    )
    with EventStorage():
        model(batch())
    (logits,) = seen["t"]["box_logits"]
    torch.testing.assert_close(logits.exp().sum(dim=1), torch.ones(len(logits)))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_checkpoint_is_a_student(name, tmp_path):
    cfg = distilled_cfg(name, write_teacher(tmp_path, name), all_terms(name, 1.0))
    model = build(cfg)
    own = tiny_cfg(name)
    stock_keys = build(own).state_dict().keys()
    extra = model.state_dict().keys() - stock_keys
    assert stock_keys <= model.state_dict().keys()
    assert extra
    assert all(key.startswith("distiller.") for key in extra)
    checkpoint = tmp_path / "model_final.pth"
    torch.save({"model": model.state_dict()}, checkpoint)
    weights, config = export.export_student(cfg, checkpoint, tmp_path / "student")
    result = build(own).load_state_dict(torch.load(weights)["model"], strict=True)
    assert not result.missing_keys
    assert not result.unexpected_keys
    text = config.read_text()
    assert "TEACHER" not in text
    if name != "fcos":
        assert ARCHITECTURES[name][0] in text


def test_inference_is_the_stock_models(tmp_path):
    model = build(
        distilled_cfg("faster", write_teacher(tmp_path, "faster"), all_terms("faster", 1.0))
    )
    stock = build(tiny_cfg("faster")).eval()
    stock.load_state_dict(strip_distiller(model.state_dict()))
    model.eval()
    with torch.no_grad():
        ours, theirs = model(batch())[0]["instances"], stock(batch())[0]["instances"]
    assert torch.equal(ours.pred_boxes.tensor, theirs.pred_boxes.tensor)
    assert torch.equal(ours.scores, theirs.scores)


def test_a_deep_copy_shares_the_teacher_and_distils_on_its_own(tmp_path):
    model = build(distilled_cfg("mask", write_teacher(tmp_path, "mask"), all_terms("mask", 1.0)))
    twin = copy.deepcopy(model)
    assert twin.teacher.frozen is model.teacher.frozen
    assert twin.teacher_taps.model is model.teacher_taps.model
    assert twin.student_taps.model is twin
    with EventStorage():
        torch.manual_seed(3)
        ours = model(batch())
        torch.manual_seed(3)
        theirs = twin(batch())
    assert {k: v.item() for k, v in ours.items()} == {k: v.item() for k, v in theirs.items()}


def test_train_mode_optimiser_and_pickle_leave_the_teacher_alone(tmp_path):
    cfg = distilled_cfg("faster", write_teacher(tmp_path, "faster"), all_terms("faster", 1.0))
    model = build(cfg)
    model.train()
    teacher = model.teacher.frozen.model
    assert not any(module.training for module in teacher.modules())
    held = {id(p) for group in build_optimizer(cfg, model).param_groups for p in group["params"]}
    assert not held & {id(p) for p in teacher.parameters()}
    assert held >= {id(p) for p in model.distiller.parameters()}
    pickle.loads(pickle.dumps(model))


def test_double_precision_reaches_the_teacher(tmp_path):
    # A dense detector: the R-CNNs' own proposal code mixes precisions in double.
    model = build(
        distilled_cfg(
            "retinanet", write_teacher(tmp_path, "retinanet"), all_terms("retinanet", 1.0)
        )
    )
    model.double()
    with EventStorage():
        losses = model(batch())
    assert all(losses[term].dtype == torch.float64 for term in all_terms("retinanet"))


def test_bf16_autocast_agrees_with_float32(tmp_path):
    model = build(distilled_cfg("mask", write_teacher(tmp_path, "mask"), all_terms("mask", 1.0)))
    values = []
    for enabled in (False, True):
        torch.manual_seed(5)
        with EventStorage(), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            values.append({k: v.item() for k, v in model(batch()).items()})
    for term in ("review", "hint", "imitation"):  # features: no box depends on the precision
        assert values[1][term] == pytest.approx(values[0][term], rel=0.05, abs=1e-3), term


def test_no_stock_forward_is_copied():
    """No function of the host calls backbone, proposal generator and RoI heads in turn."""
    for path in Path("kd_det/hosts").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                called = {
                    call.func.attr
                    for call in ast.walk(node)
                    if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute)
                }
                forbidden = {"proposal_generator", "roi_heads", "rpn"}
                assert not called & forbidden, f"{path}: {node.name}"
