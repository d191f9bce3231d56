"""The report, from the folders of runs to its files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from kd_det.core.files import replace_text, writable_folder
from kd_det.document.blocks import Block, Document, Section, Text
from kd_det.document.page import html, markdown
from kd_det.report import sections
from kd_det.report.cost import Measured, measure_all
from kd_det.report.groups import Problem, Study, collect
from kd_det.report.runs import describe
from kd_det.report.scores import Truths, score
from kd_det.report.summary import headline

PAGE, MARKDOWN, PICTURES = "report.html", "report.md", "report_pictures"


def write_report(
    runs: Sequence[str],
    baseline: Sequence[str],
    teacher: Sequence[str] = (),
    output: str | Path = "outputs/report",
    measure: bool = True,
    console: Console | None = None,
) -> Path:
    """Write ``report.html`` and ``report.md`` about runs; returns the HTML page.

    Broken runs and broken files of runs are named in the report and left out.

    Args:
        runs: ``OUTPUT_DIR`` of distilled runs, folders of ``SEEDS``, or glob patterns.
        baseline: likewise, of the student alone.
        teacher: likewise; may be empty.
        output: folder of the report. An earlier report there is replaced.
        measure: build the models and measure what they cost on this machine.
        console: shows the progress; default standard error.

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
            "Examples": lambda: sections.examples(study, best, truths, measure),
            "Configuration": lambda: sections.differences(study),
            "Runs": lambda: sections.runs(study),
            # Last: the other sections may add problems.
            "Problems": lambda: sections.problems(study),
        }
        parts = [Section(title, _made(study, title, make)) for title, make in makers.items()]
        progress.advance(drawing)
        _write(Document("Distillation report", _subtitle(study), parts), output)
        progress.advance(drawing)
    return output / PAGE


def _write(document: Document, folder: Path) -> None:
    (folder / PICTURES).mkdir(exist_ok=True)
    for picture in document.pictures():
        (folder / PICTURES / picture.name).write_bytes(picture.content)
    replace_text(folder / MARKDOWN, markdown(document, PICTURES))
    replace_text(folder / PAGE, html(document))


def _measure(study: Study, progress: Progress) -> list[Measured]:
    task = progress.add_task("measuring models", total=None)
    measured = measure_all(study, lambda total: progress.update(task, advance=1, total=total))
    failed = [m for m in measured if m.cost is None]
    study.problems += [Problem(m.label, f"its cost was not measured: {m.failure}") for m in failed]
    return measured


def _made(study: Study, title: str, make: Callable[[], list[Block]]) -> list[Block]:
    try:
        return make()
    # The other sections are of use whatever exception a broken run raises here.
    except Exception as error:
        study.problems.append(Problem(title, describe(error)))
        return [Text("This section could not be made; see Problems.")]


def _subtitle(study: Study) -> str:
    data = {run.test_sets[0] for run in study.runs if run.test_sets}
    plural = "" if len(study.groups) == 1 else "s"
    parts = [f"{len(study.groups)} distilled configuration{plural}, {len(study.runs)} runs"]
    parts += [f"evaluated on {', '.join(sorted(data))}"] if data else []
    return ", ".join(parts)
