"""The curves of a run from its ``metrics.json``, also where the file was damaged."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from pathlib import Path

#: name -> {iterations done: value}
Curves = dict[str, dict[int, float]]

_NAMED_LINES = 5


def read_metrics(path: Path) -> tuple[Curves, list[str]]:
    """Every scalar of a file of JSON lines, over iterations done.

    Where an iteration occurs again, after a resume, the later value counts. Lines that cannot be
    read are left out.

    Returns:
        The curves in the order of their iterations, and what was wrong with the file.
    """
    found: dict[str, dict[int, float]] = defaultdict(dict)
    broken = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            done = int(record["iteration"]) + 1
        except (ValueError, TypeError, KeyError, OverflowError):
            broken.append(number)
            continue
        for name, value in record.items():
            if name != "iteration" and isinstance(value, (int, float)) and math.isfinite(value):
                found[name][done] = float(value)
    curves = {name: dict(sorted(points.items())) for name, points in sorted(found.items())}
    return curves, [_described(path.name, broken)] if broken else []


def _described(name: str, lines: list[int]) -> str:
    listed = ", ".join(map(str, lines[:_NAMED_LINES]))
    more = f" and {len(lines) - _NAMED_LINES} more" if len(lines) > _NAMED_LINES else ""
    plural = "s" if len(lines) > 1 else ""
    return f"{name}: line{plural} {listed}{more} cut or not JSON, skipped"
