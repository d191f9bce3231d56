"""What holds of every host's workbench, as checks that each host's tests call."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import torch

from kd_det.bench.workbench import Workbench, latency, macs, parameters, side_model


def state_of(bench: Workbench) -> dict[str, Any]:
    """Everything that a look must not change."""
    state: dict[str, Any] = {k: v.clone() for k, v in bench.model.state_dict().items()}
    state |= {f"buffer {k}": v.clone() for k, v in bench.model.named_buffers()}
    if bench.teacher is not None:
        state |= {f"teacher {k}": v.clone() for k, v in bench.teacher.model.state_dict().items()}
    state["modes"] = torch.tensor([m.training for m in bench.model.modules()])
    return state


def check_a_look_changes_nothing(bench: Workbench) -> None:
    """Every method once; parameters, buffers and modes are as before, and all gradients flow."""
    before = state_of(bench)
    batch = next(bench.batches())
    losses = bench.losses(batch)
    assert all(torch.isfinite(loss) for loss in losses.values())
    trained = [p for p in bench.model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(sum(losses.values()), trained, allow_unused=True)
    assert all(gradient is not None for gradient in gradients)
    for side in ("student", "teacher"):
        bench.evaluate(side, 1)
        bench.predict(side, bench.validation_pictures(1)[0])
        assert macs(bench, side) > 0
        latency(bench, side, 1)
        assert parameters(side_model(bench, side)) > 0
        assert len(bench.class_names(side)) == 10
    assert bench.check_export() == []
    after = state_of(bench)
    assert after.keys() == before.keys()
    for name, value in before.items():
        assert torch.equal(after[name], value), name
    assert all(p.grad is None for p in bench.model.parameters())


def check_batches_repeat(bench: Workbench) -> None:
    """Two passes see the same pictures, whatever is drawn between two batches of the second."""
    first = [bench.pictures(batch) for batch in islice(bench.batches(), 3)]
    second = []
    for batch in islice(bench.batches(), 3):
        torch.manual_seed(len(second))
        bench.losses(batch)
        second.append(bench.pictures(batch))
    for one, other in zip(first, second, strict=True):
        assert [x.dtype for x in one] == [torch.uint8] * len(one)
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def check_nothing_is_written(bench: Workbench) -> None:
    """The run's folder is not there."""
    assert not Path(bench.cfg.OUTPUT_DIR).exists()


def check_planted_faults_of_an_export(bench: Workbench) -> None:
    """A key that is no student's is refused by name; a student that computes other things shows."""
    parameter = next(bench.student.parameters())
    bench.student.register_parameter("intruder", torch.nn.Parameter(parameter.detach().clone()))
    (problem,) = bench.check_export()
    assert "intruder" in problem
    del bench.student.intruder
    module = next(m for m in bench.student.modules() if isinstance(m, torch.nn.Conv2d))
    with torch.no_grad():
        hook = module.register_forward_hook(lambda module, args, output: 1.01 * output)
    assert any("differs by up to" in problem for problem in bench.check_export())
    hook.remove()
    assert bench.check_export() == []


def check_names_that_do_not_fit_are_none(bench: Workbench) -> None:
    """Of a bench whose config gives its teacher of ten classes two names, which are then unknown.

    Its indices are taken as they are, so that an evaluation works.
    """
    assert list(bench.cfg.KD.TEACHER.CLASS_NAMES) == ["a", "b"]
    assert bench.class_names("teacher") is None
    assert len(bench.class_names("student") or []) == 10
    bench.evaluate("teacher", 1)
