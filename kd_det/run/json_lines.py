"""Files of one JSON object per line, such as ``metrics.json``, that runs add to."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any


def end_last_line(path: str | Path) -> None:
    """Let what is appended next begin on a line of its own.

    A run that was killed while it wrote leaves the beginning of a line; the first line of the
    resumed run would be lost in it, too. What is there stays as it is.

    Args:
        path: the file; it need not exist.
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
    found = []
    for line in Path(path).read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            found.append(json.loads(line))
    return found
