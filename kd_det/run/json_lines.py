"""Files of one JSON object per line, such as ``metrics.json``, that runs add to."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any


def end_last_line(path: str | Path) -> None:
    """End the last line of a file, if there is one without an end.

    A run that was killed while it wrote leaves the beginning of a line, to which the resumed run
    would add its first.
    """
    path = Path(path)
    if not path.is_file() or not path.stat().st_size:
        return
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        if file.read(1) != b"\n":
            file.write(b"\n")


def read_json_lines(path: str | Path) -> list[dict[str, Any]]:
    """The objects of a file; a line that a crash has cut is left out."""
    objects = []
    for line in Path(path).read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            objects.append(json.loads(line))
    return objects
