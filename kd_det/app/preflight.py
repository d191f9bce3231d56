"""The command line of preflight."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from kd_det.app.arguments import config_parser, reports_mistakes
from kd_det.core.errors import fail
from kd_det.hosts.base import load_config
from kd_det.preflight.context import Settings
from kd_det.preflight.gate import preflight
from kd_det.run.folder import PREFLIGHT
from kd_det.run.plan import Plan, read_plan

_DESCRIPTION = """\
Look at a run before it starts: teacher, classes, taps, terms, cost and export. Trains nothing and
writes nothing but its report. Of a config with STAGES it looks at the first. Overrides of config
keys come last."""
_EXAMPLE = """\
example:
  %(prog)s --config-file configs/digits_torchvision/reviewkd_kd_frcnn.yaml"""


@reports_mistakes
def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Look. Returns 0 if the run is ready, 1 if not, and 2 for a mistake in the input."""
    args = argument_parser(prog).parse_args(argv)
    for name in ("batches", "images", "seconds"):
        if not getattr(args, name) > 0:
            fail(
                expected=f"--{name} above 0",
                received=str(getattr(args, name)),
                remedy="leave it out to take the default",
            )
    settings = Settings(args.batches, args.images, args.seconds)
    plan = read_plan(args.config_file, args.opts)
    opts, remark = _first_stage(plan)
    cfg = load_config(plan.file, [*plan.opts, *opts])
    output = args.output or Path(plan.output if plan.stages else cfg.OUTPUT_DIR) / PREFLIGHT
    report = preflight(cfg, output, settings, remark=remark)
    return 0 if report.ready else 1


def argument_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """The config as in training, and how far to look."""
    defaults = Settings()
    parser = config_parser(_DESCRIPTION, _EXAMPLE, prog)
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
