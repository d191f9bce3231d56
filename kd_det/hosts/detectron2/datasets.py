"""Data sets in Detectron2's catalogs: its own, any COCO json, and the digits."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog, get_detection_dataset_dicts
from detectron2.data.datasets import register_coco_instances
from detectron2.utils import comm

from kd_det.core.errors import check_known, fail
from kd_det.data.catalogue import (
    data_root,
    detection_paths,
    prepare_detection,
    require_coco,
)
from kd_det.data.coco_json import check_coco_json
from kd_det.data.digits import DIGITS, digits_paths


def register_datasets(cfg: CfgNode) -> None:
    """Register ``DATASETS.COCO_JSON`` and the digits, in Detectron2's catalog.

    Raises:
        KDError: an entry is not ``[json, image_root]``, or its name means other data already.
    """
    for name, (json_file, images) in digits_paths(data_root() / "digits").items():
        if name in DatasetCatalog and MetadataCatalog.get(name).json_file != str(json_file):
            # DETECTRON2_DATASETS has changed since.
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)
        _register(name, json_file, images)
    for name in cfg.DATASETS.COCO_JSON:
        _register(name, *detection_paths(name, cfg.DATASETS.COCO_JSON))


def _register(name: str, json_file: Path, image_root: Path) -> None:
    if name not in DatasetCatalog:
        register_coco_instances(name, {}, str(json_file), str(image_root))
        return
    known = getattr(MetadataCatalog.get(name), "json_file", None)
    if known != str(json_file):
        fail(
            expected=f"a name for {json_file} that is not taken",
            received=f"'{name}', registered with {known}",
            remedy="choose another name in DATASETS.COCO_JSON",
        )


def prepare_datasets(cfg: CfgNode, names: Iterable[str]) -> None:
    """Make sure that every data set of a run is there and sound, before any training time.

    Writes the digits if they are asked for and missing. Called by all ranks.

    Raises:
        KDError: an unknown name, or a COCO-format data set that is missing or broken.
    """
    for name in names:
        check_known("data set", name, DatasetCatalog.list())
        if comm.is_main_process():
            if name in DIGITS:
                prepare_detection(name, {})
            meta = MetadataCatalog.get(name)
            if getattr(meta, "evaluator_type", None) == "coco":
                if name.startswith("coco_") and name not in cfg.DATASETS.COCO_JSON:
                    require_coco(Path(meta.json_file))
                check_coco_json(name, meta.json_file, meta.image_root)
    comm.synchronize()


def training_dicts(cfg: CfgNode) -> list[dict[str, Any]]:
    """The images of ``DATASETS.TRAIN`` as Detectron2's own loader would take them."""
    keypoints = cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE
    return get_detection_dataset_dicts(
        cfg.DATASETS.TRAIN,
        filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
        min_keypoints=keypoints if cfg.MODEL.KEYPOINT_ON else 0,
        proposal_files=cfg.DATASETS.PROPOSAL_FILES_TRAIN if cfg.MODEL.LOAD_PROPOSALS else None,
    )
