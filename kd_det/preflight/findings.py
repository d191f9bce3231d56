"""What preflight finds, as plain data: findings and tables in sections, and a verdict."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

_NUMBER = re.compile(r"-?[\d,]*\.?\d+(e[+-]?\d+)?%?")

Level = Literal["error", "warning", "ok", "note"]


@dataclass(frozen=True)
class Finding:
    """One sentence about the run.

    Attributes:
        level: ``error`` (do not train), ``warning`` (look at it), ``ok`` (checked and good) or
            ``note`` (nothing to judge).
        section: title of the section it belongs to.
        message: the sentence.
    """

    level: Level
    section: str
    message: str


@dataclass(frozen=True)
class Table:
    """A table of texts; numbers are formatted where their meaning is known.

    Attributes:
        title: above it.
        columns: headings.
        rows: as many cells as columns.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def is_numeric(self, column: int) -> bool:
        """Whether all cells of a column are numbers, or stand for none."""
        cells = [row[column] for row in self.rows]
        return any(cells) and all(cell in ("", "-") or _NUMBER.fullmatch(cell) for cell in cells)


@dataclass
class Section:
    """One part of preflight.

    Attributes:
        title: its heading.
        findings: in the order they were made.
        tables: likewise.
        picture: file name of a picture beside the report, or empty.
        data: the numbers behind the tables, ready for JSON.
        seconds: how long it took.
    """

    title: str
    findings: list[Finding] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    picture: str = ""
    data: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    def error(self, message: str) -> None:
        """Add what makes the run pointless."""
        self._add("error", message)

    def warn(self, message: str) -> None:
        """Add what may be meant, but is worth a look."""
        self._add("warning", message)

    def ok(self, message: str) -> None:
        """Add what was checked and is good."""
        self._add("ok", message)

    def note(self, message: str) -> None:
        """Add what is neither."""
        self._add("note", message)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Add a table."""
        self.tables.append(Table(title, tuple(columns), tuple(tuple(row) for row in rows)))

    def _add(self, level: Level, message: str) -> None:
        self.findings.append(Finding(level, self.title, message))


@dataclass
class Preflight:
    """Everything preflight found.

    Attributes:
        name: of the run, for headings: its config file or output folder.
        host: ``cfg.HOST``.
        sections: in the order of the work.
        seconds: how long it took.
    """

    name: str
    host: str
    sections: list[Section] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def errors(self) -> list[Finding]:
        """Findings that make the run pointless."""
        return [finding for finding in self._findings() if finding.level == "error"]

    @property
    def warnings(self) -> list[Finding]:
        """Findings that are worth a look."""
        return [finding for finding in self._findings() if finding.level == "warning"]

    @property
    def ready(self) -> bool:
        """Whether nothing speaks against the run."""
        return not self.errors

    @property
    def verdict(self) -> str:
        """``"ready"``, ``"ready, 2 warnings"`` or ``"not ready: 1 error"``."""
        if self.errors:
            return f"not ready: {counted(len(self.errors), 'error')}"
        if self.warnings:
            return f"ready, {counted(len(self.warnings), 'warning')}"
        return "ready"

    def section(self, title: str) -> Section:
        """The section of a title."""
        return next(section for section in self.sections if section.title == title)

    def as_dict(self) -> dict[str, Any]:
        """The same, ready for JSON."""
        return {"verdict": self.verdict, "ready": self.ready, **asdict(self)}

    def _findings(self) -> Iterator[Finding]:
        for section in self.sections:
            yield from section.findings


def counted(number: int, noun: str) -> str:
    """``"1 image"``, ``"2 images"``; a plural in s."""
    return f"{number} {noun}{'' if number == 1 else 's'}"
