"""COCO-format data sets for torchvision detectors, and an order of samples that a seed decides."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from fvcore.common.config import CfgNode
from PIL import Image, ImageOps
from pycocotools import mask as rle
from pycocotools.coco import COCO
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import pil_to_tensor
from torchvision.tv_tensors import BoundingBoxes, BoundingBoxFormat, Mask

from kd_det.core.errors import fail
from kd_det.data.catalogue import prepare_detection
from kd_det.data.coco_json import check_coco_json
from kd_det.hosts.torchvision_detection.models import num_classes
from kd_det.procedures.base import ImageChange, PeriodLoader, Procedures

Sample = tuple[Tensor, dict[str, Any]]

_CACHE_BYTES = 512 * 2**20


class CocoDataset(Dataset[Sample]):
    """Images and targets as torchvision's detectors take them.

    Small data sets are kept in memory once they are decoded.

    Args:
        json_file: COCO instances annotations.
        image_root: folder that ``file_name`` is relative to.
        masks: whether targets have ``masks``.
        training: leave out crowds and, with ``filter_empty``, images without boxes.
        flip: mirror half of the images.

    Attributes:
        image_change: what a procedure makes of an image before its augmentation. Boxes remain
            those of the image itself.
    """

    def __init__(
        self,
        json_file: str | Path,
        image_root: str | Path,
        masks: bool = False,
        training: bool = False,
        filter_empty: bool = True,
        flip: bool = False,
    ) -> None:
        self.root = Path(image_root)
        self.masks = masks
        with contextlib.redirect_stdout(io.StringIO()):
            coco = COCO(str(json_file))
        # Contiguous labels from 1, in the order of the ids; 0 is the background.
        self.category_ids = sorted(coco.getCatIds())
        self.class_names = [c["name"] for c in coco.loadCats(self.category_ids)]
        labels = {c: i + 1 for i, c in enumerate(self.category_ids)}
        self.images: list[dict[str, Any]] = []
        self.annotations: list[list[dict[str, Any]]] = []
        for image in coco.loadImgs(sorted(coco.getImgIds())):
            annotations = [
                _record(coco, a, labels[a["category_id"]], masks)
                for a in coco.imgToAnns[image["id"]]
                if min(a["bbox"][2:]) > 0 and not (training and a.get("iscrowd", 0))
            ]
            if annotations or not (training and filter_empty):
                self.images.append(image)
                self.annotations.append(annotations)
        steps: list[Callable[..., Any]] = [v2.RandomHorizontalFlip()] if flip else []
        steps += [v2.ClampBoundingBoxes(), v2.SanitizeBoundingBoxes(labels_getter=_per_box)]
        steps += [v2.ToDtype(torch.float32, scale=True), v2.ToPureTensor()]
        self.transform = v2.Compose(steps)
        size = sum(3 * i["width"] * i["height"] for i in self.images)
        self._cache: dict[int, Tensor] | None = {} if size <= _CACHE_BYTES else None
        self.image_change: ImageChange | None = None

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Sample:
        """``[3, H, W]`` in 0..1 and a dict with ``boxes``, ``labels``, ``index``, ..."""
        image, annotations = self._changed(index), self.annotations[index]
        size = (image.shape[-2], image.shape[-1])
        boxes = torch.tensor([a["box"] for a in annotations], dtype=torch.float32).view(-1, 4)
        target: dict[str, Any] = {
            "boxes": BoundingBoxes(boxes, format=BoundingBoxFormat.XYXY, canvas_size=size),
            "labels": torch.tensor([a["label"] for a in annotations], dtype=torch.int64),
            "iscrowd": torch.tensor([a["iscrowd"] for a in annotations], dtype=torch.int64),
            "area": torch.tensor([a["area"] for a in annotations], dtype=torch.float32),
        }
        if self.masks:
            stack = [torch.from_numpy(rle.decode(a["mask"])) for a in annotations]
            target["masks"] = Mask(
                torch.stack(stack) if stack else torch.zeros(0, *size, dtype=torch.uint8)
            )
        image, target = self.transform(image, target)
        return image, {**target, "index": index}

    def _changed(self, index: int) -> Tensor:
        if self.image_change is not None:
            # Floats in 0..1 pass the transform's conversion as they are.
            changed = self.image_change(index, lambda i: self._read(i) / 255)
            if changed is not None:
                return changed
        return self._read(index)

    def _read(self, index: int) -> Tensor:
        if self._cache is not None and index in self._cache:
            return self._cache[index]
        with Image.open(self.root / self.images[index]["file_name"]) as file:
            image = pil_to_tensor(ImageOps.exif_transpose(file).convert("RGB"))
        if self._cache is not None:
            self._cache[index] = image
        return image


class StepSampler(Sampler[int]):
    """Endless reshuffled passes over ``length`` images, cut to the ``iterations`` of a run.

    The order follows from the seed alone, so a run resumed at iteration ``start`` goes on where it
    was. ``batch`` is that of all processes.
    """

    def __init__(
        self,
        length: int,
        batch: int,
        iterations: int,
        seed: int,
        start: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.length, self.batch, self.iterations, self.seed = length, batch, iterations, seed
        self.start, self.rank, self.world = start, rank, world

    def __len__(self) -> int:
        return self.batch // self.world * self.iterations

    def __iter__(self) -> Iterator[int]:
        first, last = self.start * self.batch + self.rank, self.iterations * self.batch
        order: list[int] = []
        current = -1
        for position in range(first, last, self.world):
            if position // self.length != current:
                current = position // self.length
                generator = torch.Generator().manual_seed(self.seed * 1_000_003 + current)
                order = torch.randperm(self.length, generator=generator).tolist()
            yield order[position % self.length]


def check_datasets(cfg: CfgNode, training: bool = True) -> None:
    """Refuse data that would fail or mislead, before anything is trained.

    Beside :func:`check_coco_json`, that is another number of classes than the model has, or boxes
    without the masks that a Mask R-CNN needs.
    """
    keys = ["TRAIN"] if training else []
    # As in Detectron2, a run without test data is not evaluated.
    if cfg.DATASETS.TEST or not training:
        keys.append("TEST")
    for key in keys:
        if len(cfg.DATASETS[key]) != 1:
            fail(
                expected=f"DATASETS.{key} to name one data set",
                received=str(tuple(cfg.DATASETS[key])),
                remedy='write for example ("digits_train",); several can be merged into one json',
            )
        name = cfg.DATASETS[key][0]
        found = check_coco_json(name, *prepare_detection(name, cfg.DATASETS.COCO_JSON))
        if len(found["categories"]) != num_classes(cfg):
            dense = cfg.MODEL.META_ARCHITECTURE in ("RetinaNet", "FCOS")
            node = "RETINANET" if dense else "ROI_HEADS"
            fail(
                expected=f"data set '{name}' to have the model's {num_classes(cfg)} classes",
                received=f"{len(found['categories'])} categories",
                remedy=f"set MODEL.{node}.NUM_CLASSES {len(found['categories'])}",
            )
        if cfg.MODEL.META_ARCHITECTURE == "MaskRCNN" and found["annotations_without_mask"]:
            fail(
                expected=f"a segmentation for every annotation of '{name}', as Mask R-CNN needs",
                received=f"{found['annotations_without_mask']} annotations without one",
                remedy="add them, or train FasterRCNN",
            )


def train_dataset(cfg: CfgNode) -> CocoDataset:
    """The training images with the config's augmentation."""
    return CocoDataset(
        *prepare_detection(cfg.DATASETS.TRAIN[0], cfg.DATASETS.COCO_JSON),
        masks=cfg.MODEL.META_ARCHITECTURE == "MaskRCNN",
        training=True,
        filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
        flip=cfg.INPUT.RANDOM_FLIP == "horizontal",
    )


