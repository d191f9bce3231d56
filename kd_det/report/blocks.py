"""What a report is made of. The page and the Markdown file render the same blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from kd_det.core.errors import KDError

Tone = Literal["", "good", "bad", "muted", "strong"]


@dataclass(frozen=True)
class Cell:
    """Text of a table.

    Attributes:
        text: what stands there.
        tone: how it is set.
        note: a second, smaller line.
        note_tone: how that is set.
    """

    text: str
    tone: Tone = ""
    note: str = ""
    note_tone: Tone = "muted"


@dataclass(frozen=True)
class Picture:
    """An image file.

    Attributes:
        name: of the file beside the Markdown, with its ending.
        content: of the file.
        text: says what it shows.
        dark: the same for a dark page; None if one serves both.
    """

    name: str
    content: bytes
    text: str
    dark: bytes | None = None

    @property
    def mime(self) -> str:
        """By the ending of its name."""
        ending = self.name.rpartition(".")[2]
        return {"svg": "image/svg+xml", "jpg": "image/jpeg"}[ending]


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str
    kind: str = "text"


@dataclass(frozen=True)
class Facts:
    """A few numbers to see first, each with what it says."""

    entries: Sequence[tuple[str, str]]
    kind: str = "facts"


@dataclass(frozen=True)
class Table:
    """Rows of cells; the first column names the row.

    Attributes:
        title: above it.
        columns: headings.
        rows: as many cells each.
        note: below it.
        words: columns hold words rather than numbers, and are set to the left.
        folded: the page shows it on demand.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    note: str = ""
    words: bool = False
    folded: bool = False
    kind: str = "table"


@dataclass(frozen=True)
class Figure:
    """One picture over the whole width."""

    title: str
    picture: Picture
    note: str = ""
    kind: str = "figure"


@dataclass(frozen=True)
class Gallery:
    """Rows of pictures side by side.

    Attributes:
        title: above it.
        columns: headings.
        rows: a caption and its pictures.
        note: below it.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[tuple[str, Sequence[Picture]]]
    note: str = ""
    kind: str = "gallery"


Block = Text | Facts | Table | Figure | Gallery


@dataclass(frozen=True)
class Section:
    """A part of the report with an entry in its navigation."""

    title: str
    blocks: list[Block] = field(default_factory=list)

    @property
    def anchor(self) -> str:
        """Its address in the page."""
        return self.title.lower().replace(" ", "-")


def describe(error: Exception) -> str:
    """What went wrong, for whoever reads the report; a KDError says it by itself."""
    return str(error) if isinstance(error, KDError) else f"{type(error).__name__}: {error}"


def row(name: str, *cells: str | Cell) -> list[Cell]:
    """A row of a table."""
    return [cell if isinstance(cell, Cell) else Cell(cell) for cell in (name, *cells)]
