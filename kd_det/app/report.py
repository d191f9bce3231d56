"""The command line of the report."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from kd_det.app.arguments import reports_mistakes
from kd_det.report.build import write_report


def argument_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """The runs to compare, and where the page goes."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description="One page about finished runs: what the distillation bought, and its cost.",
        epilog="example: %(prog)s outputs/reviewkd_seed* "
        "--baseline outputs/baseline_seed* --teacher outputs/teacher",
    )
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="OUTPUT_DIR of a run, a folder of SEEDS, or a glob"
    )
    parser.add_argument(
        "--baseline", nargs="+", required=True, metavar="RUN", help="the student without a teacher"
    )
    parser.add_argument("--teacher", nargs="+", default=[], metavar="RUN", help="the teacher's run")
    parser.add_argument(
        "--output", default="outputs/report", metavar="DIR", help="default: %(default)s"
    )
    parser.add_argument(
        "--no-measure",
        action="store_true",
        help="do not build the models to count their operations and measure their time",
    )
    return parser


@reports_mistakes
def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Write a report. Returns the exit status: 2 for a mistake in the input."""
    args = argument_parser(prog).parse_args(argv)
    page = write_report(
        args.runs, args.baseline, args.teacher, args.output, measure=not args.no_measure
    )
    sys.stderr.write(f"Report: {page}\n")
    return 0
