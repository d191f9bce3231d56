"""What every detection host refuses about terms before anything is trained."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

from kd_det.core.errors import fail
from kd_det.core.registry import LOSSES
from kd_det.core.terms import Term

BOX_TAPS = ("box_pooled", "box_features", "box_logits")
"""Taps with one row for each sampled box."""


def check_detection_terms(terms: Sequence[Term]) -> None:
    """Refuse terms that a detector's loop or its taps cannot serve.

    Raises:
        KDError: a clipped term, or taps whose rows do not correspond.
    """
    for term in terms:
        if term.clip != "none":
            fail(
                expected=f"term '{term.name}' without a clip: detectors add up their losses and "
                "take one gradient",
                received=f"CLIP {term.clip}",
                remedy="set CLIP: none, and for MHGD REDUCTION: mean with a WEIGHT of its own",
            )
        _check_rows(term)


def _check_rows(term: Term) -> None:
    """Rows are images, RoIs, positive RoIs or anchors; only rows of one kind correspond."""
    rows = [(_rows(s), _rows(t)) for s, t in term.taps]
    for (s, t), (own, other) in zip(term.taps, rows, strict=True):
        if own != other:
            fail(
                expected=f"term '{term.name}' to compare {own} with {own}",
                received=f"student {s} with teacher {t}, one row for each of the {other}",
                remedy="tap the same kind of rows on both sides",
            )
    # Losses over a graph relate the rows of all their taps.
    arguments = inspect.signature(LOSSES.get(term.loss).__init__).parameters
    if "gather" in arguments and len(set(rows)) > 1:
        fail(
            expected=f"all taps of term '{term.name}' ({term.loss}) to have the same nodes",
            received=", ".join(f"{s}: {_rows(s)}" for s, _ in term.taps),
            remedy=f"tap maps only, or only {', '.join(BOX_TAPS)}",
        )


def _rows(tap: str) -> str:
    if tap in BOX_TAPS:
        return "RoIs"
    return {"mask_logits": "positive RoIs", "cls_logits": "anchors"}.get(tap, "images")
