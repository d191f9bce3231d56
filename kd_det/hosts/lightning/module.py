"""The base of the LightningModules of all hosts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from fvcore.common.config import CfgNode
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from kd_det.core.distiller import Distiller
from kd_det.core.teacher import FrozenTeacher
from kd_det.hosts.lightning.metrics import LOG_PERIOD
from kd_det.procedures.base import Procedures, TrainingLoop
from kd_det.run.plan import Results


class ResumableModule(LightningModule):
    """A module whose random numbers go on, in a resumed run, where they were."""

    _rng: Tensor | None = None

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["rng_state"] = torch.get_rng_state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._rng = checkpoint.get("rng_state")

    def on_train_start(self) -> None:
        # Each process of several has a stream of its own, and only that of the first is in the
        # checkpoint.
        if self._rng is not None and self.trainer.world_size == 1:
            torch.set_rng_state(self._rng.cpu())
        self._rng = None


class DistillationModule(ResumableModule, TrainingLoop):
    """Trains a model that may hold a distiller; the model's state is its only state.

    The model is a stock one, or holds it as ``student`` beside a ``distiller`` and a ``teacher``.
    The seed decides the order of the training images.

    Attributes:
        results: of the last evaluation, ``{kind: {metric: percent}}``.
        evaluated_at: the iteration of that evaluation, or None.
    """

    # What to do about losses that are not finite.
    remedy = "lower SOLVER.BASE_LR or the weight of a term"

    def __init__(
        self, model: nn.Module, cfg: CfgNode, seed: int, procedures: Procedures | None = None
    ) -> None:
        super().__init__()
        self.procedures = procedures or Procedures()
        self.model = model
        self.cfg = cfg
        self.seed = seed
        self.results: Results = {}
        self.evaluated_at: int | None = None
        self._measured: dict[str, Tensor] = {}

    @property
    def student(self) -> nn.Module:
        """The stock model."""
        return getattr(self.model, "student", self.model)

    @property
    def distiller(self) -> Distiller | None:
        """The losses of the run; None for a plain student."""
        return getattr(self.model, "distiller", None)

    @property
    def teacher(self) -> FrozenTeacher | None:
        """The frozen teacher; None for a plain student."""
        return getattr(self.model, "teacher", None)

    def final_results(self) -> Results:
        """What the run reports at its end: the last evaluation, and the cost of procedures."""
        costs = self.costs()
        return self.results | ({"cost": costs} if costs else {})

    def costs(self) -> dict[str, float]:
        """See :meth:`kd_det.procedures.base.Procedures.costs`."""
        return self.procedures.costs(self)

    # A checkpoint has the student's own keys, without the name it has here.

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        return self.model.state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        return self.model.load_state_dict(state_dict, *args, **kwargs)

    def log_losses(self, losses: Mapping[str, Tensor], total: Tensor) -> None:
        """Log a step's losses by name, ``total_loss``, and the metrics of the distiller.

        Raises:
            FloatingPointError: a loss is not finite.
        """
        check_finite(f"losses are not finite at iteration {self.global_step}", losses, self.remedy)
        shown = {"total_loss": total, **losses}
        # The callback that writes metrics.json tells the loggers, by the names of their curves.
        self.log_dict({k: v.detach() for k, v in shown.items()}, logger=False)
        self.log_dict(self.procedures.scalars(), logger=False)
        if self.distiller is not None:
            # Shares are not measured in every step; the last ones are kept for the next line.
            self._measured.update(self.distiller.metrics)
            step = self.global_step + 1
            if step % LOG_PERIOD == 0 or step == self.trainer.max_steps:
                self.log_dict(self._measured, logger=False)

    def on_train_epoch_end(self) -> None:
        for procedure in self.procedures:
            procedure.on_epoch_end()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        # Saving is called on every process, though only the first writes.
        self.procedures.synchronize()
        checkpoint.update(self.procedures.state_dict())

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.procedures.load_state_dict(checkpoint)

    def on_train_end(self) -> None:
        # A run may be shorter than the distiller's report period.
        if self.distiller is not None and self.trainer.is_global_zero:
            self.distiller.report_silent()


def check_finite(what: str, losses: Mapping[str, Tensor], remedy: str) -> None:
    """Raise FloatingPointError if the sum of the losses, scalars by name, is not finite.

    The message is ``what``, the losses and the remedy.
    """
    total = torch.stack([loss.detach().float() for loss in losses.values()]).sum()
    if not torch.isfinite(total):
        values = ", ".join(f"{name} {loss.item():.4g}" for name, loss in losses.items())
        raise FloatingPointError(f"{what}: {values}; {remedy}")
