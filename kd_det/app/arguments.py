"""The command line that every tool on a config shares."""

from __future__ import annotations

import argparse


def config_parser(
    description: str, example: str, prog: str | None = None
) -> argparse.ArgumentParser:
    """``--config-file FILE ... KEY VALUE``, as every tool takes a config, to add flags to.

    Args:
        description: what the tool does.
        example: a whole command, shown below the flags; both keep their line breaks.
        prog: how the tool was called; default the name of the script.
    """
    parser = argparse.ArgumentParser(
        prog=prog,
        description=description,
        epilog=example,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config-file", required=True, metavar="FILE", help="of any host")
    parser.add_argument(
        "opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="overrides of config keys"
    )
    return parser
