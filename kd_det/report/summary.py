"""The gain of the distillation and its cost, in one sentence and a few numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kd_det.document.blocks import Facts, Text
from kd_det.report.cost import Cost, Measured, count, slowdown
from kd_det.report.groups import TEACHER, Group, Study
from kd_det.report.runs import MAIN
from kd_det.report.stats import Gain, spread

LABELS = {"bbox/AP": "box AP", "segm/AP": "mask AP", "accuracy/top1": "top-1 accuracy"}


@dataclass(frozen=True)
class Headline:
    """The configuration that gains most over the baseline, if any gain counts; else the highest."""

    group: Group
    metric: str
    gain: Gain


def headline(study: Study) -> Headline | None:
    """The best distilled configuration by the first kind of score; finished ones first."""
    for kind in study.kinds:
        gains = [(group, study.gain(group, MAIN[kind])) for group in study.groups]
        candidates = [Headline(group, MAIN[kind], gain) for group, gain in gains if gain]
        if candidates:
            return max(candidates, key=_rank)
    return None


def sentences(study: Study, best: Headline | None, measured: Sequence[Measured]) -> list[Text]:
    """The summary; a difference within noise is not called a gain."""
    if best is None or study.baseline is None:
        return [Text("Nothing can be compared: no score of both a run and the baseline was found.")]
    texts = [Text(f"{_gained(study, best)} {_paid(study, best, measured)}")]
    if len(study.groups) > 1:
        texts.append(Text(_count(study, best.metric)))
    unfinished = [str(run.folder) for run in study.runs if not run.finished]
    if unfinished:
        texts.append(Text(f"Not finished: {', '.join(unfinished)}."))
    return texts


def facts(study: Study, best: Headline | None, measured: Sequence[Measured]) -> Facts:
    """The same as numbers to see first."""
    if best is None:
        return Facts([])
    what = f"{LABELS[best.metric]}, {best.group.label} over the baseline: {best.gain.verdict}"
    entries = [(f"{best.gain.difference:+.2f}", what)]
    share = study.recovered(best.group, best.metric)
    if share is not None and best.gain.is_better:
        entries.append((f"{share:.0%}", "of the gap between baseline and teacher closed"))
    if ratio := slowdown(study, best.group):
        entries.append((f"× {ratio:.2f}", "training time per iteration"))
    own, teacher = _costs(best.group, measured)
    if own:
        size, time = ("parameters at inference", f"per image on {own.device}")
        if teacher:
            size += f" (teacher: {count(teacher.parameters)})"
            time += f" (teacher: {1000 * teacher.seconds:.3g} ms)"
        entries += [(count(own.parameters), size), (f"{1000 * own.seconds:.3g} ms", time)]
    return Facts(entries)


def _rank(candidate: Headline) -> tuple[bool, bool, float]:
    gain = candidate.gain
    all_finished = all(run.finished for run in candidate.group.counted)
    return all_finished, gain.is_better, gain.difference


def _gained(study: Study, best: Headline) -> str:
    assert study.baseline is not None
    own, alone = best.group.values(best.metric), study.baseline.values(best.metric)
    name, label, gain = best.group.label, LABELS[best.metric], best.gain
    numbers = f"{spread(own)} against {spread(alone)}"
    if gain.noise is None:
        where = "above" if gain.difference > 0 else "below"
        return (
            f"{name} is {abs(gain.difference):.2f} {label} {where} the baseline ({numbers}); "
            "a single seed does not show whether that is more than noise."
        )
    seeds = f"{len(own)} and {len(alone)} seeds"
    if not gain.counts:
        return (
            f"No gain: {name}, the highest, differs from the baseline by {gain.difference:+.2f} "
            f"{label} ({numbers}, {seeds}), which is within the noise of the seed."
        )
    if gain.difference < 0:
        return (
            f"No gain: {name}, the highest, loses {-gain.difference:.2f} {label} against the "
            f"baseline ({numbers}, {seeds}; {gain.verdict})."
        )
    share = study.recovered(best.group, best.metric)
    gap = f" and closes {share:.0%} of the gap to the teacher" if share is not None else ""
    return (
        f"{name} gains {gain.difference:.2f} {label} over the baseline ({numbers}, {seeds}; "
        f"{gain.verdict}){gap}."
    )


def _paid(study: Study, best: Headline, measured: Sequence[Measured]) -> str:
    ratio = slowdown(study, best.group)
    training = f"An iteration of training took {ratio:.2f} times as long. " if ratio else ""
    own, teacher = _costs(best.group, measured)
    alone, _ = _costs(study.baseline, measured) if study.baseline else (None, None)
    if own is None:
        return training
    inference = f"At inference it has {count(own.parameters)} parameters"
    if own is alone:
        inference += ", as the baseline"
    if teacher is not None:
        inference += f" (teacher: {count(teacher.parameters)})"
    return f"{training}{inference}."


def _count(study: Study, metric: str) -> str:
    gains = [gain for group in study.groups if (gain := study.gain(group, metric))]
    better = sum(gain.is_better for gain in gains)
    worse = sum(gain.counts and not gain.is_better for gain in gains)
    unknown = sum(gain.noise is None for gain in gains)
    noise = len(gains) - better - worse - unknown
    parts = [
        (better, "gain more than 2 sd" if better != 1 else "gains more than 2 sd"),
        (noise, "within noise"),
        (worse, "lost more than 2 sd"),
        (unknown, "of unknown noise"),
    ]
    counts = ", ".join(f"{number} {what}" for number, what in parts if number)
    return f"Of {len(gains)} distilled configurations: {counts} ({LABELS[metric]})."


def _costs(group: Group, measured: Sequence[Measured]) -> tuple[Cost | None, Cost | None]:
    own = next((m.cost for m in measured if group in m.groups), None)
    teacher = next((m.cost for m in measured if m.groups[0].role == TEACHER), None)
    return own, teacher
