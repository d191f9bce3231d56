"""Cost of the models at inference, measured on this machine, and of their training, as recorded."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from kd_det.bench.workbench import Workbench, latency, macs, parameters
from kd_det.core.errors import fail
from kd_det.document.blocks import Cell, Table, table_of
from kd_det.hosts.base import load_config, open_bench
from kd_det.report.groups import TEACHER, Group, Study
from kd_det.report.runs import Run, describe
from kd_det.run.folder import CONFIG, FINAL

# The keys of the deployed model and the size of its images.
_DEPLOYED = ("HOST", "MODEL.", "INPUT.", "TEST.")
_NOT_DEPLOYED = ("MODEL.WEIGHTS", "MODEL.BACKBONE.WEIGHTS", "MODEL.DEVICE", "TEST.EVAL_PERIOD")
_MEGA = 1e6


@dataclass(frozen=True)
class Cost:
    """Of the plain student (or teacher) of a run.

    Attributes:
        macs: multiply-accumulates of one image.
        size: bytes of its weights and buffers, without those of a distiller.
        seconds: median for one image, on ``device``.
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

    @property
    def label(self) -> str:
        return ", ".join(group.label for group in self.groups)


def measure_all(study: Study, done: Callable[[int], None]) -> list[Measured]:
    """Measure each different model once: the teacher's first, then the students'.

    ``done`` is called after each model with the number of all models.
    """
    kinds: dict[str, list[Group]] = {}
    for group in [*([study.teacher] if study.teacher else []), *study.students]:
        kinds.setdefault(_deployed(group), []).append(group)
    measured = []
    for groups in kinds.values():
        runs = [run for group in groups for run in group.runs]
        run = next((run for run in runs if run.config and run.file(FINAL)), runs[0])
        try:
            measured.append(Measured(groups, _measure(run)))
        # Any exception of one model: the costs of the others are still of use.
        except Exception as error:
            measured.append(Measured(groups, None, describe(error)))
        done(len(kinds))
    return measured


def _measure(run: Run) -> Cost:
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
        KDError: the run left no config or no weights, the config is refused, or its host is not
            installed.
    """
    config, weights = run.file(CONFIG), run.file(FINAL)
    if config is None or weights is None:
        fail(
            expected=f"{CONFIG} and final weights in {run.folder}",
            received="no weights" if config else f"no {CONFIG}",
            remedy="finish the run",
        )
    options = ["KD.ENABLED", "False"]
    if not torch.cuda.is_available():
        options += ["MODEL.DEVICE", "cpu"]
    return open_bench(load_config(str(config), options), str(weights), distilled=False)


def deployment_table(measured: Sequence[Measured]) -> Table:
    """A row per different model: its cost at inference, and the ratio of the teacher's to it."""
    teacher = next((m.cost for m in measured if m.groups[0].role == TEACHER), None)

    def column(value: Callable[[Cost], float], shown: Callable[[float], str]) -> list[Cell]:
        cells = []
        for cost in (m.cost for m in measured):
            ratio = ""
            if cost and teacher and cost is not teacher and value(cost):
                ratio = f"teacher / {value(teacher) / value(cost):.1f}"
            cells.append(Cell(shown(value(cost)), note=ratio) if cost else Cell("?", "muted"))
        return cells

    devices = sorted({m.cost.device for m in measured if m.cost})
    return table_of(
        "At inference",
        "model",
        [m.label for m in measured],
        {
            "parameters": column(lambda c: c.parameters, count),
            "GMACs": column(lambda c: c.macs / 1e9, "{:.3g}".format),
            "weights, MB": column(lambda c: c.size / _MEGA, "{:.3g}".format),
            "ms per image": column(lambda c: 1000 * c.seconds, "{:.3g}".format),
        },
        "The plain model, without the parts of a distillation: one validation image of the test "
        f"size, median of ten forwards on {', '.join(devices) or 'no device'} of this machine. "
        "GMACs are those of convolutions and matrix products.",
    )


def training_table(study: Study) -> Table:
    """A row per configuration: time, memory and size of the weights."""
    groups = study.everything

    def column(
        measure: Callable[[Run], float | None],
        shown: Callable[[float], str],
        note: Callable[[Group, float], str] = lambda group, value: "",
    ) -> list[Cell]:
        values = [(group, _mean(group, measure)) for group in groups]
        none = Cell("–", "muted")
        return [none if v is None else Cell(shown(v), note=note(g, v)) for g, v in values]

    def memory(run: Run) -> float | None:
        return max(run.curves.get("max_mem", {}).values(), default=None)

    def learned(run: Run) -> float | None:
        return (run.record.get("parameters") or {}).get("adaptors")

    def ratio(group: Group, value: float) -> str:
        slower = slowdown(study, group)
        return f"× {slower:.2f}" if slower else ""

    def share(group: Group, value: float) -> str:
        return f"{value / own:.0%}" if value and (own := seconds(group)) else ""

    return table_of(
        "Training",
        "model",
        [group.label for group in groups],
        {
            "s per iteration": column(lambda r: _median(r, "time"), "{:.3f}".format, ratio),
            "of it data": column(lambda r: _median(r, "data_time"), "{:.3f}".format, share),
            "hours": column(_hours, "{:.2f}".format),
            "memory, MB": column(memory, "{:,.0f}".format),
            "parameters of the losses": column(learned, count),
            f"{FINAL}, MB": column(_megabytes, "{:.2f}".format),
        },
        "Medians over iterations, means over seeds, below them the ratio to the baseline. "
        "Runs on different or busy machines do not compare.",
    )


def seconds(group: Group) -> float | None:
    """Of an iteration: the median of each run, the mean over runs."""
    return _mean(group, lambda run: _median(run, "time"))


def slowdown(study: Study, group: Group) -> float | None:
    """Time of an iteration relative to the baseline's; None of the baseline itself."""
    usual = seconds(study.baseline) if study.baseline else None
    own = seconds(group)
    return own / usual if own and usual and group is not study.baseline else None


def count(number: float) -> str:
    """``1.23 M``."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.0f}"


def _deployed(group: Group) -> str:
    config = group.config()
    keys = [k for k in config if k.startswith(_DEPLOYED) and k not in _NOT_DEPLOYED]
    kept = {key: config[key] for key in keys}
    return json.dumps(kept, sort_keys=True, default=str) if config else group.label


def _mean(group: Group, measure: Callable[[Run], float | None]) -> float | None:
    values = [value for run in group.counted if (value := measure(run)) is not None]
    return statistics.mean(values) if values else None


def _median(run: Run, name: str) -> float | None:
    values = run.curves.get(name, {}).values()
    return statistics.median(values) if values else None


def _hours(run: Run) -> float | None:
    times = run.curves.get("time", {}).values()
    return statistics.mean(times) * run.iterations / 3600 if times else None


def _megabytes(run: Run) -> float | None:
    weights = run.file(FINAL)
    return weights.stat().st_size / _MEGA if weights else None
