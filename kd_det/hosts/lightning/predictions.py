"""Predictions of an evaluation on several processes, as one file."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kd_det.core.distributed import gather_objects, rank
from kd_det.core.files import replace_text


def write_predictions(path: Path, own: Sequence[Any], order: Callable[[Any], Any]) -> None:
    """Write the predictions of all processes, sorted, as one JSON list; every process must call it.

    Numbers keep their full precision; predictions with the same key of ``order`` keep their order.
    """
    gathered = [entry for part in gather_objects(list(own)) for entry in part]
    if rank() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, json.dumps(sorted(gathered, key=order)))
