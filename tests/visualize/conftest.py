"""Small batches to draw."""

from __future__ import annotations

import pytest
import torch

from kd_det.data.digits.detection import DigitsSpec, write_digits
from kd_det.visualize.watch import Pictures


@pytest.fixture
def pictures(generator):
    """``pictures(sizes, padded)``: noise of these sizes in a batch padded to that one."""

    def make(*sizes, padded=(32, 48)):
        images = [
            torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8)
            for size in sizes or [(32, 48)]
        ]
        return Pictures(images, padded)

    return make


@pytest.fixture
def rows():
    """``rows(figure)``: its axes that show something, row by row, without colour bars."""

    def read(figure):
        found = {}
        for axes in figure.axes:
            place = axes.get_subplotspec()
            if axes.images and place is not None:
                found.setdefault(place.rowspan.start, []).append(axes)
        return [found[row] for row in sorted(found)]

    return read


@pytest.fixture
def cells():
    """``cells(axes)``: the numbers that the topmost image of some axes shows."""
    return lambda axes: torch.as_tensor(axes.images[-1].get_array().data)


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """Annotations and images of a tiny data set, as ``DATASETS.COCO_JSON`` wants them."""
    root = tmp_path_factory.mktemp("drawn") / "digits"
    files = write_digits(root, DigitsSpec(canvas=96, train_images=4, val_images=1))
    return [str(path) for path in files["digits_train"]]


@pytest.fixture
def options(digits, tmp_path):
    """Overrides that make configs of ``digits_torchvision`` small."""
    found = ["MODEL.BACKBONE.WIDTH", "4", "MODEL.FPN.OUT_CHANNELS", "8", "SOLVER.MAX_ITER", "3"]
    found += ["SOLVER.IMS_PER_BATCH", "2", "OUTPUT_DIR", str(tmp_path / "run")]
    found += ["KD.TEACHER.WEIGHTS", "", "KD.TEACHER.ALLOW_RANDOM", "True"]
    found += ["DATASETS.TRAIN", "('few',)", "DATASETS.TEST", "()"]
    return [*found, "DATASETS.COCO_JSON.few", repr(digits)]
