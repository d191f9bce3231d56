"""What stands in the sections of a report."""

from __future__ import annotations

from collections.abc import Sequence

from kd_det.report.blocks import Block, Figure, Table, Text, row
from kd_det.report.cost import Measured
from kd_det.report.expense import deployment_table, training_table
from kd_det.report.groups import Problem, Study
from kd_det.report.plots import dots, panels
from kd_det.report.summary import Headline, facts, sentences
from kd_det.report.tables import (
    LABELS,
    MAIN,
    class_table,
    difference_table,
    kinds,
    runs_table,
    scores_table,
)
from kd_det.run.curves import GROUPS

_NAMED = 4
_VALIDATION = ("bbox/AP", "segm/AP", "accuracy/top1")
_LOOP = ("lr", "time", "data_time", "max_mem")


def summary(study: Study, best: Headline | None, measured: Sequence[Measured]) -> list[Block]:
    """One sentence, the numbers, and every run as a dot."""
    blocks: list[Block] = [*sentences(study, best, measured), facts(study, best, measured)]
    for kind in kinds(study):
        metric = f"{kind}/{MAIN[kind]}"
        picture = dots(study.everything, metric, f"{LABELS[metric]} (%)", f"dots_{kind}")
        note = "A dot is a run, a bar the mean of its seeds; the lines are baseline and teacher."
        label = LABELS[metric]
        blocks.append(Figure(f"{label[0].upper()}{label[1:]} of every run", picture, note))
    return blocks


def accuracy(study: Study) -> list[Block]:
    """All scores, and those by class."""
    blocks: list[Block] = []
    for kind in kinds(study):
        blocks.append(scores_table(study, kind))
        if (by_class := class_table(study, kind)) is not None:
            blocks.append(by_class)
    return blocks or [Text("No run left any scores.")]


def cost(study: Study, measured: Sequence[Measured]) -> list[Block]:
    """Inference, as far as it was measured, and training."""
    return [*([deployment_table(measured)] if measured else []), training_table(study)]


def curves(study: Study) -> list[Block]:
    """Validation, task losses, terms and the loop."""
    tags = sorted({tag for run in study.runs for tag in run.tagged()})
    terms = sorted({term for run in study.runs for term in run.terms})
    of_terms = [name for t in terms for name in (f"loss/kd/{t}", *(f"{g}/{t}" for g in GROUPS))]
    of_task = ["loss/total", *(t for t in tags if t.startswith("loss/task/")), "share/task"]
    blocks: list[Block] = []
    for title, names, note, smooth in (
        ("Validation", _VALIDATION, "", False),
        ("Task losses", of_task, "", True),
        ("Distillation terms", of_terms, _terms_note(tags, terms), True),
        ("Loop", _LOOP, "time and data_time in seconds, max_mem in MB.", True),
    ):
        name = f"curves_{title.lower().replace(' ', '_')}"
        picture = panels(study.everything, names, name, f"{title} over iterations", smooth)
        if picture is not None:
            blocks.append(Figure(title, picture, note))
    text = "Over iterations; every seed thin, the mean of a configuration's seeds on top. "
    text += "Long curves are averaged to 200 points." if blocks else ""
    return [Text(text), *blocks] if blocks else [Text("No run left any curves.")]


def differences(study: Study) -> list[Block]:
    """Between students, and between baseline and teacher."""
    blocks: list[Block] = []
    students = [group for group in study.students if group.runs[0].config]
    if len(students) > 1:
        blocks.append(difference_table(students, "Between the runs"))
    if study.teacher and study.baseline and study.teacher.runs[0].config:
        pair = [study.baseline, study.teacher]
        blocks.append(difference_table(pair, "Between baseline and teacher", folded=True))
    return blocks or [Text("No two configs can be compared.")]


def runs(study: Study) -> list[Block]:
    """Where everything comes from."""
    return [runs_table(study)]


def problems(study: Study) -> list[Block]:
    """What could not be read, measured or shown; runs with the same trouble together."""
    merged: dict[str, list[str]] = {}
    for problem in _all_problems(study):
        merged.setdefault(problem.what, []).append(problem.where)
    if not merged:
        return [Text("None: everything was found and could be read.")]
    rows = []
    for what, places in merged.items():
        more = f" and {len(places) - _NAMED} more" if len(places) > _NAMED else ""
        rows.append(row(", ".join(places[:_NAMED]) + more, what))
    return [Table("Problems", ["where", "what"], rows, words=True)]


def _all_problems(study: Study) -> list[Problem]:
    own = [Problem(str(run.folder), what) for run in study.runs for what in run.problems]
    ends = [Problem(str(r.folder), r.state) for r in study.runs if not r.finished]
    return [*study.problems, *ends, *own]


def _terms_note(tags: Sequence[str], terms: Sequence[str]) -> str:
    note = "loss/kd is what is added to the loss"
    if any(tag.startswith("raw/") for tag in tags):
        return f"{note}; raw is the same before its weight, share its share of the gradient."
    return f"{note}. These runs did not log values before the weight (raw)." if terms else note
