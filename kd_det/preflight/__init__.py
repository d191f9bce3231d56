"""Look at a run for two minutes before it starts: ``tools/preflight.py``, ``PREFLIGHT: True``."""

from kd_det.preflight.context import Settings
from kd_det.preflight.findings import Preflight, Section
from kd_det.preflight.gate import preflight, require
from kd_det.preflight.run import run_preflight

__all__ = ["Preflight", "Section", "Settings", "preflight", "require", "run_preflight"]
