"""The command line of the pictures."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from kd_det.app.arguments import config_parser, reports_mistakes
from kd_det.visualize.run import visualize

_DESCRIPTION = """\
Draw what a config distils: maps of teacher and student, attention, masks, RoIs, graphs and logits,
whatever its terms compare. Overrides of config keys come last."""
_EXAMPLE = """\
example:
  %(prog)s --config-file configs/digits_torchvision/reviewkd_kd_frcnn.yaml \\
      --weights outputs/digits_torchvision/reviewkd_kd_frcnn/model_final.pth --output pictures"""


@reports_mistakes
def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Draw and list the files. Returns 2 for a mistake in the input."""
    args = argument_parser(prog).parse_args(argv)
    files = visualize(
        args.config_file,
        args.opts,
        weights=args.weights,
        images=args.images,
        batches=args.batches,
        rows=args.rows,
        output=args.output,
    )
    for file in files:
        print(file)
    return 0


def argument_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """The run, the images, and overrides as in training."""
    parser = config_parser(_DESCRIPTION, _EXAMPLE, prog)
    parser.add_argument(
        "--weights", default="", metavar="FILE", help="of the student (default MODEL.WEIGHTS)"
    )
    parser.add_argument(
        "--images", nargs="+", default=[], type=Path, metavar="FILE",
        help="images in place of training batches",
    )  # fmt: skip
    parser.add_argument("--batches", type=int, default=1, help="training batches to draw (1)")
    parser.add_argument("--rows", type=int, default=4, help="images of each batch to draw (4)")
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="for the PNGs (default OUTPUT_DIR/visualize)"
    )
    return parser
