"""Which runs the examples are of, and what is shown of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from kd_det.report.blocks import Block, Gallery, Table, Text, describe, row
from kd_det.report.classified import answer_blocks, read_answers
from kd_det.report.cost import open_plain
from kd_det.report.examples import contrast, own_annotations
from kd_det.report.groups import Group, Problem, Study
from kd_det.report.matching import MIN_IOU, MIN_SCORE, match_all, tally
from kd_det.report.runs import Run
from kd_det.report.scores import read_predictions
from kd_det.report.scoring import Truths, truth_of
from kd_det.report.summary import Headline
from kd_det.report.truth import Truth
from kd_det.run.folder import DETECTIONS, PREDICTIONS


@dataclass(frozen=True)
class _Pair:
    label: str
    run: Run
    baseline: Run


def examples(study: Study, best: Headline | None, truths: Truths, build: bool) -> list[Block]:
    """Images on which a run and the baseline differ most, both ways.

    Args:
        study: trouble with images and predictions is added to its problems.
        best: whose run is compared if it has predictions.
        truths: the data sets read so far.
        build: a classifier's images, which only its host can find, may be asked for.
    """
    kind = best.metric.split("/")[0] if best else "bbox"
    source = PREDICTIONS if kind == "accuracy" else DETECTIONS
    pair = _choose(study, best, source)
    if pair is None:
        return [
            Text(
                "No examples: they need usable predictions of a run and of the baseline "
                f"({source}; tools/train_net.py --eval-only writes them)."
            )
        ]
    runs = {"baseline": pair.baseline, pair.label: pair.run}
    if study.teacher and study.on_same_data(study.teacher):
        runs |= zip(["teacher"], _with_predictions(study.teacher, source), strict=False)
    told = Text(f"{pair.run.folder} beside {pair.baseline.folder}.")
    if kind == "accuracy":
        return [told, *_of_classifiers(study, pair.run, runs, build)]
    return [told, *_of_detectors(study, truth_of(pair.run, truths), pair.label, runs)]


def _choose(study: Study, best: Headline | None, source: str) -> _Pair | None:
    if study.baseline is None:
        return None
    alone = _with_predictions(study.baseline, source)
    usable = [group for group in study.groups if study.on_same_data(group)]
    ordered = sorted(usable, key=lambda group: best is None or group is not best.group)
    for group in ordered:
        for run in _with_predictions(group, source):
            # The same seed had the same start and the same order of images.
            same = [other for other in alone if other.seed == run.seed]
            if alone:
                return _Pair(group.label, run, (same or alone)[0])
    return None


def _with_predictions(group: Group, source: str) -> list[Run]:
    """Runs whose predictions were usable."""
    return [run for run in group.counted if source in run.sources.values()]


def _of_detectors(study: Study, truth: Truth, label: str, runs: Mapping[str, Run]) -> list[Block]:
    objects = {image: own_annotations(truth, image) for image in sorted(truth.coco.imgs)}
    found = {
        name: match_all(objects, read_predictions(path, truth))
        for name, run in runs.items()
        if (path := run.predictions)
    }
    counts = tally(found[label], found["baseline"])
    rows = [
        row("by both", f"{counts['both']:,}"),
        row(f"only by {label}", f"{counts['one']:,}"),
        row("only by the baseline", f"{counts['other']:,}"),
        row("by neither", f"{sum(map(len, objects.values())) - sum(counts.values()):,}"),
    ]
    note = (
        "An object is found by a detection of its class with an IoU of at least "
        f"{MIN_IOU:g} and a score of at least {MIN_SCORE:g}."
    )
    blocks: list[Block] = [Table("Objects found", ["", "objects"], rows, note)]
    own, alone = found[label], found["baseline"]
    for title, name, better, worse in (
        (f"{label} right, baseline wrong", "better", own, alone),
        (f"baseline right, {label} wrong", "worse", alone, own),
    ):
        shown = contrast(truth, better, worse, list(found.values()), name)
        study.problems += [Problem(truth.name, what) for what in shown.left_out]
        if not shown.images:
            blocks.append(Text(f"{title}: no such image."))
            continue
        note = "The clearest images first. Blue: right; orange: wrong; purple: ground truth."
        blocks.append(Gallery(title, ["ground truth", *found], shown.images, note))
    return blocks


def _of_classifiers(study: Study, run: Run, runs: Mapping[str, Run], build: bool) -> list[Block]:
    found = {name: read_answers(path) for name, r in runs.items() if (path := r.file(PREDICTIONS))}
    if build:
        try:
            bench = open_plain(run)
            names = bench.class_names("student")
            return answer_blocks(found, names, bench.validation_pictures)
        # Without its data or its host there is still a table.
        except Exception as error:
            what = f"its validation images are not shown: {describe(error)}"
            study.problems.append(Problem(str(run.folder), what))
    return answer_blocks(found)
