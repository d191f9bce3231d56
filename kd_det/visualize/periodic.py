"""Pictures every so many iterations of a training, which pays nothing in between.

Parameters, statistics and random streams of the training are left as they are.
"""

from __future__ import annotations

import logging
from contextlib import ExitStack

from fvcore.common.config import CfgNode
from torch import Tensor, nn

from kd_det.core.distiller import Distiller
from kd_det.visualize.canvas import to_pixels
from kd_det.visualize.draw import draw
from kd_det.visualize.subject import find_subject
from kd_det.visualize.watch import Recording, Subject, watching

IMAGES = 4

logger = logging.getLogger(__name__)


def start_pictures(cfg: CfgNode, student: nn.Module, distiller: Distiller) -> PeriodicPictures:
    """The pictures of a run; a :data:`kd_det.hosts.base.MakePictures`."""
    return PeriodicPictures(find_subject(cfg, student, distiller), cfg.VIS_PERIOD)


class PeriodicPictures:
    """Watches the iterations whose pictures are due, those that ``period`` divides.

    Args:
        subject: the run.
        period: iterations between two pictures.
    """

    def __init__(self, subject: Subject, period: int) -> None:
        self.subject = subject
        self.period = period
        self._hooks = ExitStack()
        self._recordings: list[Recording] = []

    def begin(self, iteration: int) -> None:
        """Before the forward of an iteration, counted from 0."""
        if iteration % self.period == 0:
            self._recordings = self._hooks.enter_context(watching(self.subject, IMAGES))

    def end(self) -> dict[str, Tensor]:
        """After it: uint8 RGB ``[3, H, W]`` by TensorBoard tag; none if none are due."""
        recordings = self._recordings
        self.stop()
        if not recordings:
            return {}
        try:
            figures = draw(self.subject, recordings[-1])
            return {f"distilled/{name}": to_pixels(figure) for name, figure in figures.items()}
        except Exception:
            # A training of days must not end over a picture.
            logger.exception("what is distilled could not be drawn")
            return {}

    def stop(self) -> None:
        """Stop listening."""
        self._hooks.close()
        self._recordings = []
