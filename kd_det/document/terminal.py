"""Sections of documents in a terminal; pictures are left to the page."""

from __future__ import annotations

from rich import box
from rich.console import Console, JustifyMethod
from rich.rule import Rule
from rich.table import Table as RichTable
from rich.text import Text as RichText

from kd_det.document.blocks import (
    MARKS,
    Block,
    Finding,
    Findings,
    Level,
    Section,
    Table,
    Text,
    Verdict,
)

_STYLES: dict[Level, str] = {
    "error": "bold red",
    "warning": "yellow",
    "ok": "green",
    "note": "dim",
}
_LONGEST = 16  # rows of a table; the page has all


def print_section(console: Console, section: Section) -> None:
    """Print the title of a section and its blocks."""
    console.print(Rule(RichText(section.title, "bold"), align="left", style="blue"))
    for block in section.blocks:
        print_block(console, block)
    console.print()


def print_block(console: Console, block: Block) -> None:
    """Print a text, a table, findings or a verdict."""
    if isinstance(block, Text):
        console.print(RichText(block.text))
    elif isinstance(block, Table):
        # Rich breaks a table's own title to the width of the table.
        console.print(RichText(block.title, "italic"))
        console.print(_table(block))
    elif isinstance(block, (Findings, Verdict)):
        for finding in block.findings:
            console.print(_finding(finding, with_section=isinstance(block, Verdict)))
    if isinstance(block, Verdict):
        style = _STYLES[block.level].removeprefix("bold ")
        text = RichText(block.text, f"bold {style}")
        console.print(text.append(f"  ({block.remark})", "dim") if block.remark else text)


def _table(table: Table) -> RichTable:
    shown = RichTable(box=box.SIMPLE_HEAD, header_style="bold", padding=(0, 1), pad_edge=False)
    for index, column in enumerate(table.columns):
        justify: JustifyMethod = "right" if table.is_numeric(index) else "left"
        shown.add_column(column, justify=justify, overflow="fold")
    for cells in table.rows[:_LONGEST]:
        shown.add_row(*(RichText(cell.text) for cell in cells))
    if len(table.rows) > _LONGEST:
        more = f"... and {len(table.rows) - _LONGEST} more"
        shown.add_row(*([more, *[""] * (len(table.columns) - 1)]))
    return shown


def _finding(finding: Finding, with_section: bool) -> RichText:
    style = _STYLES[finding.level]
    text = RichText(f"{MARKS[finding.level]} ", style)
    if with_section:
        text.append(f"{finding.section}: ", "bold")
    return text.append(finding.message, style if finding.level in ("error", "warning") else "")
