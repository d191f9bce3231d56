"""What models see on images: boxes and classes, one column per model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import torch
from torch import Tensor
from torchvision.utils import draw_bounding_boxes

from kd_det.bench.workbench import Detections

matplotlib.use("Agg")
from matplotlib import font_manager
from matplotlib import pyplot as plt

MIN_SCORE = 0.5

_LEGIBLE = 480  # labels are legible on images of this width: smaller ones are enlarged
_FONT_SIZE = 26


def draw_detections(
    images: Sequence[Tensor],
    columns: Mapping[str, Sequence[Detections]],
    path: Path,
    names: Sequence[str] | None = None,
) -> None:
    """One row per image, one column per model, boxes labelled with the class.

    Args:
        images: uint8 RGB ``[3, H, W]``.
        columns: title to detections per image; those below a score of 0.5 are left out.
        path: the PNG to write.
        names: of the classes; their indices are shown without them.
    """
    figure, grid = plt.subplots(
        len(images),
        len(columns),
        figsize=(2.6 * len(columns), 2.6 * len(images) + 0.4),
        squeeze=False,
        layout="constrained",
    )
    for axes in grid.flat:
        axes.set_axis_off()
    for column, (title, detections) in enumerate(columns.items()):
        grid[0][column].set_title(title, fontsize=12)
        for row, (image, found) in enumerate(zip(images, detections, strict=True)):
            drawn = annotated(image, found, names)
            grid[row][column].imshow(drawn.permute(1, 2, 0).numpy())
    figure.suptitle(f"Detections with a score of at least {MIN_SCORE}", fontsize=10)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def annotated(
    image: Tensor,
    found: Detections,
    names: Sequence[str] | None = None,
    colours: Sequence[tuple[int, int, int]] | None = None,
) -> Tensor:
    """An image with its detections of a score of at least 0.5, enlarged until labels are legible.

    Args:
        image: uint8 RGB ``[3, H, W]``.
        found: detections in its pixels.
        names: of the classes; their indices are shown without them.
        colours: RGB of each detection; default one per class.

    Returns:
        uint8 RGB ``[3, s H, s W]`` with a whole factor ``s``.
    """
    scale = max(1, round(_LEGIBLE / image.shape[-1]))
    large = torch.nn.functional.interpolate(image[None].float(), scale_factor=scale, mode="nearest")
    large = large[0].to(torch.uint8)
    keep = found.scores >= MIN_SCORE
    if not keep.any():
        return large
    classes = [int(k) for k in found.classes[keep]]
    if colours is None:
        palette = plt.get_cmap("tab10").colors  # type: ignore[attr-defined]
        shown = [tuple(int(255 * c) for c in palette[k % 10]) for k in classes]
    else:
        shown = [colour for colour, kept in zip(colours, keep.tolist(), strict=True) if kept]
    return draw_bounding_boxes(
        large,
        found.boxes[keep] * scale,
        labels=[names[k] if names else str(k) for k in classes],
        colors=shown,
        width=3,
        font=font_manager.findfont("DejaVu Sans"),  # comes with matplotlib
        font_size=_FONT_SIZE,
        label_colors="white",
        fill_labels=True,
    )
