"""Files that a crash in the middle of writing leaves whole, and folders that take them."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from kd_det.core.errors import fail


def replace_text(path: str | Path, text: str) -> None:
    """Write a file as a whole: after a crash there is the old one or the new one."""
    path = Path(path)
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def writable_folder(folder: str | Path, option: str = "--output") -> Path:
    """A folder, made if need be; refused if it cannot be written to.

    ``option`` is what the user names another one with.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        fail(
            expected="an output folder that can be written to",
            received=f"'{folder}' ({error.strerror})",
            remedy=f"choose another one with {option}",
        )
    return folder
