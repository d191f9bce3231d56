"""A whole search: checks, runs with a progress bar, and the files that it writes."""

from __future__ import annotations

import fcntl
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from kd_det.core.errors import fail
from kd_det.tuning.plan import TABLE, TunedConfig
from kd_det.tuning.report import draw, table
from kd_det.tuning.runs import TrainNet
from kd_det.tuning.search import Run, Sweep, greedy_search
from kd_det.tuning.space import Space

PLOT, BEST, LOCK = "search.png", "best.yaml", "search.lock"


def tune(
    config_file: str,
    spaces: Mapping[str, Space],
    output: Path,
    *,
    metric: str = "",
    seeds: Sequence[int] = (),
    overrides: Sequence[str] = (),
    jobs: int = 1,
    num_gpus: int = 1,
    stop: Callable[[], bool] = lambda: False,
    run: Run | None = None,
) -> list[Sweep]:
    """Search the best value of each key in turn; started again, it continues where it was.

    ``table.md``, ``search.png`` and ``best.yaml`` are written to ``output`` after every key, beside
    Optuna's ``search.journal`` and the runs.

    Args:
        config_file: of any host.
        spaces: key to the values to try, in the order of the search.
        output: a folder of its own.
        metric: ``group/name`` in a run's results; default ``bbox/AP`` for detectors,
            ``accuracy/top1`` for classifiers.
        seeds: default: those of the config.
        overrides: ``KEY VALUE`` pairs for all runs.
        jobs: values that are trained at a time.
        num_gpus: processes of each run.
        stop: called while trainings run; True ends them and the search.
        run: replaces the training.

    Raises:
        KDError: before the first training, about any value that would fail later; or every value of
            a key failed, or the search in ``output`` was begun with other settings.
    """
    if jobs < 1 or (jobs > 1 and num_gpus > 1):
        fail(
            expected="at least one job, and only one where a run has several processes",
            received=f"{jobs} jobs of {num_gpus} processes",
            remedy="give --jobs 1, or --num-gpus 1",
        )
    config = TunedConfig(config_file, overrides)
    config.check(spaces)
    metric, seeds = config.metric(metric), config.seeds(seeds)

    def write(sweeps: Sequence[Sweep]) -> None:
        (output / TABLE).write_text(table(sweeps, metric, seeds))
        draw(sweeps, metric, output / PLOT)
        config.write(output / BEST, {sweep.key: sweep.best.value for sweep in sweeps})

    total = len(seeds) * sum(space.trials for space in spaces.values())
    with _locked(output) as lock, _Bar(total) as bar:
        run = run or TrainNet(config_file, overrides, metric, num_gpus, jobs, lock, stop)
        return greedy_search(
            spaces,
            run,
            output,
            seeds=seeds,
            settings=lambda fixed: {"metric": metric, **config.settings(fixed)},
            progress=bar,
            after_key=write,
            jobs=jobs,
        )


@contextmanager
def _locked(output: Path) -> Iterator[int]:
    """A lock against a second search in a folder, which a surviving training still holds."""
    output.mkdir(parents=True, exist_ok=True)
    with (output / LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            fail(
                expected=f"no other search in {output}",
                received="one that is running, or a training of one that was killed",
                remedy=f"wait for it, or end it: fuser {output / LOCK} names its process",
            )
        yield file.fileno()


class _Bar(Progress):
    """A progress bar over all runs of a search, on standard error."""

    def __init__(self, total: int) -> None:
        super().__init__(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("runs,"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            # A run takes minutes or days: the time left is estimated from all of them.
            speed_estimate_period=float("inf"),
        )
        self._runs = self.add_task("", total=total)

    def begin(self, key: str, done: int) -> None:
        self.update(self._runs, description=key)
        if done:
            # Runs of an earlier start do not count for the speed of this one.
            completed = int(self.tasks[self._runs].completed) + done
            self.reset(self._runs, completed=completed, description=key)
        self.advance(self._runs, 0)  # where the time of the first run begins

    def finish(self, runs: int) -> None:
        self.advance(self._runs, runs)
