"""Fills the tables of ``methods/index.md`` from the registry and the pages of the methods.

Losses come from the registry, papers from the first sentences of their modules, and hosts from the
table of taps on a method's page, which has the name of the module.
"""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kd_det import LOSSES

INDEX = "methods/index"
PAGES = Path(__file__).resolve().parents[1] / "methods"
# Procedures, which go with any loss: page, and the module that opens with the paper.
PROCEDURES = {
    "KCD": ("kcd", "kd_det.procedures.kcd.condensation"),
    "UNIX": ("unix", "kd_det.procedures.unix"),
}

_PAPER = re.compile(r"(?:[\w-]+: )?(?P<what>[^(]+) \((?P<paper>.*?)(?:, (?P<link>https\S+))?\)[.,]")
_TITLE = re.compile('"(.*?)"')


@dataclass(frozen=True)
class Method:
    """Registered names, the page without its ending, and the module that opens with the paper."""

    names: tuple[str, ...]
    page: str
    module: str

    @property
    def text(self) -> str:
        return (PAGES / f"{self.page}.md").read_text()

    def row(self) -> str:
        what, paper = first_sentence(self.module)
        names = ", ".join(f"`{name}`" for name in self.names)
        classifiers, detectors = ("yes" if host else "" for host in hosts(self.text))
        return f"| [{names}]({self.page}.md) | {what} | {paper} | {classifiers} | {detectors} |"


def losses() -> list[Method]:
    """One method per module of the package that registers losses, by page."""
    names: dict[str, list[str]] = {}
    for name, loss in LOSSES:
        if loss.__module__.startswith("kd_det.losses."):
            names.setdefault(loss.__module__, []).append(name)
    # The module of a method, or the folder where it has several.
    methods = [Method(tuple(n), m.split(".")[2], m) for m, n in names.items()]
    return sorted(methods, key=lambda method: method.page)


def procedures() -> list[Method]:
    """One method per procedure."""
    return [Method((name,), page, module) for name, (page, module) in PROCEDURES.items()]


def first_sentence(module: str) -> tuple[str, str]:
    """The description of a method in its module's docstring, and its paper as Markdown."""
    doc = " ".join((importlib.import_module(module).__doc__ or "").split())
    match = _PAPER.match(doc)
    if match is None:
        raise ValueError(
            f"{module} should open with 'NAME: what it is (authors, \"title\", venue)'"
        )
    link = match["link"]
    paper = _TITLE.sub(lambda t: f"[{t[1]}]({link})" if link else f"*{t[1]}*", match["paper"])
    return match["what"][0].lower() + match["what"][1:], paper


def hosts(text: str) -> tuple[bool, bool]:
    """Whether a page names taps of classifiers and of detectors, by the rows of its tap table."""
    section = text.partition("\n## Taps\n")[2].partition("\n## ")[0]
    table = re.search(r"^\| host \|.*\n\|[ |-]+\|\n((?:\|.*\n?)+)", section, re.MULTILINE)
    rows = table[1].splitlines() if table else []
    classifiers = [row.startswith("| classifier") for row in rows]
    return any(classifiers), not all(classifiers)


def table(methods: list[Method]) -> str:
    """A Markdown table, one row per method."""
    head = (
        "| name | what it is | paper | classifiers | detectors |\n| --- | --- | --- | --- | --- |"
    )
    return "\n".join([head, *(method.row() for method in methods)])


def setup(app: Any) -> dict[str, bool]:
    """Called by Sphinx."""
    app.connect("source-read", _fill)
    # Always rebuilt: Sphinx does not see the modules that it depends on.
    app.connect("env-get-outdated", lambda *_: [INDEX])
    return {"parallel_read_safe": True}


def _fill(app: Any, name: str, source: list[str]) -> None:
    if name == INDEX:
        for marker, methods in (("losses", losses()), ("procedures", procedures())):
            source[0] = source[0].replace(f"<!-- table of {marker} -->", table(methods))
