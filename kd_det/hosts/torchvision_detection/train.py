"""Train and evaluate a torchvision detector, alone or under a teacher, from a config."""

from __future__ import annotations

import argparse
import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from fvcore.common.config import CfgNode
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import nn

from kd_det.checkpoint import load_distiller, load_student
from kd_det.checks import fail
from kd_det.config import read_terms
from kd_det.hosts.torchvision_detection.config import check_config, load_config
from kd_det.hosts.torchvision_detection.data import (
    CocoDataset,
    check_datasets,
    train_dataset,
    train_loader,
)
from kd_det.hosts.torchvision_detection.kcd import build_condensation, planned_config
from kd_det.hosts.torchvision_detection.lit import LitDetector
from kd_det.hosts.torchvision_detection.model import DistilledDetector
from kd_det.hosts.torchvision_detection.models import build_model
from kd_det.hosts.torchvision_detection.teacher import build_teacher
from kd_det.loop.callbacks import JSONLines, Progress, ReportProgress, StepProgressBar
from kd_det.loop.hardware import (
    announce_rendezvous,
    common_seed,
    hardware_arguments,
    precision,
    quiet,
)
from kd_det.loop.pre_stage import load_given_pre_stage, prepare_pre_stage
from kd_det.runs import check_output_dir, evaluated_weights
from kd_det.stages import check_single_run

logger = logging.getLogger(__name__)

CHECKPOINT, FINAL, CONFIG = "last.ckpt", "model_final.pth", "config.yaml"
_LOG_PERIOD = 20

Results = dict[str, dict[str, float]]


