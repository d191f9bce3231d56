"""Documents as HTML pages that need no other file, and as Markdown with pictures beside it."""

from __future__ import annotations

import re
from datetime import datetime, timezone

from jinja2 import Environment, PackageLoader, StrictUndefined

import kd_det
from kd_det.document.blocks import MARKS, Document


def html(document: Document) -> str:
    """One page with its style and its pictures inside, without scripts or requests."""
    return _render("page.html.jinja", document)


def markdown(document: Document, pictures: str) -> str:
    """The same as Markdown; the pictures are expected in the folder ``pictures`` beside it."""
    return _render("page.md.jinja", document, pictures=pictures)


def _render(template: str, document: Document, **values: str) -> str:
    environment = Environment(
        loader=PackageLoader("kd_det.document"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=lambda name: name is not None and ".html" in name,
    )
    environment.filters["md"] = _markdown
    environment.filters["cell"] = lambda x: _markdown(x).replace("|", "\\|").replace("\n", " ")
    text = environment.get_template(template).render(
        document=document,
        marks=MARKS,
        version=kd_det.__version__,
        written=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        **values,
    )
    return re.sub(r"\s*\n\n\n+", "\n\n", re.sub(r"[ ]+\n", "\n", text))


def _markdown(text: str) -> str:
    """Text that must not be read as HTML: names of folders may hold anything."""
    return text.replace("\\", "\\\\").replace("&", "&amp;").replace("<", "&lt;")
