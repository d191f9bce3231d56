"""Binary masks as COCO polygons that decode to exactly the same mask.

Coordinates are COCO's continuous ones: pixel ``(row, column)`` covers ``[column, column + 1] x
[row, row + 1]``, so its centre is ``(column + 0.5, row + 0.5)``.
"""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray


def mask_to_polygons(mask: NDArray[np.bool_]) -> list[list[float]]:
    """Trace a mask, holes included, so that ``pycocotools`` rasterises it back unchanged.

    The mask is traced at twice its resolution, which puts every vertex a quarter pixel inside the
    boundary of its pixel: each pixel centre is clearly inside or outside (at the original
    resolution the last row and column are lost), the outline stays the same when flipped, and even
    a single pixel gives four vertices, of which a COCO polygon needs three.

    COCO's polygon lists are unions without holes. Each hole is joined to its outline by a cut that
    is traced once in each direction: rasterisers that count crossings, such as ``pycocotools``,
    cancel the cut and leave the hole empty.

    Args:
        mask: ``(H, W)`` boolean.

    Returns:
        One flat ``[x0, y0, x1, y1, ...]`` list in pixels per connected part, each with at least
        eight numbers; empty for an empty mask.
    """
    doubled = mask.astype(np.uint8).repeat(2, axis=0).repeat(2, axis=1)
    contours, hierarchy = cv2.findContours(doubled, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    if hierarchy is None:
        return []
    parents = np.asarray(hierarchy).reshape(-1, 4)[:, 3]
    polygons = []
    for outline_index in np.flatnonzero(parents < 0).tolist():
        polygon = contours[outline_index].reshape(-1, 2)
        for hole_index in np.flatnonzero(parents == outline_index).tolist():
            polygon = _cut_hole(polygon, contours[hole_index].reshape(-1, 2))
        polygons.append(((polygon + 0.5) / 2).reshape(-1).tolist())
    return polygons


def _cut_hole(polygon: NDArray[Any], hole: NDArray[Any]) -> NDArray[Any]:
    """Join a hole to a polygon at their closest vertices; both are ``(N, 2)`` vertex lists."""
    distances = ((polygon[:, None] - hole[None]) ** 2).sum(axis=2)
    at, start = divmod(int(distances.argmin()), len(hole))
    there_and_back = np.concatenate([hole[start:], hole[: start + 1], polygon[at : at + 1]])
    return np.concatenate([polygon[: at + 1], there_and_back, polygon[at + 1 :]])
