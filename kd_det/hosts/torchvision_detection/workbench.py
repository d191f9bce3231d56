"""A run of this host, built to be looked at; see :class:`kd_det.bench.workbench.Workbench`."""

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

from kd_det.bench.looks import (
    detector_outputs,
    evaluating,
    export_problems,
    load_learned,
    open_pre_stage,
    repeatable,
    training_losses,
)
from kd_det.bench.workbench import Detections, PixelInput, Side, Workbench, side_model
from kd_det.core.checkpoint import read_weights
from kd_det.core.distiller import Distiller
from kd_det.core.teacher import FrozenTeacher, load_strict
from kd_det.hosts.lightning.hardware import precision
from kd_det.hosts.torchvision_detection.classes import class_names, teacher_class_names
from kd_det.hosts.torchvision_detection.config import check_config, load_config
from kd_det.hosts.torchvision_detection.data import (
    check_datasets,
    evaluation_loader,
    train_dataset,
    train_loader,
)
from kd_det.hosts.torchvision_detection.evaluation import COCOMetric
from kd_det.hosts.torchvision_detection.export import export_student
from kd_det.hosts.torchvision_detection.heads import BOXES, BoxHead
from kd_det.hosts.torchvision_detection.lit import set_input_sizes, use_full_precision_levels
from kd_det.hosts.torchvision_detection.model import DistilledDetector
from kd_det.hosts.torchvision_detection.models import build_model, num_classes
from kd_det.hosts.torchvision_detection.teacher import teacher_config
from kd_det.hosts.torchvision_detection.train import build_training_model
from kd_det.procedures.base import TrainingSet, build_procedures
from kd_det.run.class_names import fitting_names, translated, translation
from kd_det.run.devices import check_devices

_GREY = torch.full((3, 480, 640), 128, dtype=torch.uint8)


def open_bench(cfg: CfgNode, weights: str = "", distilled: bool = True) -> Workbench:
    """See :func:`kd_det.hosts.base.open_bench`."""
    check_config(cfg)
    check_devices(cfg.MODEL.DEVICE, 1)
    cfg = cfg.clone()
    cfg.defrost()
    # Loader processes would take longer to start than a few batches take to load.
    cfg.DATALOADER.NUM_WORKERS = 0
    if weights:
        cfg.MODEL.BACKBONE.WEIGHTS = ""  # not fetched in vain
    torch.manual_seed(max(cfg.SEED, 0))
    model = build_training_model(cfg, weights or cfg.MODEL.WEIGHTS, distilled)
    return TorchvisionWorkbench(cfg, model.to(cfg.MODEL.DEVICE), weights)


