"""kd_det: make a small detector or classifier learn from a large one.

The core needs torch and fvcore only; everything that knows a framework is in
:mod:`kd_det.hosts` and is imported on demand.
"""

import kd_det.losses  # noqa: F401  (fills the registry)
from kd_det.core.distiller import Distiller, tap_specs
from kd_det.core.errors import KDError
from kd_det.core.registry import LOSSES, SCHEDULES
from kd_det.core.taps import Tap, TapRecorder
from kd_det.core.teacher import FrozenTeacher

__version__ = "0.1.0"

__all__ = [
    "LOSSES",
    "SCHEDULES",
    "Distiller",
    "FrozenTeacher",
    "KDError",
    "Tap",
    "TapRecorder",
    "tap_specs",
]
