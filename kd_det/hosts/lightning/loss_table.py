"""The parts of progress bars that all hosts share: columns, and the current losses below them."""

from __future__ import annotations

from collections.abc import Mapping

from rich.columns import Columns
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

_ROWS = {"loss/task": "task", "loss/kd": "kd", "loss": "total"}
_ORDER = ("total", "task", "kd", "eval")


def bar_columns(width: int) -> list[ProgressColumn]:
    """Description of ``width`` characters, bar, count, elapsed time and time left."""
    return [
        TextColumn(f"{{task.description:<{width}}}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    ]


def loss_table(values: Mapping[str, float]) -> Table:
    """Scalars by tag, one row per group; whatever is no loss and no evaluation is left out."""
    rows: dict[str, list[Text]] = {}
    for tag, value in values.items():
        group, _, name = tag.rpartition("/")
        row = _ROWS.get(group, group)
        if row in _ORDER:
            shown = Text(f"{name} ", style="dim") if row != "total" else Text()
            rows.setdefault(row, []).append(shown.append(compact(value), style="default not dim"))
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(justify="right", style="bold", min_width=7)
    for row in _ORDER:
        if row in rows:
            # Columns, unlike text, never part a name from its number.
            table.add_row(row, Columns(rows[row], padding=(0, 3, 0, 0)))
    return table


def compact(value: float) -> str:
    """At most seven characters: ``0.412``, ``17.1``, ``1.2e-05``."""
    if value == 0 or 1e-3 <= abs(value) < 1e4:
        digits = 3 if abs(value) < 10 else 1
        return f"{value:.{digits}f}"
    return f"{value:.1e}"
