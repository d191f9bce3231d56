"""Train and evaluate a classifier, alone or distilled, from a config."""

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

from kd_det.checks import fail
from kd_det.hosts.classification.build import (
    build_condensation,
    build_training_model,
    build_unix,
    flops_ratio,
)
from kd_det.hosts.classification.config import check_config, load_config
from kd_det.hosts.classification.data import ClassificationData
from kd_det.hosts.classification.lit import LitClassifier
from kd_det.hosts.classification.loaders import train_loader
from kd_det.hosts.classification.model import DistilledClassifier
from kd_det.loop.callbacks import EpochProgressBar, JSONLines, StepProgressBar
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
from kd_det.unix import unix_cost

logger = logging.getLogger(__name__)

CHECKPOINT, FINAL, CONFIG, RESULTS = "last.ckpt", "model_final.pth", "config.yaml", "results.json"
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
    results = run(cfg, args.resume, args.eval_only, (), getattr(args, "num_gpus", 1), machines)
    show = rank_zero_only(print)
    for kind, values in results.items():
        show(f"{kind}: " + ", ".join(f"{k} {v:.2f}" for k, v in values.items()))
    return results


def run(
    cfg: CfgNode,
    resume: bool = False,
    eval_only: bool = False,
    callbacks: Sequence[pl.Callback] = (),
    num_gpus: int = 1,
    num_machines: int = 1,
) -> Results:
    """Train as a config says, evaluate, and leave everything in ``OUTPUT_DIR``.

    ``model_final.pth`` holds the student's keys and the adaptors under ``distiller.*``,
    ``last.ckpt`` (written after every epoch) what a resumed run needs, ``metrics.json``, ``csv``
    and ``tensorboard`` the curves, ``results.json`` what is returned.

    Args:
        cfg: a config of this host.
        resume: go on from ``last.ckpt`` in ``OUTPUT_DIR`` if it is there.
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
    check_single_run(cfg)
    hardware = hardware_arguments(cfg, num_gpus, num_machines)
    output = Path(cfg.OUTPUT_DIR)
    if not eval_only:
        check_output_dir(cfg.OUTPUT_DIR, resume)
    weights = cfg.MODEL.WEIGHTS
    if eval_only:
        weights = evaluated_weights(weights, output, (FINAL, CHECKPOINT))
    test_data = ClassificationData(cfg, training=False)
    train_data = None if eval_only else ClassificationData(cfg, training=True)
    seed = cfg.SEED if cfg.SEED >= 0 else common_seed()
    quiet()
    pl.seed_everything(seed, verbose=False)
    model = build_training_model(cfg, weights, distilled=not eval_only)
    _check(cfg, model)
    if model.distiller is not None and model.teacher is not None:
        load_given_pre_stage(model.distiller, model.teacher, cfg)
    trainer = _trainer(cfg, hardware, output, callbacks, eval_only)
    condensation = build_condensation(cfg, train_data) if train_data else None
    unix = None if eval_only else build_unix(cfg, seed, trainer.global_rank)
    lit = LitClassifier(model, cfg, seed, train_data, test_data, condensation, unix)
    # Whatever building drew must not show in training, and every process needs its own stream.
    pl.seed_everything(seed + trainer.global_rank, verbose=False)
    if not eval_only:
        if trainer.is_global_zero:
            output.mkdir(parents=True, exist_ok=True)
            (output / CONFIG).write_text(cfg.dump())
        checkpoint = output / CHECKPOINT
        resumed = resume and checkpoint.is_file()
        if model.teacher is not None and not resumed:
            _pre_stage(cfg, lit, hardware, resume)
            pl.seed_everything(seed + trainer.global_rank, verbose=False)
        trainer.fit(lit, ckpt_path=str(checkpoint) if resumed else None)
        if trainer.is_global_zero:
            torch.save({"model": model.state_dict()}, output / FINAL)
    if eval_only or lit.evaluated_at != trainer.global_step:
        trainer.validate(lit, verbose=False)
    results = lit.results if eval_only else lit.results | _cost(cfg, lit)
    if trainer.is_global_zero and not eval_only:
        (output / RESULTS).write_text(json.dumps(results, indent=2) + "\n")
    return results


def _pre_stage(cfg: CfgNode, lit: LitClassifier, hardware: dict[str, Any], resume: bool) -> None:
    """What the terms learn from the teacher beforehand, on the training set as the run sees it."""
    model, data = lit.model, lit.train_data
    assert model.distiller is not None
    assert model.teacher is not None
    assert data is not None
    prepare_pre_stage(
        model.distiller,
        model.teacher,
        cfg,
        captures=lambda batch: model.teacher_captures(batch[0]),
        loader=lambda total, done, rank, world: train_loader(cfg, data, lit.seed, rank, world),
        epoch=math.ceil(len(data) / cfg.SOLVER.IMS_PER_BATCH),
        hardware=hardware,
        seed=lit.seed,
        callbacks=[StepProgressBar(refresh_rate=5)],
        resume=resume,
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


def _cost(cfg: CfgNode, lit: LitClassifier) -> Results:
    """Computation of KCD or UNIX as a share of plain distillation's, formula and measured."""
    if lit.condensation is not None:
        formula, measured = lit.condensation.formula_cost(), lit.condensation.measured_cost()
    elif lit.unix is not None:
        ratio = flops_ratio(lit.model, cfg.INPUT.SIZE)
        formula = unix_cost(ratio, cfg.KD.UNIX.K_FRAC)
        measured = lit.unix.measured_cost(ratio)
    else:
        return {}
    logger.info("cost: %.2f %% by the formula, %.2f %% measured", 100 * formula, 100 * measured)
    return {"cost": {"formula": 100 * formula, "measured": 100 * measured}}


