"""The LightningModule: one step, the optimiser and the evaluation of a classifier."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from fvcore.common.config import CfgNode
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from kd_det.condensation import Condensation
from kd_det.gradients import add_clipped_gradients, clip_factor, transfer_gradients
from kd_det.hosts.classification.data import ClassificationData
from kd_det.hosts.classification.loaders import evaluation_loader, train_loader
from kd_det.hosts.classification.model import DistilledClassifier
from kd_det.ledger import logit_entropy
from kd_det.loop.optim import parameter_groups
from kd_det.losses.base import full_precision
from kd_det.unix import MixedBatch, UnixMixup

_TOP_K = (1, 5)


class LitClassifier(LightningModule):
    """Trains a :class:`DistilledClassifier`; the classifier's state is its only state.

    Args:
        model: the classifier.
        cfg: a config of this host.
        seed: decides order and augmentation of the training images.
        train_data: the training set; None to evaluate only.
        test_data: the test set.
        condensation: KCD's state.
        unix: the batch transform.

    Attributes:
        results: of the last evaluation, ``{"accuracy": {"top1": ..., "top1_best": ...}}`` in
            percent.
        evaluated_at: the iteration of that evaluation, or None.
    """

    def __init__(
        self,
        model: DistilledClassifier,
        cfg: CfgNode,
        seed: int,
        train_data: ClassificationData | None,
        test_data: ClassificationData,
        condensation: Condensation | None = None,
        unix: UnixMixup | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.cfg = cfg
        self.seed = seed
        self.train_data, self.test_data = train_data, test_data
        self.condensation, self.unix = condensation, unix
        self.results: dict[str, dict[str, float]] = {}
        self.evaluated_at: int | None = None
        self._best: tuple[float, int] | None = None
        self._rng: Tensor | None = None
        self._clipped_loss: Tensor | None = None
        classes = test_data.num_classes
        # Outside the module tree: counts of one evaluation belong to no checkpoint.
        self._metrics = {
            f"top{k}": MulticlassAccuracy(classes, top_k=k, average="micro")
            for k in _TOP_K
            if k < classes
        }

    # A checkpoint has the student's own keys, without the name it has here.

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        return self.model.state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        return self.model.load_state_dict(state_dict, *args, **kwargs)

    # Training

    def train_dataloader(self) -> Any:
        assert self.train_data is not None
        place = (self.trainer.global_rank, self.trainer.world_size)
        return train_loader(self.cfg, self.train_data, self.seed, *place, self.condensation)

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], _: int) -> Tensor:
        images, targets, indices = batch
        if self.unix is not None:
            losses = self.model(*self._mix(images, targets))
        else:
            losses = self.model(images, targets)
        if self.condensation is not None:
            assert self.model.logits is not None
            self.condensation.update(indices.cpu(), logit_entropy(self.model.logits).cpu())
        clipped = self.model.clipped_terms
        parts = {name: full_precision(loss) for name, loss in losses.items()}
        total = torch.stack([v for k, v in parts.items() if k not in clipped]).sum()
        self._clipped_loss = torch.stack([parts[k] for k in clipped]).sum() if clipped else None
        shown = {name: loss.detach() for name, loss in parts.items()}
        everything = torch.stack(list(shown.values())).sum()
        if not torch.isfinite(everything):
            raise FloatingPointError(
                f"losses are not finite at iteration {self.global_step}: "
                + ", ".join(f"{k} {v.item():.4g}" for k, v in shown.items())
                + "; lower SOLVER.BASE_LR or the weight of a term"
            )
        self.log_dict({"total_loss": everything, **shown})
        return total

    def _mix(self, images: Tensor, targets: Tensor) -> tuple[Tensor, MixedBatch]:
        """UNIX: the part of the batch to train on, chosen by a first pass of the student."""
        assert self.unix is not None
        in_training = self.cfg.KD.UNIX.SCORE_MODE == "train"
        pixels = self.model.statistics.normalize(images)
        logits = score(self.model.student, pixels, in_training)
        mixed = self.unix(images, targets, logits)
        return mixed.images, mixed

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """The usual backward pass, after that of the terms that are clipped to the task."""
        if self._clipped_loss is None:
            loss.backward(*args, **kwargs)
            return
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        transfer = transfer_gradients(self._clipped_loss, parameters)
        loss.backward(*args, **kwargs)
        assert self.model.distiller is not None
        factor = clip_factor(self.current_epoch)
        adaptors = self.model.distiller.parameters()
        add_clipped_gradients(parameters, transfer, factor, unclipped=adaptors)
        self._clipped_loss = None

    def on_train_epoch_end(self) -> None:
        if self.condensation is not None:
            self.condensation.ledger.merge()
            self.condensation.step()

    def configure_optimizers(self) -> Any:
        solver = self.cfg.SOLVER
        optimizer = torch.optim.SGD(
            parameter_groups(self.model, solver.WEIGHT_DECAY, solver.WEIGHT_DECAY_NORM),
            lr=solver.BASE_LR,
            momentum=solver.MOMENTUM,
            nesterov=solver.NESTEROV,
        )
        schedule = torch.optim.lr_scheduler.MultiStepLR(
            optimizer, list(solver.EPOCH_STEPS), solver.GAMMA
        )
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["rng_state"] = torch.get_rng_state()
        checkpoint["best"] = self._best
        checkpoint["results"] = (self.results, self.evaluated_at)
        for name in ("condensation", "unix"):
            if (part := getattr(self, name)) is not None:
                checkpoint[name] = part.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._rng = checkpoint.get("rng_state")
        self._best = checkpoint.get("best")
        self.results, self.evaluated_at = checkpoint.get("results", ({}, None))
        for name in ("condensation", "unix"):
            if (part := getattr(self, name)) is not None and name in checkpoint:
                part.load_state_dict(checkpoint[name])

    def on_train_start(self) -> None:
        # Dropout goes on where it was. Each process of several has a stream of its own, and only
        # that of the first is in the checkpoint.
        if self._rng is not None and self.trainer.world_size == 1:
            torch.set_rng_state(self._rng.cpu())
        self._rng = None

    def on_train_end(self) -> None:
        # A run may be shorter than the distiller's report period.
        if self.model.distiller is not None and self.trainer.is_global_zero:
            self.model.distiller.report_silent()

    # Evaluation

    def val_dataloader(self) -> Any:
        place = (self.trainer.global_rank, self.trainer.world_size)
        return evaluation_loader(self.cfg, self.test_data, *place)

    def on_validation_start(self) -> None:
        for metric in self._metrics.values():
            metric.reset()
            metric.to(self.device)

    def validation_step(self, batch: tuple[Tensor, Tensor], _: int) -> None:
        images, targets = batch
        logits = self.model(images)
        for metric in self._metrics.values():
            metric.update(logits, targets)

    def on_validation_epoch_end(self) -> None:
        found = {name: 100 * float(metric.compute()) for name, metric in self._metrics.items()}
        if self._best is None or found["top1"] > self._best[0]:
            self._best = (found["top1"], self.current_epoch + 1)
        best, epoch = self._best
        self.results = {"accuracy": {**found, "top1_best": best, "best_epoch": float(epoch)}}
        self.evaluated_at = self.global_step
        for logger in self.loggers:
            flat = {f"accuracy/{name}": value for name, value in self.results["accuracy"].items()}
            logger.log_metrics(flat, step=self.global_step)


def score(model: nn.Module, images: Tensor, training: bool) -> Tensor:
    """Logits ``[N, K]`` without a gradient, with the statistics of the batch or the stored ones."""
    mode = model.training
    with torch.no_grad():
        try:
            return model.train(training)(images)
        finally:
            model.train(mode)
