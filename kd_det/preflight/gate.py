"""Preflight from a config to its report: on the screen, as files, and as a condition to train."""

from __future__ import annotations

import gc
import logging
import sys
import warnings
from pathlib import Path

import torch
from fvcore.common.config import CfgNode
from rich.console import Console

from kd_det.core.errors import fail
from kd_det.preflight.context import Settings
from kd_det.preflight.findings import Preflight, Section
from kd_det.preflight.page import HTML, PICTURE, prepare_folder, write_report
from kd_det.preflight.render import show_section, show_verdict
from kd_det.preflight.run import run_preflight
from kd_det.run.folder import PREFLIGHT


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
        settings: how far to look.
        console: where to print; standard output by default.
        remark: what to note at the beginning; nothing if empty.

    Raises:
        KDError: the folder cannot be used. Whatever is wrong with the run is in the report.
    """
    prepare_folder(output)
    (output / PICTURE).unlink(missing_ok=True)  # an earlier report's; the others are replaced
    console = console or Console(file=sys.stdout)
    # What libraries have to say about a run that is only looked at is of no use here.
    loud = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with console.status("") as status, warnings.catch_warnings():
            warnings.simplefilter("ignore")

            def begin(title: str) -> None:
                status.update(f"{title} ...")

            def done(section: Section) -> None:
                show_section(console, section)

            report = run_preflight(cfg, settings, output / PICTURE, begin, done, remark)
    finally:
        logging.disable(loud)
        _free_memory()
    write_report(report, output)
    show_verdict(console, report)
    console.print(f"Report: {output / HTML}", style="dim", soft_wrap=True)
    return report


def require(cfg: CfgNode) -> None:
    """Refuse to train what is not ready; for ``PREFLIGHT: True``.

    Args:
        cfg: as :func:`kd_det.hosts.base.load_config` reads it. The report goes to
            ``OUTPUT_DIR/preflight``.

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


def _free_memory() -> None:
    """Leave the GPU to the training that may follow in this process."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
