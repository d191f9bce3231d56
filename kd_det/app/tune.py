"""The command line of the search."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kd_det.app.arguments import config_parser, reports_mistakes
from kd_det.core.errors import fail
from kd_det.tuning.report import verdict
from kd_det.tuning.search import Sweep
from kd_det.tuning.space import SAMPLERS, Space, make_space
from kd_det.tuning.tune import tune

_DESCRIPTION = """\
Search the best loss weights of a run, one key after the other, with the best values of the keys
before. It can be interrupted and started again. Overrides of config keys come last."""
_EXAMPLE = """\
example:
  %(prog)s --config-file configs/digits_torchvision/reviewkd_kd_frcnn.yaml \\
      --keys KD.TERMS.review.WEIGHT KD.TERMS.roi_logits.WEIGHT --values 0.1 0.3 1 3 \\
      --seeds 1 2 --output outputs/tune"""


@reports_mistakes
def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Search; the exit status is 2 for bad input, 130 if interrupted, 1 if a value failed."""
    args = parse_arguments(argv, prog)
    received: list[int] = []

    def interrupt(signum: int, frame: Any) -> None:
        # With several jobs other threads wait for the trainings.
        received.append(signum)
        raise KeyboardInterrupt

    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, interrupt)
    try:
        sweeps = tune(
            args.config_file,
            read_spaces(args),
            args.output,
            metric=args.metric,
            seeds=args.seeds,
            overrides=args.opts,
            jobs=args.jobs,
            num_gpus=args.num_gpus,
            stop=lambda: bool(received),
        )
    except KeyboardInterrupt:
        print("\nInterrupted; the same command continues where it was.", file=sys.stderr)
        return 130
    return _report(sweeps, args.output)


def argument_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """Keys and the values to try for them, the runs, and overrides as in training."""
    parser = config_parser(_DESCRIPTION, _EXAMPLE, prog)
    parser.add_argument(
        "--keys", nargs="+", required=True, metavar="KEY[=V,V,...]",
        help="config keys in the order of the search, each with values of its own if wanted",
    )  # fmt: skip
    parser.add_argument("--values", nargs="+", default=[], help="try these")
    parser.add_argument("--low", type=float, help="or a range: its smallest value")
    parser.add_argument("--high", type=float, help="its largest value")
    parser.add_argument("--log", action="store_true", help="even in the logarithm")
    parser.add_argument("--trials", type=int, default=10, help="values from the range (10)")
    parser.add_argument("--sampler", choices=SAMPLERS, help="of values grid, of a range tpe")
    parser.add_argument("--metric", default="", help="default bbox/AP or accuracy/top1")
    parser.add_argument("--seeds", nargs="+", default=[], help="default: the config's")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--jobs", type=int, default=1, help="values trained at a time")
    parser.add_argument("--num-gpus", type=int, default=1, help="GPUs of each run")
    return parser


def parse_arguments(
    argv: Sequence[str] | None = None, prog: str | None = None
) -> argparse.Namespace:
    """The command line; overrides may also follow a list of numbers."""
    args = argument_parser(prog).parse_args(argv)
    for name, kind in (("values", float), ("seeds", int)):
        numbers, overrides = _leading(getattr(args, name), kind)
        setattr(args, name, numbers)
        args.opts = [*overrides, *args.opts]
    return args


def _leading(words: Sequence[str], kind: Callable[[str], Any]) -> tuple[list[Any], list[str]]:
    """The numbers at the beginning of a list, and the rest."""
    numbers: list[Any] = []
    for word in words:
        try:
            numbers.append(kind(word))
        except ValueError:
            break
    return numbers, list(words[len(numbers) :])


def read_spaces(args: argparse.Namespace) -> dict[str, Space]:
    """The values to try for each key, in the order of the keys.

    Raises:
        KDError: a key twice, or see :func:`kd_det.tuning.space.make_space`.
    """
    spaces = {}
    for entry in args.keys:
        key, _, own = entry.partition("=")
        if key in spaces:
            fail(expected="every key once", received=f"{key} twice", remedy="leave out one")
        try:
            values = [float(value) for value in own.split(",")] if own else args.values
        except ValueError:
            fail(expected=f"numbers for {key}", received=own, remedy=f"write {key}=0.1,1,10")
        names = () if own else ("low", "high", "log", "trials", "sampler")
        spaces[key] = make_space(values, **{name: getattr(args, name) for name in names})
    return spaces


def _report(sweeps: list[Sweep], output: Path) -> int:
    for sweep in sweeps:
        print(f"{sweep.key}: {verdict(sweep)}")
    print(f"Table, plot and best config: {output}/table.md, search.png, best.yaml")
    failures = [(s.key, p) for s in sweeps for p in s.points if p.failure]
    for key, point in failures:
        print(f"error: {key} {point.value:g} failed: {point.failure}", file=sys.stderr)
    return 1 if failures else 0
