"""Sections of documents in a terminal; pictures are left to the page."""

from __future__ import annotations

from rich import box
from rich.console import Console, JustifyMethod
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from kd_det.document import blocks

_STYLES = {"error": "bold red", "warning": "yellow", "ok": "green", "note": "dim"}
_LONGEST = 16  # rows of a table; the page has all


def print_section(console: Console, section: blocks.Section) -> None:
    """Print the title of a section and its blocks."""
    console.print(Rule(Text(section.title, "bold"), align="left", style="blue"))
    for block in section.blocks:
        print_block(console, block)
    console.print()


def print_block(console: Console, block: blocks.Block) -> None:
    """Print a text, a table, findings or a verdict."""
    if isinstance(block, blocks.Text):
        console.print(Text(block.text))
    elif isinstance(block, blocks.Table):
        # Rich breaks a table's own title to the width of the table.
        console.print(Text(block.title, "italic"))
        console.print(_table(block))
    elif isinstance(block, (blocks.Findings, blocks.Verdict)):
        for finding in block.findings:
            console.print(_finding(finding, with_section=isinstance(block, blocks.Verdict)))
    if isinstance(block, blocks.Verdict):
        style = _STYLES[block.level].removeprefix("bold ")
        text = Text(block.text, f"bold {style}")
        console.print(text.append(f"  ({block.remark})", "dim") if block.remark else text)


def _table(table: blocks.Table) -> Table:
    shown = Table(box=box.SIMPLE_HEAD, header_style="bold", padding=(0, 1), pad_edge=False)
    for index, column in enumerate(table.columns):
        justify: JustifyMethod = "right" if table.is_numeric(index) else "left"
        shown.add_column(column, justify=justify, overflow="fold")
    for cells in table.rows[:_LONGEST]:
        shown.add_row(*(Text(cell.text) for cell in cells))
    if len(table.rows) > _LONGEST:
        more = f"... and {len(table.rows) - _LONGEST} more"
        shown.add_row(*([more, *[""] * (len(table.columns) - 1)]))
    return shown


def _finding(finding: blocks.Finding, with_section: bool) -> Text:
    style = _STYLES[finding.level]
    text = Text(f"{blocks.MARKS[finding.level]} ", style)
    if with_section:
        text.append(f"{finding.section}: ", "bold")
    return text.append(finding.message, style if finding.level in ("error", "warning") else "")
