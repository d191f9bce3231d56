"""Train and evaluate a torchvision detector, alone or under a teacher, from a config."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import lightning.pytorch as pl
from fvcore.common.config import CfgNode
from torch import nn

from kd_det.core.checkpoint import load_distiller, load_student
from kd_det.hosts.base import MakePictures, Progress
from kd_det.hosts.detection.distillation import plan_options
from kd_det.hosts.lightning.conduct import conduct
from kd_det.hosts.lightning.pre_stage import prepare_run
from kd_det.hosts.lightning.progress import progress_callback
from kd_det.hosts.lightning.run import Run, open_run
from kd_det.hosts.lightning.run import check_run as check_lightning_run
from kd_det.hosts.lightning.trainer import build_trainer
from kd_det.hosts.torchvision_detection.classes import build_class_map
from kd_det.hosts.torchvision_detection.config import check_config
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
)
from kd_det.run.config import read_terms
from kd_det.run.curves import CurveTag
from kd_det.run.plan import NEW, Results, Start


def check_run(cfg: CfgNode, start: Start) -> None:
    """See :class:`kd_det.hosts.base.Host`."""
    check_config(cfg)
    check_lightning_run(cfg, start)


def run(
    cfg: CfgNode,
    start: Start = NEW,
    *,
    progress: Progress | None = None,
    pictures: MakePictures | None = None,
    callbacks: Sequence[pl.Callback] = (),
) -> Results:
    """See :class:`kd_det.hosts.base.RunHost`; without ``DATASETS.TEST`` nothing is evaluated.

    Returns:
        ``{"bbox": {"AP": ..., "AP50": ...}, "segm": {...}}`` in percent; ``"cost"``, where a
        procedure reports one, is the share of plain distillation's computation in percent.
    """
    check_config(cfg)
    with open_run(cfg, start) as run_context:
        seed, training = run_context.seed, not start.eval_only
        check_datasets(cfg, training)
        pl.seed_everything(seed, verbose=False)
        model = build_training_model(cfg, run_context.weights, distilled=training)
        dataset = train_dataset(cfg) if training else None
        procedures = Procedures()
        if dataset is not None:
            size = len(dataset)
            procedures = build_procedures(cfg, lambda: TrainingSet(size, seed))
        planned = procedures.planned_config(cfg)
        lit = LitDetector(model, planned, seed, dataset, procedures)
        tag = CurveTag([*cfg.KD.TERMS])
        solver, period = planned.SOLVER, planned.TEST.EVAL_PERIOD
        trainer = build_trainer(
            run_context,
            tag,
            [progress_callback(tag, progress), *callbacks],
            pictures,
            saving={"every_n_train_steps": max(1, solver.CHECKPOINT_PERIOD)},
            max_steps=solver.MAX_ITER,
            max_epochs=-1,
            limit_val_batches=1.0 if planned.DATASETS.TEST else 0,
            val_check_interval=period if 0 < period < solver.MAX_ITER else None,
        )
        before = partial(_before_run, run_context, lit, tag, progress)
        return conduct(run_context, lit, trainer, before, save_at_end=True)


def build_training_model(cfg: CfgNode, weights: str = "", distilled: bool = True) -> nn.Module:
    """The stock student, and around it the teacher and the terms where ``KD.ENABLED``.

    Args:
        cfg: a config of this host.
        weights: the student's start.
        distilled: False leaves the teacher out even where ``KD.ENABLED``, as evaluation does.
    """
    student = build_model(cfg)
    if weights:
        load_student(student, weights, complete=not distilled)
    if not (distilled and cfg.KD.ENABLED):
        return student
    class_map, terms = build_class_map(cfg), read_terms(cfg)
    teacher, options = build_teacher(cfg).frozen, plan_options(cfg, terms)
    model = DistilledDetector(student, teacher, terms, class_map=class_map, **options)
    if cfg.KD.WEIGHTS:
        load_distiller(model.distiller, cfg.KD.WEIGHTS)
    on_losses_built(cfg, model.distiller, model.teacher)
    return model


def _before_run(
    run_context: Run, lit: LitDetector, tag: CurveTag, progress: Progress | None
) -> None:
    """Train what the terms learn from the teacher beforehand."""
    model, dataset, cfg = lit.model, lit.dataset, run_context.cfg
    if not isinstance(model, DistilledDetector):
        return
    assert dataset is not None

    def loader(iterations: int, done: int, rank: int, world: int) -> Any:
        whole = cfg.clone()
        whole.defrost()
        whole.SOLVER.MAX_ITER = iterations
        return train_loader(whole, dataset, run_context.seed, done, rank, world)

    prepare_run(
        run_context,
        lit,
        model.teacher_captures(cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN),
        loader,
        math.ceil(len(dataset) / cfg.SOLVER.IMS_PER_BATCH),
        [progress_callback(tag, progress, "Pre-stage")],
    )
