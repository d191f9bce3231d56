"""The distiller: named, weighted, scheduled terms."""

from __future__ import annotations

import copy
import logging
import pickle

import pytest
import torch

from kd_det import Distiller, tap_specs
from kd_det.losses import TapSpec, hint_loss, kd_loss

LOGITS = TapSpec(5)
MAP = TapSpec(3, stride=8)
SPECS = {"logits": LOGITS, "map": MAP, "stages": [LOGITS, LOGITS]}


@pytest.fixture
def taps(randn):
    """Recorded tensors of a student and a teacher, by tap name."""

    def one(grad):
        return {
            "logits": randn(4, 5, grad=grad),
            "map": randn(2, 3, 4, 6, grad=grad),
            "stages": [randn(4, 5, grad=grad), randn(4, 5, grad=grad)],
        }

    return one(grad=True), one(grad=False)


def build(terms, **arguments):
    return Distiller(terms, SPECS, SPECS, **arguments).double()


def kd(**keys):
    return {"LOSS": "KD", "TAPS": ["logits"], **keys}


def hint(**keys):
    return {"LOSS": "FitNet", "TAPS": ["map"], **keys}


def test_losses_are_weighted_and_named_by_their_terms(taps):
    distiller = build({"soft": kd(WEIGHT=20), "again": kd(WEIGHT=0.5, TEMPERATURE=4.0)})
    losses = distiller(*taps)
    student, teacher = (side["logits"] for side in taps)
    assert list(losses) == ["soft", "again"]
    torch.testing.assert_close(losses["soft"], 20 * kd_loss(student, teacher))
    torch.testing.assert_close(losses["again"], 0.5 * kd_loss(student, teacher, 4.0))
    assert all(loss.dim() == 0 for loss in losses.values())


def test_weight_and_schedule_multiply_step_by_step(taps):
    distiller = build({"x": kd(WEIGHT=8.0, SCHEDULE={"NAME": "linear_warmup", "ITERS": 4})})
    raw = kd_loss(taps[0]["logits"], taps[1]["logits"]).item()
    values = [distiller(*taps)["x"].item() for _ in range(6)]
    assert values == pytest.approx([8.0 * raw * f for f in (0, 0.25, 0.5, 0.75, 1, 1)], rel=1e-12)


def test_steps_count_in_training_only(taps):
    distiller = build({"x": kd(SCHEDULE={"NAME": "delay", "ITERS": 1})}).eval()
    assert [distiller(*taps)["x"].item() for _ in range(3)] == [0.0, 0.0, 0.0]
    assert int(distiller.step) == 0
    distiller.train()
    assert distiller(*taps)["x"].item() == 0.0
    assert distiller(*taps)["x"].item() > 0.0
    assert int(distiller.step) == 2


def test_the_step_survives_the_checkpoint(taps, tmp_path):
    terms = {"x": kd(SCHEDULE={"NAME": "linear_decay", "ITERS": 10}), "hint": hint()}
    first = build(terms)
    for _ in range(3):
        first(*taps)
    torch.save(first.state_dict(), tmp_path / "model.pth")
    resumed = build(terms)
    resumed.load_state_dict(torch.load(tmp_path / "model.pth", weights_only=True))
    assert int(resumed.step) == 3
    for _ in range(2):
        expected, losses = first(*taps), resumed(*taps)
        assert {k: v.item() for k, v in losses.items()} == {
            k: v.item() for k, v in expected.items()
        }


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))],
    ids=["deepcopy", "pickle"],
)
def test_a_copy_goes_on_by_itself(taps, duplicate):
    distiller = build({"x": kd(SCHEDULE={"NAME": "delay", "ITERS": 2})})
    distiller(*taps)
    twin = duplicate(distiller)
    twin(*taps)
    assert (int(twin.step), int(distiller.step)) == (2, 1)
    assert twin(*taps)["x"].item() > 0.0
    assert distiller(*taps)["x"].item() == 0.0


