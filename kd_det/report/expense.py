"""What training and deployment cost, as tables."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

from kd_det.report.blocks import Cell, Table, row
from kd_det.report.cost import Cost, Measured
from kd_det.report.groups import TEACHER, Group, Study
from kd_det.report.runs import Run

_MEGA = 1e6


def deployment_table(measured: Sequence[Measured]) -> Table:
    """A row per different model: what it costs at inference."""
    teacher = next((m.cost for m in measured if m.groups[0].role == TEACHER), None)
    rows = []
    for entry in measured:
        name = ", ".join(group.label for group in entry.groups)
        if entry.cost is None:
            rows.append(row(name, *[Cell("?", "muted")] * 4))
            continue
        against = teacher if entry.cost is not teacher else None
        rows.append(
            row(
                name,
                _less(lambda c: c.parameters, count, entry.cost, against),
                _less(lambda c: c.macs / 1e9, "{:.3g}".format, entry.cost, against),
                _less(lambda c: c.size / _MEGA, "{:.3g}".format, entry.cost, against),
                _less(lambda c: 1000 * c.seconds, "{:.3g}".format, entry.cost, against),
            )
        )
    devices = sorted({m.cost.device for m in measured if m.cost})
    return Table(
        "At inference",
        ["model", "parameters", "GMACs", "weights, MB", "ms per image"],
        rows,
        note="The plain model, without what a distillation adds: one validation image of the test "
        f"size, median of ten forwards on {', '.join(devices) or 'no device'} of this machine. "
        "GMACs are those of convolutions and matrix products.",
    )


def training_table(study: Study) -> Table:
    """A row per configuration: time, memory and what is on disk."""
    usual = seconds(study.baseline) if study.baseline else None
    rows = []
    for group in study.everything:
        own, waits = seconds(group), _mean(group, lambda r: _median(r, "data_time"))
        hours = _mean(group, _hours)
        memory = _mean(group, lambda r: max(r.curves.get("max_mem", {}).values(), default=None))
        learnt = _mean(group, lambda r: (r.record.get("parameters") or {}).get("adaptors"))
        disk = _mean(group, lambda r: w.stat().st_size / _MEGA if (w := r.weights()) else None)
        compared = own / usual if own and usual and group is not study.baseline else None
        rows.append(
            row(
                group.label,
                _number(own, "{:.3f}", "" if compared is None else f"× {compared:.2f}"),
                _number(waits, "{:.3f}", f"{waits / own:.0%}" if waits and own else ""),
                _number(hours, "{:.2f}"),
                _number(memory, "{:,.0f}"),
                "–" if learnt is None else count(learnt),
                _number(disk, "{:.2f}"),
            )
        )
    columns = [
        *("model", "s per iteration", "of it data", "hours", "memory, MB"),
        *("parameters of the losses", "model_final.pth, MB"),
    ]
    kept = [at for at in range(len(columns)) if at == 0 or any(r[at].text != "–" for r in rows)]
    return Table(
        "Training",
        [columns[at] for at in kept],
        [[r[at] for at in kept] for r in rows],
        note="Medians over iterations, means over seeds, below them the ratio to the baseline. "
        "Runs on different or busy machines do not compare.",
    )


def seconds(group: Group) -> float | None:
    """Of an iteration: the median of each run, the mean over runs."""
    return _mean(group, lambda run: _median(run, "time"))


def count(number: float) -> str:
    """``1.23 M``."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.0f}"


def _less(
    value: Callable[[Cost], float], shown: Callable[[float], str], cost: Cost, other: Cost | None
) -> Cell:
    note = ""
    if other is not None and value(cost):
        note = f"teacher / {value(other) / value(cost):.1f}"
    return Cell(shown(value(cost)), note=note)


def _number(value: float | None, shown: str, note: str = "") -> Cell:
    return Cell("–", "muted") if value is None else Cell(shown.format(value), note=note)


def _mean(group: Group, measure: Callable[[Run], float | None]) -> float | None:
    values = [value for run in group.counted if (value := measure(run)) is not None]
    return statistics.mean(values) if values else None


def _median(run: Run, name: str) -> float | None:
    values = run.curves.get(name, {}).values()
    return statistics.median(values) if values else None


def _hours(run: Run) -> float | None:
    times = run.curves.get("time", {})
    if not times:
        return None
    return statistics.mean(times.values()) * run.iterations / 3600
