"""The command line of the quickstart."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from kd_det.app.arguments import add_overrides, reports_mistakes, text_parser
from kd_det.app.quickstart.run import HOSTS, quickstart

_DESCRIPTION = """\
A small detector learns from a large one, on real images, in minutes. Overrides of config keys come
last and hold for all trainings."""
_EXAMPLE = """\
example, with a shorter schedule:
  %(prog)s SOLVER.MAX_ITER 60 SOLVER.STEPS '()'"""


@reports_mistakes
def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Train, compare, draw. Returns 2 for a mistake in the input, 130 if interrupted."""
    parser = text_parser(_DESCRIPTION, _EXAMPLE, prog)
    parser.add_argument(
        "--host", default="torchvision_detection", choices=HOSTS, help="default: %(default)s"
    )
    output = Path("outputs/quickstart")
    parser.add_argument(
        "--output", type=Path, default=output, metavar="DIR", help="default: %(default)s"
    )
    add_overrides(parser)
    args = parser.parse_args(argv)
    try:
        quickstart(args.host, args.output, args.opts)
    except (KeyboardInterrupt, SystemExit):  # Lightning answers the first by the second
        print("\nInterrupted; the same command continues where it was.", file=sys.stderr)
        return 130
    return 0
