"""The phases of the quickstart, its table, its pictures and its last sentence."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from kd_det.bench.workbench import Detections, Workbench, parameters
from kd_det.data.catalogue import data_root
from kd_det.data.digits.detection import DigitsSpec, write_digits
from kd_det.document.detections import draw_detections
from kd_det.hosts.base import Host, get_host
from kd_det.hosts.lightning.loss_table import bar_columns
from kd_det.run.folder import CONFIG, FINAL, LOG, METRICS, RESULTS
from kd_det.run.json_lines import read_json_lines
from kd_det.run.plan import Results, Start

CONFIGS = Path("configs")  # those of the package where the working directory has none
HOSTS = {"torchvision_detection": "digits_torchvision", "detectron2": "digits"}
"""The folder below ``configs/`` of each host with ``teacher_frcnn.yaml`` and its students."""

# Loggers of the hosts' libraries, whose messages go to a file.
_LOGGERS = ("py.warnings", "kd_det", "lightning", "lightning.pytorch", "detectron2", "fvcore")
_TIMED_IMAGES = 30
# Two thirds of the schedules in the configs, so that two slow cores need no quarter of an hour.
_TEACHER_SCHEDULE = ("SOLVER.MAX_ITER", "800", "SOLVER.STEPS", "(600, 730)")
_STUDENT_SCHEDULE = (
    *("SOLVER.MAX_ITER", "400", "SOLVER.STEPS", "(300, 365)"),
    *("TEST.EVAL_PERIOD", "100"),  # the points of a student's curve
)
_SHOWN_IMAGES = 4


@dataclass(frozen=True)
class Phase:
    """One training of the quickstart."""

    name: str
    label: str
    config: str


TEACHER = Phase("teacher", "teacher", "teacher_frcnn.yaml")
ALONE = Phase("student_alone", "student alone", "baseline_frcnn.yaml")
DISTILLED = Phase("student_distilled", "student distilled", "reviewkd_kd_frcnn.yaml")
PHASES = (TEACHER, ALONE, DISTILLED)


def quickstart(host_name: str, output: Path, opts: Sequence[str] = ()) -> dict[str, Results]:
    """Run or continue all phases, print a table and draw pictures; returns the results by phase.

    Args:
        host_name: a key of :data:`HOSTS`.
        output: folder of all runs and pictures.
        opts: further config overrides, the same for all phases.
    """
    host = get_host(host_name)
    # Of the standard output as it is now: while a host runs, that is a log file.
    console = Console(file=sys.stdout)
    runs = output / host_name
    started = time.monotonic()
    console.print(
        f"[bold]kd_det quickstart[/] on {host_name}: {os.cpu_count()} CPU cores, "
        f"{torch.get_num_threads()} threads. Everything goes to {output}/ and can be interrupted "
        "and started again."
    )
    with Progress(*bar_columns(26), console=console, redirect_stdout=False) as progress:
        data = _write_data(progress)
        results = {p.name: _train(host, p, runs, opts, progress) for p in PHASES}
    console.print(f"Trained in {(time.monotonic() - started) / 60:.1f} minutes.\n")
    benches = {}
    for phase in PHASES:
        cfg = host.load_config(str(runs / phase.name / CONFIG), ())
        benches[phase] = host.open_bench(cfg, str(runs / phase.name / FINAL), False)
    images = benches[TEACHER].validation_pictures(_TIMED_IMAGES)
    console.print(_table(benches, results, images))
    output.mkdir(parents=True, exist_ok=True)
    students = {phase.label: runs / phase.name for phase in (ALONE, DISTILLED)}
    _draw_curves(students, results[TEACHER.name]["bbox"]["AP"], output / "curves.png")
    shown = images[:_SHOWN_IMAGES]
    columns = {"ground truth": _ground_truth(data["digits_val"][0])}
    for phase, bench in benches.items():
        columns[phase.label] = [bench.predict("student", image) for image in shown]  # type: ignore[misc]
    draw_detections(shown, columns, output / "detections.png")
    console.print(f"Pictures: {output / 'curves.png'} and {output / 'detections.png'}\n")
    console.print(_next_step(host_name), soft_wrap=True)
    return results


def _write_data(progress: Progress) -> dict[str, tuple[Path, Path]]:
    spec = DigitsSpec()
    total = spec.train_images + spec.val_images
    task = progress.add_task("images of digits", total=total)
    data = write_digits(
        data_root() / "digits", spec, lambda done, _: progress.update(task, completed=done)
    )
    progress.update(task, completed=total)
    return data


def _train(
    host: Host, phase: Phase, runs: Path, opts: Sequence[str], progress: Progress
) -> Results:
    output = runs / phase.name
    task = progress.add_task(phase.label, total=None)
    results = output / RESULTS
    if results.is_file():
        progress.update(task, total=1, completed=1, description=f"{phase.label} (done before)")
        return json.loads(results.read_text())

    def report(activity: str, completed: int, total: int) -> None:
        # One bar per phase, over training iterations; evaluations in between only change its name.
        if activity == "train":
            progress.update(task, completed=completed, total=total, description=phase.label)
        else:
            progress.update(task, description=f"{phase.label}, evaluating")

    teacher, folder = runs / TEACHER.name, CONFIGS / HOSTS[host.name]
    overrides = [
        *("KD.TEACHER.CONFIG_FILE", str(folder / TEACHER.config)),
        *("KD.TEACHER.WEIGHTS", str(teacher / FINAL)),
        *(_TEACHER_SCHEDULE if phase is TEACHER else _STUDENT_SCHEDULE),
        *opts,
        *("OUTPUT_DIR", str(output)),
    ]
    cfg = host.load_config(str(folder / phase.config), overrides)
    with log_to(output / LOG):
        metrics = host.run(cfg, Start(resume=True), progress=report)
    progress.update(task, description=phase.label)
    return metrics


@contextlib.contextmanager
def log_to(path: Path) -> Iterator[None]:
    """Send what libraries print and log to a file, so that the screen shows progress only."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file, contextlib.redirect_stdout(file):
        handler = logging.StreamHandler(file)
        handler.setFormatter(logging.Formatter("%(asctime)s %(name)s: %(message)s"))
        for name in _LOGGERS:
            logger = logging.getLogger(name)
            logger.setLevel(logging.INFO)
            logger.propagate = False
            logger.handlers = [handler]
        logging.captureWarnings(True)
        try:
            yield
        finally:
            logging.captureWarnings(False)


