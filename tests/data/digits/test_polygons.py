"""Masks as COCO polygons decode to exactly the same mask."""

from __future__ import annotations

import numpy as np
import pytest
from pycocotools import mask as mask_util

from kd_det.data.digits.polygons import mask_to_polygons


def decode(polygons, shape):
    rles = mask_util.frPyObjects(polygons, *shape)
    return mask_util.decode(mask_util.merge(rles)).astype(bool)


@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
def test_polygons_decode_to_the_same_mask(density):
    rng = np.random.default_rng(0)
    for _ in range(50):
        mask = rng.random(rng.integers(2, 24, 2)) < density
        if mask.any():
            np.testing.assert_array_equal(decode(mask_to_polygons(mask), mask.shape), mask)


def test_a_hole_stays_a_hole():
    mask = np.zeros((9, 9), bool)
    mask[1:8, 1:8] = True
    mask[3:6, 3:6] = False
    polygons = mask_to_polygons(mask)
    assert len(polygons) == 1
    np.testing.assert_array_equal(decode(polygons, mask.shape), mask)


def test_an_island_in_a_hole_is_kept():
    mask = np.zeros((9, 9), bool)
    mask[0:9, 0:9] = True
    mask[2:7, 2:7] = False
    mask[4, 4] = True
    np.testing.assert_array_equal(decode(mask_to_polygons(mask), mask.shape), mask)


def test_a_single_pixel_gives_a_valid_polygon():
    mask = np.zeros((5, 5), bool)
    mask[4, 0] = True
    polygons = mask_to_polygons(mask)
    assert len(polygons) == 1
    assert len(polygons[0]) >= 6
    np.testing.assert_array_equal(decode(polygons, mask.shape), mask)


def test_polygons_survive_a_horizontal_flip():
    rng = np.random.default_rng(1)
    mask = rng.random((16, 20)) < 0.6
    flipped = []
    for polygon in mask_to_polygons(mask):
        points = np.array(polygon).reshape(-1, 2)
        points[:, 0] = mask.shape[1] - points[:, 0]
        flipped.append(points.reshape(-1).tolist())
    np.testing.assert_array_equal(decode(flipped, mask.shape), mask[:, ::-1])


def test_an_empty_mask_has_no_polygon():
    assert mask_to_polygons(np.zeros((4, 4), bool)) == []
