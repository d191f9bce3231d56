"""Names of curves, the same on every host: ``loss/task/*``, ``loss/kd/*``, ``share/*``."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

#: Groups of what a distiller reports besides its losses; see :class:`kd_det.Distiller`.
GROUPS = ("raw", "weight", "share")
# The student's own losses that do not begin with loss_: those of torchvision's dense detectors.
_TASK_LOSSES = ("classification", "bbox_regression", "bbox_ctrness")


def curve_tag(name: str, terms: Collection[str]) -> str:
    """The tag of a logged scalar.

    Args:
        name: as it is logged: ``total_loss``, ``loss_cls``, a term, ``share/review``, ``lr``.
        terms: names of the run's terms.

    Returns:
        ``loss/total``, ``loss/task/<name without loss_>``, ``loss/kd/<term>``; other names stay.
    """
    if name == "total_loss":
        return "loss/total"
    if name in terms:
        return f"loss/kd/{name}"
    if name in _TASK_LOSSES or name.startswith("loss_"):
        return f"loss/task/{name.removeprefix('loss_')}"
    return name


@dataclass(frozen=True)
class CurveTag:
    """:func:`curve_tag` for one run: ``tag(name)``.

    Attributes:
        terms: names of the run's terms.
    """

    terms: Collection[str] = ()

    def __call__(self, name: str) -> str:
        """The tag of a logged scalar."""
        return curve_tag(name, self.terms)
