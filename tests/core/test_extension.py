"""An extension adds, never edits: a loss is one class with a decorator and one config entry."""

from __future__ import annotations

import pytest
import torch
from fvcore.common.config import CfgNode

from kd_det import LOSSES, SCHEDULES, Distiller
from kd_det.losses import DistillLoss, TapSpec
from kd_det.run.config import add_kd_config, merge_config, read_terms

SPECS = {"map": TapSpec(3, stride=8)}


@pytest.fixture(autouse=True)
def _registries_as_before():
    before = {registry: dict(registry) for registry in (LOSSES, SCHEDULES)}
    yield
    for registry, objects in before.items():
        for name in [name for name, _ in registry if name not in objects]:
            registry._obj_map.pop(name)


@pytest.fixture
def toy():
    @LOSSES.register("Toy")
    class ToyLoss(DistillLoss):
        """Absolute difference to a power."""

        def __init__(self, power: float = 1.0, widths: list[int] | None = None) -> None:
            super().__init__()
            self.power = power

        def forward(self, student, teacher, **context):
            pairs = zip(student, teacher, strict=True)
            return sum((s - t.detach()).abs().pow(self.power).sum() for s, t in pairs)

    return ToyLoss


CONFIG = """
KD:
  TERMS:
    mine:
      LOSS: Toy
      WEIGHT: 0.5
      TAPS: [map]
      POWER: 2
"""


def read(tmp_path, text=CONFIG, options=()):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    cfg = CfgNode()
    add_kd_config(cfg)
    return read_terms(merge_config(cfg, str(path), options))


@pytest.mark.usefixtures("toy")
def test_a_toy_loss_takes_one_class_and_one_config_entry(tmp_path, randn):
    distiller = Distiller(read(tmp_path), SPECS, SPECS)
    student, teacher = randn(2, 3, 4, 6, grad=True), randn(2, 3, 4, 6)
    losses = distiller({"map": student}, {"map": teacher})
    assert list(losses) == ["mine"]
    torch.testing.assert_close(losses["mine"], 0.5 * (student - teacher).square().sum())
    losses["mine"].backward()
    torch.testing.assert_close(student.grad, student.detach() - teacher)


@pytest.mark.usefixtures("toy")
@pytest.mark.parametrize(
    ("options", "part"),
    [
        (["KD.TERMS.mine.LOSS", "Toi"], "received 'Toi'; remedy: did you mean 'Toy'?"),
        (["KD.TERMS.mine.POWR", "3"], "received 'powr'; remedy: did you mean 'power'?"),
        (["KD.TERMS.mine.POWER", "high"], "POWER of loss Toy of term 'mine' to be float"),
        (["KD.TERMS.mine.WIDTHS", "['a']"], "WIDTHS of loss Toy of term 'mine' to be list[int]"),
    ],
    ids=str,
)
def test_mistakes_with_a_toy_loss_are_refused_like_any_other(tmp_path, refuses, options, part):
    with refuses(part):
        read(tmp_path, options=options)


def test_a_loss_without_a_constructor_has_no_arguments(tmp_path, refuses):
    @LOSSES.register("Toy")
    class ToyLoss(DistillLoss):
        pass

    assert Distiller(read(tmp_path, CONFIG.replace("POWER: 2", "")), SPECS, SPECS)
    for key in ("POWER", "ARGS", "KWARGS"):
        with refuses(f"received '{key.lower()}'; remedy: known: (none)"):
            read(tmp_path, CONFIG.replace("POWER", key))


def test_a_loss_gets_its_shapes_from_the_taps(randn):
    @LOSSES.register("Toy")
    class ToyLoss(DistillLoss):
        def __init__(self, widths: list[int], scale: float = 1.0) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.full((sum(widths),), scale))

        @classmethod
        def tap_arguments(cls, student, teacher, given):
            return {"widths": [spec.channels for spec in student]}

        def forward(self, student, teacher, **context):
            return self.weight.sum() * student[0].sum()

    distiller = Distiller({"x": {"LOSS": "Toy", "TAPS": ["map"], "SCALE": 2.0}}, SPECS, SPECS)
    assert distiller.terms["x"].weight.tolist() == [2.0] * 3
    assert list(distiller.state_dict()) == ["step", "terms.x.weight"]


def test_an_argument_that_neither_config_nor_taps_give_is_named(refuses):
    @LOSSES.register("Toy")
    class ToyLoss(DistillLoss):
        def __init__(self, classes: int, margin: float = 1.0) -> None:
            super().__init__()

    with refuses("term 'x' to give CLASSES to Toy; received MARGIN; remedy: add the missing key"):
        Distiller({"x": {"LOSS": "Toy", "TAPS": ["map"], "MARGIN": 2.0}}, SPECS, SPECS)


def test_a_loss_gets_the_context_it_needs(randn):
    @LOSSES.register("Toy")
    class ToyLoss(DistillLoss):
        needs = ("classes",)

        def forward(self, student, teacher, *, classes, **context):
            assert not context
            return student[0].sum() * len(classes)

    term = {"x": {"LOSS": "Toy", "TAPS": ["map"]}}
    distiller = Distiller(term, SPECS, SPECS, context=["classes", "gt_boxes"])
    maps = {"map": randn(1, 3, 2, 2, grad=True)}
    loss = distiller(maps, maps, {"classes": [1, 2, 3], "gt_boxes": "not asked for"})["x"]
    torch.testing.assert_close(loss, maps["map"].sum() * 3)


def test_a_toy_schedule_takes_one_function(randn):
    @SCHEDULES.register()
    def alternating(period: int):
        return lambda step: float(step // period % 2)

    schedule = {"NAME": "alternating", "PERIOD": 2}
    term = {"x": {"LOSS": "FitNet", "TAPS": ["map"], "SCHEDULE": schedule}}
    distiller = Distiller(term, SPECS, SPECS).double()
    student, teacher = {"map": randn(2, 3, 4, 6, grad=True)}, {"map": randn(2, 3, 4, 6)}
    on = [bool(distiller(student, teacher)["x"] > 0) for _ in range(6)]
    assert on == [False, False, True, True, False, False]


@pytest.mark.usefixtures("toy")
def test_a_name_is_taken_once():
    with pytest.raises(AssertionError, match="Toy"):
        LOSSES.register("Toy")(DistillLoss)


def test_both_forms_of_the_decorator_register():
    @LOSSES.register()
    class PlainName(DistillLoss):
        pass

    assert LOSSES.get("PlainName") is PlainName
    assert LOSSES.register("Alias")(PlainName) is PlainName
    assert LOSSES.get("Alias") is PlainName
    assert "Toy" not in LOSSES
