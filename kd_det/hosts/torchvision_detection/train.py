"""Train and evaluate a torchvision detector, alone or under a teacher, from a config."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import lightning.pytorch as pl
from fvcore.common.config import CfgNode
from torch import nn

from kd_det.balance import build_balance
from kd_det.core.checkpoint import load_distiller, load_student
from kd_det.core.errors import fail
from kd_det.hosts.lightning import entry
from kd_det.hosts.lightning.module import Results
from kd_det.hosts.lightning.pre_stage import prepare_run
from kd_det.hosts.lightning.progress import Progress, ReportProgress, RunProgressBar
from kd_det.hosts.lightning.run import Run, open_run
from kd_det.hosts.lightning.trainer import build_trainer
from kd_det.hosts.torchvision_detection.classes import build_class_map
from kd_det.hosts.torchvision_detection.config import check_config, load_config
from kd_det.hosts.torchvision_detection.data import check_datasets, train_dataset, train_loader
from kd_det.hosts.torchvision_detection.lit import LitDetector
from kd_det.hosts.torchvision_detection.model import DistilledDetector
from kd_det.hosts.torchvision_detection.models import build_model
from kd_det.hosts.torchvision_detection.teacher import build_teacher
from kd_det.procedures.base import (
    Procedures,
    TrainingSet,
    build_procedures,
    on_losses_built,
    reads_uncertainties,
)
from kd_det.run.config import read_terms
from kd_det.run.curves import CurveTag


def main(args: argparse.Namespace) -> Results:
    """See :func:`kd_det.hosts.lightning.entry.main`."""
    return entry.main(args, load_config, run)


def run(
    cfg: CfgNode,
    resume: bool = False,
    eval_only: bool = False,
    progress: Progress | None = None,
    callbacks: Sequence[pl.Callback] = (),
    num_gpus: int = 1,
    num_machines: int = 1,
) -> Results:
    """Train as a config says, evaluate, and leave everything in ``OUTPUT_DIR``.

    Without ``DATASETS.TEST`` nothing is evaluated.

    Args:
        cfg: a config of this host.
        resume: go on from ``last.ckpt`` in ``OUTPUT_DIR`` if it is there.
        eval_only: evaluate ``MODEL.WEIGHTS``, or else what ``OUTPUT_DIR`` holds.
        progress: called instead of a progress bar with ``"train"``, ``"evaluate"`` or, for losses
            that learn from the teacher first, ``"pre-stage"``; see :class:`ReportProgress`.
        callbacks: further Lightning callbacks.
        num_gpus: processes on this machine where ``MODEL.DEVICE`` is ``cuda``.
        num_machines: machines of the run.

    Returns:
        ``{"bbox": {"AP": ..., "AP50": ...}, "segm": {...}}`` in percent; ``"cost"``, where a
        procedure reports one, is the share of plain distillation's computation in percent.

    Raises:
        KDError: anything that would fail later, before training and before anything is written.
    """
    check_config(cfg)
    with open_run(cfg, resume, eval_only, num_gpus, num_machines) as this:
        check_datasets(cfg, training=not eval_only)
        pl.seed_everything(this.seed, verbose=False)
        model = build_training_model(cfg, this.weights, distilled=not eval_only)
        dataset = None if eval_only else train_dataset(cfg)
        procedures = Procedures()
        if dataset is not None:
            size = len(dataset)
            procedures = build_procedures(cfg, lambda: TrainingSet(size, this.seed))
        planned = procedures.planned_config(cfg)
        lit = LitDetector(model, planned, this.seed, dataset, procedures)
        tag = CurveTag([*cfg.KD.TERMS])
        bar = ReportProgress(progress) if progress else RunProgressBar(tag)
        trainer = _trainer(this, planned, tag, [bar, *callbacks])
        pre_stage = partial(_before_run, this, lit, tag, progress)
        return entry.conduct(this, lit, trainer, pre_stage, save_at_end=True)


def build_training_model(cfg: CfgNode, weights: str = "", distilled: bool = True) -> nn.Module:
    """The stock student, and around it the teacher and the terms where ``KD.ENABLED``.

    Args:
        cfg: a config of this host.
        weights: the student's start.
        distilled: False leaves the teacher out whatever the config says, as evaluation does.
    """
    student = build_model(cfg)
    if weights:
        load_student(student, weights, complete=not distilled)
    if not (distilled and cfg.KD.ENABLED):
        return student
    if not cfg.KD.TERMS:
        fail(
            expected="KD.TERMS to name at least one loss",
            received="none",
            remedy="add a term, or set KD.ENABLED False to train the plain student",
        )
    class_map = build_class_map(cfg)
    terms = read_terms(cfg)
    model = DistilledDetector(
        student,
        build_teacher(cfg),
        terms,
        cfg.KD.REPORT_PERIOD,
        task_weight=cfg.KD.TASK_WEIGHT,
        values=reads_uncertainties(cfg),
        class_map=class_map,
        balance=build_balance(cfg, terms),
    )
    if cfg.KD.WEIGHTS:
        load_distiller(model.distiller, cfg.KD.WEIGHTS)
    on_losses_built(cfg, model.distiller, model.teacher)
    return model


def _before_run(this: Run, lit: LitDetector, tag: CurveTag, progress: Progress | None) -> None:
    model, dataset, cfg = lit.model, lit.dataset, this.cfg
    if not isinstance(model, DistilledDetector):
        return
    assert dataset is not None

    def loader(iterations: int, start: int, rank: int, world: int) -> Any:
        whole = cfg.clone()
        whole.defrost()
        whole.SOLVER.MAX_ITER = iterations
        return train_loader(whole, dataset, this.seed, start, rank, world)

    def report(_: str, done: int, total: int) -> None:
        assert progress is not None
        progress("pre-stage", done, total)

    prepare_run(
        this,
        lit,
        model.teacher_captures(cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN),
        loader,
        math.ceil(len(dataset) / cfg.SOLVER.IMS_PER_BATCH),
        [ReportProgress(report) if progress else RunProgressBar(tag, "Pre-stage")],
    )


def _trainer(
    this: Run, planned: CfgNode, tag: CurveTag, callbacks: Sequence[pl.Callback]
) -> pl.Trainer:
    solver, period = planned.SOLVER, planned.TEST.EVAL_PERIOD
    return build_trainer(
        this,
        tag,
        callbacks,
        saving={"every_n_train_steps": max(1, solver.CHECKPOINT_PERIOD)},
        max_steps=solver.MAX_ITER,
        max_epochs=-1,
        limit_val_batches=1.0 if planned.DATASETS.TEST else 0,
        val_check_interval=period if 0 < period < solver.MAX_ITER else None,
    )
