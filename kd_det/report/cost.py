"""What a finished run's model costs to deploy, measured on this machine."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass

import torch

from kd_det.bench.workbench import Workbench, latency, macs, open_workbench, parameters
from kd_det.core.errors import fail
from kd_det.hosts.base import load_config
from kd_det.report.blocks import describe
from kd_det.report.groups import Group, Study
from kd_det.report.runs import Run
from kd_det.run.folder import CONFIG

# What decides the deployed model and the size of its images; where its weights come from does not.
_DEPLOYED = ("HOST", "MODEL.", "INPUT.", "TEST.")
_NOT_DEPLOYED = ("MODEL.WEIGHTS", "MODEL.BACKBONE.WEIGHTS", "MODEL.DEVICE", "TEST.EVAL_PERIOD")


@dataclass(frozen=True)
class Cost:
    """Of the plain student (or teacher) that a run leaves.

    Attributes:
        parameters: their number.
        macs: multiply-accumulates of one image.
        size: bytes of its weights and buffers, without what a distiller learnt.
        seconds: median of one image.
        device: where that was measured.
    """

    parameters: int
    macs: float
    size: int
    seconds: float
    device: str


@dataclass(frozen=True)
class Measured:
    """Groups with the same deployed model, and its cost; None where it could not be measured."""

    groups: list[Group]
    cost: Cost | None
    failure: str = ""


def measure_all(study: Study, done: Callable[[str, int], None]) -> list[Measured]:
    """Measure each different model once: the teacher's first, then the students'.

    Args:
        study: everything that is compared.
        done: told the name of every model that was measured, and their number in all.
    """
    kinds: dict[str, list[Group]] = {}
    for group in [*([study.teacher] if study.teacher else []), *study.students]:
        kinds.setdefault(_deployed(group), []).append(group)
    found = []
    for groups in kinds.values():
        run = _with_weights(groups)
        try:
            found.append(Measured(groups, measure(run)))
        # One model that cannot be built here must not cost the report of the others.
        except Exception as error:
            found.append(Measured(groups, None, describe(error)))
        done(groups[0].label, len(kinds))
    return found


def measure(run: Run) -> Cost:
    """Build the plain model of a run and look at one image of the test size.

    Raises:
        KDError: the config is refused, or its host is not installed.
    """
    bench = open_plain(run)
    tensors = [*bench.student.parameters(), *bench.student.buffers()]
    return Cost(
        parameters=parameters(bench.student),
        macs=macs(bench, "student"),
        size=sum(tensor.numel() * tensor.element_size() for tensor in tensors),
        seconds=latency(bench, "student"),
        device=str(next(bench.student.parameters()).device),
    )


def open_plain(run: Run) -> Workbench:
    """The model of a run with its final weights, without teacher and terms.

    Raises:
        KDError: see :func:`kd_det.hosts.base.load_config` and
        :func:`kd_det.bench.workbench.open_workbench`.
    """
    config, weights = run.file(CONFIG), run.weights()
    if config is None or weights is None:
        fail(
            expected=f"{CONFIG} and final weights in {run.folder}",
            received="no weights" if config else f"no {CONFIG}",
            remedy="finish the run",
        )
    options = ["KD.ENABLED", "False"]
    if not torch.cuda.is_available():
        options += ["MODEL.DEVICE", "cpu"]
    return open_workbench(load_config(str(config), options), str(weights), distilled=False)


def _deployed(group: Group) -> str:
    config = group.config()
    kept = {
        key: value
        for key, value in config.items()
        if key.startswith(_DEPLOYED) and key not in _NOT_DEPLOYED
    }
    return json.dumps(kept, sort_keys=True, default=str) if config else group.label


def _with_weights(groups: list[Group]) -> Run:
    runs = [run for group in groups for run in group.runs]
    return next((run for run in runs if run.config and run.weights()), runs[0])
