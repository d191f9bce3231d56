"""The sections of preflight, one after the other."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from fvcore.common.config import CfgNode

from kd_det.bench.workbench import Side
from kd_det.core.errors import KDError, fail
from kd_det.hosts.base import open_bench
from kd_det.preflight.budget import affordable, timed
from kd_det.preflight.classes import inspect_classes
from kd_det.preflight.context import Context, Settings
from kd_det.preflight.cost import inspect_cost
from kd_det.preflight.findings import Preflight, Section
from kd_det.preflight.steps import Steps, take_steps
from kd_det.preflight.teacher import inspect_teacher
from kd_det.preflight.terms import inspect_taps, inspect_terms

BUILD = "Build"
_NEEDS_STEPS = ("Taps", "Terms", "Cost")
_STEPS = 0.35  # of Settings.seconds
_PASSES = 3  # forwards that take as long as a forward and its backward pass


def run_preflight(
    cfg: CfgNode,
    settings: Settings | None = None,
    picture: Path | None = None,
    begin: Callable[[str], None] = lambda title: None,
    done: Callable[[Section], None] = lambda section: None,
    remark: str = "",
) -> Preflight:
    """Look at a run before it starts. Trains nothing and writes nothing but the picture.

    Mistakes in the run and unexpected failures become errors of the section in which they occur, so
    that there is always a report. Sections that depend on a failed one are skipped with a note.

    Args:
        cfg: as :func:`kd_det.hosts.base.load_config` reads it.
        settings: the extent of preflight.
        picture: file for the picture of the teacher's predictions; None draws none.
        begin: called with the title of each section before the work on it.
        done: called with each section after it.
        remark: a note at the beginning; none if empty.
    """
    started = time.perf_counter()
    report = Preflight(str(cfg.OUTPUT_DIR), str(cfg.HOST))
    context: Context | None = None
    for title in TITLES:
        begin(title)
        section = Section(title)
        start = time.perf_counter()
        try:
            if title == BUILD:
                if remark:
                    section.note(remark)
                context = _build(section, cfg, settings or Settings(), picture)
            elif context is None:
                section.note("skipped: the run could not be built")
            else:
                _inspect(section, context)
        except (KDError, FloatingPointError, torch.OutOfMemoryError) as error:
            section.error(_one_line(error))
        # The other sections are of use whatever exception a broken run raises here.
        except Exception as error:
            section.data["traceback"] = traceback.format_exc()
            section.error(f"could not be looked at: {type(error).__name__}: {_one_line(error)}")
        section.seconds = time.perf_counter() - start
        report.sections.append(section)
        report.seconds = time.perf_counter() - started
        done(section)
    return report


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _build(section: Section, cfg: CfgNode, settings: Settings, picture: Path | None) -> Context:
    bench = open_bench(cfg)
    kind = "distilled" if bench.distiller is not None else "alone: KD.ENABLED is False"
    section.ok(f"{type(bench.student).__name__} on {cfg.MODEL.DEVICE}, {kind}")
    for name in bench.pre_stage:
        section.note(
            f"term '{name}' has a network that the run first trains on the teacher; here it is "
            "random, and so are the term's values"
        )
    return Context(cfg, bench, settings, picture)


def _inspect(section: Section, context: Context) -> None:
    if section.title in _NEEDS_STEPS and context.steps is None:
        if context.steps_failed:
            section.note("skipped: no training step could be taken")
            return
        context.steps_failed = True  # unless this works
        context.steps = _steps(context)
    _INSPECT[section.title](section, context)


def _steps(context: Context) -> Steps:
    bench, settings = context.bench, context.settings
    whole = int(bench.cfg.SOLVER.IMS_PER_BATCH)
    seconds = settings.seconds * _STEPS
    # BatchNorm needs more than the 1x1 maps of one image of a classifier.
    fewest = 1 if hasattr(bench.student, "backbone") else min(2, whole)
    images = affordable(whole, _seconds_per_image(context), seconds, at_least=fewest)
    while True:
        try:
            return take_steps(bench, settings.batches, images, seconds)
        except torch.OutOfMemoryError:
            # The run may spread its batch over several GPUs; this process has one.
            if images < 2:
                raise
            images //= 2
            torch.cuda.empty_cache()


def _seconds_per_image(context: Context) -> float:
    """Approximate time of an image in a step: forwards, and a backward pass per loss."""
    bench = context.bench
    terms = len(bench.distiller.terms) if bench.distiller is not None else 0
    passes: dict[Side, int] = {"student": _PASSES * (1 + terms), "teacher": 1}
    if bench.teacher is None:
        del passes["teacher"]
    for side in [s for s in passes if s not in context.seconds_per_image]:
        batch = next(bench.batches(), None)
        if batch is None:
            fail(expected="training images", received="none", remedy="correct DATASETS.TRAIN")
        image = bench.pictures(batch)[0]
        predict = partial(bench.predict, side, image)
        context.seconds_per_image[side] = timed(predict, context.device)
    return sum(count * context.seconds_per_image[side] for side, count in passes.items())


def inspect_export(section: Section, context: Context) -> None:
    """Load the checkpoint that the run would write into the stock model."""
    problems = context.bench.check_export()
    for problem in problems:
        section.error(problem)
    if not problems:
        section.ok(
            "the checkpoint this run would write loads into the stock model: every key fits, and "
            "its outputs are the same"
        )


_INSPECT: dict[str, Callable[[Section, Context], None]] = {
    "Teacher": inspect_teacher,
    "Class lists": inspect_classes,
    "Taps": inspect_taps,
    "Terms": inspect_terms,
    "Cost": inspect_cost,
    "Export": inspect_export,
}
TITLES = (BUILD, *_INSPECT)
