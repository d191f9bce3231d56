"""COCO average precision of torchvision's detections, by torchmetrics, and the file of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pycocotools import mask as rle
from torch import Tensor
from torchmetrics.detection import MeanAveragePrecision
from torchvision.ops import box_convert

from kd_det.core.distributed import gather_objects
from kd_det.hosts.lightning.predictions import write_predictions
from kd_det.run.folder import DETECTIONS

_MASK_THRESHOLD = 0.5
# pycocotools' own, which torchmetrics has in float32: a recall of exactly 0.3 is below those.
_IOUS, _RECALLS = np.linspace(0.5, 0.95, 10), np.linspace(0, 1, 101)
_NAMES = {"AP": "map", "AP50": "map_50", "AP75": "map_75"}
_NAMES |= {"APs": "map_small", "APm": "map_medium", "APl": "map_large"}


class COCOMetric:
    """Collects detections on each process and measures them together; masks if wanted."""

    def __init__(self, masks: bool) -> None:
        self.kinds: tuple[Literal["bbox", "segm"], ...] = ("bbox", "segm") if masks else ("bbox",)
        # Its own synchronisation needs as many images on every process.
        self._metric = MeanAveragePrecision(
            iou_type=self.kinds,
            iou_thresholds=_IOUS.tolist(),
            rec_thresholds=_RECALLS.tolist(),
            backend="pycocotools",
            sync_on_compute=False,
        )

    def update(
        self, detections: Sequence[Mapping[str, Tensor]], targets: Sequence[Mapping[str, Tensor]]
    ) -> None:
        """Add images: what a detector returns for each, :func:`prepared` or not, and its truth."""
        self._metric.update([prepared(d) for d in detections], [prepared(t) for t in targets])

    def compute(self) -> dict[str, dict[str, float]]:
        """``{"bbox": {"AP": ..., "AP50": ...}, "segm": ...}`` in percent, of all processes."""
        own = self._metric.metric_state
        states = gather_objects(own)
        for name in own:
            setattr(self._metric, name, [entry for state in states for entry in state[name]])
        found: Mapping[str, Any] = self._metric.compute()
        results: dict[str, dict[str, float]] = {}
        for kind in self.kinds:
            prefix = f"{kind}_" if len(self.kinds) > 1 else ""
            values = {name: 100 * float(found[prefix + key]) for name, key in _NAMES.items()}
            # torchmetrics gives -1 where there is nothing to measure.
            results[kind] = {k: v if v >= 0 else float("nan") for k, v in values.items()}
        return results


class DetectionFile:
    """Collects detections on each process for ``inference/coco_instances_results.json``.

    The file is a list of COCO results, as Detectron2's evaluator writes it: ids as in the data
    set's json, boxes ``(x, y, width, height)`` in pixels of the image as it is, masks as RLE.
    Numbers keep their full precision, so that pycocotools finds the same AP in them.

    Args:
        image_ids: of the data set's images, in their order.
        category_ids: of the labels 1, 2, ...
    """

    def __init__(self, image_ids: Sequence[int], category_ids: Sequence[int]) -> None:
        self.image_ids, self.category_ids = image_ids, category_ids
        self._found: list[dict[str, Any]] = []

    def update(self, detections: Sequence[Mapping[str, Tensor]], indices: Sequence[int]) -> None:
        """Add images: their detections, :func:`prepared`, and their places in the data set."""
        for found, index in zip(detections, indices, strict=True):
            boxes = box_convert(found["boxes"], "xyxy", "xywh").tolist()
            masks = [_encoded(mask) for mask in found["masks"]] if "masks" in found else []
            scores, labels = found["scores"].tolist(), found["labels"].tolist()
            for k, (box, score, label) in enumerate(zip(boxes, scores, labels, strict=True)):
                entry = {
                    "image_id": self.image_ids[index],
                    "category_id": self.category_ids[label - 1],
                    "bbox": box,
                    "score": score,
                }
                self._found.append(entry | ({"segmentation": masks[k]} if masks else {}))

    def write(self, output_dir: str | Path) -> None:
        """Write what all processes have collected, by image; every process must call it."""
        # Detections of one image stay in the detector's order.
        write_predictions(Path(output_dir) / DETECTIONS, self._found, itemgetter("image_id"))


def prepared(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Detections or ground truth as torchmetrics wants them: on the CPU, masks as booleans."""
    kept = {k: values[k] for k in ("boxes", "labels", "scores", "iscrowd", "area") if k in values}
    kept = {k: v.float() if v.is_floating_point() else v for k, v in kept.items()}
    if "masks" in values:
        masks = values["masks"]
        # Predictions come as probabilities [R, 1, H, W].
        masks = masks[:, 0] > _MASK_THRESHOLD if masks.is_floating_point() else masks
        kept["masks"] = masks.bool()
    return {k: v.detach().cpu() for k, v in kept.items()}


def _encoded(mask: Tensor) -> dict[str, Any]:
    encoded = rle.encode(np.asfortranarray(mask.numpy().astype(np.uint8)))
    return {"size": encoded["size"], "counts": encoded["counts"].decode("ascii")}
