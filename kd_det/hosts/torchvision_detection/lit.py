"""The LightningModule: one step, the optimiser and the evaluation of a torchvision detector."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from fvcore.common.config import CfgNode
from torch import Tensor, nn

from kd_det.core.numerics import full_precision
from kd_det.hosts.lightning.module import DistillationModule
from kd_det.hosts.lightning.optim import build_sgd, learning_rate_factor
from kd_det.hosts.torchvision_detection.data import CocoDataset, evaluation_loader, train_loader
from kd_det.hosts.torchvision_detection.evaluation import COCOMetric, DetectionFile, prepared
from kd_det.hosts.torchvision_detection.model import DistilledDetector
from kd_det.procedures.base import Procedures

Batch = tuple[list[Tensor], list[dict[str, Any]]]


class LitDetector(DistillationModule):
    """Trains a stock detector or a :class:`DistilledDetector`.

    ``cfg`` must be planned by the procedures. ``dataset`` is None where nothing is trained.
    """

    remedy = "lower SOLVER.BASE_LR or the weight of a term, or lengthen the warm-up"

    def __init__(
        self,
        model: nn.Module,
        cfg: CfgNode,
        seed: int,
        dataset: CocoDataset | None = None,
        procedures: Procedures | None = None,
    ) -> None:
        super().__init__(model, cfg, seed, procedures)
        self.dataset = dataset
        self._metric: COCOMetric | None = None
        self._file: DetectionFile | None = None
        if cfg.SOLVER.AMP.ENABLED:
            use_full_precision_levels(model)

    # Training

    def train_dataloader(self) -> Any:
        assert self.dataset is not None
        start, rank = self.trainer.global_step, self.trainer.global_rank
        world = self.trainer.world_size
        return train_loader(self.cfg, self.dataset, self.seed, start, rank, world, self.procedures)

    def training_step(self, batch: Batch, _: int) -> Tensor:
        batch = self.procedures.on_batch(batch, self)
        losses = self.model(*batch)
        total = torch.stack([full_precision(loss) for loss in losses.values()]).sum()
        self.log_losses(losses, total)
        # Within the step, so that a checkpoint of this iteration holds its values too.
        self.procedures.on_step(batch, self)
        return total

    # What procedures find; see kd_det.procedures.base.TrainingLoop

    def select(self, batch: Batch, rows: Sequence[int]) -> Batch:
        images, targets = batch
        return [images[row] for row in rows], [targets[row] for row in rows]

    def indices(self, batch: Batch) -> Tensor:
        return torch.tensor([target["index"] for target in batch[1]])

    def uncertainties(self) -> Tensor:
        values = self.model.image_values
        assert isinstance(values, Tensor)
        return values

    def configure_optimizers(self) -> Any:
        solver = self.cfg.SOLVER
        optimizer = build_sgd(self.model, solver)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: learning_rate_factor(solver, step)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_fit_start(self) -> None:
        set_input_sizes(self.student, self.cfg, training=True)

    # Evaluation

    def val_dataloader(self) -> Any:
        return evaluation_loader(self.cfg, self.trainer.global_rank, self.trainer.world_size)

    def on_validation_start(self) -> None:
        set_input_sizes(self.student, self.cfg, training=False)
        roi_heads = getattr(self.student, "roi_heads", None)
        self._metric = COCOMetric(masks=roi_heads is not None and roi_heads.has_mask())
        data: CocoDataset = self.trainer.val_dataloaders.dataset
        self._file = DetectionFile([image["id"] for image in data.images], data.category_ids)

    def validation_step(self, batch: Batch, _: int) -> None:
        images, targets = batch
        assert self._metric is not None
        assert self._file is not None
        detections = [prepared(found) for found in self.model(images)]
        self._metric.update(detections, targets)
        self._file.update(detections, [target["index"] for target in targets])

    def on_validation_epoch_end(self) -> None:
        assert self._metric is not None
        assert self._file is not None
        self.results = self._metric.compute()
        self._file.write(self.cfg.OUTPUT_DIR)
        self._metric = self._file = None
        self.evaluated_at = self.global_step
        set_input_sizes(self.student, self.cfg, training=True)


def set_input_sizes(detector: nn.Module, cfg: CfgNode, training: bool) -> None:
    """Give torchvision's transform the sizes of a phase; it has only one set of them."""
    train, test = cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TEST
    detector.transform.min_size = tuple(train) if training else (test,)
    detector.transform.max_size = cfg.INPUT.MAX_SIZE_TRAIN if training else cfg.INPUT.MAX_SIZE_TEST


def use_full_precision_levels(model: nn.Module) -> None:
    """Hand the pyramid on in float32 under autocast, in the student and in its teacher.

    torchvision takes the precision of anchors from the maps, and in bfloat16 a coordinate above
    256 is off by a pixel or more.
    """
    detectors = [model]
    if isinstance(model, DistilledDetector):
        detectors = [model.student, model.teacher.model]
    for detector in detectors:
        detector.backbone.register_forward_hook(_full_precision_levels)


def _full_precision_levels(module: nn.Module, inputs: Any, output: Any) -> Any:
    return type(output)((key, full_precision(value)) for key, value in output.items())
