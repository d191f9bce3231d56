"""The workbench of this host; see :class:`kd_det.bench.workbench.Workbench`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from fvcore.common.config import CfgNode
from lightning.fabric import Fabric
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor, nn
from torchvision.transforms.v2.functional import to_dtype

from kd_det.bench.looks import as_bytes, evaluating, repeatable, training_losses
from kd_det.bench.workbench import Detections, PixelInput, Side, in_this_process, side_model
from kd_det.core.checkpoint import read_weights
from kd_det.core.teacher import load_strict
from kd_det.hosts.detection.workbench import DetectionWorkbench
from kd_det.hosts.lightning.hardware import one_device
from kd_det.hosts.torchvision_detection.classes import class_names
from kd_det.hosts.torchvision_detection.config import check_config, load_config
from kd_det.hosts.torchvision_detection.data import (
    check_datasets,
    evaluation_loader,
    train_dataset,
    train_loader,
)
from kd_det.hosts.torchvision_detection.evaluation import COCOMetric
from kd_det.hosts.torchvision_detection.export import export_student
from kd_det.hosts.torchvision_detection.family import BOXES, BoxHead
from kd_det.hosts.torchvision_detection.lit import set_input_sizes, use_full_precision_levels
from kd_det.hosts.torchvision_detection.model import DistilledDetector
from kd_det.hosts.torchvision_detection.models import build_model, num_classes
from kd_det.hosts.torchvision_detection.teacher import teacher_config
from kd_det.hosts.torchvision_detection.train import build_training_model
from kd_det.run.devices import check_devices


def open_bench(
    cfg: CfgNode, weights: str = "", distilled: bool = True, model: nn.Module | None = None
) -> TorchvisionWorkbench:
    """See :func:`kd_det.hosts.base.open_bench`."""
    if model is not None:
        return TorchvisionWorkbench(cfg, model)
    check_config(cfg)
    check_devices(cfg.MODEL.DEVICE, 1)
    cfg = in_this_process(cfg)
    if weights:
        cfg.MODEL.BACKBONE.WEIGHTS = ""  # not fetched in vain
    torch.manual_seed(cfg.SEED)
    model = build_training_model(cfg, weights or cfg.MODEL.WEIGHTS, distilled)
    bench = TorchvisionWorkbench(cfg, model.to(cfg.MODEL.DEVICE))
    bench.prepare_losses(weights)
    if bench.teacher is not None:
        set_input_sizes(bench.teacher.model, bench.config("teacher"), training=False)
    if cfg.SOLVER.AMP.ENABLED:
        use_full_precision_levels(model)
    return bench


class TorchvisionWorkbench(DetectionWorkbench):
    """A stock detector, or a :class:`DistilledDetector`, with the data of its config.

    Args:
        cfg: a config of this host.
        model: the module that trains.
    """

    count_classes = staticmethod(num_classes)
    data_names = staticmethod(class_names)
    background = "first"

    def __init__(self, cfg: CfgNode, model: nn.Module) -> None:
        if isinstance(model, DistilledDetector):
            parts = (model.student, model.distiller, model.teacher, teacher_config(cfg))
            super().__init__(cfg, model, *parts)
        else:
            super().__init__(cfg, model, model)
        if BoxHead().specs(self.student):
            self.box_tap = BoxHead().places(self.student, [])[BOXES]

    # Training

    def batches(self) -> Iterator[Any]:
        """``(images, targets)`` as the model takes them."""
        check_datasets(self.cfg)
        loader = train_loader(self.cfg, train_dataset(self.cfg), self.cfg.SEED)
        return repeatable(loader, torch.manual_seed, self.cfg.SEED)

    def losses(self, batch: Any) -> dict[str, Tensor]:
        set_input_sizes(self.student, self.cfg, training=True)
        images, targets = move_data_to_device(batch, self.device)
        with self._fabric.autocast():
            return training_losses(self.model, self.distiller, images, targets)

    def pictures(self, batch: Any) -> list[Tensor]:
        images, _ = batch
        return [as_bytes(image) for image in images]

    def ground_truth(self, batch: Any) -> list[Detections]:
        _, targets = batch
        return [
            Detections(t["boxes"], t["labels"] - 1, torch.ones(len(t["labels"]))) for t in targets
        ]

    def unannotated(self, pictures: Sequence[Tensor]) -> Any:
        targets = [
            {
                "boxes": torch.zeros(0, 4),
                "labels": torch.zeros(0, dtype=torch.int64),
                "masks": torch.zeros(0, *picture.shape[1:], dtype=torch.uint8),
            }
            for picture in pictures
        ]
        return [_as_floats(picture) for picture in pictures], targets

    def _training_images(self) -> int:
        return len(train_dataset(self.cfg))

    # Evaluation

    def validation_pictures(self, count: int) -> list[Tensor]:
        if not self.cfg.DATASETS.TEST:
            return []
        data: Any = evaluation_loader(self.cfg).dataset
        return [as_bytes(data[index][0]) for index in range(min(count, len(data)))]

    def evaluate(self, side: Side, images: int) -> dict[str, dict[str, float]]:
        check_datasets(self.cfg, training=False)
        detector = self._ready(side)
        metric = COCOMetric(masks=_has_masks(self.student) and _has_masks(detector))
        left = images
        with evaluating(detector), self._fabric.autocast():
            for batch in evaluation_loader(self.cfg):
                pictures, targets = (part[:left] for part in batch)
                detections = detector(move_data_to_device(pictures, self.device))
                if side == "teacher":
                    detections = [self._translated(each) for each in detections]
                metric.update(detections, targets)
                left -= len(pictures)
                if not left:
                    break
        return metric.compute()

    def example(self, side: Side) -> tuple[Any, ...]:
        transform: Any = self._ready(side).transform
        ((picture,),) = self._arguments(side, self._example_picture)
        with evaluating(transform):
            image, _ = transform.resize(picture, None)
        return ([image],)

    # Facts

    def pixel_input(self, side: Side) -> PixelInput:
        transform: Any = side_model(self, side).transform
        return PixelInput(
            "RGB",
            tuple(transform.image_mean),
            tuple(transform.image_std),
            scale=1,
            divisor=transform.size_divisible,
        )

    @cached_property
    def _fabric(self) -> Fabric:
        return one_device(self.cfg)

    def _ready(self, side: Side) -> Any:
        if side == "teacher" and self.teacher is not None:
            self.teacher.follow(next(self.student.parameters()))
        set_input_sizes(self.student, self.cfg, training=False)
        return side_model(self, side)

    def _arguments(self, side: Side, picture: Tensor) -> tuple[Any, ...]:
        return ([_as_floats(picture.to(self.device))],)

    def _detections(self, output: Any) -> Detections:
        return Detections(output[0]["boxes"], output[0]["labels"] - 1, output[0]["scores"])

    def _translated(self, detections: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A teacher's detections with the student's labels, without those it has no class for."""
        labels = 1 + self._in_students_classes(detections["labels"] - 1)
        known = labels > 0
        return {name: value[known] for name, value in {**detections, "labels": labels}.items()}

    def _reload(self, checkpoint: Path, folder: Path) -> nn.Module:
        weights, config = export_student(self.cfg, checkpoint, folder)
        stock_cfg = load_config(str(config))
        stock = build_model(stock_cfg)
        load_strict(stock, read_weights(weights), str(weights))
        set_input_sizes(stock, stock_cfg, training=False)
        return stock


def _has_masks(detector: Any) -> bool:
    return hasattr(detector, "roi_heads") and detector.roi_heads.has_mask()


def _as_floats(picture: Tensor) -> Tensor:
    return to_dtype(picture, torch.float32, scale=True)
