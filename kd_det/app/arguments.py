"""The command line that every tool on a config shares."""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable
from typing import ParamSpec

from kd_det.core.errors import KDError

P = ParamSpec("P")


def reports_mistakes(main: Callable[P, int]) -> Callable[P, int]:
    """A main function that prints a :class:`KDError` and returns 2 in place of raising it."""

    @functools.wraps(main)
    def reporting(*args: P.args, **kwargs: P.kwargs) -> int:
        try:
            return main(*args, **kwargs)
        except KDError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2

    return reporting


def text_parser(description: str, example: str, prog: str | None) -> argparse.ArgumentParser:
    """A parser whose help keeps the line breaks of a description and of an example command.

    ``prog`` is how the tool was called; None: the name of the script.
    """
    return argparse.ArgumentParser(
        prog=prog,
        description=description,
        epilog=example,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """Take ``KEY VALUE ...`` as the last arguments."""
    parser.add_argument(
        "opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="overrides of config keys"
    )


def config_parser(description: str, example: str, prog: str | None) -> argparse.ArgumentParser:
    """``--config-file FILE ... KEY VALUE``, as every tool takes a config, to add flags to."""
    parser = text_parser(description, example, prog)
    parser.add_argument("--config-file", required=True, metavar="FILE", help="of any host")
    add_overrides(parser)
    return parser
