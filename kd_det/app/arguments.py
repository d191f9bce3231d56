"""The command line that every tool on a config shares."""

from __future__ import annotations

import argparse


def config_parser(description: str, example: str) -> argparse.ArgumentParser:
    """``--config-file FILE ... KEY VALUE``, as every tool takes a config, to add flags to.

    Args:
        description: what the tool does.
        example: a whole command, shown below the flags; both keep their line breaks.
    """
    parser = argparse.ArgumentParser(
        description=description,
        epilog=example,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config-file", required=True, metavar="FILE", help="of any host")
    parser.add_argument(
        "opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="overrides of config keys"
    )
    return parser
