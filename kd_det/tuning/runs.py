"""One training run of a search: a process of ``kd-det train``, and its metric."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kd_det.core.errors import KDError, fail, nearest
from kd_det.run.folder import RESULTS
from kd_det.tuning.space import as_text

TRAIN = ("-m", "kd_det.app.main", "train")
"""Arguments of the interpreter; the console command need not be on the path."""
SCREEN = "screen.txt"
_REFUSED = 2  # what it returns for a mistake in its input
_POLL_SECONDS = 0.2
_GRACE_SECONDS = 10.0


class RunError(KDError):
    """A training that failed, for instance because it diverged; other values may succeed."""


@dataclass
class TrainNet:
    """Trains one config with given values and seed, and returns a metric.

    A finished run is read, an interrupted one continues from its last checkpoint.

    Attributes:
        overrides: ``KEY VALUE`` pairs, the same for all runs.
        metric: ``group/name``, such as ``bbox/AP`` or ``accuracy/top1``.
        num_gpus: processes of each run.
        jobs: runs at a time, which share the cores of the machine.
        lock: a file descriptor that trainings inherit, so that a lock on it outlives a killed
            search as long as its training does.
        stop: called while a training runs; True ends it.
    """

    config_file: str
    overrides: Sequence[str]
    metric: str
    num_gpus: int = 1
    jobs: int = 1
    lock: int | None = None
    stop: Callable[[], bool] = lambda: False

    def __call__(self, values: Mapping[str, float], seed: int, output: Path) -> float:
        """Train into ``output`` with ``values`` over the config's own.

        Raises:
            RunError: the training failed.
            KDError: ``kd-det train`` refused its input, or the metric is not among the results.
        """
        if read_results(output) is None:
            opts = [part for key, value in values.items() for part in (key, as_text(value))]
            self._train([*opts, "SEEDS", "[]", "SEED", str(seed)], output)
        return _pick(read_results(output) or {}, self.metric, output)

    def _train(self, opts: Sequence[str], output: Path) -> None:
        screen = output / SCREEN
        command = [sys.executable, *TRAIN, "--config-file", self.config_file]
        command += ["--num-gpus", str(self.num_gpus)]
        # Also without a checkpoint: the folder of an interrupted run is not new.
        command += ["--resume"] if screen.exists() else []
        command += [*self.overrides, *opts, "OUTPUT_DIR", str(output)]
        threads = max(1, (os.cpu_count() or 1) // self.jobs)
        output.mkdir(parents=True, exist_ok=True)
        with screen.open("a") as file:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={"OMP_NUM_THREADS": str(threads)} | os.environ,
                start_new_session=True,  # to end it together with the processes it starts
                pass_fds=[] if self.lock is None else [self.lock],
            )
            try:
                while process.poll() is None:
                    if self.stop():
                        raise KeyboardInterrupt
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(_POLL_SECONDS)
            finally:
                _end(process)
        if process.returncode:
            kind = KDError if process.returncode == _REFUSED else RunError
            raise kind(
                f"expected the run in {output} to finish; received exit status "
                f"{process.returncode} ({_last_line(screen)}); remedy: read {screen}"
            )


def read_results(output: Path) -> dict[str, Any] | None:
    """The results of a run, ``{group: {name: value}}``; None if it is not finished."""
    try:
        return json.loads((output / RESULTS).read_text())
    except (OSError, json.JSONDecodeError):  # interrupted in writing
        return None


def _pick(results: Mapping[str, Any], metric: str, output: Path) -> float:
    group, _, name = metric.partition("/")
    value = results.get(group, {}).get(name)
    if value is None:
        known = [f"{g}/{n}" for g, content in results.items() for n in content]
        fail(
            expected=f"the results of {output} to hold '{metric}'",
            received=f"{len(known)} others",
            remedy=nearest(metric, known) if known else "name DATASETS.TEST to evaluate on",
        )
    if not math.isfinite(value):
        raise RunError(
            f"expected a finite {metric}; received {value} in {output}; "
            f"remedy: read {output / SCREEN}"
        )
    return float(value)


def _last_line(screen: Path) -> str:
    lines = [line.strip() for line in screen.read_text(errors="replace").splitlines()]
    return next((line for line in reversed(lines) if line), "nothing on its screen")


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a training and the processes it started, if it is still running."""
    for signum in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is not None:
            return
        os.killpg(process.pid, signum)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE_SECONDS)
