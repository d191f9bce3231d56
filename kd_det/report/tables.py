"""The tables of a report."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from kd_det.report.blocks import Cell, Table, Tone, row
from kd_det.report.groups import BASELINE, TEACHER, Group, Study
from kd_det.report.runs import Run
from kd_det.report.stats import Gain, gain, recovered, spread
from kd_det.run.folder import DETECTIONS, PREDICTIONS

KINDS = {"bbox": "Boxes", "segm": "Masks", "accuracy": "Accuracy"}
MAIN = {"bbox": "AP", "segm": "AP", "accuracy": "top1"}
LABELS = {"bbox/AP": "box AP", "segm/AP": "mask AP", "accuracy/top1": "top-1 accuracy"}
_METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "top1", "top5", "top1_best")
_MANY_CLASSES = 20
_MARK = " †"


def kinds(study: Study) -> list[str]:
    """What was measured: ``bbox``, ``segm``, ``accuracy``."""
    return [k for k in KINDS if any(group.values(f"{k}/{MAIN[k]}") for group in study.everything)]


def scores_table(study: Study, kind: str) -> Table:
    """A row per configuration: mean, spread, gain over the baseline and its verdict."""
    names = [f"{kind}/{name}" for name in _METRICS]
    names = [n for n in names if any(group.values(n) for group in study.everything)]
    main = f"{kind}/{MAIN[kind]}"
    rows = []
    for group in study.everything:
        found = gain_of(study, group, main)
        share = recovered_by(study, group, main)
        rows.append(
            row(
                f"{group.label}{_MARK if _marked(group, kind) else ''}",
                str(len(group.values(main))),
                *(_score(study, group, name) for name in names),
                Cell(found.verdict if found else "", _tone(found)),
                Cell(f"{share:.0%}", "" if found and found.counts else "muted")
                if share is not None
                else Cell(""),
            )
        )
    return Table(
        KINDS[kind],
        ["model", "seeds", *(name.split("/")[1] for name in names), "verdict", "of the gap"],
        rows,
        note=_scores_note(study, kind),
    )


def class_table(study: Study, kind: str) -> Table | None:
    """A row per class: the score of every configuration, and its gain over the baseline."""
    prefix = f"{kind}/{MAIN[kind]}-"
    groups = study.everything
    names = dict.fromkeys(
        name for group in groups for run in group.counted for name in run.scores
        if name.startswith(prefix)
    )  # fmt: skip
    shown = [group for group in groups if any(group.values(name) for name in names)]
    if not names or not shown:
        return None
    rows = [
        row(name.removeprefix(prefix), *(_score(study, group, name, 1) for group in shown))
        for name in names
    ]
    return Table(
        f"{KINDS[kind]} by class ({MAIN[kind]})",
        ["class", *(group.label for group in shown)],
        rows,
        note="Mean over seeds; below it the gain over the baseline, in colour beyond 2 sd. With "
        "many classes, a few exceed that by chance.",
        folded=len(names) > _MANY_CLASSES,
    )


def difference_table(groups: Sequence[Group], title: str, folded: bool = False) -> Table:
    """The config keys in which configurations differ."""
    configs = [group.config() for group in groups]
    keys = sorted({key for config in configs for key in config})
    rows = []
    for key in keys:
        values = [_value(config[key]) if key in config else "–" for config in configs]
        if len(set(values)) > 1:
            rows.append(row(key, *values))
    note = "" if rows else "None."
    return Table(
        title, ["key", *(group.label for group in groups)], rows, note, words=True, folded=folded
    )


def runs_table(study: Study) -> Table:
    """What every run was, as far as it wrote it down."""
    columns: dict[str, Callable[[Run], str]] = {
        "seed": lambda run: "" if run.seed is None else str(run.seed),
        "state": lambda run: run.state,
        "scores from": lambda run: ", ".join(dict.fromkeys(run.sources.values())),
        "versions": _versions,
        "commit": _commit,
        "started": _started,
        "starts": lambda run: str(len(run.record.get("starts", [])) or ""),
        "teacher's sha256": _fingerprint,
        "command": lambda run: " ".join(map(str, run.record.get("command", []))),
    }
    cells = {name: [tell(run) for run in study.runs] for name, tell in columns.items()}
    shown = [name for name, column in cells.items() if any(column)]
    rows = [
        row(str(run.folder), *(cells[name][at] for name in shown))
        for at, run in enumerate(study.runs)
    ]
    return Table("Runs", ["folder", *shown], rows, words=True)


def gain_of(study: Study, group: Group, name: str) -> Gain | None:
    """Over the baseline; None for baseline and teacher, and on other data."""
    if study.baseline is None or group.role in (BASELINE, TEACHER) or not study.on_same_data(group):
        return None
    return gain(group.values(name), study.baseline.values(name))


def recovered_by(study: Study, group: Group, name: str) -> float | None:
    """Share of the teacher-student gap; None for baseline and teacher, and on other data."""
    if study.baseline is None or study.teacher is None or group.role in (BASELINE, TEACHER):
        return None
    if not (study.on_same_data(group) and study.on_same_data(study.teacher)):
        return None
    return recovered(group.values(name), study.baseline.values(name), study.teacher.values(name))


def _score(study: Study, group: Group, name: str, digits: int = 2) -> Cell:
    values = group.values(name)
    found = gain_of(study, group, name)
    # By class a column is narrow: the mean alone.
    text = spread(values) if digits > 1 else spread([statistics.mean(values)] if values else [], 1)
    note = f"{found.difference:+.{digits}f}" if found else ""
    return Cell(text, "", note, _tone(found))


def _tone(found: Gain | None) -> Tone:
    if found is None or not found.counts:
        return "muted"
    return "good" if found.difference > 0 else "bad"


def _marked(group: Group, kind: str) -> bool:
    sources = [run.sources[kind] for run in group.counted if kind in run.sources]
    return any(source not in (DETECTIONS, PREDICTIONS) for source in sources)


def _scores_note(study: Study, kind: str) -> str:
    note = (
        "Percent, mean ± sample standard deviation over seeds; below it the gain over the "
        "baseline. A gain counts beyond twice the larger of the two deviations."
    )
    if any(_marked(group, kind) for group in study.everything):
        note += (
            f"{_MARK} Not from saved predictions but from results.json or, of unfinished runs, "
            "the last evaluation."
        )
    elif kind != "accuracy":
        note += " By pycocotools from the saved predictions."
    return note


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_value, value))}]"
    return str(value) if value != "" else "''"


def _versions(run: Run) -> str:
    versions = run.record.get("versions", {})
    return ", ".join(f"{k} {versions[k]}" for k in ("kd_det", "torch") if k in versions)


def _started(run: Run) -> str:
    starts = run.record.get("starts")
    return str(starts[0].get("at", "")) if starts and isinstance(starts[0], dict) else ""


def _commit(run: Run) -> str:
    git = run.record.get("git") or {}
    return f"{str(git['commit'])[:8]}{' with changes' if git.get('dirty') else ''}" if git else ""


def _fingerprint(run: Run) -> str:
    return str((run.record.get("teacher") or {}).get("sha256") or "")[:12]
