"""Training on the frozen teacher alone, before a run on Lightning.

A host brings the teacher's tensors of a batch and the batches. What is trained, and the files of
it, belong to the procedures of the run; see :mod:`kd_det.procedures.pre_stage`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from fvcore.common.config import CfgNode
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor

from kd_det.core.distributed import rank
from kd_det.hosts.lightning.metrics import LOG_PERIOD
from kd_det.hosts.lightning.module import DistillationModule, ResumableModule, check_finite
from kd_det.hosts.lightning.run import Run
from kd_det.hosts.lightning.trainer import plain_trainer, saver
from kd_det.procedures.base import BeforeRun, before_run
from kd_det.procedures.pre_stage import PreStageModel
from kd_det.run.folder import PRE_STAGE, PRE_STAGE_CHECKPOINT

# A batch to the teacher's tensors by tap name, without gradients. Batches arrive on the device of
# training.
Captures = Callable[[Any], Mapping[str, Any]]
# (iterations of the whole pre-stage, iterations done, rank, world) to the batches still to come. A
# loader that ends earlier, such as one epoch, is begun again.
Loader = Callable[[int, int, int, int], Iterable[Any]]


def prepare_run(
    run: Run,
    lit: DistillationModule,
    captures: Captures,
    loader: Loader,
    epoch: int,
    callbacks: Sequence[pl.Callback] = (),
) -> None:
    """Call what procedures train before the first iteration; a loss curve is in ``pre_stage``.

    On every process, and not where a checkpoint of the run itself follows. ``epoch`` is the number
    of iterations of one pass over the training set.
    """

    def train(model: PreStageModel, iterations: int) -> None:
        period = max(1, run.cfg.SOLVER.CHECKPOINT_PERIOD)
        saving = saver(run, PRE_STAGE_CHECKPOINT, every_n_train_steps=period)
        trainer = plain_trainer(
            run,
            [saving, *callbacks],
            max_steps=iterations,
            max_epochs=-1,
            logger=CSVLogger(run.cfg.OUTPUT_DIR, name="pre_stage"),
            log_every_n_steps=min(LOG_PERIOD, iterations),
            limit_val_batches=0,
        )
        pl.seed_everything(run.seed + trainer.global_rank, verbose=False)
        checkpoint = run.output / PRE_STAGE_CHECKPOINT
        resumed = run.start.resume and checkpoint.is_file()
        trainer.fit(
            _LitPreStage(model, captures, loader, iterations, run.cfg.KD.PRE_STAGE),
            ckpt_path=str(checkpoint) if resumed else None,
        )

    file = run.output / PRE_STAGE
    context = BeforeRun(
        run.cfg, lit.distiller, lit.teacher, file, run.start.resume, train, lambda n: n * epoch
    )
    if before_run(context) and rank() == 0:
        (run.output / PRE_STAGE_CHECKPOINT).unlink(missing_ok=True)


class _LitPreStage(ResumableModule):
    def __init__(
        self, model: PreStageModel, captures: Captures, loader: Loader, total: int, node: CfgNode
    ) -> None:
        super().__init__()
        self.model, self.node, self.total = model, node, total
        self._captures, self._loader = captures, loader

    def train_dataloader(self) -> Any:
        done, world = self.trainer.global_step, self.trainer.world_size
        return self._loader(self.total, done, self.trainer.global_rank, world)

    def training_step(self, batch: Any, _: int) -> Tensor:
        losses = self.model(self._captures(batch))
        where = f"the pre-stage is not finite at iteration {self.global_step}"
        check_finite(where, losses, "lower KD.PRE_STAGE.BASE_LR")
        self.log_dict({name: loss.detach() for name, loss in losses.items()})
        return torch.stack(list(losses.values())).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        node = self.node
        return self.model.optimizer(node.BASE_LR, node.MOMENTUM, node.NESTEROV, node.WEIGHT_DECAY)
