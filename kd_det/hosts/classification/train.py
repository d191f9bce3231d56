"""Train and evaluate a classifier, alone or distilled, from a config."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import lightning.pytorch as pl
from fvcore.common.config import CfgNode

from kd_det.core.errors import fail
from kd_det.hosts.base import MakePictures, Progress
from kd_det.hosts.classification.build import build_training_model, training_procedures
from kd_det.hosts.classification.config import check_config
from kd_det.hosts.classification.data import ClassificationData
from kd_det.hosts.classification.lit import LitClassifier
from kd_det.hosts.classification.loaders import train_loader
from kd_det.hosts.classification.model import DistilledClassifier
from kd_det.hosts.lightning.conduct import conduct
from kd_det.hosts.lightning.pre_stage import prepare_run
from kd_det.hosts.lightning.progress import progress_callback
from kd_det.hosts.lightning.run import Run, open_run
from kd_det.hosts.lightning.run import check_run as check_lightning_run
from kd_det.hosts.lightning.trainer import build_trainer
from kd_det.procedures.base import active_procedures
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
    """See :class:`kd_det.hosts.base.RunHost`.

    Returns:
        ``{"accuracy": {"top1": last, "top1_best": best, ...}}`` in percent; ``"cost"``, where a
        procedure reports one, is the share of plain distillation's computation in percent.
    """
    check_config(cfg)
    with open_run(cfg, start) as run_context:
        seed, training = run_context.seed, not start.eval_only
        test_data = ClassificationData(cfg, training=False)
        train_data = ClassificationData(cfg, training=True) if training else None
        pl.seed_everything(seed, verbose=False)
        model = build_training_model(cfg, run_context.weights, distilled=training)
        _check(cfg, model)
        tag = CurveTag([*cfg.KD.TERMS])
        bar = progress_callback(tag, progress)
        trainer = _trainer(run_context, tag, [bar, *callbacks], pictures)
        procedures = None
        if train_data is not None:
            procedures = training_procedures(cfg, train_data, seed, trainer.global_rank)
        lit = LitClassifier(model, cfg, seed, train_data, test_data, procedures)
        before = partial(_before_run, run_context, lit, tag, progress)
        return conduct(run_context, lit, trainer, before, save_at_end=False)


def _before_run(
    run_context: Run, lit: LitClassifier, tag: CurveTag, progress: Progress | None
) -> None:
    """Train what the terms learn from the teacher beforehand, on the run's own training data."""
    model, data, cfg = lit.model, lit.train_data, run_context.cfg
    assert data is not None
    prepare_run(
        run_context,
        lit,
        captures=lambda batch: model.teacher_captures(batch[0]),
        loader=lambda total, done, rank, world: train_loader(cfg, data, lit.seed, rank, world),
        epoch=math.ceil(len(data) / cfg.SOLVER.IMS_PER_BATCH),
        callbacks=[progress_callback(tag, progress, "Pre-stage")],
    )


def _check(cfg: CfgNode, model: DistilledClassifier) -> None:
    if model.clipped_terms and (cfg.SOLVER.AMP.ENABLED and cfg.MODEL.DEVICE != "cpu"):
        fail(
            expected="CLIP task_norm in full precision",
            received="SOLVER.AMP.ENABLED True, which scales the gradients",
            remedy="set SOLVER.AMP.ENABLED False",
        )


def _trainer(
    run_context: Run,
    tag: CurveTag,
    callbacks: Sequence[pl.Callback],
    pictures: MakePictures | None,
) -> pl.Trainer:
    cfg, hardware = run_context.cfg, run_context.hardware
    if hardware["strategy"] == "ddp" and cfg.KD.ENABLED and not cfg.KD.TASK_WEIGHT:
        # Without the task losses the classifier's last layers take no part.
        strategy = {"strategy": "ddp_find_unused_parameters_true"}
        run_context = replace(run_context, hardware=hardware | strategy)
    return build_trainer(
        run_context,
        tag,
        callbacks,
        pictures,
        saving={"every_n_epochs": 1, "save_on_train_epoch_end": True},
        max_epochs=cfg.SOLVER.MAX_EPOCH,
        max_steps=cfg.SOLVER.MAX_ITER or -1,
        check_val_every_n_epoch=max(1, cfg.TEST.EVAL_PERIOD),
        # The length of an epoch may change.
        reload_dataloaders_every_n_epochs=int(
            any(procedure.chooses_images for procedure in active_procedures(cfg))
        ),
    )
