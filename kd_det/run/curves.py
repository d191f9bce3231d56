"""Names of curves, the same on every host: ``loss/task/*``, ``loss/kd/*``, ``share/*``."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

#: Groups of what a distiller reports besides its losses; see :class:`kd_det.Distiller`.
GROUPS = ("raw", "weight", "share")
# The student's own losses that do not begin with loss_: those of torchvision's dense detectors.
_TASK_LOSSES = ("classification", "bbox_regression", "bbox_ctrness")


@dataclass(frozen=True)
class CurveTag:
    """``tag(name)``: the tag of a scalar that is logged, in a run with these terms.

    ``total_loss`` becomes ``loss/total``, a term ``loss/kd/<term>``, a loss of the student
    ``loss/task/<name without loss_>``; other names, such as ``share/review`` and ``lr``, stay.
    """

    terms: Collection[str] = ()

    def __call__(self, name: str) -> str:
        if name == "total_loss":
            return "loss/total"
        if name in self.terms:
            return f"loss/kd/{name}"
        if name in _TASK_LOSSES or name.startswith("loss_"):
            return f"loss/task/{name.removeprefix('loss_')}"
        return name
