"""What a host is, and the host of a config."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence

from fvcore.common.config import CfgNode

from kd_det.core.errors import fail
from kd_det.run.config import read_host

INSTALL_GUIDE = "https://detectron2.readthedocs.io/tutorials/install.html"


def load_config(config_file: str, opts: Sequence[str] = ()) -> CfgNode:
    """The config a file describes, read and checked as its host does.

    Raises:
        KDError: see :func:`kd_det.run.config.merge_config`; or its host is not installed.
    """
    host = read_host(config_file)
    if host == "detectron2":
        require_detectron2()
        return importlib.import_module("kd_det.hosts.detectron2.train").load_cfg(config_file, opts)
    return importlib.import_module(f"kd_det.hosts.{host}.config").load_config(config_file, opts)


def require_detectron2() -> None:
    """Say what is missing where a config needs Detectron2.

    Raises:
        KDError: Detectron2 is not installed.
    """
    if importlib.util.find_spec("detectron2") is None:
        fail(
            expected="Detectron2, which this config runs on",
            received="no installed package of that name",
            remedy=f"install it as {INSTALL_GUIDE} describes, or run "
            "configs/digits_torchvision/reviewkd_frcnn.yaml, which does without",
        )
