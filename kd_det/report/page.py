"""Sections as one HTML page that needs nothing else, and as Markdown with pictures beside it."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

import kd_det
from kd_det.core.files import replace_text
from kd_det.report.blocks import Figure, Gallery, Picture, Section

PAGE, MARKDOWN, PICTURES = "report.html", "report.md", "report_pictures"


def write_page(folder: Path, title: str, subtitle: str, sections: Sequence[Section]) -> Path:
    """Write both files and the pictures; an earlier report of this folder is replaced.

    Args:
        folder: exists.
        title: of the page.
        subtitle: below it.
        sections: in their order.

    Returns:
        The HTML page.
    """
    pictures = {picture.name: picture for picture in _pictures(sections)}
    (folder / PICTURES).mkdir(exist_ok=True)
    for picture in pictures.values():
        (folder / PICTURES / picture.name).write_bytes(picture.content)
    environment = Environment(
        loader=PackageLoader("kd_det.report", "templates"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=lambda name: name is not None and ".html" in name,
    )
    environment.filters |= {"data_uri": _data_uri, "cell": _markdown_cell, "md": _markdown}
    values = {
        "title": title,
        "subtitle": subtitle,
        "sections": sections,
        "version": kd_det.__version__,
        "written": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "pictures": PICTURES,
    }
    for name in (MARKDOWN, PAGE):
        text = environment.get_template(f"{name}.jinja").render(values)
        replace_text(folder / name, re.sub(r"\s*\n\n\n+", "\n\n", re.sub(r"[ ]+\n", "\n", text)))
    return folder / PAGE


def _pictures(sections: Sequence[Section]) -> Iterator[Picture]:
    for section in sections:
        for block in section.blocks:
            if isinstance(block, Figure):
                yield block.picture
            elif isinstance(block, Gallery):
                for _, pictures in block.rows:
                    yield from pictures


def _data_uri(content: bytes, mime: str) -> str:
    return f"data:{mime};base64,{base64.b64encode(content).decode()}"


def _markdown_cell(text: str) -> str:
    return _markdown(text).replace("|", "\\|").replace("\n", " ")


def _markdown(text: str) -> str:
    """Text that must not be read as HTML: names of folders may hold anything."""
    return text.replace("\\", "\\\\").replace("&", "&amp;").replace("<", "&lt;")
