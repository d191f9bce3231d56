"""Data sets by name: where each lies. The only place that knows ``DETECTRON2_DATASETS``."""

from __future__ import annotations

import os
from pathlib import Path


def data_root() -> Path:
    """Where data sets live: ``$DETECTRON2_DATASETS``, or ``datasets`` as in Detectron2."""
    return Path(os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets")))
