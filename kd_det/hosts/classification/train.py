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
from kd_det.hosts.classification.build import build_condensation, build_training_model, build_unix
from kd_det.hosts.classification.config import check_config, load_config
from kd_det.hosts.classification.data import ClassificationData
from kd_det.hosts.classification.lit import LitClassifier
from kd_det.hosts.classification.loaders import train_loader
from kd_det.hosts.classification.model import DistilledClassifier
from kd_det.hosts.lightning import entry
from kd_det.hosts.lightning.module import Results
from kd_det.hosts.lightning.pre_stage import load_given_pre_stage, prepare_pre_stage
from kd_det.hosts.lightning.progress import RunProgressBar
from kd_det.hosts.lightning.run import Run, open_run
from kd_det.hosts.lightning.trainer import build_trainer
from kd_det.run.config import is_condensed
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
        ``{"accuracy": {"top1": last, "top1_best": best, ...}}`` in percent; with KCD or UNIX
        also ``"cost"``, the share of plain distillation's computation in percent.

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
        if model.distiller is not None and model.teacher is not None:
            load_given_pre_stage(model.distiller, model.teacher, cfg)
        tag = CurveTag([*cfg.KD.TERMS])
        trainer = _trainer(this, tag, [RunProgressBar(tag), *callbacks])
        condensation = build_condensation(cfg, train_data) if train_data else None
        unix = None if eval_only else build_unix(cfg, this.seed, trainer.global_rank)
        lit = LitClassifier(model, cfg, this.seed, train_data, test_data, condensation, unix)
        pre_stage = partial(_pre_stage, this, lit, tag)
        return entry.conduct(this, lit, trainer, pre_stage, save_at_end=False)


def _pre_stage(this: Run, lit: LitClassifier, tag: CurveTag) -> None:
    """What the terms learn from the teacher beforehand, on the training set as the run sees it."""
    model, data, cfg = lit.model, lit.train_data, this.cfg
    if model.distiller is None or model.teacher is None:
        return
    assert data is not None
    prepare_pre_stage(
        model.distiller,
        model.teacher,
        cfg,
        captures=lambda batch: model.teacher_captures(batch[0]),
        loader=lambda total, done, rank, world: train_loader(cfg, data, lit.seed, rank, world),
        epoch=math.ceil(len(data) / cfg.SOLVER.IMS_PER_BATCH),
        hardware=this.hardware,
        seed=this.seed,
        callbacks=[RunProgressBar(tag, "Pre-stage")],
        resume=this.resume,
    )


def _check(cfg: CfgNode, model: DistilledClassifier) -> None:
    if model.clipped_terms and (cfg.SOLVER.AMP.ENABLED and cfg.MODEL.DEVICE != "cpu"):
        fail(
            expected="CLIP task_norm in full precision",
            received="SOLVER.AMP.ENABLED True, which scales the gradients",
            remedy="set SOLVER.AMP.ENABLED False",
        )
    if cfg.KD.ENABLED and cfg.KD.UNIX.ENABLED and cfg.KD.JOINT.ENABLED:
        fail(
            expected="a frozen teacher for KD.UNIX, which saves its passes",
            received="KD.JOINT.ENABLED True",
            remedy="disable one of the two",
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
        # KCD's epochs shrink.
        reload_dataloaders_every_n_epochs=int(is_condensed(cfg)),
    )
