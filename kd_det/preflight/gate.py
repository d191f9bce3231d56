"""Preflight from a config to its report: on the screen, as files, and as a condition to train."""

from __future__ import annotations

import gc
import json
import logging
import sys
import warnings
from pathlib import Path

import torch
from fvcore.common.config import CfgNode
from rich.console import Console

from kd_det.core.errors import fail
from kd_det.core.files import replace_text, writable_folder
from kd_det.document.page import html
from kd_det.document.terminal import print_block, print_section
from kd_det.preflight.context import Settings
from kd_det.preflight.findings import Preflight
from kd_det.preflight.run import run_preflight
from kd_det.run.folder import PREFLIGHT

HTML, JSON, PICTURE = FILES = ("preflight.html", "preflight.json", "teacher.png")


def preflight(
    cfg: CfgNode,
    output: Path,
    settings: Settings | None = None,
    console: Console | None = None,
    remark: str = "",
) -> Preflight:
    """Look at a run, print section by section, and write the report.

    Args:
        cfg: as :func:`kd_det.hosts.base.load_config` reads it.
        output: folder of the report: new, empty, or with an earlier report in it.
        settings: the extent of preflight.
        console: default standard output.
        remark: a note at the beginning; none if empty.

    Raises:
        KDError: the folder cannot be used. Mistakes in the run are part of the report.
    """
    prepare_folder(output)
    (output / PICTURE).unlink(missing_ok=True)  # an earlier report's; the others are replaced
    console = console or Console(file=sys.stdout)
    # Messages of libraries about a run that is not started are of no use here.
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with console.status("") as status, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            report = run_preflight(
                cfg,
                settings,
                output / PICTURE,
                lambda title: status.update(f"{title} ..."),
                lambda section: print_section(console, section.shown()),
                remark,
            )
    finally:
        logging.disable(disabled)
        # Training may follow in this process.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    write_report(report, output)
    print_block(console, report.shown_verdict())
    console.print(f"Report: {output / HTML}", style="dim", soft_wrap=True)
    return report


def require(cfg: CfgNode) -> None:
    """Refuse to train a run that is not ready; for ``PREFLIGHT: True``.

    The report goes to ``OUTPUT_DIR/preflight``.

    Raises:
        KDError: the report has errors, or cannot be written.
    """
    output = Path(cfg.OUTPUT_DIR) / PREFLIGHT
    report = preflight(cfg, output)
    if not report.ready:
        fail(
            expected="a run that passes its preflight, as PREFLIGHT is True",
            received=f"{report.verdict}: {report.errors[0].message}",
            remedy=f"correct what {output / HTML} lists, or set PREFLIGHT False to train anyway",
        )


def prepare_folder(output: Path) -> None:
    """Make the folder of the report, so that a mistake shows before the run is built.

    Raises:
        KDError: it cannot be written to, or holds something else than an earlier report.
    """
    writable_folder(output)
    others = sorted(path.name for path in output.iterdir() if path.name not in FILES)
    if others:
        fail(
            expected="a folder for the report that is new, empty, or holds an earlier report",
            received=f"'{output}', which holds {', '.join(others[:8])}",
            remedy="choose another one with --output",
        )


def write_report(report: Preflight, output: Path) -> None:
    """Write ``preflight.json`` and ``preflight.html`` into a folder of :func:`prepare_folder`."""
    # JSON has neither infinity nor nan: they become texts.
    text = json.dumps(report.as_dict())
    content = json.loads(text, parse_constant=lambda name: str(float(name)))
    replace_text(output / JSON, json.dumps(content, indent=2) + "\n")
    replace_text(output / HTML, html(report.shown()))