@pytest.mark.parametrize("term", [hint(WEIGHT=0), hint(SCHEDULE={"NAME": "delay", "ITERS": 9})])
@pytest.mark.parametrize("teacher_value", [1.0, float("inf"), float("nan")])
def test_zero_weight_keeps_the_graph_and_lets_nothing_through(taps, term, teacher_value):
    student, teacher = taps
    teacher["map"].fill_(teacher_value)
    distiller = build({"hint": term})
    loss = distiller(student, teacher)["hint"]
    assert loss.item() == 0.0
    loss.backward()
    for tensor in (student["map"], *distiller.parameters()):
        assert torch.equal(tensor.grad, torch.zeros_like(tensor))


def test_adaptors_are_the_only_parameters_and_sit_under_their_term():
    distiller = build({"hint": hint(), "soft": kd()})
    names = {name for name, _ in distiller.named_parameters()}
    assert names == {
        f"terms.hint.adaptors.0.{leaf}"
        for leaf in ("conv.weight", "conv.bias", "bn.weight", "bn.bias")
    }


def test_a_tap_of_several_tensors_gives_the_mean_over_its_stages(taps):
    loss = build({"x": kd(TAPS=["stages"])})(*taps)["x"]
    pairs = zip(taps[0]["stages"], taps[1]["stages"], strict=True)
    torch.testing.assert_close(loss, sum(kd_loss(s, t) for s, t in pairs) / 2)


def test_student_and_teacher_taps_may_have_different_names(taps):
    student, teacher = taps
    distiller = Distiller(
        {"x": kd(TAPS=[["logits", "theirs"]])}, {"logits": LOGITS}, {"theirs": LOGITS}
    )
    loss = distiller(student, {"theirs": teacher["logits"]})["x"]
    torch.testing.assert_close(loss, kd_loss(student["logits"], teacher["logits"]))


def test_no_terms_give_no_losses(taps):
    assert build({})(*taps) == {}


def test_context_by_tap_name_is_narrowed_to_the_taps_in_their_order(randn):
    specs = {name: TapSpec(2, stride=s) for name, s in (("p2", 4), ("p3", 8), ("p4", 16))}
    sizes = {"p2": (8, 8), "p3": (4, 4), "p4": (2, 2)}
    anchors = {
        name: torch.rand(h * w, 4).double() * 8 + torch.tensor([0.0, 0.0, 8.0, 8.0])
        for name, (h, w) in sizes.items()
    }
    boxes = [torch.tensor([[0.0, 0.0, 12.0, 12.0]]).double()]
    maps = {name: randn(1, 2, *size, grad=True) for name, size in sizes.items()}
    term = {"LOSS": "FGFI", "TAPS": ["p3", "p4"], "ASSIGN": "all"}
    distiller = Distiller({"x": term}, specs, specs, context=["anchors", "gt_boxes"]).double()
    target = {name: x.detach() + 1 for name, x in maps.items()}
    loss = distiller(maps, target, {"anchors": anchors, "gt_boxes": boxes})["x"]
    expected = distiller.terms["x"](
        [maps["p3"], maps["p4"]],
        [target["p3"], target["p4"]],
        anchors=[anchors["p3"], anchors["p4"]],
        gt_boxes=boxes,
    )
    assert loss > 0
    torch.testing.assert_close(loss, expected)


def test_silent_terms_are_reported_by_name(taps, caplog):
    terms = {
        "off": kd(WEIGHT=0),
        "late": kd(SCHEDULE={"NAME": "delay", "ITERS": 3}),
        "busy": kd(),
        "faded": kd(SCHEDULE={"NAME": "linear_decay", "ITERS": 1}),
    }
    distiller = build(terms, report_period=3)
    with caplog.at_level(logging.WARNING, "kd_det"):
        for _ in range(2):
            distiller(*taps)
        assert not caplog.records
        distiller(*taps)
    reported = [record.getMessage().split("'")[1] for record in caplog.records]
    assert reported == ["off", "late"]
    assert "exactly zero in all of the last 3 steps" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING, "kd_det"):
        for _ in range(3):
            distiller(*taps)
    assert [record.getMessage().split("'")[1] for record in caplog.records] == ["off", "faded"]


