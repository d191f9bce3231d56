"""Predictions of an evaluation on several processes, as one file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from kd_det.core.files import replace_text


def gather_objects(own: Any) -> list[Any]:
    """``own`` of every process, in their order; every process must call it."""
    if not (dist.is_available() and dist.is_initialized()):
        return [own]
    everyones: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyones, own)
    return everyones


def write_predictions(path: Path, entries: Sequence[Any]) -> None:
    """Write a list as JSON, on the main process; numbers keep their full precision."""
    if dist.is_available() and dist.is_initialized() and dist.get_rank():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, json.dumps(list(entries)))
