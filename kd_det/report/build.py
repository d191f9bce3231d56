"""From the folders of runs to the report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from kd_det.core.files import writable_folder
from kd_det.report import sections
from kd_det.report.blocks import Block, Section, Text, describe
from kd_det.report.cost import Measured, measure_all
from kd_det.report.groups import Problem, Study, collect
from kd_det.report.page import write_page
from kd_det.report.scoring import Truths, score
from kd_det.report.showcase import examples
from kd_det.report.summary import headline


def write_report(
    runs: Sequence[str],
    baseline: Sequence[str],
    teacher: Sequence[str] = (),
    output: str | Path = "outputs/report",
    measure: bool = True,
    console: Console | None = None,
) -> Path:
    """Write ``report.html`` and ``report.md`` about runs.

    A run that is broken, or anything of it, is named in the report and left out.

    Args:
        runs: ``OUTPUT_DIR`` of distilled runs, folders of ``SEEDS``, or glob patterns.
        baseline: likewise, of the student alone.
        teacher: likewise; may be empty.
        output: folder of the report. An earlier report there is replaced.
        measure: build the models and measure what they cost on this machine.
        console: where progress is shown; default standard error.

    Returns:
        The HTML page.

    Raises:
        KDError: ``output`` cannot be written to; ``baseline``, ``teacher`` or all of ``runs`` name
            no folder.
    """
    output = Path(output)
    writable_folder(output)
    with Progress(
        TextColumn("{task.description:<18}"), BarColumn(), MofNCompleteColumn(),
        TimeElapsedColumn(), console=console or Console(stderr=True),
    ) as progress:  # fmt: skip
        reading = progress.add_task("reading runs", total=None)
        study = collect(runs, baseline, teacher)
        progress.update(reading, total=len(study.runs), completed=len(study.runs))
        truths: Truths = {}
        for run in progress.track(study.runs, description="evaluating"):
            score(run, truths)
        measured = _measure(study, progress) if measure else []
        best = headline(study)
        drawing = progress.add_task("writing", total=2)
        makers: dict[str, Callable[[], list[Block]]] = {
            "Summary": lambda: sections.summary(study, best, measured),
            "Accuracy": lambda: sections.accuracy(study),
            "Cost": lambda: sections.cost(study, measured),
            "Curves": lambda: sections.curves(study),
            "Examples": lambda: examples(study, best, truths, measure),
            "Configuration": lambda: sections.differences(study),
            "Runs": lambda: sections.runs(study),
            # Last: what went wrong with the others is part of it.
            "Problems": lambda: sections.problems(study),
        }
        shown = [Section(title, _made(study, title, make)) for title, make in makers.items()]
        progress.advance(drawing)
        page = write_page(output, "Distillation report", _subtitle(study), shown)
        progress.advance(drawing)
    return page


def _measure(study: Study, progress: Progress) -> list[Measured]:
    task = progress.add_task("measuring models", total=None)

    def done(label: str, total: int) -> None:
        progress.update(task, advance=1, total=total)

    measured = measure_all(study, done)
    study.problems += [
        Problem(
            ", ".join(group.label for group in m.groups), f"its cost was not measured: {m.failure}"
        )
        for m in measured
        if m.cost is None
    ]
    return measured


def _made(study: Study, title: str, make: Callable[[], list[Block]]) -> list[Block]:
    try:
        return make()
    # A run may be broken in ways that nobody thought of; the other sections are still of use.
    except Exception as error:
        study.problems.append(Problem(title, describe(error)))
        return [Text("This section could not be made; see Problems.")]


def _subtitle(study: Study) -> str:
    data = {run.test_sets[0] for run in study.runs if run.test_sets}
    number = len(study.groups)
    plural = "" if number == 1 else "s"
    parts = [f"{number} distilled configuration{plural}, {len(study.runs)} runs"]
    parts += [f"evaluated on {', '.join(sorted(data))}"] if data else []
    return ", ".join(parts)
