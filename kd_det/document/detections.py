"""Pictures of images with detections: boxes and classes."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import torch
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image
from torchvision.utils import draw_bounding_boxes

from kd_det.bench.workbench import Detections

matplotlib.use("Agg")
from matplotlib import font_manager
from matplotlib import pyplot as plt

MIN_SCORE = 0.5

_CELL = 2.6  # inches
_LEGIBLE = 480  # labels are legible on images of this width: smaller ones are enlarged
_FONT_SIZE = 26
_QUALITY = 85  # of a JPEG


def draw_detections(
    images: Sequence[Tensor],
    columns: Mapping[str, Sequence[Detections]],
    path: Path,
    names: Sequence[str] | None = None,
) -> None:
    """Write a PNG of one row per image and one column per model, boxes labelled with the class.

    Args:
        images: uint8 RGB ``[3, H, W]``.
        columns: title to detections per image; those below a score of 0.5 are left out.
        path: the PNG.
        names: of the classes; their indices are shown without them.
    """
    rows = zip(images, *columns.values(), strict=True)
    drawn = [[annotated(image, one, names) for one in detections] for image, *detections in rows]
    draw_grid(drawn, path, columns=list(columns), detections=True)


def draw_grid(
    images: Sequence[Sequence[Tensor]],
    path: Path,
    columns: Sequence[str] = (),
    rows: Sequence[str] = (),
    labels: Sequence[Sequence[str]] = (),
    detections: bool = False,
) -> None:
    """Write a PNG of images, uint8 RGB ``[3, H, W]``, in rows and columns with titles.

    ``labels`` are texts below each image; ``detections`` names the threshold of their score.
    """
    shape = len(images), len(images[0])
    size = (_CELL * shape[1], _CELL * shape[0] + 0.5)
    figure, grid = plt.subplots(*shape, figsize=size, squeeze=False, layout="constrained")
    for at, axes in enumerate(grid.flat):
        row, column = divmod(at, shape[1])
        axes.imshow(images[row][column].permute(1, 2, 0).numpy())
        axes.set(xticks=[], yticks=[], xlabel=labels[row][column] if labels else "")
        axes.spines[:].set_visible(False)
    for axes, title in zip(grid[0], columns, strict=False):
        axes.set_title(title, fontsize=12)
    for axes, title in zip(grid[:, 0], rows, strict=False):
        axes.set_ylabel(title, fontsize=12)
    if detections:
        figure.suptitle(f"Detections with a score of at least {MIN_SCORE}", fontsize=10)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def class_label(index: int, names: Sequence[str] | None) -> str:
    """The name of a class, or its index without one."""
    return names[index] if names and 0 <= index < len(names) else str(index)


def jpeg(image: Tensor) -> bytes:
    """A uint8 RGB image ``[3, H, W]`` as a file."""
    buffer = io.BytesIO()
    to_pil_image(image.cpu()).save(buffer, "JPEG", quality=_QUALITY)
    return buffer.getvalue()


def annotated(
    image: Tensor,
    detections: Detections,
    names: Sequence[str] | None = None,
    colours: Sequence[tuple[int, int, int]] | None = None,
) -> Tensor:
    """An image with its detections of a score of at least 0.5, enlarged until labels are legible.

    Args:
        image: uint8 RGB ``[3, H, W]``.
        detections: boxes in its pixels.
        names: of the classes; their indices are shown without them.
        colours: RGB of each detection; default one per class.

    Returns:
        uint8 RGB ``[3, s H, s W]`` with a whole factor ``s``.
    """
    scale = max(1, round(_LEGIBLE / image.shape[-1]))
    large = torch.nn.functional.interpolate(image[None].float(), scale_factor=scale, mode="nearest")
    large = large[0].to(torch.uint8)
    keep = detections.scores >= MIN_SCORE
    if not keep.any():
        return large
    classes = [int(k) for k in detections.classes[keep]]
    if colours is None:
        palette = plt.get_cmap("tab10").colors  # type: ignore[attr-defined]
        shown = [tuple(int(255 * c) for c in palette[k % 10]) for k in classes]
    else:
        shown = [colour for colour, kept in zip(colours, keep.tolist(), strict=True) if kept]
    return draw_bounding_boxes(
        large,
        detections.boxes[keep] * scale,
        labels=[class_label(k, names) for k in classes],
        colors=shown,
        width=3,
        font=font_manager.findfont("DejaVu Sans"),  # comes with matplotlib
        font_size=_FONT_SIZE,
        label_colors="white",
        fill_labels=True,
    )
