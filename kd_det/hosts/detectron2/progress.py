"""The bar of a run on a terminal (time left, task losses, terms), and the log of the run."""

from __future__ import annotations

import argparse
import io
import logging
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, redirect_stdout

from detectron2.config import CfgNode
from detectron2.engine import default_setup
from detectron2.engine.hooks import HookBase
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from rich.console import Console, RenderableType
from rich.logging import RichHandler
from rich.progress import Progress

from kd_det.hosts.base import Progress as Report
from kd_det.hosts.lightning.loss_table import bar_columns, loss_table
from kd_det.run.curves import CurveTag

# Seconds between two drawings. There is no thread that draws: loader processes are forked at
# any time, and would keep the locks it holds at that moment.
_DRAW_PERIOD = 0.2
# Iterations, and seconds of them, over which values and speed are taken.
_WINDOW, _SPEED_WINDOW = 20, 300.0
_STOCK_LOGS = ("detectron2", "fvcore")


class ProgressBar(Progress):
    """One bar for a whole run, below it the losses, by default on standard error.

    Use it as a context manager.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.losses: RenderableType = ""
        super().__init__(
            *bar_columns(10),
            console=console or Console(stderr=True),
            auto_refresh=False,
            speed_estimate_period=_SPEED_WINDOW,
            # What goes to a file stays out of the terminal.
            redirect_stdout=sys.stdout.isatty(),
        )
        #: The one task of the bar.
        self.run = self.add_task("Preparing", total=None)

    def get_renderables(self) -> Iterator[RenderableType]:
        """The bar and the losses."""
        yield from super().get_renderables()
        yield self.losses

    def finish(self, results: Mapping[str, Mapping[str, float]]) -> None:
        """Show that the run is over, and its results but for those of single classes."""
        self.update(self.run, description="Done")
        for kind, metrics in results.items():
            values = (f"{k} {v:.2f}" for k, v in metrics.items() if "-" not in k)
            self.console.print(f"{kind}: " + ", ".join(values), highlight=False)
        self.losses = ""


class ReportProgress(HookBase):
    """Calls a function after every iteration, in place of a bar."""

    def __init__(self, report: Report) -> None:
        self.report = report

    def after_step(self) -> None:
        self.report("train", self.trainer.iter + 1, self.trainer.max_iter)


class ShowProgress(HookBase):
    """Moves the bar of a run. Must come before the hook that evaluates, which takes a while.

    Args:
        bar: it shows this run until the next one takes it.
        eval_period: ``TEST.EVAL_PERIOD``; None where nothing is evaluated, not even at the end.
        name: shown before the bar.
    """

    def __init__(
        self,
        bar: ProgressBar,
        tag: CurveTag,
        eval_period: int | None = None,
        name: str = "Training",
    ) -> None:
        self.bar, self.tag, self.eval_period, self.name = bar, tag, eval_period, name
        self._drawn = 0.0

    def before_train(self) -> None:
        # A resumed run goes on where it was; the speed is that of its own iterations.
        total, done = self.trainer.max_iter, self.trainer.start_iter
        self.bar.reset(self.bar.run, total=total, completed=done, description=self.name)

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        self.bar.update(self.bar.run, completed=done)
        evaluates = bool(self.eval_period) and done % self.eval_period == 0
        if evaluates or time.monotonic() - self._drawn > _DRAW_PERIOD:
            self._draw("Evaluating" if evaluates else self.name)

    def after_train(self) -> None:
        evaluates = self.eval_period is not None and self.trainer.iter >= self.trainer.max_iter
        self._draw("Evaluating" if evaluates else self.name)

    def _draw(self, description: str) -> None:
        smoothed = self.trainer.storage.latest_with_smoothing_hint(_WINDOW)
        values = {self.tag(name): value for name, (value, _) in smoothed.items()}
        for kind in ("bbox", "segm"):
            if f"{kind}/AP" in values:
                values[f"eval/{kind} AP"] = values[f"{kind}/AP"]
        self.bar.losses = loss_table(values)
        self.bar.update(self.bar.run, description=description, refresh=True)
        self._drawn = time.monotonic()


@contextmanager
def progress_bar(wanted: bool = True) -> Iterator[ProgressBar | None]:
    """The bar, if wanted, on the main process of a run whose standard error is a terminal."""
    shown = wanted and comm.is_main_process() and sys.stderr.isatty()
    with ProgressBar() if shown else nullcontext() as bar:
        yield bar


def setup_logging(
    cfg: CfgNode,
    args: argparse.Namespace,
    bar: ProgressBar | None,
    package: str,
    on_screen: bool = True,
) -> None:
    """Detectron2's setup of a run, with the log of ``package`` beside its own, in ``log.txt``.

    Args:
        cfg: the config of the run.
        args: logged as the command line.
        bar: where there is one, the screen shows warnings only, above it.
        package: the name of a logger.
        on_screen: False keeps the log off a screen without a bar.
    """
    names = (*_STOCK_LOGS, package)
    for name in names:
        # Stages and seeds are several runs in one process, and each would print through the
        # handlers of all before it.
        logging.getLogger(name).handlers.clear()
    setup_logger.cache_clear()
    on_screen = on_screen and bar is None
    screen = sys.stdout if on_screen else io.StringIO()
    with redirect_stdout(screen):
        default_setup(cfg, args)
        setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name=package)
    for log in map(logging.getLogger, names):
        if not on_screen:
            # Detectron2's setup cannot be called without a handler for the screen.
            log.handlers = [x for x in log.handlers if getattr(x, "stream", None) is not screen]
        if bar is not None:
            above = RichHandler(logging.WARNING, bar.console, show_time=False, show_path=False)
            log.addHandler(above)
