"""A run of this host, built to be looked at; see :class:`kd_det.bench.workbench.Workbench`."""

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
from kd_det.core.checkpoint import load_student, read_weights
from kd_det.core.distiller import Distiller
from kd_det.core.errors import fail
from kd_det.core.taps import Tap
from kd_det.core.teacher import FrozenTeacher, load_strict
from kd_det.hosts.detectron2.backbones import add_backbone_config
from kd_det.hosts.detectron2.classes import class_names, num_classes, teacher_class_names
from kd_det.hosts.detectron2.config import get_cfg
from kd_det.hosts.detectron2.datasets import prepare_datasets, register_datasets, training_dicts
from kd_det.hosts.detectron2.export import export_student
from kd_det.hosts.detectron2.heads import BOXES, BoxHead, num_box_stages
from kd_det.hosts.detectron2.procedures import check_run_procedures
from kd_det.hosts.detectron2.teacher import teacher_config
from kd_det.hosts.detectron2.train import check_weights
from kd_det.hosts.detectron2.trainer import student_start
from kd_det.procedures.base import TrainingSet, build_procedures
from kd_det.run.class_names import fitting_names, translated, translation
from kd_det.run.devices import check_devices

_GREY = torch.full((3, 480, 640), 128, dtype=torch.uint8)


