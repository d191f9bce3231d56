"""KCD's blends of two images, applied when the first of them is read."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from detectron2.data import DatasetMapper
from detectron2.data import detection_utils as utils
from detectron2.data import transforms as T
from numpy.typing import NDArray

from kd_det.procedures.kcd.condensation import Condensation
from kd_det.procedures.kcd.sampler import blend_images


class BlendMapper:
    """Detectron2's mapper, whose first augmentation is the blend of a recipe, if there is one.

    Blends are made of original images, before any geometric augmentation, and never stored.
    Boxes and masks are those of the kept image.

    Args:
        mapper: the stock mapper; it is changed.
        dataset: dataset dicts by place in the training set.
        condensation: whose recipes are applied.
        index: key of a dict's own place.
    """

    def __init__(
        self, mapper: DatasetMapper, dataset: Any, condensation: Condensation, index: str
    ) -> None:
        self.mapper = mapper
        self._dataset = dataset
        self._index = index
        # Not the condensation itself: a loader process needs no copy of the ledger.
        self._partners, self._epsilons = condensation.partners, condensation.epsilons
        self._blend = _Blend(condensation.blend)
        mapper.augmentations = T.AugmentationList([self._blend, mapper.augmentations])

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any] | None:
        index = dataset_dict[self._index]
        partner, self._blend.epsilon = int(self._partners[index]), float(self._epsilons[index])
        self._blend.partner = None
        if partner >= 0 and self._blend.epsilon > 0:
            file_name = self._dataset[partner]["file_name"]
            self._blend.partner = utils.read_image(file_name, format=self.mapper.image_format)
        return self.mapper(dataset_dict)


class _Blend(T.Augmentation):
    def __init__(self, mode: str) -> None:
        super().__init__()
        self.mode = mode
        self.partner: NDArray[Any] | None = None
        self.epsilon = 0.0

    def get_transform(self, image: NDArray[Any]) -> T.Transform:
        if self.partner is None:
            return T.NoOpTransform()
        return _BlendTransform(self.partner, self.epsilon, self.mode)


class _BlendTransform(T.Transform):
    """:func:`blend_images` on arrays ``[H, W, C]``; coordinates stay."""

    def __init__(self, partner: NDArray[Any], epsilon: float, mode: str) -> None:
        super().__init__()
        self.partner = partner
        self.epsilon = epsilon
        self.mode: Any = mode

    def apply_image(self, img: NDArray[Any]) -> NDArray[Any]:
        image, partner = (
            torch.from_numpy(x.astype(np.float32)).permute(2, 0, 1) for x in (img, self.partner)
        )
        blended = blend_images(image, partner, self.epsilon, self.mode).permute(1, 2, 0).numpy()
        # Rounded: cutting off decimals would darken every blend.
        return blended.round().clip(0, 255).astype(img.dtype) if img.dtype == np.uint8 else blended

    def apply_coords(self, coords: NDArray[Any]) -> NDArray[Any]:
        return coords

    def apply_segmentation(self, segmentation: NDArray[Any]) -> NDArray[Any]:
        return segmentation