class TorchvisionWorkbench:
    """A stock detector, or a :class:`DistilledDetector`, with the data of its config.

    Args:
        cfg: a config of this host.
        model: what trains.
        weights: a checkpoint whose adaptors are taken over.
    """

    def __init__(self, cfg: CfgNode, model: nn.Module, weights: str = "") -> None:
        self.cfg = cfg
        self.teacher_cfg: CfgNode | None = None
        self.model = self.student = model
        self.teacher: FrozenTeacher | None = None
        self.distiller: Distiller | None = None
        self.pre_stage: list[str] = []
        if isinstance(model, DistilledDetector):
            self.teacher_cfg = teacher_config(cfg)
            self.student, self.teacher = model.student, model.teacher
            self.distiller = model.distiller
            if weights:
                load_learned(model.distiller, weights)
            self.pre_stage = open_pre_stage(model.distiller, self.teacher, "")
            set_input_sizes(self.teacher.model, self.teacher_cfg, training=False)
        self.box_tap = (
            BoxHead().places(self.student, [])[BOXES] if BoxHead().specs(self.student) else None
        )
        self._seed = max(cfg.SEED, 0)
        if cfg.SOLVER.AMP.ENABLED:
            use_full_precision_levels(model)
        self._fabric = Fabric(
            accelerator="cpu" if cfg.MODEL.DEVICE == "cpu" else "cuda",
            devices=1,
            precision=precision(cfg),  # type: ignore[arg-type]
        )

    # Training

    def batches(self) -> Iterator[Any]:
        """``(images, targets)`` as the model takes them."""
        check_datasets(self.cfg)
        loader = train_loader(self.cfg, train_dataset(self.cfg), self._seed)
        return repeatable(loader, torch.manual_seed, self._seed)

    def losses(self, batch: Any) -> dict[str, Tensor]:
        set_input_sizes(self.student, self.cfg, training=True)
        images, targets = move_data_to_device(batch, self._device)
        with self._fabric.autocast():
            return training_losses(self.model, self.distiller, images, targets)

    def sampled_boxes(self, capture: Any) -> list[Tensor]:
        return list(capture)

    def pictures(self, batch: Any) -> list[Tensor]:
        images, _ = batch
        return [_as_bytes(image) for image in images]

    def ground_truth(self, batch: Any) -> list[Detections]:
        _, targets = batch
        return [
            Detections(t["boxes"], t["labels"] - 1, torch.ones(len(t["labels"]))) for t in targets
        ]

    def iterations(self) -> int:
        cfg = self.cfg
        procedures = build_procedures(cfg, lambda: TrainingSet(len(train_dataset(cfg))))
        return int(procedures.planned_config(cfg).SOLVER.MAX_ITER)

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

    # Validation

    def validation_pictures(self, count: int) -> list[Tensor]:
        if not self.cfg.DATASETS.TEST:
            return []
        data: Any = evaluation_loader(self.cfg).dataset
        return [_as_bytes(data[index][0]) for index in range(min(count, len(data)))]

    def evaluate(self, side: Side, images: int) -> dict[str, dict[str, float]]:
        check_datasets(self.cfg, training=False)
        detector = self._ready(side)
        metric = COCOMetric(masks=_has_masks(self.student) and _has_masks(detector))
        left = images
        with evaluating(detector), self._fabric.autocast():
            for batch in evaluation_loader(self.cfg):
                pictures, targets = (part[:left] for part in batch)
                found = detector(move_data_to_device(pictures, self._device))
                if side == "teacher":
                    found = [self._in_students_classes(each) for each in found]
                metric.update(found, targets)
                left -= len(pictures)
                if not left:
                    break
        return metric.compute()

    def predict(self, side: Side, picture: Tensor) -> Detections:
        with evaluating(self._ready(side)) as detector:
            return _detect(detector, picture.to(self._device))

    # What is there

    def pixel_input(self, side: Side) -> PixelInput:
        transform: Any = side_model(self, side).transform
        return PixelInput(
            "RGB",
            tuple(transform.image_mean),
            tuple(transform.image_std),
            scale=1,
            divisor=transform.size_divisible,
        )

    def class_names(self, side: Side) -> list[str] | None:
        if side == "student":
            return fitting_names(class_names(self.cfg), num_classes(self.cfg))
        if self.teacher_cfg is None:
            return None
        return fitting_names(teacher_class_names(self.cfg), num_classes(self.teacher_cfg))

    def example(self, side: Side) -> tuple[Any, ...]:
        transform: Any = self._ready(side).transform
        with evaluating(transform):
            image, _ = transform.resize(_as_floats(self._example_picture.to(self._device)), None)
        return ([image],)

    def check_export(self) -> list[str]:
        picture = self._example_picture.to(self._device)

        def reload(checkpoint: Path, folder: Path) -> nn.Module:
            weights, config = export_student(self.cfg, checkpoint, folder)
            stock_cfg = load_config(str(config))
            stock = build_model(stock_cfg)
            load_strict(stock, read_weights(weights), str(weights))
            set_input_sizes(stock, stock_cfg, training=False)
            return stock

        self._ready("student")
        return export_problems(
            self.model,
            self.student,
            reload,
            lambda model: detector_outputs(model, lambda: _detect(model, picture)),
        )

    @property
    def _device(self) -> torch.device:
        return next(self.student.parameters()).device

    @cached_property
    def _example_picture(self) -> Tensor:
        first = self.validation_pictures(1)
        return first[0] if first else _GREY

    @cached_property
    def _translation(self) -> list[int] | None:
        return translation(
            self.class_names("student"), self.class_names("teacher"), self.cfg.KD.CLASS_MAP
        )

    def _ready(self, side: Side) -> Any:
        """A side's detector on the student's device, prepared for images of its test size."""
        if side == "teacher" and self.teacher is not None:
            self.teacher.follow(next(self.student.parameters()))
        set_input_sizes(self.student, self.cfg, training=False)
        return side_model(self, side)

    def _in_students_classes(self, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A teacher's detections with the student's labels, without those it has no class for."""
        labels = 1 + translated(found["labels"] - 1, self._translation, num_classes(self.cfg))
        known = labels > 0
        return {name: value[known] for name, value in {**found, "labels": labels}.items()}


def _detect(detector: nn.Module, picture: Tensor) -> Detections:
    found = detector([_as_floats(picture)])[0]
    return Detections(found["boxes"], found["labels"] - 1, found["scores"])


def _has_masks(detector: Any) -> bool:
    return hasattr(detector, "roi_heads") and detector.roi_heads.has_mask()


def _as_floats(picture: Tensor) -> Tensor:
    return to_dtype(picture, torch.float32, scale=True)


def _as_bytes(image: Tensor) -> Tensor:
    # Not scale=True, which truncates: 0.999 * 255 must come back as what it was read from.
    return (image * 255).round().clamp(0, 255).to(torch.uint8)
