"""Pictures at regular iterations of a training; the iterations between them cost nothing.

Parameters, statistics and random streams of the training are left as they are.
"""

from __future__ import annotations

import logging
from contextlib import ExitStack

from torch import Tensor

from kd_det.bench.workbench import Workbench
from kd_det.visualize.canvas import to_pixels
from kd_det.visualize.draw import draw
from kd_det.visualize.watch import Recording, watching

IMAGES = 4

logger = logging.getLogger(__name__)


class PeriodicPictures:
    """Records and draws the iterations that ``period`` divides.

    Args:
        bench: the run.
        period: iterations between two pictures.
    """

    def __init__(self, bench: Workbench, period: int) -> None:
        self.bench = bench
        self.period = period
        self._hooks = ExitStack()
        self._recordings: list[Recording] = []

    def begin(self, iteration: int) -> None:
        """Before the forward of an iteration, counted from 0."""
        if iteration % self.period == 0:
            self._recordings = self._hooks.enter_context(watching(self.bench, IMAGES))

    def end(self) -> dict[str, Tensor]:
        """After the forward: uint8 RGB ``[3, H, W]`` by TensorBoard tag, empty if none is due."""
        recordings = self._recordings
        self.stop()
        if not recordings:
            return {}
        try:
            figures = draw(self.bench, recordings[-1])
            return {f"distilled/{name}": to_pixels(figure) for name, figure in figures.items()}
        except Exception:
            # A picture is no reason to end a training.
            logger.exception("what is distilled could not be drawn")
            return {}

    def stop(self) -> None:
        """Remove the hooks."""
        self._hooks.close()
        self._recordings = []
