"""Preflight as one HTML file that needs nothing else, and as JSON."""

from __future__ import annotations

import base64
import json
import math
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader

from kd_det.core.errors import fail
from kd_det.core.files import replace_text, writable_folder
from kd_det.preflight.findings import Preflight

HTML, JSON, PICTURE = FILES = ("preflight.html", "preflight.json", "teacher.png")


def prepare_folder(output: Path) -> None:
    """Make the report's folder, so that a mistake shows before anything is looked at.

    Raises:
        KDError: it cannot be written to, or holds something else than an earlier report.
    """
    writable_folder(output)
    others = sorted(path.name for path in output.iterdir() if path.name not in FILES)
    if others:
        fail(
            expected="a folder for the report that is new, empty, or holds an earlier report",
            received=f"'{output}', which holds {', '.join(others[:8])}",
            remedy="choose another one with --output",
        )


def write_report(report: Preflight, output: Path) -> None:
    """Write ``preflight.json`` and ``preflight.html`` into a folder of :func:`prepare_folder`."""
    replace_text(output / JSON, json.dumps(_plain(report.as_dict()), indent=2) + "\n")
    replace_text(output / HTML, render_page(report, output))


def render_page(report: Preflight, folder: Path) -> str:
    """The page; pictures are taken from ``folder`` and become part of it."""
    environment = Environment(
        loader=PackageLoader("kd_det.preflight", "."), autoescape=True, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    pictures = {
        section.title: base64.b64encode((folder / section.picture).read_bytes()).decode()
        for section in report.sections
        if section.picture and (folder / section.picture).is_file()
    }
    return environment.get_template("page.html").render(report=report, pictures=pictures)


def _plain(value: Any) -> Any:
    """What JSON can hold: it knows no infinity and no nan."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
