"""Scores of runs from their saved predictions, where there are any."""

from __future__ import annotations

import math
from collections.abc import Mapping

from kd_det.core.errors import KDError
from kd_det.report.blocks import describe
from kd_det.report.classified import accuracy, read_answers
from kd_det.report.runs import Run
from kd_det.report.scores import detection_scores, read_predictions
from kd_det.report.truth import Truth, find_truth
from kd_det.run.folder import DETECTIONS, PREDICTIONS, RESULTS

# Evaluators round differently; predictions of other weights differ by more. In percent.
_SAME = 0.1

Truths = dict[str, Truth | KDError]


def score(run: Run, truths: Truths) -> None:
    """Replace the scores of a run by those of its saved predictions.

    Whatever prevents that is among the run's problems, and its earlier scores stay.

    Args:
        run: changed in place.
        truths: the data sets read so far; added to.
    """
    detections, answers = run.predictions, run.file(PREDICTIONS)
    try:
        if detections is not None:
            truth = truth_of(run, truths)
            measured = detection_scores(truth, read_predictions(detections, truth))
            _take(run, measured, DETECTIONS)
        elif answers is not None:
            _take(run, accuracy(read_answers(answers)), PREDICTIONS)
    # One broken run, whatever broke it, must not cost the report of the others.
    except Exception as error:
        run.problems.append(f"its saved predictions are not used: {describe(error)}")
    if not run.scores:
        run.problems.append(f"no scores: no {RESULTS}, no evaluation in its metrics")


def truth_of(run: Run, truths: Truths) -> Truth:
    """The first data set of a run's ``DATASETS.TEST``, read once for all runs.

    Raises:
        KDError: see :func:`kd_det.report.truth.find_truth`.
    """
    name = run.test_sets[0] if run.test_sets else ""
    key = " ".join(run.data)
    if key not in truths:
        try:
            truths[key] = find_truth(name, run.config)
        except KDError as error:
            truths[key] = error
    found = truths[key]
    if isinstance(found, KDError):
        raise found
    return found


def _take(run: Run, measured: Mapping[str, float], source: str) -> None:
    _compare(run, measured)
    run.scores |= measured
    run.sources |= dict.fromkeys((name.split("/")[0] for name in measured), source)


def _compare(run: Run, measured: Mapping[str, float]) -> None:
    for name in ("bbox/AP", "segm/AP", "accuracy/top1"):
        before, now = run.scores.get(name), measured.get(name)
        source = run.sources.get(name.split("/")[0])
        if before is not None and now is not None and not math.isclose(before, now, abs_tol=_SAME):
            run.problems.append(
                f"its saved predictions give {name} {now:.2f}, its {source} {before:.2f}: they are "
                "of different evaluations; the former are shown"
            )
