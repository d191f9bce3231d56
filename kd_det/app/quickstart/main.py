"""The command line of the quickstart."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from kd_det.app.quickstart.run import HOSTS, quickstart
from kd_det.core.errors import KDError

_DESCRIPTION = """\
A small detector learns from a large one, on real images, in minutes. Overrides of config keys come
last and hold for all trainings."""
_EXAMPLE = """\
example, with a shorter schedule:
  %(prog)s SOLVER.MAX_ITER 60 SOLVER.STEPS '()'"""


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Train, compare, draw. Returns 2 for a mistake in the input, 130 if interrupted."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description=_DESCRIPTION,
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--host", default="torchvision_detection", choices=HOSTS, help="default: %(default)s"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("outputs/quickstart"),
        metavar="DIR",
        help="default: %(default)s",
    )
    parser.add_argument(
        "opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="overrides of config keys"
    )
    args = parser.parse_args(argv)
    try:
        quickstart(args.host, args.output, args.opts)
    except KDError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, SystemExit):  # Lightning answers the first by the second
        print("\nInterrupted; the same command continues where it was.", file=sys.stderr)
        return 130
    return 0
