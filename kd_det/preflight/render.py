"""Preflight in a terminal."""

from __future__ import annotations

from rich import box
from rich.console import Console, JustifyMethod
from rich.rule import Rule
from rich.table import Table as RichTable
from rich.text import Text

from kd_det.preflight.findings import Finding, Preflight, Section, Table

_STYLES = {"error": "bold red", "warning": "yellow", "ok": "green", "note": "dim"}
_MARKS = {"error": "✗", "warning": "!", "ok": "✓", "note": "·"}
_LONGEST = 16  # rows of a table; the report has all


def show_section(console: Console, section: Section) -> None:
    """Print a section: its tables, then its findings."""
    console.print(Rule(Text(section.title, "bold"), align="left", style="blue"))
    for table in section.tables:
        # Not as the table's own title, which is broken to the table's width.
        console.print(Text(table.title, "italic"))
        console.print(_table(table))
    for finding in section.findings:
        console.print(_finding(finding))
    console.print()


def show_verdict(console: Console, report: Preflight) -> None:
    """Print the last line, and before it what it counts."""
    for finding in [*report.errors, *report.warnings]:
        console.print(_finding(finding, with_section=True))
    style = _STYLES["error" if report.errors else "warning" if report.warnings else "ok"]
    text = Text(f"{report.verdict}", f"bold {style.removeprefix('bold ')}")
    text.append(f"  ({report.seconds:.0f} seconds)", "dim")
    console.print(text)


def _table(table: Table) -> RichTable:
    shown = RichTable(box=box.SIMPLE_HEAD, header_style="bold", padding=(0, 1), pad_edge=False)
    for index, column in enumerate(table.columns):
        justify: JustifyMethod = "right" if table.is_numeric(index) else "left"
        shown.add_column(column, justify=justify, overflow="fold")
    for row in table.rows[:_LONGEST]:
        shown.add_row(*map(Text, row))
    if len(table.rows) > _LONGEST:
        more = f"... and {len(table.rows) - _LONGEST} more"
        shown.add_row(*([more, *[""] * (len(table.columns) - 1)]))
    return shown


def _finding(finding: Finding, with_section: bool = False) -> Text:
    style = _STYLES[finding.level]
    text = Text(f"{_MARKS[finding.level]} ", style)
    if with_section:
        text.append(f"{finding.section}: ", "bold")
    text.append(finding.message, style if finding.level in ("error", "warning") else "")
    return text