def train_loader(
    cfg: CfgNode,
    dataset: CocoDataset,
    seed: int,
    start: int = 0,
    rank: int = 0,
    world: int = 1,
    procedures: Procedures | None = None,
) -> DataLoader[Sample] | PeriodLoader:
    """Batches of a whole run of ``SOLVER.MAX_ITER`` as one pass, from iteration ``start`` on.

    One of the ``procedures`` may choose the images, and has its own start.
    """
    batch = cfg.SOLVER.IMS_PER_BATCH
    if batch % world:
        fail(
            expected="SOLVER.IMS_PER_BATCH to be a multiple of the number of processes",
            received=f"{batch} images for {world} processes",
            remedy="change one of them",
        )
    procedures = procedures or Procedures()
    dataset.image_change = procedures.chooser.image_change()
    if (stream := procedures.chooser.sampler(seed, rank, world)) is not None:
        loader = _loader(cfg, dataset, stream, batch // world, seed)
        return PeriodLoader(loader, procedures, cfg.SOLVER.MAX_ITER)
    sampler = StepSampler(len(dataset), batch, cfg.SOLVER.MAX_ITER, seed, start, rank, world)
    return _loader(cfg, dataset, sampler, batch // world, seed)


def evaluation_loader(cfg: CfgNode, rank: int = 0, world: int = 1) -> DataLoader[Sample]:
    """The test images once; each process has its own, none twice."""
    dataset = CocoDataset(
        *prepare_detection(cfg.DATASETS.TEST[0], cfg.DATASETS.COCO_JSON),
        masks=cfg.MODEL.META_ARCHITECTURE == "MaskRCNN",
    )
    batch = max(1, cfg.SOLVER.IMS_PER_BATCH // world)
    return _loader(cfg, dataset, range(rank, len(dataset), world), batch, 0)


def collate(samples: Sequence[Sample]) -> tuple[list[Tensor], list[dict[str, Any]]]:
    """Lists rather than stacked tensors: images differ in size."""
    images, targets = zip(*samples, strict=True)
    return list(images), list(targets)


def _loader(
    cfg: CfgNode, dataset: CocoDataset, sampler: Any, batch: int, seed: int
) -> DataLoader[Sample]:
    return DataLoader(
        dataset,
        batch,
        sampler=sampler,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        persistent_workers=cfg.DATALOADER.NUM_WORKERS > 0,
        collate_fn=collate,
        # Its own: starting an iterator would otherwise draw from the global stream.
        generator=torch.Generator().manual_seed(seed),
    )


def _record(coco: COCO, annotation: dict[str, Any], label: int, masks: bool) -> dict[str, Any]:
    x, y, width, height = annotation["bbox"]
    record = {
        "box": [x, y, x + width, y + height],
        "label": label,
        "iscrowd": annotation.get("iscrowd", 0),
        "area": annotation.get("area", width * height),
    }
    if masks:
        record["mask"] = coco.annToRLE(annotation)
    return record


def _per_box(inputs: Any) -> list[Tensor]:
    """Whatever has a row per box and must go when the box goes."""
    target = inputs[1]
    return [target["labels"], target["iscrowd"], target["area"]]
