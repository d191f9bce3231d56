"""A run of this host, built to be looked at; see :class:`kd_det.bench.workbench.Workbench`."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from fvcore.common.config import CfgNode
from lightning.fabric import Fabric
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor, nn
from torch.utils.data import Subset
from torchmetrics.classification import MulticlassAccuracy
from torchvision.transforms import v2

from kd_det.bench.looks import (
    evaluating,
    export_problems,
    load_learned,
    open_pre_stage,
    training_losses,
)
from kd_det.bench.workbench import PixelInput, Side, Workbench, side_model
from kd_det.core.distiller import Distiller
from kd_det.core.taps import Tap
from kd_det.core.teacher import FrozenTeacher
from kd_det.hosts.classification.build import (
    build_student,
    build_training_model,
    training_procedures,
)
from kd_det.hosts.classification.classes import class_names, teacher_class_names
from kd_det.hosts.classification.config import check_config, load_config
from kd_det.hosts.classification.data import ClassificationData, prepared_by
from kd_det.hosts.classification.export import export_student
from kd_det.hosts.classification.lit import LitClassifier
from kd_det.hosts.classification.loaders import evaluation_loader, train_loader
from kd_det.hosts.classification.model import DistilledClassifier, Statistics
from kd_det.hosts.classification.teacher import num_classes, teacher_config
from kd_det.hosts.lightning.hardware import precision
from kd_det.run.class_names import fitting_names, translated, translation
from kd_det.run.devices import check_devices

_TOP_K = (1, 5)


def open_bench(cfg: CfgNode, weights: str = "", distilled: bool = True) -> Workbench:
    """See :func:`kd_det.hosts.base.open_bench`."""
    check_config(cfg)
    check_devices(cfg.MODEL.DEVICE, 1)
    cfg = cfg.clone()
    cfg.defrost()
    # Loader processes would take longer to start than a few batches take to load.
    cfg.DATALOADER.NUM_WORKERS = 0
    torch.manual_seed(max(cfg.SEED, 0))
    model = build_training_model(cfg, weights or cfg.MODEL.WEIGHTS, distilled)
    if weights and model.distiller is not None:
        load_learned(model.distiller, weights)
    return ClassificationWorkbench(cfg, model.to(cfg.MODEL.DEVICE))


class ClassificationWorkbench:
    """A :class:`DistilledClassifier` with the data of its config.

    Args:
        cfg: a config of this host.
        model: what trains.
    """

    box_tap: Tap | None = None

    def __init__(self, cfg: CfgNode, model: DistilledClassifier) -> None:
        self.cfg = cfg
        self.teacher_cfg: CfgNode | None = None
        self.model: nn.Module = model
        self._classifier = model
        self.student: nn.Module = model.student
        self.teacher: FrozenTeacher | None = model.teacher
        self.distiller: Distiller | None = model.distiller
        self.pre_stage: list[str] = []
        if self.teacher is not None:
            self.teacher_cfg = teacher_config(cfg)
        if self.distiller is not None:
            given = cfg.KD.PRE_STAGE.WEIGHTS
            self.pre_stage = open_pre_stage(self.distiller, self.teacher, given)
        self._test_data: dict[Side, ClassificationData] = {}
        self._seed = max(cfg.SEED, 0)
        self._fabric = Fabric(
            accelerator="cpu" if cfg.MODEL.DEVICE == "cpu" else "cuda",
            devices=1,
            precision=precision(cfg),  # type: ignore[arg-type]
        )

    # Training

    def batches(self) -> Iterator[Any]:
        """``(images, classes, indices)``."""
        loader = train_loader(self.cfg, self._training_data, self._seed, rank=0, world=1)
        return self._epochs(loader)

    def losses(self, batch: Any) -> dict[str, Tensor]:
        images, targets, indices = move_data_to_device(batch, self._device)
        # Procedures of their own for every look: some count their draws.
        procedures = training_procedures(self.cfg, self._training_data, self._seed)
        with self._fabric.autocast():
            if not len(procedures):
                return training_losses(self.model, self.distiller, images, targets)
            lit = LitClassifier(
                self._classifier,
                self.cfg,
                self._seed,
                None,
                self._validation("student"),
                procedures,
            )
            return training_losses(_Step(lit), self.distiller, images, targets, indices)

    def sampled_boxes(self, capture: Any) -> list[Tensor]:
        return []

    def pictures(self, batch: Any) -> list[Tensor]:
        return [(image * 255).round().clamp(0, 255).to(torch.uint8) for image in batch[0]]

    def ground_truth(self, batch: Any) -> Tensor:
        _, targets, _ = batch
        return targets

    def unannotated(self, pictures: Sequence[Tensor]) -> Any:
        images = torch.cat([self._prepared("student", picture) for picture in pictures])
        return images, torch.zeros(len(images), dtype=torch.int64), torch.arange(len(images))

    def iterations(self) -> int:
        solver, data = self.cfg.SOLVER, self._training_data
        periods = training_procedures(self.cfg, data).periods(solver.MAX_EPOCH, len(data))
        batch = solver.IMS_PER_BATCH
        total = sum(epochs * math.ceil(images / batch) for epochs, images in periods)
        return min(total, solver.MAX_ITER or total)

    # Validation

    def validation_pictures(self, count: int) -> list[Tensor]:
        as_rgb = v2.Compose([v2.ToImage(), v2.RGB(), v2.ToPureTensor()])
        source = self._validation("student").source
        return [as_rgb(source[index][0]) for index in range(min(count, len(source)))]

    def evaluate(self, side: Side, images: int) -> dict[str, dict[str, float]]:
        data = self._validation(side)
        first = Subset(data, range(min(images, len(data))))
        metrics = {
            f"top{k}": MulticlassAccuracy(data.num_classes, top_k=k, average="micro")
            for k in _TOP_K
            if k < data.num_classes
        }
        with self._fabric.autocast():
            for pixels, targets in evaluation_loader(self.cfg, first, rank=0, world=1):
                logits = self._logits(side, pixels).float().cpu()
                if side == "teacher":
                    logits = self._in_students_classes(logits)
                for metric in metrics.values():
                    metric.update(logits, targets)
        return {"accuracy": {name: 100 * float(m.compute()) for name, m in metrics.items()}}

    def predict(self, side: Side, picture: Tensor) -> Tensor:
        return self._logits(side, self._prepared(side, picture))[0].softmax(dim=0)

    # What is there

    def pixel_input(self, side: Side) -> PixelInput:
        found = self._statistics(side)
        return PixelInput("RGB", tuple(found.mean), tuple(found.std), scale=1, divisor=1)

    def class_names(self, side: Side) -> list[str] | None:
        if side == "student":
            return fitting_names(class_names(self.cfg), num_classes(self.cfg))
        if self.teacher_cfg is None:
            return None
        return fitting_names(teacher_class_names(self.cfg), num_classes(self.teacher_cfg))

    def example(self, side: Side) -> tuple[Any, ...]:
        side_model(self, side)
        return (self._normalized(side, self._prepared(side, self.validation_pictures(1)[0])),)

    def check_export(self) -> list[str]:
        (example,) = self.example("student")

        def reload(checkpoint: Path, folder: Path) -> nn.Module:
            weights, config = export_student(self.cfg, checkpoint, folder)
            return build_student(load_config(str(config)), str(weights), complete=True)

        def outputs(model: nn.Module) -> dict[str, Tensor]:
            with evaluating(model):
                return {"logits": model(example)}

        return export_problems(self.model, self.student, reload, outputs)

    def _config(self, side: Side) -> CfgNode:
        side_model(self, side)
        return self.cfg if side == "student" else self.teacher_cfg

    @property
    def _device(self) -> torch.device:
        return next(self.student.parameters()).device

    @cached_property
    def _training_data(self) -> ClassificationData:
        return ClassificationData(self.cfg, training=True)

    @staticmethod
    def _epochs(loader: Any) -> Iterator[Any]:
        for epoch in itertools.count():
            loader.sampler.set_epoch(epoch)
            yield from loader

    def _validation(self, side: Side) -> ClassificationData:
        """The student's test images, prepared as a side expects them."""
        if side not in self._test_data:
            cfg = self._config(side).clone()
            cfg.defrost()
            cfg.DATASETS.TEST = self.cfg.DATASETS.TEST
            self._test_data[side] = ClassificationData(cfg, training=False)
        return self._test_data[side]

    def _prepared(self, side: Side, picture: Tensor) -> Tensor:
        return prepared_by(self._config(side), training=False)(picture)[None]

    def _statistics(self, side: Side) -> Statistics:
        cfg = self._config(side)
        return Statistics(cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD)

    def _normalized(self, side: Side, images: Tensor) -> Tensor:
        return self._statistics(side).normalize(images.to(self._device))

    def _logits(self, side: Side, images: Tensor) -> Tensor:
        pixels = self._normalized(side, images)
        if side == "teacher" and self.teacher is not None:
            self.teacher.follow(pixels)
        with evaluating(side_model(self, side)) as model:
            return model(pixels)

    def _in_students_classes(self, logits: Tensor) -> Tensor:
        """A teacher's logits of the student's classes; no answer for those it does not know."""
        count = num_classes(self.cfg)
        places = translated(torch.arange(logits.shape[1]), self._translation, count)
        known = places >= 0
        found = logits.new_full((len(logits), count), -torch.inf)
        found[:, places[known]] = logits[:, known]
        return found

    @cached_property
    def _translation(self) -> list[int] | None:
        return translation(
            self.class_names("student"), self.class_names("teacher"), self.cfg.KD.CLASS_MAP
        )


class _Step(nn.Module):
    """A training forward of a batch as procedures change it, which may move statistics, too."""

    def __init__(self, lit: LitClassifier) -> None:
        super().__init__()
        self.lit = lit

    def forward(self, *batch: Tensor) -> dict[str, Tensor]:
        images, targets, _ = self.lit.procedures.on_batch(batch, self.lit)
        losses: dict[str, Tensor] = self.lit.model(images, targets)
        return losses
