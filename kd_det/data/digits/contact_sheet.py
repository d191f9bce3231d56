"""One picture of many annotated images, for a look at a data set."""

from __future__ import annotations

import json
from pathlib import Path

import cv2

from kd_det.core.errors import check_at_least, fail

_COLUMNS = 6
_TILE_INCHES = 2.6


def draw_contact_sheet(
    json_file: str | Path, image_root: str | Path, path: str | Path, count: int = 24
) -> Path:
    """Draw the first images of a COCO-format data set with their boxes and class names.

    Args:
        json_file: COCO instances annotations.
        image_root: folder of the images.
        path: the PNG to write; its folder is made if missing.
        count: number of images, at least 1; fewer if the data set has fewer.

    Raises:
        KDError: ``count`` below 1, or an image that cannot be read.
    """
    # A figure without pyplot touches no global state and needs no display.
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    check_at_least("images of a contact sheet", count, 1)
    content = json.loads(Path(json_file).read_bytes())
    names = {category["id"]: category["name"] for category in content["categories"]}
    records = content["images"][:count]
    columns = min(_COLUMNS, len(records))
    rows = -(-len(records) // columns)
    figure = Figure(figsize=(columns * _TILE_INCHES, rows * _TILE_INCHES), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for panel in panels:
        panel.axis("off")
    for record, panel in zip(records, panels, strict=False):
        file = Path(image_root) / record["file_name"]
        image = cv2.imread(str(file))
        if image is None:
            fail(
                expected=f"an image at {file}",
                received="a file that is missing or cannot be read",
                remedy="correct the image folder or write the data set again",
            )
        panel.imshow(cv2.cvtColor(image, cv2.COLOR_BGR2RGB))
        for entry in content["annotations"]:
            if entry["image_id"] != record["id"]:
                continue
            x, y, width, height = entry["bbox"]
            # imshow puts the centre of the first pixel at 0, COCO its corner.
            corner = (x - 0.5, y - 0.5)
            panel.add_patch(Rectangle(corner, width, height, fill=False, color="yellow"))
            panel.text(
                *corner,
                names[entry["category_id"]],
                fontsize=8,
                verticalalignment="bottom",
                bbox={"facecolor": "yellow", "edgecolor": "none", "pad": 0.8, "alpha": 0.8},
            )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=120)
    return path
