"""The blocks that documents consist of: HTML, Markdown and the terminal show the same ones."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

Tone = Literal["", "good", "bad", "muted"]
Level = Literal["error", "warning", "ok", "note"]

MARKS: dict[Level, str] = {"error": "✗", "warning": "!", "ok": "✓", "note": "·"}

# A number with its sign, factor, unit and standard deviation, or a sign that there is none.
_NUMBER = re.compile(
    r"[-+×]? ?[\d,]*\.?\d+(e[+-]?\d+)?(%| ?[kMG]| ms)?( ± [\d,]*\.?\d+)?|[-–?]?", re.ASCII
)
_MIMES = {"svg": "image/svg+xml", "jpg": "image/jpeg", "png": "image/png"}


@dataclass(frozen=True)
class Cell:
    """Text of a table, and a second, smaller line below it."""

    text: str
    tone: Tone = ""
    note: str = ""
    note_tone: Tone = "muted"


def row(*cells: str | Cell) -> list[Cell]:
    """A row of a table."""
    return [cell if isinstance(cell, Cell) else Cell(cell) for cell in cells]


@dataclass(frozen=True)
class Picture:
    """An image file: SVG, JPEG or PNG, by the ending of its name beside a Markdown document.

    ``text`` describes it for readers who do not see it; ``dark`` is its content for dark pages,
    None if one picture serves both.
    """

    name: str
    content: bytes
    text: str
    dark: bytes | None = None

    def data_uri(self, dark: bool = False) -> str:
        """The picture as the source of an ``<img>``."""
        content = self.dark if dark and self.dark is not None else self.content
        mime = _MIMES[self.name.rpartition(".")[2]]
        return f"data:{mime};base64,{base64.b64encode(content).decode()}"


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str
    kind: str = "text"


@dataclass(frozen=True)
class Facts:
    """A few large numbers, each with its meaning."""

    entries: Sequence[tuple[str, str]]
    kind: str = "facts"


@dataclass(frozen=True)
class Finding:
    """One sentence that judges something, and the title of the section it belongs to."""

    level: Level
    section: str
    message: str


@dataclass(frozen=True)
class Findings:
    """A list of findings."""

    findings: Sequence[Finding]
    kind: str = "findings"


@dataclass(frozen=True)
class Verdict:
    """The result of a document in a few words, with the findings that it counts."""

    level: Level
    text: str
    findings: Sequence[Finding]
    remark: str = ""
    kind: str = "verdict"


@dataclass(frozen=True)
class Table:
    """Rows of as many cells as columns; the first column names the row.

    HTML shows a folded one on demand.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    note: str = ""
    folded: bool = False
    kind: str = "table"

    def is_numeric(self, column: int) -> bool:
        """Whether a column aligns to the right: its cells are numbers or stand for none."""
        cells = [row[column].text for row in self.rows] if column else []
        return any(cells) and all(map(_NUMBER.fullmatch, cells))


def table_of(
    title: str,
    heading: str,
    names: Sequence[str],
    columns: Mapping[str, Sequence[str | Cell]],
    note: str = "",
) -> Table:
    """A table from the names of its rows and its columns; columns without any entry are left out.

    Cells without an entry are empty or ``–``.
    """
    rows = [row(*cells) for cells in zip(*columns.values(), strict=True)]
    kept = [k for k in range(len(columns)) if any(r[k].text not in ("", "–") for r in rows)]
    headings = list(columns)
    return Table(
        title,
        [heading, *(headings[k] for k in kept)],
        [row(name, *(r[k] for k in kept)) for name, r in zip(names, rows, strict=True)],
        note,
    )


@dataclass(frozen=True)
class Figure:
    """One picture over the whole width."""

    title: str
    picture: Picture
    note: str = ""
    kind: str = "figure"


@dataclass(frozen=True)
class Gallery:
    """Rows of pictures side by side, each with a caption; the note stands above them.

    Without columns every picture is captioned by its own text.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[tuple[str, Sequence[Picture]]]
    note: str = ""
    kind: str = "gallery"


Block = Text | Facts | Findings | Verdict | Table | Figure | Gallery


@dataclass(frozen=True)
class Section:
    """A part of a document with an entry in its navigation, and a remark beside its title."""

    title: str
    blocks: Sequence[Block] = field(default_factory=list)
    remark: str = ""

    @property
    def anchor(self) -> str:
        """Its address in the page."""
        return self.title.lower().replace(" ", "-")


@dataclass(frozen=True)
class Document:
    """Sections below a title and a line about the whole."""

    title: str
    subtitle: str
    sections: Sequence[Section]

    def pictures(self) -> Iterator[Picture]:
        for section in self.sections:
            for block in section.blocks:
                if isinstance(block, Figure):
                    yield block.picture
                elif isinstance(block, Gallery):
                    for _, pictures in block.rows:
                        yield from pictures
