"""The command line of preflight; ``tools/preflight.py`` only calls :func:`main`."""

from __future__ import annotations

import argparse
import gc
import logging
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from fvcore.common.config import CfgNode
from rich.console import Console

from kd_det.checks import KDError, fail
from kd_det.cli import config_parser, load_config
from kd_det.preflight.context import Settings
from kd_det.preflight.findings import Preflight, Section
from kd_det.preflight.page import HTML, PICTURE, prepare_folder, write_report
from kd_det.preflight.render import show_section, show_verdict
from kd_det.preflight.run import run_preflight
from kd_det.stages import Plan, read_plan

_DESCRIPTION = """\
Look at a run before it starts: teacher, classes, taps, terms, cost and export. Trains nothing and
writes nothing but its report. Of a config with STAGES it looks at the first. Overrides of config
keys come last."""
_EXAMPLE = """\
example:
  python tools/preflight.py --config-file configs/digits_torchvision/reviewkd_kd_frcnn.yaml"""
_FOLDER = "preflight"


def main(argv: Sequence[str] | None = None) -> int:
    """Look. Returns 0 if the run is ready, 1 if not, and 2 for a mistake in the input."""
    args = argument_parser().parse_args(argv)
    settings = Settings(args.batches, args.images, args.seconds)
    try:
        _check(settings)
        plan = read_plan(args.config_file, args.opts)
        opts, remark = _first_stage(plan)
        cfg = load_config(args.config_file, [*args.opts, *opts])
        output = args.output or Path(plan.output if plan.stages else cfg.OUTPUT_DIR) / _FOLDER
        report = preflight(cfg, output, settings, remark=remark)
    except KDError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0 if report.ready else 1


def argument_parser() -> argparse.ArgumentParser:
    """The config as in ``train_net.py``, and how far to look."""
    defaults = Settings()
    parser = config_parser(_DESCRIPTION, _EXAMPLE)
    parser.add_argument(
        "--batches", type=int, default=defaults.batches, metavar="K",
        help=f"training batches to measure terms on ({defaults.batches})",
    )  # fmt: skip
    parser.add_argument(
        "--images", type=int, default=defaults.images, metavar="N",
        help=f"images to show to the teacher and to evaluate on ({defaults.images})",
    )  # fmt: skip
    parser.add_argument(
        "--seconds", type=float, default=defaults.seconds,
        help="take fewer batches and images where they would need longer than about this in all "
        f"({defaults.seconds:g})",
    )  # fmt: skip
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="of the report; default OUTPUT_DIR/preflight"
    )
    return parser


def preflight(
    cfg: CfgNode,
    output: Path,
    settings: Settings | None = None,
    console: Console | None = None,
    remark: str = "",
) -> Preflight:
    """Look at a run, print section by section, and write the report.

    Args:
        cfg: as :func:`kd_det.cli.load_config` reads it.
        output: folder of the report: new, empty, or with an earlier report in it.
        settings: how far to look.
        console: where to print; standard output by default.
        remark: what to note at the beginning; nothing if empty.

    Raises:
        KDError: the folder cannot be used. Whatever is wrong with the run is in the report.
    """
    prepare_folder(output)
    (output / PICTURE).unlink(missing_ok=True)  # an earlier report's; the others are replaced
    console = console or Console(file=sys.stdout)
    # What libraries have to say about a run that is only looked at is of no use here.
    loud = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with console.status("") as status, warnings.catch_warnings():
            warnings.simplefilter("ignore")

            def begin(title: str) -> None:
                status.update(f"{title} ...")

            def done(section: Section) -> None:
                show_section(console, section)

            report = run_preflight(cfg, settings, output / PICTURE, begin, done, remark)
    finally:
        logging.disable(loud)
        _free_memory()
    write_report(report, output)
    show_verdict(console, report)
    console.print(f"Report: {output / HTML}", style="dim", soft_wrap=True)
    return report


def require(cfg: CfgNode) -> None:
    """Refuse to train what is not ready; for ``PREFLIGHT: True``.

    Args:
        cfg: as :func:`kd_det.cli.load_config` reads it. The report goes to
            ``OUTPUT_DIR/preflight``.

    Raises:
        KDError: the report has errors, or cannot be written.
    """
    output = Path(cfg.OUTPUT_DIR) / _FOLDER
    report = preflight(cfg, output)
    if not report.ready:
        fail(
            expected="a run that passes its preflight, as PREFLIGHT is True",
            received=f"{report.verdict}: {report.errors[0].message}",
            remedy=f"correct what {output / HTML} lists, or set PREFLIGHT False to train anyway",
        )


def _first_stage(plan: Plan) -> tuple[list[str], str]:
    """``KEY VALUE`` pairs of the first stage of a plan, and what to say about it.

    The others start from checkpoints that are not there yet.
    """
    if not plan.stages:
        return [], ""
    first, count = plan.stages[0], len(plan.stages)
    opts = ["STAGES", "[]", "OUTPUT_DIR", str(plan.output / f"stage_1_{first.name}")]
    remark = f"this is about '{first.name}', stage 1 of {count}"
    if count > 1:
        remark += (
            ". The others start from what it leaves: PREFLIGHT True looks at each before it starts"
        )
    return [*opts, *first.options(None)], remark


def _free_memory() -> None:
    """Leave the GPU to the training that may follow in this process."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _check(settings: Settings) -> None:
    for name, value in (
        ("batches", settings.batches),
        ("images", settings.images),
        ("seconds", settings.seconds),
    ):
        if not value > 0:
            fail(
                expected=f"--{name} above 0",
                received=str(value),
                remedy="leave it out to take the default",
            )