def test_a_term_without_positives_is_reported(caplog, randn):
    distiller = build({"x": kd()}, report_period=2)
    for _ in range(2):
        distiller({"logits": randn(0, 5, grad=True)}, {"logits": randn(0, 5)})
    assert "term 'x' was exactly zero" in caplog.text


def test_one_active_step_is_enough_not_to_be_reported(taps, randn):
    distiller = build({"x": kd()})
    distiller({"logits": randn(0, 5, grad=True)}, {"logits": randn(0, 5)})
    distiller(*taps)
    assert distiller.report_silent() == []


BAD = {
    "unknown student tap": (
        {"x": kd(TAPS=["logit"])},
        SPECS,
        "known student tap of term 'x'; received 'logit'; remedy: did you mean 'logits'? known:",
    ),
    "unknown teacher tap": (
        {"x": kd(TAPS=[["logits", "lgoits"]])},
        SPECS,
        "known teacher tap of term 'x'; received 'lgoits'; remedy: did you mean 'logits'",
    ),
    "class counts": (
        {"x": kd()},
        {"logits": TapSpec(21)},
        "heads of the same classes; received student 5 logits, teacher 21 logits; remedy: use a",
    ),
    "number of stages": (
        {"x": kd(TAPS=["stages"])},
        {"stages": LOGITS},
        "term 'x' to tap as many student as teacher tensors; received 2 and 1; remedy",
    ),
    "strides": (
        {"x": hint()},
        {"map": TapSpec(3, stride=16)},
        "student stride 8, teacher stride 16; remedy",
    ),
    "missing context": (
        {"x": {"LOSS": "FGFI", "TAPS": ["map"]}},
        SPECS,
        "term 'x' (FGFI) to get 'anchors' from its host; received a host that offers nothing",
    ),
    "value that only the loss can judge": (
        {"x": kd(TEMPERATURE=0.0)},
        SPECS,
        "a temperature above 0; received 0.0; remedy",
    ),
    "unknown loss": ({"x": {"LOSS": "KDD", "TAPS": ["map"]}}, SPECS, "did you mean 'KD'"),
}


@pytest.mark.parametrize(("terms", "teacher_specs", "message"), BAD.values(), ids=BAD.keys())
def test_what_cannot_work_is_refused_when_built(refuses, terms, teacher_specs, message):
    with refuses(message):
        Distiller(terms, SPECS, teacher_specs)


def test_specs_of_recorded_tensors_hold_channels_and_sizes(randn):
    captures = {
        "map": randn(2, 3, 4, 6),
        "logits": randn(2, 5),
        "heads": [randn(2, 5), randn(2, 7)],
    }
    assert tap_specs(captures) == {
        "map": TapSpec(3, size=(4, 6)),
        "logits": TapSpec(5),
        "heads": [TapSpec(5), TapSpec(7)],
    }


def test_adaptors_bridge_the_sizes_that_were_recorded(randn):
    student, teacher = {"m": randn(2, 3, 8, 6)}, {"m": randn(2, 5, 4, 3)}
    distiller = Distiller(
        {"x": {"LOSS": "FitNet", "TAPS": ["m"]}}, tap_specs(student), tap_specs(teacher)
    ).double()
    adapted = distiller.terms["x"].adaptors[0](student["m"])
    torch.testing.assert_close(distiller(student, teacher)["x"], hint_loss(adapted, teacher["m"]))


def test_full_weights_leave_schedules_out_and_put_them_back(taps):
    distiller = build({"x": kd(WEIGHT=3.0, SCHEDULE={"NAME": "delay", "ITERS": 9})})
    with distiller.full_weights():
        loss = distiller(*taps)["x"]
        assert distiller.metrics["weight/x"] == 3.0
    torch.testing.assert_close(loss, 3 * kd_loss(taps[0]["logits"], taps[1]["logits"]))
    assert distiller(*taps)["x"] == 0
    assert distiller.metrics["weight/x"] == 0
    assert int(distiller.step) == 2
