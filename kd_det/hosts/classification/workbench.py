"""The workbench of this host; see :class:`kd_det.bench.workbench.Workbench`."""

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

from kd_det.bench.looks import as_bytes, evaluating, training_losses
from kd_det.bench.workbench import PixelInput, Side, Workbench, in_this_process, side_model
from kd_det.hosts.classification.build import (
    build_student,
    build_training_model,
    training_procedures,
)
from kd_det.hosts.classification.classes import class_names
from kd_det.hosts.classification.config import check_config, load_config
from kd_det.hosts.classification.data import ClassificationData, prepared_by
from kd_det.hosts.classification.export import export_student
from kd_det.hosts.classification.lit import LitClassifier
from kd_det.hosts.classification.loaders import evaluation_loader, train_loader
from kd_det.hosts.classification.model import DistilledClassifier, Statistics
from kd_det.hosts.classification.teacher import num_classes, teacher_config
from kd_det.hosts.lightning.hardware import one_device
from kd_det.run.devices import check_devices

_TOP_K = (1, 5)


def open_bench(
    cfg: CfgNode, weights: str = "", distilled: bool = True, model: Any = None
) -> ClassificationWorkbench:
    """See :func:`kd_det.hosts.base.open_bench`."""
    if model is not None:
        return ClassificationWorkbench(cfg, model)
    check_config(cfg)
    check_devices(cfg.MODEL.DEVICE, 1)
    cfg = in_this_process(cfg)
    torch.manual_seed(cfg.SEED)
    model = build_training_model(cfg, weights or cfg.MODEL.WEIGHTS, distilled)
    bench = ClassificationWorkbench(cfg, model.to(cfg.MODEL.DEVICE))
    bench.prepare_losses(weights)
    return bench


class ClassificationWorkbench(Workbench):
    """A :class:`DistilledClassifier` with the data of its config.

    Args:
        cfg: a config of this host.
        model: the module that trains.
    """

    count_classes = staticmethod(num_classes)
    data_names = staticmethod(class_names)
    entrance = ""

    def __init__(self, cfg: CfgNode, model: DistilledClassifier) -> None:
        teacher_cfg = teacher_config(cfg) if model.teacher is not None else None
        super().__init__(cfg, model, model.student, model.distiller, model.teacher, teacher_cfg)
        self._classifier = model
        self._test_data: dict[Side, ClassificationData] = {}

    # Training

    def batches(self) -> Iterator[Any]:
        """``(images, classes, indices)``."""
        loader: Any = train_loader(self.cfg, self._training_data, self.cfg.SEED, rank=0, world=1)
        for epoch in itertools.count():
            loader.sampler.set_epoch(epoch)
            yield from loader

    def losses(self, batch: Any) -> dict[str, Tensor]:
        images, targets, indices = move_data_to_device(batch, self.device)
        cfg, seed = self.cfg, self.cfg.SEED
        # New procedures in every call: some count their draws.
        procedures = training_procedures(cfg, self._training_data, seed)
        with self._fabric.autocast():
            if not len(procedures):
                return training_losses(self.model, self.distiller, images, targets)
            data = self._validation("student")
            lit = LitClassifier(self._classifier, cfg, seed, None, data, procedures)
            return training_losses(_Step(lit), self.distiller, images, targets, indices)

    def pictures(self, batch: Any) -> list[Tensor]:
        return [as_bytes(image) for image in batch[0]]

    def ground_truth(self, batch: Any) -> Tensor:
        _, targets, _ = batch
        return targets

    def unannotated(self, pictures: Sequence[Tensor]) -> Any:
        images = torch.cat([self._prepared("student", picture) for picture in pictures])
        return images, torch.zeros(len(images), dtype=torch.int64), torch.arange(len(images))

    def iterations(self) -> int:
        solver, data = self.cfg.SOLVER, self._training_data
        periods = training_procedures(self.cfg, data).chooser.periods(solver.MAX_EPOCH, len(data))
        batch = solver.IMS_PER_BATCH
        total = sum(epochs * math.ceil(images / batch) for epochs, images in periods)
        return min(total, solver.MAX_ITER or total)

    # Evaluation

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
                    logits = self._translated(logits)
                for metric in metrics.values():
                    metric.update(logits, targets)
        return {"accuracy": {name: 100 * float(m.compute()) for name, m in metrics.items()}}

    def predict(self, side: Side, picture: Tensor) -> Tensor:
        return self._logits(side, self._prepared(side, picture))[0].softmax(dim=0)

    def example(self, side: Side) -> tuple[Any, ...]:
        return (self._normalized(side, self._prepared(side, self._example_picture)),)

    # Facts

    def pixel_input(self, side: Side) -> PixelInput:
        statistics = self._statistics(side)
        return PixelInput("RGB", tuple(statistics.mean), tuple(statistics.std), scale=1, divisor=1)

    @cached_property
    def _fabric(self) -> Fabric:
        return one_device(self.cfg)

    def _reload(self, checkpoint: Path, folder: Path) -> nn.Module:
        weights, config = export_student(self.cfg, checkpoint, folder)
        return build_student(load_config(str(config)), str(weights), complete=True)

    def _outputs(self, model: nn.Module, arguments: tuple[Any, ...]) -> dict[str, Tensor]:
        with evaluating(model):
            return {"logits": model(*arguments)}

    @cached_property
    def _training_data(self) -> ClassificationData:
        return ClassificationData(self.cfg, training=True)

    def _validation(self, side: Side) -> ClassificationData:
        """The student's test images, prepared as a side expects them."""
        if side not in self._test_data:
            cfg = self.config(side).clone()
            cfg.defrost()
            cfg.DATASETS.TEST = self.cfg.DATASETS.TEST
            self._test_data[side] = ClassificationData(cfg, training=False)
        return self._test_data[side]

    def _prepared(self, side: Side, picture: Tensor) -> Tensor:
        return prepared_by(self.config(side), training=False)(picture)[None]

    def _statistics(self, side: Side) -> Statistics:
        cfg = self.config(side)
        return Statistics(cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD)

    def _normalized(self, side: Side, images: Tensor) -> Tensor:
        return self._statistics(side).normalize(images.to(self.device))

    def _logits(self, side: Side, images: Tensor) -> Tensor:
        pixels = self._normalized(side, images)
        if side == "teacher" and self.teacher is not None:
            self.teacher.follow(pixels)
        with evaluating(side_model(self, side)) as model:
            return model(pixels)

    def _translated(self, logits: Tensor) -> Tensor:
        """A teacher's logits of the student's classes; ``-inf`` for those it does not know."""
        places = self._in_students_classes(torch.arange(logits.shape[1]))
        known = places >= 0
        translated = logits.new_full((len(logits), self.num_classes("student")), -torch.inf)
        translated[:, places[known]] = logits[:, known]
        return translated


class _Step(nn.Module):
    """A training forward of a batch as procedures change it, which may change statistics, too."""

    def __init__(self, lit: LitClassifier) -> None:
        super().__init__()
        self.lit = lit

    def forward(self, *batch: Tensor) -> dict[str, Tensor]:
        images, targets, _ = self.lit.procedures.on_batch(batch, self.lit)
        losses: dict[str, Tensor] = self.lit.model(images, targets)
        return losses
