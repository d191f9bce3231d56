"""KCD on this host: :mod:`kd_det.hosts.detection.kcd`, and which images a batch has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kd_det.hosts.detection.kcd import (
    StageLoader,
    build_condensation,
    check_kcd,
    costs,
    planned_config,
    report_costs,
)

__all__ = [
    "StageLoader",
    "build_condensation",
    "check_kcd",
    "costs",
    "dataset_indices",
    "planned_config",
    "report_costs",
]


def dataset_indices(targets: Sequence[dict[str, Any]]) -> list[int]:
    """Places of a batch's images in the training set."""
    return [target["index"] for target in targets]
