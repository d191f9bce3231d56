"""The section of examples: which runs it compares, and how."""

from __future__ import annotations

from collections.abc import Mapping

from kd_det.document.blocks import Block, Text
from kd_det.report.classified import answer_blocks, read_answers
from kd_det.report.cost import open_plain
from kd_det.report.detected import detection_blocks
from kd_det.report.groups import Group, Problem, Study
from kd_det.report.runs import Run, describe
from kd_det.report.scores import Truths, read_predictions, truth_of
from kd_det.report.summary import Headline
from kd_det.run.folder import DETECTIONS, PREDICTIONS


def examples(study: Study, best: Headline | None, truths: Truths, build: bool) -> list[Block]:
    """Images on which a run and the baseline differ most, both ways.

    Args:
        study: problems with images and predictions are added to it.
        best: its run is compared if it has predictions.
        truths: the data sets read so far.
        build: whether the host of a classifier may be opened, which alone can find its images.
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
    label, run, baseline = pair
    runs = {"baseline": baseline, label: run}
    if study.teacher and study.on_same_data(study.teacher):
        runs |= zip(["teacher"], _with_predictions(study.teacher, source), strict=False)
    compared = Text(f"{run.folder} beside {baseline.folder}.")
    if kind == "accuracy":
        return [compared, *_of_classifiers(study, run, runs, build)]
    truth = truth_of(run, truths)
    predictions = {
        name: read_predictions(path, truth)
        for name, one in runs.items()
        if (path := one.predictions)
    }
    blocks, problems = detection_blocks(truth, label, predictions)
    study.problems += [Problem(truth.name, what) for what in problems]
    return [compared, *blocks]


def _choose(study: Study, best: Headline | None, source: str) -> tuple[str, Run, Run] | None:
    """Label and run of a configuration, the best if possible, and the baseline's run beside it."""
    alone = _with_predictions(study.baseline, source) if study.baseline else []
    usable = [group for group in study.groups if study.on_same_data(group)]
    for group in sorted(usable, key=lambda group: best is None or group is not best.group):
        for run in _with_predictions(group, source):
            # The same seed had the same start and the same order of images.
            same = [other for other in alone if other.seed == run.seed]
            if alone:
                return group.label, run, (same or alone)[0]
    return None


def _with_predictions(group: Group, source: str) -> list[Run]:
    """Runs whose predictions were usable."""
    return [run for run in group.counted if source in run.sources.values()]


def _of_classifiers(study: Study, run: Run, runs: Mapping[str, Run], build: bool) -> list[Block]:
    answers = {
        name: read_answers(path) for name, one in runs.items() if (path := one.file(PREDICTIONS))
    }
    if build:
        try:
            bench = open_plain(run)
            names = bench.class_names("student")
            return answer_blocks(answers, names, bench.validation_pictures)
        # Without its data or its host there is still a table.
        except Exception as error:
            what = f"its validation images are not shown: {describe(error)}"
            study.problems.append(Problem(str(run.folder), what))
    return answer_blocks(answers)
