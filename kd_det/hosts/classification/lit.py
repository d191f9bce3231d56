"""The LightningModule: one step, the optimiser and the evaluation of a classifier."""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from fvcore.common.config import CfgNode
from torch import Tensor
from torchmetrics.classification import MulticlassAccuracy

from kd_det.balance.clip import add_clipped_gradients, clip_factor, transfer_gradients
from kd_det.bench.looks import modes_kept
from kd_det.core.numerics import full_precision, logit_entropy
from kd_det.hosts.classification.build import flops_ratio
from kd_det.hosts.classification.data import ClassificationData
from kd_det.hosts.classification.loaders import evaluation_loader, train_loader
from kd_det.hosts.classification.model import DistilledClassifier
from kd_det.hosts.lightning.module import DistillationModule
from kd_det.hosts.lightning.optim import build_sgd
from kd_det.hosts.lightning.predictions import write_predictions
from kd_det.procedures.base import Procedures
from kd_det.procedures.unix import MixedBatch
from kd_det.run.folder import PREDICTIONS

_TOP_K = (1, 5)


class LitClassifier(DistillationModule):
    """Trains a :class:`DistilledClassifier`; the seed also decides the augmentation of images.

    ``train_data`` is None where a run only evaluates.
    """

    model: DistilledClassifier

    def __init__(
        self,
        model: DistilledClassifier,
        cfg: CfgNode,
        seed: int,
        train_data: ClassificationData | None,
        test_data: ClassificationData,
        procedures: Procedures | None = None,
    ) -> None:
        super().__init__(model, cfg, seed, procedures)
        self.train_data, self.test_data = train_data, test_data
        self._best: tuple[float, int] | None = None
        self._clipped_loss: Tensor | None = None
        self._predictions: list[dict[str, Any]] = []
        classes = test_data.num_classes
        # Outside the module tree: counts of one evaluation belong to no checkpoint.
        self._metrics = {
            f"top{k}": MulticlassAccuracy(classes, top_k=k, average="micro")
            for k in _TOP_K
            if k < classes
        }

    # Training

    def train_dataloader(self) -> Any:
        assert self.train_data is not None
        place = (self.trainer.global_rank, self.trainer.world_size)
        return train_loader(self.cfg, self.train_data, self.seed, *place, self.procedures)

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], _: int) -> Tensor:
        images, targets, _ = batch = self.procedures.on_batch(batch, self)
        losses = self.model(images, targets)
        self.procedures.on_step(batch, self)
        clipped = self.model.clipped_terms
        parts = {name: full_precision(loss) for name, loss in losses.items()}
        total = torch.stack([v for k, v in parts.items() if k not in clipped]).sum()
        self._clipped_loss = torch.stack([parts[k] for k in clipped]).sum() if clipped else None
        shown = {name: loss.detach() for name, loss in parts.items()}
        self.log_losses(shown, torch.stack(list(shown.values())).sum())
        return total

    # What procedures find; see kd_det.procedures.base.TrainingLoop

    def select(self, batch: tuple[Tensor, Any, Tensor], rows: Sequence[int]) -> Any:
        rows, (images, targets, indices) = list(rows), batch
        mixed = isinstance(targets, MixedBatch)
        kept = MixedBatch(*(part[rows] for part in targets)) if mixed else targets[rows]
        return images[rows], kept, indices[rows]

    def indices(self, batch: tuple[Tensor, Any, Tensor]) -> Tensor:
        return batch[2]

    def uncertainties(self) -> Tensor:
        assert self.model.logits is not None
        return logit_entropy(self.model.logits)

    def score(self, images: Tensor, training: bool) -> Tensor:
        student = self.model.student
        with modes_kept(student), torch.no_grad():
            return student.train(training)(self.model.statistics.normalize(images))

    def flops_ratio(self) -> float:
        return flops_ratio(self.model, self.cfg.INPUT.SIZE)

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

    def configure_optimizers(self) -> Any:
        solver = self.cfg.SOLVER
        optimizer = build_sgd(self.model, solver)
        schedule = torch.optim.lr_scheduler.MultiStepLR(
            optimizer, list(solver.EPOCH_STEPS), solver.GAMMA
        )
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["best"] = self._best
        checkpoint["results"] = (self.results, self.evaluated_at)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self._best = checkpoint.get("best")
        self.results, self.evaluated_at = checkpoint.get("results", ({}, None))

    # Evaluation

    def val_dataloader(self) -> Any:
        place = (self.trainer.global_rank, self.trainer.world_size)
        return evaluation_loader(self.cfg, self.test_data, *place)

    def on_validation_start(self) -> None:
        self._predictions = []
        for metric in self._metrics.values():
            metric.reset()
            metric.to(self.device)

    def validation_step(self, batch: tuple[Tensor, Tensor], _: int) -> None:
        images, targets = batch
        logits = self.model(images)
        for metric in self._metrics.values():
            metric.update(logits, targets)
        confidence, prediction = logits.float().softmax(dim=1).max(dim=1)
        rank, world = self.trainer.global_rank, self.trainer.world_size
        columns = (targets.tolist(), prediction.tolist(), confidence.tolist())
        for target, found, sure in zip(*columns, strict=True):
            # The loader deals the images out in turn.
            index = rank + len(self._predictions) * world
            self._predictions.append(
                {"index": index, "target": target, "prediction": found, "confidence": sure}
            )

    def on_validation_epoch_end(self) -> None:
        found = {name: 100 * float(metric.compute()) for name, metric in self._metrics.items()}
        if self._best is None or found["top1"] > self._best[0]:
            self._best = (found["top1"], self.current_epoch + 1)
        best, epoch = self._best
        self.results = {"accuracy": {**found, "top1_best": best, "best_epoch": float(epoch)}}
        self.evaluated_at = self.global_step
        path = Path(self.cfg.OUTPUT_DIR) / PREDICTIONS
        write_predictions(path, self._predictions, itemgetter("index"))