def open_bench(cfg: CfgNode, weights: str = "", distilled: bool = True) -> Workbench:
    """See :func:`kd_det.hosts.base.open_bench`."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.KD.ENABLED = cfg.KD.ENABLED and distilled
    cfg.SEED = max(cfg.SEED, 0)
    # Loader processes would take longer to start than a few batches take to load.
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.VIS_PERIOD = 0  # Detectron2 would draw into the storage of the first iteration
    check_devices(cfg.MODEL.DEVICE, 1)
    check_run_procedures(cfg)
    register_datasets(cfg)
    seed_all_rng(cfg.SEED)
    model = build_model(cfg)
    distiller = getattr(model, "distiller", None)
    if weights:
        path = PathManager.get_local_path(weights)
        load_student(model, path, complete=not distilled)
        if distiller is not None:
            load_learned(distiller, path)
    else:
        check_weights(cfg.MODEL.WEIGHTS)
        with student_start(distiller, cfg):
            DetectionCheckpointer(model).load(cfg.MODEL.WEIGHTS)
    return Detectron2Workbench(cfg, model)


class Detectron2Workbench:
    """A stock or distilled meta-architecture with the data of its config.

    Args:
        cfg: a config of this host, its data sets registered.
        model: what trains.
    """

    def __init__(self, cfg: CfgNode, model: Any) -> None:
        self.cfg = cfg
        self.teacher_cfg: CfgNode | None = None
        self.model: nn.Module = model
        self.student: nn.Module = model
        self.teacher: FrozenTeacher | None = None
        self.distiller: Distiller | None = getattr(model, "distiller", None)
        self.pre_stage: list[str] = []
        if self.distiller is not None:
            self.teacher_cfg = teacher_config(cfg)
            self.teacher = model.teacher.frozen
            given = cfg.KD.PRE_STAGE.WEIGHTS
            self.pre_stage = open_pre_stage(self.distiller, self.teacher, given)
        self.box_tap: Tap | None = None
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

    def sampled_boxes(self, capture: Any) -> list[Tensor]:
        boxes = capture[0] if num_box_stages(self.student) > 1 else capture
        return [each.tensor for each in boxes]

    def pictures(self, batch: Any) -> list[Tensor]:
        return [self._picture(x["image"]) for x in batch]

    def ground_truth(self, batch: Any) -> list[Detections]:
        found = [x["instances"] for x in batch]
        return [Detections(i.gt_boxes.tensor, i.gt_classes, torch.ones(len(i))) for i in found]

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

    def iterations(self) -> int:
        cfg = self.cfg
        procedures = build_procedures(cfg, lambda: TrainingSet(len(training_dicts(cfg))))
        return int(procedures.planned_config(cfg).SOLVER.MAX_ITER)

    # Validation

    def validation_pictures(self, count: int) -> list[Tensor]:
        if not self.cfg.DATASETS.TEST:
            return []
        images = [read_image(x["file_name"], "RGB") for x in self._validation[:count]]
        return [torch.from_numpy(image.copy()).permute(2, 0, 1) for image in images]

    def evaluate(self, side: Side, images: int) -> dict[str, dict[str, float]]:
        model, cfg = side_model(self, side), self._config(side)
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
            self._in_students_classes if side == "teacher" else lambda found: found,
        )
        loader = build_detection_test_loader(records, mapper=DatasetMapper(cfg, is_train=False))
        # pycocotools reports to the screen.
        with evaluating(model), contextlib.redirect_stdout(io.StringIO()):
            results = inference_on_dataset(model, loader, evaluator)
        return {kind: dict(values) for kind, values in results.items()}

    def predict(self, side: Side, picture: Tensor) -> Detections:
        return _detect(side_model(self, side), self._input(side, picture))

    # What is there

    def pixel_input(self, side: Side) -> PixelInput:
        model: Any = side_model(self, side)
        return PixelInput(
            self._config(side).INPUT.FORMAT,
            tuple(model.pixel_mean.flatten().tolist()),
            tuple(model.pixel_std.flatten().tolist()),
            scale=255,
            divisor=max(model.backbone.size_divisibility, 1),
        )

    def class_names(self, side: Side) -> list[str] | None:
        if side == "student":
            return fitting_names(class_names(self.cfg), num_classes(self.cfg))
        if self.teacher_cfg is None:
            return None
        return fitting_names(teacher_class_names(self.cfg), num_classes(self.teacher_cfg))

    def example(self, side: Side) -> tuple[Any, ...]:
        side_model(self, side)
        return ([self._input(side, self._example_picture)],)

    def check_export(self) -> list[str]:
        example = self._input("student", self._example_picture)
        return export_problems(
            self.model,
            self.student,
            self._reload,
            lambda model: detector_outputs(model, lambda: _detect(model, example)),
        )

    def _config(self, side: Side) -> CfgNode:
        return self.cfg if side == "student" else self.teacher_cfg

    @cached_property
    def _validation(self) -> list[dict[str, Any]]:
        name = self.cfg.DATASETS.TEST[0]
        prepare_datasets(self.cfg, [name])
        return get_detection_dataset_dicts(name, filter_empty=False)

    @cached_property
    def _example_picture(self) -> Tensor:
        first = self.validation_pictures(1)
        return first[0] if first else _GREY

    @cached_property
    def _translation(self) -> list[int] | None:
        return translation(
            self.class_names("student"), self.class_names("teacher"), self.cfg.KD.CLASS_MAP
        )

    def _picture(self, image: Tensor) -> Tensor:
        rgb = convert_image_to_rgb(image.permute(1, 2, 0), self.cfg.INPUT.FORMAT)
        return torch.from_numpy(rgb.round().astype(np.uint8)).permute(2, 0, 1)

    def _input(self, side: Side, picture: Tensor) -> dict[str, Any]:
        """What a side's mapper would make of an image file with these pixels."""
        cfg = self._config(side)
        image = Image.fromarray(picture.permute(1, 2, 0).numpy())
        resized = AugInput(convert_PIL_to_numpy(image, cfg.INPUT.FORMAT))
        AugmentationList(build_augmentation(cfg, is_train=False))(resized)
        pixels = torch.from_numpy(np.ascontiguousarray(resized.image.transpose(2, 0, 1)))
        return {"image": pixels, "height": image.height, "width": image.width}

    def _in_students_classes(self, found: Instances) -> Instances:
        """A teacher's detections with the student's classes, without those it does not have."""
        classes = translated(found.pred_classes, self._translation, num_classes(self.cfg))
        found = found[classes >= 0]
        found.pred_classes = classes[classes >= 0]
        return found

    def _reload(self, checkpoint: Path, folder: Path) -> nn.Module:
        weights, config = export_student(self.cfg, checkpoint, folder)
        # Detectron2's own keys, but for what it cannot describe itself.
        fcos = self.cfg.MODEL.META_ARCHITECTURE == "DistilledFCOS"
        stock_cfg = get_cfg() if fcos else get_stock_cfg()
        if not fcos:
            add_backbone_config(stock_cfg)
        stock_cfg.merge_from_file(str(config))
        stock = build_model(stock_cfg)
        load_strict(stock, read_weights(weights), str(weights))
        return stock


class _SomeImages(COCOEvaluator):
    """Detectron2's evaluator on some images of a data set; nothing is written.

    Args:
        name: of the data set.
        tasks: what to measure.
        images: ids of the images that will be processed.
        prepare: changes the detections of an image.
    """

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


def _detect(model: nn.Module, example: dict[str, Any]) -> Detections:
    with evaluating(model):
        found = model([example])[0]["instances"]
    return Detections(found.pred_boxes.tensor, found.pred_classes, found.scores)