def main(args: argparse.Namespace) -> Results:
    """Entry point of ``tools/train_net.py`` for this host.

    Args:
        args: ``config_file``, ``opts``, ``resume``, ``eval_only``, ``num_gpus``,
            ``num_machines``, ``machine_rank`` and ``dist_url``.
    """
    cfg = load_config(args.config_file, args.opts)
    machines = announce_rendezvous(args)
    results = run(
        cfg,
        resume=args.resume,
        eval_only=args.eval_only,
        num_gpus=getattr(args, "num_gpus", 1),
        num_machines=machines,
    )
    show = rank_zero_only(print)
    for kind, values in results.items():
        show(f"{kind}: " + ", ".join(f"{k} {v:.2f}" for k, v in values.items()))
    return results


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

    ``model_final.pth`` holds the student's keys and the adaptors under ``distiller.*``,
    ``last.ckpt`` what a resumed run needs, ``metrics.json``, ``csv`` and ``tensorboard`` the
    curves, ``results.json`` what is returned. Without ``DATASETS.TEST`` nothing is evaluated.

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
        ``{"bbox": {"AP": ..., "AP50": ...}, "segm": {...}}`` in percent, and with KCD its
        ``"kcd"`` costs.

    Raises:
        KDError: anything that would fail later, before training and before anything is written.
    """
    check_config(cfg)
    check_single_run(cfg)
    hardware = hardware_arguments(cfg, num_gpus, num_machines)
    output = Path(cfg.OUTPUT_DIR)
    if not eval_only:
        check_output_dir(cfg.OUTPUT_DIR, resume)
    weights = cfg.MODEL.WEIGHTS
    if eval_only:
        weights = evaluated_weights(weights, output, (FINAL, CHECKPOINT))
    check_datasets(cfg, training=not eval_only)
    seed = cfg.SEED if cfg.SEED >= 0 else common_seed()
    quiet()
    pl.seed_everything(seed, verbose=False)
    model = build_training_model(cfg, weights, distilled=not eval_only)
    dataset = None if eval_only else train_dataset(cfg)
    condensation = build_condensation(cfg, len(dataset)) if dataset is not None else None
    planned = cfg if condensation is None else planned_config(cfg, condensation)
    lit = LitDetector(model, planned, seed, dataset, condensation)
    bar = [ReportProgress(progress)] if progress else [StepProgressBar(refresh_rate=5)]
    trainer = _trainer(planned, hardware, output, [*bar, *callbacks], eval_only)
    if dataset is not None:
        if trainer.is_global_zero:
            output.mkdir(parents=True, exist_ok=True)
            (output / CONFIG).write_text(cfg.dump())
        checkpoint = output / CHECKPOINT
        resumed = resume and checkpoint.is_file()
        if isinstance(model, DistilledDetector) and not resumed:
            _pre_stage(cfg, model, dataset, hardware, seed, progress, resume)
        # Whatever was drawn so far must not show in training, and every process needs its own
        # stream.
        pl.seed_everything(seed + trainer.global_rank, verbose=False)
        trainer.fit(lit, ckpt_path=str(checkpoint) if resumed else None)
        trainer.save_checkpoint(checkpoint)
        if trainer.is_global_zero:
            torch.save({"model": model.state_dict()}, output / FINAL)
    if cfg.DATASETS.TEST and lit.evaluated_at != planned.SOLVER.MAX_ITER:
        trainer.validate(lit, verbose=False)
    if trainer.is_global_zero and not eval_only:
        (output / "results.json").write_text(json.dumps(lit.results, indent=2) + "\n")
    return lit.results


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
    model = DistilledDetector(
        student,
        build_teacher(cfg),
        read_terms(cfg),
        cfg.KD.REPORT_PERIOD,
        task_weight=cfg.KD.TASK_WEIGHT,
        values=cfg.KD.KCD.ENABLED,
    )
    if cfg.KD.WEIGHTS:
        load_distiller(model.distiller, cfg.KD.WEIGHTS)
    load_given_pre_stage(model.distiller, model.teacher, cfg)
    return model


def _pre_stage(
    cfg: CfgNode,
    model: DistilledDetector,
    dataset: CocoDataset,
    hardware: dict[str, Any],
    seed: int,
    progress: Progress | None,
    resume: bool,
) -> None:
    def loader(iterations: int, start: int, rank: int, world: int) -> Any:
        whole = cfg.clone()
        whole.defrost()
        whole.SOLVER.MAX_ITER = iterations
        return train_loader(whole, dataset, seed, start, rank, world)

    def report(_: str, done: int, total: int) -> None:
        assert progress is not None
        progress("pre-stage", done, total)

    prepare_pre_stage(
        model.distiller,
        model.teacher,
        cfg,
        model.teacher_captures(cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN),
        loader,
        math.ceil(len(dataset) / cfg.SOLVER.IMS_PER_BATCH),
        hardware,
        seed,
        [ReportProgress(report)] if progress else [StepProgressBar(refresh_rate=5)],
        resume,
    )


def _trainer(
    cfg: CfgNode,
    hardware: dict[str, Any],
    output: Path,
    callbacks: Sequence[pl.Callback],
    eval_only: bool,
) -> pl.Trainer:
    solver, period = cfg.SOLVER, cfg.TEST.EVAL_PERIOD
    clip = solver.CLIP_GRADIENTS
    every = 0 < period < solver.MAX_ITER
    loggers: list[Any] = []
    own: list[pl.Callback] = []
    if not eval_only:
        loggers = [
            # A version for every start: Lightning's CSV writer begins by removing what is there.
            CSVLogger(output, name="csv"),
            TensorBoardLogger(output, name="tensorboard", version=""),
        ]
        own = [
            JSONLines(output / "metrics.json", _LOG_PERIOD),
            ModelCheckpoint(
                output,
                filename=Path(CHECKPOINT).stem,
                every_n_train_steps=max(1, solver.CHECKPOINT_PERIOD),
                enable_version_counter=False,
            ),
        ]
    return pl.Trainer(
        **hardware,
        precision=precision(cfg),  # type: ignore[arg-type]
        max_steps=solver.MAX_ITER,
        max_epochs=-1,
        logger=loggers or False,
        callbacks=[*own, *callbacks],
        enable_checkpointing=not eval_only,
        enable_model_summary=False,
        log_every_n_steps=min(_LOG_PERIOD, solver.MAX_ITER),
        num_sanity_val_steps=0,
        limit_val_batches=1.0 if cfg.DATASETS.TEST else 0,
        val_check_interval=period if every else None,
        gradient_clip_val=clip.CLIP_VALUE if clip.ENABLED else None,
        gradient_clip_algorithm=clip.CLIP_TYPE if clip.ENABLED else None,
        default_root_dir=str(output),
    )
