"""The checkpoint the run would write, in the stock model."""

from __future__ import annotations

from kd_det.preflight.context import Context
from kd_det.preflight.findings import Section


def inspect_export(section: Section, context: Context) -> None:
    """Fill the section."""
    problems = context.bench.check_export()
    for problem in problems:
        section.error(problem)
    if not problems:
        section.ok(
            "the checkpoint this run would write loads into the stock model: every key fits, and "
            "its outputs are the same"
        )
