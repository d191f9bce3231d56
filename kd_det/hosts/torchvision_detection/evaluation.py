"""COCO average precision of torchvision's detections, by torchmetrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch.distributed as dist
from torch import Tensor
from torchmetrics.detection import MeanAveragePrecision

_MASK_THRESHOLD = 0.5
_NAMES = {
    "AP": "map",
    "AP50": "map_50",
    "AP75": "map_75",
    "APs": "map_small",
    "APm": "map_medium",
    "APl": "map_large",
}


class COCOMetric:
    """Collects detections on each process and measures them together.

    Args:
        masks: measure masks besides boxes.
    """

    def __init__(self, masks: bool) -> None:
        self.kinds: tuple[Literal["bbox", "segm"], ...] = ("bbox", "segm") if masks else ("bbox",)
        # Its own synchronisation needs as many images on every process.
        self._metric = MeanAveragePrecision(
            iou_type=self.kinds, backend="pycocotools", sync_on_compute=False
        )

    def update(
        self, detections: Sequence[Mapping[str, Tensor]], targets: Sequence[Mapping[str, Tensor]]
    ) -> None:
        """Add images.

        Args:
            detections: per image what torchvision's detectors return.
            targets: per image the ground truth, with ``iscrowd`` and ``area``.
        """
        self._metric.update([_prepared(d) for d in detections], [_prepared(t) for t in targets])

    def compute(self) -> dict[str, dict[str, float]]:
        """``{"bbox": {"AP": ..., "AP50": ...}, "segm": ...}`` in percent, of all processes."""
        self._gather()
        found: Mapping[str, Any] = self._metric.compute()
        results: dict[str, dict[str, float]] = {}
        for kind in self.kinds:
            prefix = f"{kind}_" if len(self.kinds) > 1 else ""
            values = {name: 100 * float(found[prefix + key]) for name, key in _NAMES.items()}
            # torchmetrics says -1 where there is nothing to measure.
            results[kind] = {k: v if v >= 0 else float("nan") for k, v in values.items()}
        return results

    def _gather(self) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            return
        own = self._metric.metric_state
        states: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(states, own)
        for name in own:
            setattr(self._metric, name, [entry for state in states for entry in state[name]])


def _prepared(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Detections or ground truth as torchmetrics wants them: on the CPU, masks as booleans."""
    kept = {k: values[k] for k in ("boxes", "labels", "scores", "iscrowd", "area") if k in values}
    kept = {k: v.float() if v.is_floating_point() else v for k, v in kept.items()}
    if "masks" in values:
        masks = values["masks"]
        # Predictions come as probabilities [R, 1, H, W].
        masks = masks[:, 0] > _MASK_THRESHOLD if masks.is_floating_point() else masks
        kept["masks"] = masks.bool()
    return {k: v.detach().cpu() for k, v in kept.items()}
