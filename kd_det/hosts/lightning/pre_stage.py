"""The pre-stage of a run on Lightning: what its losses learn from the frozen teacher beforehand.

A host says what the teacher computes for a batch and where batches come from; everything else,
:mod:`kd_det.procedures.pre_stage`'s files included, is the same for all of them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from fvcore.common.config import CfgNode
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor

from kd_det.core.distiller import Distiller
from kd_det.core.errors import fail
from kd_det.core.teacher import FrozenTeacher
from kd_det.hosts.lightning.hardware import precision
from kd_det.hosts.lightning.module import ResumableModule, check_finite
from kd_det.procedures.pre_stage import (
    PreStageModel,
    load_pre_stage,
    pre_stage_losses,
    save_pre_stage,
    teacher_fingerprint,
)
from kd_det.run.folder import PRE_STAGE, PRE_STAGE_CHECKPOINT

logger = logging.getLogger(__name__)

_LOG_PERIOD = 20

# A batch to the teacher's tensors by tap name, without gradients.
Captures = Callable[[Any], Mapping[str, Any]]
# (iterations of the whole pre-stage, iterations done, rank, world) to the batches still to come. A
# loader that ends earlier, such as one epoch, is begun again.
Loader = Callable[[int, int, int, int], Iterable[Any]]


def load_given_pre_stage(distiller: Distiller, teacher: FrozenTeacher, cfg: CfgNode) -> None:
    """Load ``KD.PRE_STAGE.WEIGHTS`` if it is given; call it before anything is written.

    Raises:
        KDError: no term needs a pre-stage, or the file is one of another teacher; see
            :func:`kd_det.procedures.pre_stage.load_pre_stage`.
    """
    path = cfg.KD.PRE_STAGE.WEIGHTS
    if not path:
        return
    if not pre_stage_losses(distiller):
        fail(
            expected="KD.PRE_STAGE.WEIGHTS only with a term that has a pre-stage, such as MHGD",
            received=f"'{path}' and terms {', '.join(distiller.terms)}",
            remedy="leave it empty",
        )
    load_pre_stage(path, distiller, teacher_fingerprint(teacher))


def prepare_pre_stage(
    distiller: Distiller,
    teacher: FrozenTeacher,
    cfg: CfgNode,
    captures: Captures,
    loader: Loader,
    epoch: int,
    hardware: Mapping[str, Any],
    seed: int,
    callbacks: Sequence[pl.Callback] = (),
    resume: bool = False,
) -> None:
    """Train what the terms need, or take the finished file of an interrupted run.

    Does nothing where no term needs a pre-stage or all have theirs already, from a file or from
    an earlier stage. The result is ``OUTPUT_DIR/pre_stage.pth``, the loss curve is in
    ``OUTPUT_DIR/pre_stage``. Call it on every process, and not where a checkpoint of the run
    itself follows: that holds the networks.

    Args:
        distiller: the run's losses.
        teacher: the frozen teacher.
        cfg: a config with ``KD.PRE_STAGE``, ``OUTPUT_DIR``, ``SOLVER.AMP``,
            ``SOLVER.CHECKPOINT_PERIOD`` and ``MODEL.DEVICE``.
        captures: see :data:`Captures`; batches arrive on the device of training.
        loader: see :data:`Loader`.
        epoch: iterations of one pass over the training set.
        hardware: see :func:`kd_det.hosts.lightning.hardware.hardware_arguments`.
        seed: of the random numbers of this phase; each process adds its rank.
        callbacks: a progress bar, for example.
        resume: take or continue what is in ``OUTPUT_DIR``.

    Raises:
        KDError: ``OUTPUT_DIR`` holds a pre-stage and ``resume`` is False; or a file of another
            teacher; or no iterations.
    """
    losses = {name: x for name, x in pre_stage_losses(distiller).items() if not x[0].is_ready}
    if not losses:
        return
    path = Path(cfg.OUTPUT_DIR) / PRE_STAGE
    fingerprint = teacher_fingerprint(teacher)
    if path.is_file():
        if not resume:
            fail(
                expected="OUTPUT_DIR without a finished pre-stage",
                received=f"'{path}' of another run",
                remedy=f"add --resume to continue that run, set KD.PRE_STAGE.WEIGHTS {path} to "
                "use it elsewhere, or choose another OUTPUT_DIR",
            )
        load_pre_stage(path, losses, fingerprint)
        return
    node = cfg.KD.PRE_STAGE
    iterations = node.MAX_ITER or node.EPOCHS * epoch
    if iterations < 1:
        fail(
            expected="a pre-stage of at least one iteration",
            received=f"KD.PRE_STAGE.EPOCHS {node.EPOCHS}, MAX_ITER {node.MAX_ITER}",
            remedy="use the default 20 epochs, or give a finished one as KD.PRE_STAGE.WEIGHTS",
        )
    model = PreStageModel(losses)
    trainer = _trainer(cfg, iterations, hardware, callbacks)
    train_pre_stage(model, captures, loader, iterations, node, trainer, seed, resume)
    if trainer.is_global_zero:
        save_pre_stage(path, losses, fingerprint)
        path.with_name(PRE_STAGE_CHECKPOINT).unlink(missing_ok=True)
    trainer.strategy.barrier()


def train_pre_stage(
    model: PreStageModel,
    captures: Captures,
    loader: Loader,
    iterations: int,
    node: CfgNode,
    trainer: pl.Trainer,
    seed: int,
    resume: bool = False,
) -> None:
    """The loop alone: SGD as ``node`` says, then :meth:`PreStageModel.finish`.

    Args:
        model: what learns.
        captures: see :data:`Captures`.
        loader: see :data:`Loader`.
        iterations: of the whole pre-stage.
        node: ``KD.PRE_STAGE``.
        trainer: with ``max_steps`` of ``iterations``.
        seed: see :func:`prepare_pre_stage`.
        resume: continue a checkpoint in the trainer's folder, if there is one.

    Raises:
        FloatingPointError: a loss that is not finite.
    """
    pl.seed_everything(seed + trainer.global_rank, verbose=False)
    checkpoint = Path(trainer.default_root_dir) / PRE_STAGE_CHECKPOINT
    resumed = resume and checkpoint.is_file()
    lit = _LitPreStage(model, captures, loader, iterations, node)
    trainer.fit(lit, ckpt_path=str(checkpoint) if resumed else None)
    model.finish()
    last = {k: f"{float(v):.4f}" for k, v in trainer.callback_metrics.items()}
    logger.info("pre-stage: %d iterations on the teacher alone, losses %s", iterations, last)


class _LitPreStage(ResumableModule):
    def __init__(
        self,
        model: PreStageModel,
        captures: Captures,
        loader: Loader,
        iterations: int,
        node: CfgNode,
    ) -> None:
        super().__init__()
        self.model = model
        self.node = node
        self.iterations = iterations
        self._captures = captures
        self._loader = loader

    def train_dataloader(self) -> Any:
        trainer = self.trainer
        return self._loader(
            self.iterations, trainer.global_step, trainer.global_rank, trainer.world_size
        )

    def training_step(self, batch: Any, _: int) -> Tensor:
        losses = self.model(self._captures(batch))
        where = f"the pre-stage is not finite at iteration {self.global_step}"
        check_finite(where, losses, "lower KD.PRE_STAGE.BASE_LR")
        self.log_dict({name: loss.detach() for name, loss in losses.items()})
        return torch.stack(list(losses.values())).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        node = self.node
        return self.model.optimizer(node.BASE_LR, node.MOMENTUM, node.NESTEROV, node.WEIGHT_DECAY)


def _trainer(
    cfg: CfgNode, iterations: int, hardware: Mapping[str, Any], callbacks: Sequence[pl.Callback]
) -> pl.Trainer:
    saver = ModelCheckpoint(
        cfg.OUTPUT_DIR,
        filename=Path(PRE_STAGE_CHECKPOINT).stem,
        every_n_train_steps=max(1, cfg.SOLVER.CHECKPOINT_PERIOD),
        enable_version_counter=False,
    )
    return pl.Trainer(
        **hardware,
        precision=precision(cfg),  # type: ignore[arg-type]
        max_steps=iterations,
        max_epochs=-1,
        logger=CSVLogger(cfg.OUTPUT_DIR, name="pre_stage"),
        callbacks=[saver, *callbacks],
        enable_progress_bar=any(isinstance(each, pl.callbacks.ProgressBar) for each in callbacks),
        enable_model_summary=False,
        log_every_n_steps=min(_LOG_PERIOD, iterations),
        num_sanity_val_steps=0,
        limit_val_batches=0,
        default_root_dir=str(cfg.OUTPUT_DIR),
    )
