"""The LightningModule: one step, the optimiser and the evaluation of a torchvision detector."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from fvcore.common.config import CfgNode
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from kd_det.checks import fail
from kd_det.condensation import Condensation
from kd_det.hosts.torchvision_detection.data import (
    CocoDataset,
    evaluation_loader,
    train_loader,
)
from kd_det.hosts.torchvision_detection.evaluation import COCOMetric
from kd_det.hosts.torchvision_detection.kcd import costs, dataset_indices
from kd_det.hosts.torchvision_detection.model import DistilledDetector
from kd_det.loop.optim import learning_rate_factor, parameter_groups
from kd_det.losses.base import full_precision

logger = logging.getLogger(__name__)


class LitDetector(LightningModule):
    """Trains a stock detector or a :class:`DistilledDetector`; their state is its only state.

    Args:
        model: the detector.
        cfg: a config of this host.
        seed: decides the order of the training images.
        dataset: the training images; None where nothing is trained.
        condensation: KCD's state, where the training set shrinks; ``cfg`` must be planned for it
            and ``model`` must leave values of its images.

    Attributes:
        results: of the last evaluation, ``{"bbox": {"AP": ...}}`` in percent; with KCD also its
            costs, under ``"kcd"``.
        evaluated_at: the iteration of that evaluation, or None.
    """

    def __init__(
        self,
        model: nn.Module,
        cfg: CfgNode,
        seed: int,
        dataset: CocoDataset | None = None,
        condensation: Condensation | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.cfg = cfg
        self.seed = seed
        self.dataset = dataset
        self.condensation = condensation
        self.results: dict[str, dict[str, float]] = {}
        self.evaluated_at: int | None = None
        self._rng: Tensor | None = None
        self._metric: COCOMetric | None = None
        if cfg.SOLVER.AMP.ENABLED:
            use_full_precision_levels(model)

    @property
    def student(self) -> nn.Module:
        """The stock detector."""
        return self.model.student if isinstance(self.model, DistilledDetector) else self.model

    # A checkpoint has the student's own keys, without the name it has here.

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        return self.model.state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        return self.model.load_state_dict(state_dict, *args, **kwargs)

    # Training

    def train_dataloader(self) -> Any:
        assert self.dataset is not None
        start, rank = self.trainer.global_step, self.trainer.global_rank
        world = self.trainer.world_size
        return train_loader(
            self.cfg, self.dataset, self.seed, start, rank, world, self.condensation
        )

    def training_step(self, batch: tuple[list[Tensor], list[dict[str, Tensor]]], _: int) -> Tensor:
        losses = self.model(*batch)
        total = torch.stack([full_precision(loss) for loss in losses.values()]).sum()
        if not torch.isfinite(total):
            raise FloatingPointError(
                f"losses are not finite at iteration {self.global_step}: "
                + ", ".join(f"{k} {v.item():.4g}" for k, v in losses.items())
                + "; lower SOLVER.BASE_LR or the weight of a term, or lengthen the warm-up"
            )
        self.log_dict({"total_loss": total.detach(), **{k: v.detach() for k, v in losses.items()}})
        if self.condensation is not None:
            # Within the step, so that a checkpoint of this iteration knows its values too.
            indices = torch.tensor(dataset_indices(batch[1]))
            self.condensation.update(indices, self.model.image_values)  # type: ignore[arg-type]
            self.condensation.step()
        return total

    def configure_optimizers(self) -> Any:
        solver = self.cfg.SOLVER
        optimizer = torch.optim.SGD(
            parameter_groups(self.model, solver.WEIGHT_DECAY, solver.WEIGHT_DECAY_NORM),
            lr=solver.BASE_LR,
            momentum=solver.MOMENTUM,
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: learning_rate_factor(solver, step)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["rng_state"] = torch.get_rng_state()
        if self.condensation is not None:
            # Saving is called on every process, though only the first writes.
            self.condensation.ledger.merge()
            checkpoint["kcd"] = self.condensation.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._rng = checkpoint.get("rng_state")
        if (self.condensation is not None) != ("kcd" in checkpoint):
            fail(
                expected="to resume a run with KD.KCD.ENABLED as it began",
                received=f"{self.condensation is not None} now, {'kcd' in checkpoint} then",
                remedy="set it as in the config.yaml of OUTPUT_DIR, or start afresh",
            )
        if self.condensation is not None:
            self.condensation.load_state_dict(checkpoint["kcd"])

    def on_fit_start(self) -> None:
        set_input_sizes(self.student, self.cfg, training=True)

    def on_train_start(self) -> None:
        # RoI and anchor sampling go on where they were. Each process of several has a stream of
        # its own, and only that of the first is in the checkpoint.
        if self._rng is not None and self.trainer.world_size == 1:
            torch.set_rng_state(self._rng.cpu())
        self._rng = None

    def on_train_end(self) -> None:
        # A run may be shorter than the distiller's report period.
        if isinstance(self.model, DistilledDetector) and self.trainer.is_global_zero:
            self.model.distiller.report_silent()
        if self.condensation is not None:
            logger.info(
                "KCD: the run took %(cost_measured).1f %% of the samples of a whole one (published "
                "formula, whose first stage is already condensed: %(cost_formula).1f %%)",
                costs(self.condensation),
            )

    # Evaluation

    def val_dataloader(self) -> Any:
        return evaluation_loader(self.cfg, self.trainer.global_rank, self.trainer.world_size)

    def on_validation_start(self) -> None:
        set_input_sizes(self.student, self.cfg, training=False)
        roi_heads = getattr(self.student, "roi_heads", None)
        self._metric = COCOMetric(masks=roi_heads is not None and roi_heads.has_mask())

    def validation_step(self, batch: tuple[list[Tensor], list[dict[str, Tensor]]], _: int) -> None:
        images, targets = batch
        assert self._metric is not None
        self._metric.update(self.model(images), targets)

    def on_validation_epoch_end(self) -> None:
        assert self._metric is not None
        self.results = self._metric.compute()
        if self.condensation is not None:
            self.results["kcd"] = costs(self.condensation)
        self._metric = None
        self.evaluated_at = self.global_step
        set_input_sizes(self.student, self.cfg, training=True)
        flat = {f"{kind}/{k}": v for kind, of in self.results.items() for k, v in of.items()}
        for logger in self.loggers:
            logger.log_metrics(flat, step=self.global_step)


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
