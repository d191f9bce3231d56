"""The workbench of this host; see :class:`kd_det.bench.workbench.Workbench`."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.config import get_cfg as get_stock_cfg
from detectron2.data import (
    DatasetMapper,
    build_detection_test_loader,
    build_detection_train_loader,
    get_detection_dataset_dicts,
)
from detectron2.data.detection_utils import (
    build_augmentation,
    convert_image_to_rgb,
    convert_PIL_to_numpy,
    read_image,
)
from detectron2.data.transforms import AugInput, AugmentationList
from detectron2.evaluation import COCOEvaluator, inference_on_dataset
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage
from detectron2.utils.file_io import PathManager
from PIL import Image
from torch import Tensor, nn

from kd_det.bench.looks import evaluating, repeatable, training_losses
from kd_det.bench.workbench import Detections, PixelInput, Side, in_this_process, side_model
from kd_det.core.checkpoint import load_student, read_weights
from kd_det.core.errors import fail
from kd_det.core.teacher import load_strict
from kd_det.hosts.detection.workbench import DetectionWorkbench
from kd_det.hosts.detectron2.backbones import add_backbone_config
from kd_det.hosts.detectron2.classes import class_names, num_classes
from kd_det.hosts.detectron2.config import get_cfg
from kd_det.hosts.detectron2.datasets import prepare_datasets, register_datasets, training_dicts
from kd_det.hosts.detectron2.export import export_student
from kd_det.hosts.detectron2.family import BOXES, BoxHead
from kd_det.hosts.detectron2.procedures import check_run_procedures
from kd_det.hosts.detectron2.teacher import teacher_config
from kd_det.hosts.detectron2.train import check_weights
from kd_det.hosts.detectron2.trainer import student_start
from kd_det.run.devices import check_devices


def open_bench(
    cfg: CfgNode, weights: str = "", distilled: bool = True, model: Any = None
) -> Detectron2Workbench:
    """See :func:`kd_det.hosts.base.open_bench`."""
    if model is not None:
        return Detectron2Workbench(cfg, model)
    cfg = in_this_process(cfg)
    cfg.KD.ENABLED = cfg.KD.ENABLED and distilled
    cfg.VIS_PERIOD = 0  # Detectron2 would draw into the storage of the first iteration
    check_devices(cfg.MODEL.DEVICE, 1)
    check_run_procedures(cfg)
    register_datasets(cfg)
    seed_all_rng(cfg.SEED)
    model = build_model(cfg)
    bench = Detectron2Workbench(cfg, model)
    if weights:
        path = PathManager.get_local_path(weights)
        load_student(model, path, complete=not distilled)
        bench.prepare_losses(path)
    else:
        check_weights(cfg.MODEL.WEIGHTS)
        with student_start(bench.distiller, cfg):
            DetectionCheckpointer(model).load(cfg.MODEL.WEIGHTS)
        bench.prepare_losses("")
    return bench


class Detectron2Workbench(DetectionWorkbench):
    """A stock or distilled meta-architecture with the data of its config.

    Args:
        cfg: a config of this host, its data sets registered.
        model: the module that trains.
    """

    count_classes = staticmethod(num_classes)
    data_names = staticmethod(class_names)

    def __init__(self, cfg: CfgNode, model: Any) -> None:
        distilled = getattr(model, "distiller", None) is not None
        super().__init__(
            cfg,
            model,
            student=model,
            distiller=model.distiller if distilled else None,
            teacher=model.teacher.frozen if distilled else None,
            teacher_cfg=teacher_config(cfg) if distilled else None,
        )
        if BoxHead().specs(model):
            self.box_tap = BoxHead().places(model, [])[BOXES]

    # Training

    def batches(self) -> Iterator[Any]:
        """Lists of dicts as Detectron2's mapper makes them."""
        prepare_datasets(self.cfg, self.cfg.DATASETS.TRAIN)
        loader = build_detection_train_loader(self.cfg)
        return repeatable(loader, seed_all_rng, self.cfg.SEED)

    def losses(self, batch: Any) -> dict[str, Tensor]:
        half = self.cfg.SOLVER.AMP.ENABLED and self.cfg.MODEL.DEVICE.startswith("cuda")
        with EventStorage(), torch.autocast("cuda", enabled=half):
            return training_losses(self.model, self.distiller, batch)

    def pictures(self, batch: Any) -> list[Tensor]:
        return [self._picture(x["image"]) for x in batch]

    def ground_truth(self, batch: Any) -> list[Detections]:
        truth = [x["instances"] for x in batch]
        return [Detections(i.gt_boxes.tensor, i.gt_classes, torch.ones(len(i))) for i in truth]

    def unannotated(self, pictures: Sequence[Tensor]) -> list[dict[str, Any]]:
        batch = [self._input("student", picture) for picture in pictures]
        for example in batch:
            size = (example["image"].shape[1], example["image"].shape[2])
            example["instances"] = Instances(
                size,
                gt_boxes=Boxes(torch.zeros(0, 4)),
                gt_classes=torch.zeros(0, dtype=torch.int64),
                gt_masks=BitMasks(torch.zeros(0, *size)),
            )
        return batch

    def _training_images(self) -> int:
        return len(training_dicts(self.cfg))

    # Evaluation

    def validation_pictures(self, count: int) -> list[Tensor]:
        if not self.cfg.DATASETS.TEST:
            return []
        images = [read_image(x["file_name"], "RGB") for x in self._validation[:count]]
        return [torch.from_numpy(image.copy()).permute(2, 0, 1) for image in images]

    def evaluate(self, side: Side, images: int) -> dict[str, dict[str, float]]:
        model, cfg = side_model(self, side), self.config(side)
        if not self.cfg.DATASETS.TEST:
            fail(
                expected="DATASETS.TEST to name the data to evaluate on",
                received="nothing",
                remedy="name a data set in COCO format",
            )
        masks = self.cfg.MODEL.MASK_ON and cfg.MODEL.MASK_ON
        records = self._validation[:images]
        evaluator = _SomeImages(
            self.cfg.DATASETS.TEST[0],
            ("bbox", "segm") if masks else ("bbox",),
            [record["image_id"] for record in records],
            self._translated if side == "teacher" else lambda instances: instances,
        )
        loader = build_detection_test_loader(records, mapper=DatasetMapper(cfg, is_train=False))
        # pycocotools reports to the screen.
        with evaluating(model), contextlib.redirect_stdout(io.StringIO()):
            results = inference_on_dataset(model, loader, evaluator)
        return {kind: dict(values) for kind, values in results.items()}

    # Facts

    def pixel_input(self, side: Side) -> PixelInput:
        model: Any = side_model(self, side)
        return PixelInput(
            self.config(side).INPUT.FORMAT,
            tuple(model.pixel_mean.flatten().tolist()),
            tuple(model.pixel_std.flatten().tolist()),
            scale=255,
            divisor=max(model.backbone.size_divisibility, 1),
        )

    @cached_property
    def _validation(self) -> list[dict[str, Any]]:
        name = self.cfg.DATASETS.TEST[0]
        prepare_datasets(self.cfg, [name])
        return get_detection_dataset_dicts(name, filter_empty=False)

    def _picture(self, image: Tensor) -> Tensor:
        rgb = convert_image_to_rgb(image.permute(1, 2, 0), self.cfg.INPUT.FORMAT)
        return torch.from_numpy(rgb.round().astype(np.uint8)).permute(2, 0, 1)

    def _input(self, side: Side, picture: Tensor) -> dict[str, Any]:
        """What the mapper of a side makes of an image file with these pixels."""
        cfg = self.config(side)
        image = Image.fromarray(picture.permute(1, 2, 0).numpy())
        resized = AugInput(convert_PIL_to_numpy(image, cfg.INPUT.FORMAT))
        AugmentationList(build_augmentation(cfg, is_train=False))(resized)
        pixels = torch.from_numpy(np.ascontiguousarray(resized.image.transpose(2, 0, 1)))
        return {"image": pixels, "height": image.height, "width": image.width}

    def _arguments(self, side: Side, picture: Tensor) -> tuple[Any, ...]:
        return ([self._input(side, picture)],)

    def _detections(self, output: Any) -> Detections:
        instances = output[0]["instances"]
        return Detections(instances.pred_boxes.tensor, instances.pred_classes, instances.scores)

    def _translated(self, instances: Instances) -> Instances:
        """A teacher's detections with the student's classes, without those it does not have."""
        classes = self._in_students_classes(instances.pred_classes)
        known = instances[classes >= 0]
        known.pred_classes = classes[classes >= 0]
        return known

    def _reload(self, checkpoint: Path, folder: Path) -> nn.Module:
        weights, config = export_student(self.cfg, checkpoint, folder)
        # Detectron2's own keys, and of ours only those of models that Detectron2 does not have.
        fcos = self.cfg.MODEL.META_ARCHITECTURE == "DistilledFCOS"
        stock_cfg = get_cfg() if fcos else get_stock_cfg()
        if not fcos:
            add_backbone_config(stock_cfg)
        stock_cfg.merge_from_file(str(config))
        stock = build_model(stock_cfg)
        load_strict(stock, read_weights(weights), str(weights))
        return stock


class _SomeImages(COCOEvaluator):
    """Detectron2's evaluator on images with some ids, of detections that ``prepare`` changes."""

    def __init__(
        self,
        name: str,
        tasks: tuple[str, ...],
        images: Sequence[Any],
        prepare: Callable[[Instances], Instances],
    ) -> None:
        super().__init__(name, tasks=tasks, distributed=False)
        self._images, self._prepare = list(images), prepare

    def process(self, inputs: Any, outputs: Any) -> None:
        super().process(inputs, [{"instances": self._prepare(x["instances"])} for x in outputs])

    def evaluate(self) -> Any:
        return super().evaluate(img_ids=self._images)
