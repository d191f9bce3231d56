"""The images of a batch as the student saw them, from the tensor that enters its backbone.

What is tapped lies on that tensor's grid, resized and padded, and so do boxes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor

from kd_det.bench.workbench import PixelInput
from kd_det.core.errors import fail


@dataclass(frozen=True)
class Pictures:
    """Images of one batch.

    Attributes:
        images: per image uint8 RGB ``[3, h, w]``, without padding.
        size: ``(H, W)`` of the padded batch, the pixels that feature maps cover; padding is at
            the right and at the bottom.
    """

    images: Sequence[Tensor]
    size: tuple[int, int]

    def __len__(self) -> int:
        return len(self.images)


def seen_pictures(batch: Tensor, pixels: PixelInput, most: int) -> Pictures:
    """Undo the normalisation of a batch.

    Args:
        batch: ``[N, 3, H, W]`` as it enters the backbone.
        pixels: what the model expects, hence what was done to it.
        most: the largest number of images to take, from the first on.
    """
    size = (batch.shape[2], batch.shape[3])
    batch = batch[:most].detach().float().cpu()
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (pixels.mean, pixels.std))
    values = ((batch * std + mean) * (255 / pixels.scale)).round().clamp(0, 255).to(torch.uint8)
    if pixels.order == "BGR":
        values = values.flip(1)
    return Pictures(
        [image[:, :h, :w] for image, (h, w) in zip(values, map(_filled, batch), strict=True)], size
    )


def _filled(image: Tensor) -> tuple[int, int]:
    """Height and width without padding, which is exactly 0 after normalisation."""
    filled = (image != 0).any(dim=0)
    h, w = (int(filled.any(dim=d).nonzero().max()) + 1 if filled.any() else 0 for d in (1, 0))
    return h or image.shape[1], w or image.shape[2]


def read_pictures(files: Sequence[str | Path]) -> list[Tensor]:
    """Image files as uint8 RGB ``[3, H, W]``.

    Raises:
        KDError: a file is missing or cannot be decoded.
    """
    return [_read(Path(file)) for file in files]


def _read(path: Path) -> Tensor:
    try:
        with Image.open(path) as file:
            return pil_to_tensor(ImageOps.exif_transpose(file).convert("RGB"))
    # Broken files make Pillow raise anything: TypeError and struct.error of a damaged EXIF, too.
    except Exception as error:
        fail(
            expected="image files that Pillow can decode",
            received=f"'{path}' ({' '.join(str(error).split())})",
            remedy="correct the path, or convert the file to PNG or JPEG",
        )
