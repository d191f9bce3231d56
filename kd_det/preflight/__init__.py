"""Look at a run for two minutes before it starts: ``tools/preflight.py``, ``PREFLIGHT: True``."""

from kd_det.preflight.context import Settings
from kd_det.preflight.findings import Finding, Preflight, Section, Table
from kd_det.preflight.gate import preflight, require
from kd_det.preflight.run import run_preflight

__all__ = [
    "Finding",
    "Preflight",
    "Section",
    "Settings",
    "Table",
    "preflight",
    "require",
    "run_preflight",
]