def _trainer(
    cfg: CfgNode,
    hardware: dict[str, Any],
    output: Path,
    callbacks: Sequence[pl.Callback],
    eval_only: bool,
) -> pl.Trainer:
    solver, clip = cfg.SOLVER, cfg.SOLVER.CLIP_GRADIENTS
    loggers: list[Any] = []
    own: list[pl.Callback] = [EpochProgressBar(refresh_rate=5)]
    if not eval_only:
        loggers = [
            # A version for every start: Lightning's CSV writer begins by removing what is there.
            CSVLogger(output, name="csv"),
            TensorBoardLogger(output, name="tensorboard", version=""),
        ]
        own += [
            JSONLines(output / "metrics.json", _LOG_PERIOD),
            ModelCheckpoint(
                output,
                filename=Path(CHECKPOINT).stem,
                every_n_epochs=1,
                save_on_train_epoch_end=True,
                enable_version_counter=False,
            ),
        ]
    if hardware["strategy"] == "ddp" and cfg.KD.ENABLED and not cfg.KD.TASK_WEIGHT:
        # Without the task losses the classifier's last layers take no part.
        hardware = hardware | {"strategy": "ddp_find_unused_parameters_true"}
    return pl.Trainer(
        **hardware,
        precision=precision(cfg),  # type: ignore[arg-type]
        max_epochs=solver.MAX_EPOCH,
        max_steps=solver.MAX_ITER or -1,
        logger=loggers or False,
        callbacks=[*own, *callbacks],
        enable_checkpointing=not eval_only,
        enable_model_summary=False,
        log_every_n_steps=_LOG_PERIOD,
        num_sanity_val_steps=0,
        check_val_every_n_epoch=max(1, cfg.TEST.EVAL_PERIOD),
        # KCD's epochs shrink.
        reload_dataloaders_every_n_epochs=1 if cfg.KD.ENABLED and cfg.KD.KCD.ENABLED else 0,
        gradient_clip_val=clip.CLIP_VALUE if clip.ENABLED else None,
        gradient_clip_algorithm=clip.CLIP_TYPE if clip.ENABLED else None,
        default_root_dir=str(output),
    )