def _ground_truth(json_file: Path) -> list[Detections]:
    """The annotations of the first images."""
    content = json.loads(json_file.read_text())
    classes = sorted(category["id"] for category in content["categories"])
    truth = []
    for record in content["images"][:_SHOWN_IMAGES]:
        own = [a for a in content["annotations"] if a["image_id"] == record["id"]]
        boxes = torch.tensor([a["bbox"] for a in own]).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        labels = torch.tensor([classes.index(a["category_id"]) for a in own])
        truth.append(Detections(boxes, labels, torch.ones(len(own))))
    return truth


def _table(
    benches: dict[Phase, Workbench], results: dict[str, Results], images: Sequence[Tensor]
) -> Table:
    table = Table(title="Box AP on validation images whose digits were never trained on")
    for column in ("model", "AP", "AP50", "parameters", "ms per image", "gap recovered"):
        table.add_column(column, justify="left" if column == "model" else "right")
    low = results[ALONE.name]["bbox"]["AP"]
    high = results[TEACHER.name]["bbox"]["AP"]
    for phase, bench in benches.items():
        box = results[phase.name]["bbox"]
        share = f"{(box['AP'] - low) / (high - low):.0%}" if high > low else "no gap"
        table.add_row(
            phase.label,
            f"{box['AP']:.1f}",
            f"{box['AP50']:.1f}",
            f"{parameters(bench.student):,}",
            f"{_milliseconds(bench, images):.0f}",
            share if phase is DISTILLED else "",
        )
    return table


def _milliseconds(bench: Workbench, images: Sequence[Tensor]) -> float:
    """Median time of one image, batch size 1, after two images of warm-up."""
    times = []
    for image in [*images[:2], *images]:
        start = time.perf_counter()
        bench.predict("student", image)
        times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times[2:])


def read_curve(metrics: Path, key: str) -> tuple[list[int], list[float]]:
    """Iterations and values of one metric from ``metrics.json``."""
    lines = read_json_lines(metrics)
    # A continued run repeats the iterations after its last checkpoint: the later value counts.
    points = {line["iteration"] + 1: line[key] for line in lines if key in line}
    return sorted(points), [points[x] for x in sorted(points)]


def _draw_curves(runs: Mapping[str, Path], teacher_ap: float, path: Path) -> None:
    """Validation AP over training iterations of each student, with the teacher's as a line."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for (label, output), colour in zip(runs.items(), ("tab:gray", "tab:blue"), strict=True):
        x, y = read_curve(output / METRICS, "bbox/AP")
        axes.plot(x, y, marker="o", label=label, color=colour)
        axes.annotate(f"{y[-1]:.1f}", (x[-1], y[-1]), xytext=(6, -3), textcoords="offset points")
    axes.axhline(teacher_ap, linestyle="--", color="tab:green", label=f"teacher ({teacher_ap:.1f})")
    axes.set(xlabel="training iteration", ylabel="box AP on validation images (%)")
    axes.set_title("The same student, alone and with a teacher")
    axes.set_ylim(bottom=0)
    axes.margins(x=0.08)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=150)


def _next_step(host_name: str) -> str:
    folder = HOSTS[host_name]
    return (
        "Next, with your own data in COCO format: train a teacher with\n"
        f"  kd-det train --config-file configs/{folder}/teacher_frcnn.yaml "
        'DATASETS.COCO_JSON.mine \'["path/to/train.json", "path/to/images"]\' '
        "DATASETS.TRAIN '(\"mine\",)' ...\n"
        f"and distil from it with configs/{folder}/reviewkd_kd_frcnn.yaml (both come with kd_det). "
        'docs/torchvision.md, "Your own data", has the whole recipe.'
    )
