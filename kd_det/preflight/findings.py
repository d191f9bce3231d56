"""The result of preflight as data: sections of findings, tables and numbers, and a verdict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partialmethod
from typing import Any

from kd_det.document import blocks
from kd_det.document.blocks import Finding, Level, Picture, Table, row


@dataclass
class Section:
    """One part of preflight, which took ``seconds``.

    Attributes:
        picture: shown below the tables; its file lies beside the report.
        data: the numbers behind the tables, ready for JSON.
    """

    title: str
    findings: list[Finding] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    picture: Picture | None = None
    data: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    def _add(self, level: Level, message: str) -> None:
        self.findings.append(Finding(level, self.title, message))

    error = partialmethod(_add, "error")  # a reason not to start the run
    warn = partialmethod(_add, "warning")  # may be intended, but should be looked at
    ok = partialmethod(_add, "ok")
    note = partialmethod(_add, "note")

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        self.tables.append(Table(title, columns, [row(*cells) for cells in rows]))

    def shown(self) -> blocks.Section:
        parts: list[blocks.Block] = [*self.tables, blocks.Findings(self.findings)]
        if self.picture is not None:
            parts.append(blocks.Figure(self.picture.text, self.picture))
        return blocks.Section(self.title, parts, f"{self.seconds:.1f} s")

    def as_dict(self) -> dict[str, Any]:
        tables = [
            {"title": t.title, "columns": t.columns, "rows": [[c.text for c in r] for r in t.rows]}
            for t in self.tables
        ]
        return {
            "title": self.title,
            "findings": [asdict(finding) for finding in self.findings],
            "tables": tables,
            "picture": self.picture.name if self.picture else "",
            "data": self.data,
            "seconds": self.seconds,
        }


@dataclass
class Preflight:
    """The whole result for the run in the folder ``name``, which took ``seconds``."""

    name: str
    host: str
    sections: list[Section] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def errors(self) -> list[Finding]:
        """Reasons not to start the run."""
        return self._findings("error")

    @property
    def warnings(self) -> list[Finding]:
        """Facts that should be looked at."""
        return self._findings("warning")

    @property
    def ready(self) -> bool:
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
        return next(section for section in self.sections if section.title == title)

    def shown_verdict(self) -> blocks.Verdict:
        """The verdict with the findings that it counts."""
        level: Level = "error" if self.errors else "warning" if self.warnings else "ok"
        findings = [*self.errors, *self.warnings]
        return blocks.Verdict(level, self.verdict, findings, f"{self.seconds:.0f} seconds")

    def shown(self) -> blocks.Document:
        sections = [section.shown() for section in self.sections]
        return blocks.Document(
            f"Preflight: {self.verdict}",
            f"{self.name} · {self.host}",
            [blocks.Section("Verdict", [self.shown_verdict()]), *sections],
        )

    def as_dict(self) -> dict[str, Any]:
        sections = [section.as_dict() for section in self.sections]
        verdict = {"verdict": self.verdict, "ready": self.ready}
        return {**verdict, **vars(self), "sections": sections}

    def _findings(self, level: Level) -> list[Finding]:
        return [f for section in self.sections for f in section.findings if f.level == level]


def counted(number: int, noun: str, plural: str = "s") -> str:
    """``"1 image"``, ``"2 images"``."""
    return f"{number} {noun}{'' if number == 1 else plural}"
