"""The console command ``kd-det``: every tool of the project under one name."""

from __future__ import annotations

import argparse
import importlib
import sys
import traceback
from collections.abc import Sequence

from kd_det.app.arguments import text_parser

COMMANDS = {
    "train": ("kd_det.app.train", "train or evaluate a distilled detector or classifier"),
    "preflight": ("kd_det.app.preflight", "look at a run before it starts"),
    "report": ("kd_det.app.report", "compare finished runs on one page"),
    "visualize": ("kd_det.app.visualize", "draw what a config distils"),
    "tune": ("kd_det.app.tune", "search loss weights"),
    "export": ("kd_det.app.export", "strip a distilled checkpoint to the stock student"),
    "quickstart": ("kd_det.app.quickstart.main", "distil a small detector in minutes"),
}
"""Module of each command, which has a ``main(argv, prog)``, and one line about it."""

EXTRAS = {
    "kd_det.app.quickstart": "all",
    "kd_det.data.digits": "digits",
    "kd_det.document": "report",
    "kd_det.hosts.classification": "classification",
    "kd_det.hosts.detectron2": "detectron2",
    "kd_det.hosts.torchvision_detection": "torchvision",
    "kd_det.preflight": "report",
    "kd_det.report": "report",
    "kd_det.tuning": "tune",
    "kd_det.visualize": "report",
}
"""The optional dependencies of a package: an extra in ``pyproject.toml``."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that is named first. Returns its exit status."""
    commands = "\n".join(f"  {name:<11} {line}" for name, (_, line) in COMMANDS.items())
    parser = text_parser(
        "Knowledge distillation for detectors and classifiers.",
        f"commands:\n{commands}\n\n'%(prog)s COMMAND --help' shows the arguments of a command.",
        "kd-det",
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="see below")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="of the command")
    args = parser.parse_args(argv)
    return run_command(args.command, args.arguments, prog=f"{parser.prog} {args.command}")


def run_command(name: str, argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run one command, in this process.

    Args:
        name: a key of :data:`COMMANDS`.
        argv: its arguments; default ``sys.argv[1:]``.
        prog: how it was called, for its help; default the script that runs.

    Returns:
        Its exit status: 2 where a package that it needs is not installed.
    """
    try:
        return importlib.import_module(COMMANDS[name][0]).main(
            argv, prog or f"python {sys.argv[0]}"
        )
    except ModuleNotFoundError as error:
        extra = extra_of(error)
        if extra is None:
            raise
        print(
            f"error: expected the package '{error.name}', which this command needs; "
            f"received no installed package of that name; remedy: pip install 'kd_det[{extra}]'",
            file=sys.stderr,
        )
        return 2


def extra_of(error: ModuleNotFoundError) -> str | None:
    """The extra whose package an import statement of this project did not find.

    None where the statement stands in another project, whose installation is then damaged.
    """
    frames = traceback.walk_tb(error.__traceback__)
    modules = [frame.f_globals.get("__name__", "") for frame, _ in frames]
    modules = [module for module in modules if module.partition(".")[0] != "importlib"]
    if not modules or not modules[-1].startswith("kd_det."):
        return None
    # A module that several packages share, such as hosts/lightning, has no extra of its own:
    # the one that imports it decides.
    for module in reversed(modules):
        for package, extra in EXTRAS.items():
            if f"{module}.".startswith(f"{package}."):
                return extra
    return None


if __name__ == "__main__":
    sys.exit(main())
