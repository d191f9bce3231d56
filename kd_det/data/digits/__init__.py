"""Handwritten digits: images of one digit, and a detection data set drawn from them.

Names and files of the detection data set are here, because the modules that draw it need OpenCV.
"""

from __future__ import annotations

from pathlib import Path

SPLITS = ("train", "val")
DIGITS = tuple(f"digits_{split}" for split in SPLITS)
CLASS_NAMES = tuple("0123456789")


def digits_paths(root: Path) -> dict[str, tuple[Path, Path]]:
    """``{"digits_train": (json, image_root), "digits_val": ...}`` below ``root``."""
    folder = Path(root)
    return {
        f"digits_{split}": (folder / "annotations" / f"digits_{split}.json", folder / split)
        for split in SPLITS
    }
