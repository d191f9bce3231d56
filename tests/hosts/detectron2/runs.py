"""Runs of seconds on a few images of digits, which may be interrupted."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.engine.hooks import HookBase
from detectron2.utils.env import seed_all_rng

from kd_det.hosts.detectron2.datasets import register_datasets
from kd_det.hosts.detectron2.train import run_in_process
from kd_det.run.plan import Start
from tests.hosts.detectron2.models import distilled_cfg


class Stop(Exception):
    """The run dies."""


class Interrupt(HookBase):
    """Die after so many iterations."""

    def __init__(self, after: int) -> None:
        self.after = after

    def after_step(self) -> None:
        if self.trainer.iter + 1 == self.after:
            raise Stop("pulled the plug")


def small_cfg(
    images: Mapping[str, tuple[Path, Path]],
    teacher: tuple[Path, Path],
    terms: dict[str, Any],
    output: Path,
    *opts: Any,
) -> CfgNode:
    """A distilled Faster R-CNN on digits; nothing is evaluated.

    Args:
        images: as :func:`kd_det.data.digits.detection.write_digits` returns them; the data sets are
        called
            ``<name of the folder above output>_<split>``.
        teacher: config and weights.
        terms: of the run.
        output: ``OUTPUT_DIR``.
        *opts: further keys and values.
    """
    cfg, name = distilled_cfg("faster", teacher, terms), output.parent.name
    for split, files in images.items():
        cfg.DATASETS.COCO_JSON[f"{name}_{split}"] = [str(path) for path in files]
    register_datasets(cfg)
    cfg.merge_from_list(
        [
            *("DATASETS.TRAIN", (f"{name}_digits_train",), "DATASETS.TEST", (), "SEED", 7),
            *("INPUT.MIN_SIZE_TRAIN", (96,), "INPUT.MIN_SIZE_TEST", 96),
            *("SOLVER.IMS_PER_BATCH", 2, "SOLVER.MAX_ITER", 4, "SOLVER.STEPS", ()),
            *("SOLVER.CHECKPOINT_PERIOD", 2, "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 8),
            *("OUTPUT_DIR", str(output)),
            *opts,
        ]
    )
    output.mkdir(exist_ok=True)
    cfg.freeze()
    return cfg


def train(cfg: CfgNode, *hooks: HookBase, resume: bool = False, bar: Any = None) -> dict[str, Any]:
    """As the command line does."""
    seed_all_rng(cfg.SEED if cfg.SEED >= 0 else None)
    return run_in_process(cfg, Start(resume=resume), hooks, bar)
