"""The greedy search: one Optuna study per key, with the best values of the earlier keys."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import Trial, TrialState

from kd_det.core.errors import fail
from kd_det.tuning.runs import RunError
from kd_det.tuning.space import Space, as_text

JOURNAL = "search.journal"

Run = Callable[[Mapping[str, float], int, Path], float]
"""``(values by key, seed, folder) -> metric``; see :class:`kd_det.tuning.runs.TrainNet`."""


@dataclass(frozen=True)
class Point:
    """One value of a key; ``scores`` has the metric of each seed and is empty after a failure."""

    value: float
    scores: tuple[float, ...] = ()
    failure: str = ""

    @property
    def mean(self) -> float:
        return statistics.fmean(self.scores)

    @property
    def deviation(self) -> float | None:
        """Sample standard deviation over seeds; None for a single seed."""
        return statistics.stdev(self.scores) if len(self.scores) > 1 else None


@dataclass(frozen=True)
class Sweep:
    """The points of one key, by rising value."""

    key: str
    points: tuple[Point, ...]

    @property
    def finished(self) -> tuple[Point, ...]:
        """Points without a failure, the best first; of equals the smaller value."""
        done = [point for point in self.points if point.scores]
        return tuple(sorted(done, key=lambda point: (-point.mean, point.value)))

    @property
    def best(self) -> Point:
        return self.finished[0]


class Progress(Protocol):
    """Receives the progress of a search."""

    def begin(self, key: str, done: int) -> None:
        """The search of a key begins or continues; ``done`` of its runs were finished before."""

    def finish(self, runs: int) -> None:
        """That many runs have ended."""


def greedy_search(
    spaces: Mapping[str, Space],
    run: Run,
    output: Path,
    *,
    seeds: Sequence[int],
    settings: Callable[[Mapping[str, float]], Mapping[str, Any]],
    progress: Progress,
    after_key: Callable[[Sequence[Sweep]], None] = lambda sweeps: None,
    jobs: int = 1,
) -> list[Sweep]:
    """Maximise a metric key by key. Started again, it continues where it was.

    ``output`` holds the trials in an Optuna storage, ``search.journal``, and each run in
    ``runs/<key>/<value>/seed_<seed>``. Failed and interrupted runs are tried once more.

    Args:
        spaces: the values to try, in the order of the search.
        run: trains once and returns the metric.
        output: the folder of this search.
        seeds: a value's score is the mean over them.
        settings: ``(best values so far) -> all that a score depends on``, as JSON.
        progress: receives the beginning of each key and the end of each run.
        after_key: called with the sweeps so far after every key.
        jobs: values that are trained at a time.

    Raises:
        KDError: the search in ``output`` was begun with other settings, every value of a key
            failed, or ``run`` raised it.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    output.mkdir(parents=True, exist_ok=True)
    # One file, also on file systems whose locks SQLite cannot use.
    storage = JournalStorage(JournalFileBackend(str(output / JOURNAL)))
    fixed: dict[str, float] = {}
    sweeps: list[Sweep] = []

    def score(
        trial: Trial, key: str, space: Space, fixed: Mapping[str, float], folder: Path
    ) -> float:
        value = trial.suggest_float(key, space.low, space.high, log=space.log)
        scores: list[float] = []
        try:
            for seed in seeds:
                values = {**fixed, key: value}
                scores.append(run(values, seed, folder / as_text(value) / f"seed_{seed}"))
                progress.finish(1)
        except RunError as error:
            trial.set_user_attr("failure", str(error))
            progress.finish(len(seeds) - len(scores))
            raise
        trial.set_user_attr("scores", scores)
        return statistics.fmean(scores)

    for key, space in spaces.items():
        study = optuna.create_study(
            storage=storage, study_name=key, direction="maximize", load_if_exists=True
        )
        folder = output / "runs" / key
        given = {"seeds": list(seeds), "log": space.log, **settings(fixed)}
        _check_settings(study, given, output, folder)
        # Another seed at every start: the same one would draw the same values again.
        study.sampler = space.make_sampler(len(study.trials))
        todo = _queue(study, key, space)
        progress.begin(key, done=(space.trials - todo) * len(seeds))
        study.optimize(
            partial(score, key=key, space=space, fixed=dict(fixed), folder=folder),
            n_trials=todo,
            n_jobs=jobs,
            catch=(RunError,),
        )
        sweeps.append(read_sweep(study, key))
        if not sweeps[-1].finished:
            fail(
                expected=f"at least one value of {key} to train to the end",
                received=f"failures only, the last: {sweeps[-1].points[-1].failure}",
                remedy="correct what failed and start the same command again",
            )
        fixed[key] = sweeps[-1].best.value
        after_key(sweeps)
    return sweeps


def _queue(study: optuna.Study, key: str, space: Space) -> int:
    """Queue the values that must be tried first; returns the number of trials to run.

    Optuna's ``GridSampler`` is not used: with several jobs it gives an interrupted value to more
    than one of them, and an extended list starts with values that were tried before.
    """
    # Trials that a killed process left queued or running are closed, and queued again below.
    while study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
        study.ask()
    for trial in study.get_trials(states=(TrialState.RUNNING,)):
        study.tell(trial.number, state=TrialState.FAIL)
    done = {trial.params[key] for trial in study.get_trials(states=(TrialState.COMPLETE,))}
    failed = [trial.params.get(key) for trial in study.get_trials(states=(TrialState.FAIL,))]
    again = [v for v in dict.fromkeys(failed) if v is not None and space.low <= v <= space.high]
    missing = [value for value in space.values or again if value not in done]
    todo = len(missing) if space.values else max(0, space.trials - len(done))
    for value in missing[:todo]:
        study.enqueue_trial({key: value})
    return todo


def read_sweep(study: optuna.Study, key: str) -> Sweep:
    """The points of a study; a failure only where the value never finished."""
    points: dict[float, Point] = {}
    for trial in study.get_trials(states=(TrialState.FAIL, TrialState.COMPLETE)):
        value: Any = trial.params.get(key)
        if trial.state == TrialState.COMPLETE:
            points[value] = Point(value, tuple(trial.user_attrs["scores"]))
        elif "failure" in trial.user_attrs:
            points.setdefault(value, Point(value, failure=trial.user_attrs["failure"]))
    return Sweep(key, tuple(points[value] for value in sorted(points)))


def _check_settings(
    study: optuna.Study, settings: Mapping[str, Any], output: Path, folder: Path
) -> None:
    """Refuse to continue a search under other settings, whose scores are not comparable."""
    now = json.loads(json.dumps(settings))
    before = study.user_attrs.get("settings")
    if before is None:
        if folder.is_dir() and any(folder.iterdir()):
            fail(
                expected=f"the runs of {folder} to be recorded in {output / JOURNAL}",
                received="runs without a record",
                remedy="remove that folder, or choose another output",
            )
        study.set_user_attr("settings", now)
        return
    changed = sorted(k for k in before | now if before.get(k) != now.get(k))
    if changed:
        fail(
            expected=f"the search of {study.study_name} in {output} to continue as it began",
            received=", ".join(f"{k} {now.get(k)!r}, was {before.get(k)!r}" for k in changed[:4]),
            remedy="start the command as it was, or choose another output",
        )
