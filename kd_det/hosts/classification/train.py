"""Train and evaluate a classifier, alone or distilled, from a config."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import lightning.pytorch as pl
from fvcore.common.config import CfgNode

from kd_det.core.errors import fail
from kd_det.hosts.classification.build import build_training_model, training_procedures
from kd_det.hosts.classification.config import check_config, load_config
from kd_det.hosts.classification.data import ClassificationData
from kd_det.hosts.classification.lit import LitClassifier
from kd_det.hosts.classification.loaders import train_loader
from kd_det.hosts.classification.model import DistilledClassifier
from kd_det.hosts.lightning import entry
from kd_det.hosts.lightning.module import Results
from kd_det.hosts.lightning.pre_stage import prepare_run
from kd_det.hosts.lightning.progress import RunProgressBar
from kd_det.hosts.lightning.run import Run, open_run
from kd_det.hosts.lightning.trainer import build_trainer
from kd_det.procedures.base import active_procedures
from kd_det.run.curves import CurveTag


def main(args: argparse.Namespace) -> Results:
    """See :func:`kd_det.hosts.lightning.entry.main`."""
    return entry.main(args, load_config, run)


def run(
    cfg: CfgNode,
    resume: bool = False,
    eval_only: bool = False,
    callbacks: Sequence[pl.Callback] = (),
    num_gpus: int = 1,
    num_machines: int = 1,
) -> Results:
    """Train as a config says, evaluate, and leave everything in ``OUTPUT_DIR``.

    Args:
        cfg: a config of this host.
        resume: go on from ``last.ckpt``, which is written after every epoch, if it is there.
        eval_only: evaluate ``MODEL.WEIGHTS``, or else what ``OUTPUT_DIR`` holds.
        callbacks: further Lightning callbacks.
        num_gpus: processes on this machine where ``MODEL.DEVICE`` is ``cuda``.
        num_machines: machines of the run.

    Returns:
        ``{"accuracy": {"top1": last, "top1_best": best, ...}}`` in percent; ``"cost"``, where a
        procedure reports one, is the share of plain distillation's computation in percent.

    Raises:
        KDError: anything that would fail later, before training and before anything is written.
    """
    check_config(cfg)
    with open_run(cfg, resume, eval_only, num_gpus, num_machines) as this:
        test_data = ClassificationData(cfg, training=False)
        train_data = None if eval_only else ClassificationData(cfg, training=True)
        pl.seed_everything(this.seed, verbose=False)
        model = build_training_model(cfg, this.weights, distilled=not eval_only)
        _check(cfg, model)
        tag = CurveTag([*cfg.KD.TERMS])
        trainer = _trainer(this, tag, [RunProgressBar(tag), *callbacks])
        procedures = None
        if train_data is not None:
            procedures = training_procedures(cfg, train_data, this.seed, trainer.global_rank)
        lit = LitClassifier(model, cfg, this.seed, train_data, test_data, procedures)
        pre_stage = partial(_before_run, this, lit, tag)
        return entry.conduct(this, lit, trainer, pre_stage, save_at_end=False)


def _before_run(this: Run, lit: LitClassifier, tag: CurveTag) -> None:
    """What the terms learn from the teacher beforehand, on the training set as the run sees it."""
    model, data, cfg = lit.model, lit.train_data, this.cfg
    assert data is not None
    prepare_run(
        this,
        lit,
        captures=lambda batch: model.teacher_captures(batch[0]),
        loader=lambda total, done, rank, world: train_loader(cfg, data, lit.seed, rank, world),
        epoch=math.ceil(len(data) / cfg.SOLVER.IMS_PER_BATCH),
        callbacks=[RunProgressBar(tag, "Pre-stage")],
    )


def _check(cfg: CfgNode, model: DistilledClassifier) -> None:
    if model.clipped_terms and (cfg.SOLVER.AMP.ENABLED and cfg.MODEL.DEVICE != "cpu"):
        fail(
            expected="CLIP task_norm in full precision",
            received="SOLVER.AMP.ENABLED True, which scales the gradients",
            remedy="set SOLVER.AMP.ENABLED False",
        )


def _trainer(this: Run, tag: CurveTag, callbacks: Sequence[pl.Callback]) -> pl.Trainer:
    cfg = this.cfg
    if this.hardware["strategy"] == "ddp" and cfg.KD.ENABLED and not cfg.KD.TASK_WEIGHT:
        # Without the task losses the classifier's last layers take no part.
        strategy = {"strategy": "ddp_find_unused_parameters_true"}
        this = replace(this, hardware=this.hardware | strategy)
    return build_trainer(
        this,
        tag,
        callbacks,
        saving={"every_n_epochs": 1, "save_on_train_epoch_end": True},
        max_epochs=cfg.SOLVER.MAX_EPOCH,
        max_steps=cfg.SOLVER.MAX_ITER or -1,
        check_val_every_n_epoch=max(1, cfg.TEST.EVAL_PERIOD),
        # The length of an epoch may change.
        reload_dataloaders_every_n_epochs=int(
            any(procedure.chooses_images for procedure in active_procedures(cfg))
        ),
    )
