"""Maps: the numbers that are drawn, where they lie, and one scale for both sides."""

from __future__ import annotations

import math

import pytest
import torch

from kd_det.losses.fgfi import fgfi_mask
from kd_det.visualize.canvas import common_scale, to_pixels
from kd_det.visualize.maps import attention_grid, feature_grid, mask_grid


def scale(axes):
    norm = axes.images[-1].norm
    return norm.vmin, norm.vmax


def test_features_are_mean_magnitudes_by_a_slow_loop(pictures, rows, cells, randn):
    student, teacher = randn(2, 5, 4, 6), randn(2, 3, 8, 12)
    grid = rows(feature_grid(pictures((32, 48), (32, 48)), student, teacher, "p3"))
    for n in range(2):
        for axes, side in zip(grid[n][1:], (student, teacher), strict=True):
            shown = cells(axes)
            for y in range(side.shape[2]):
                for x in range(side.shape[3]):
                    values = [abs(side[n, c, y, x].item()) for c in range(side.shape[1])]
                    assert shown[y, x].item() == pytest.approx(sum(values) / len(values))


def test_student_and_teacher_have_one_scale_over_all_images(pictures, rows, randn):
    batch = pictures((32, 48), (32, 48), (32, 48))
    student, teacher = randn(3, 4, 4, 6), 100 * randn(3, 4, 4, 6)
    for figure, sides in (
        (feature_grid(batch, student, teacher, "p3"), slice(1, 3)),
        (attention_grid(batch, student, teacher, "p3"), slice(1, 3)),
        (attention_grid(batch, student, teacher, "p3"), slice(3, 4)),
    ):
        scales = {scale(axes) for row in rows(figure) for axes in row[sides]}
        assert len(scales) == 1


def test_a_scale_begins_at_zero_or_surrounds_its_middle():
    values = torch.tensor([-3.0, 1.0, 2.0])
    assert (common_scale(values).vmin, common_scale(values).vmax) == (0, 3)
    around = common_scale(values, around=1)
    assert (around.vmin, around.vmax) == (1 - 4, 1 + 4)
    odd = common_scale(torch.tensor([math.nan, math.inf, 5.0]), torch.zeros(0))
    assert (odd.vmin, odd.vmax) == (0, 5)


def test_a_single_cell_does_not_darken_the_others():
    values = torch.ones(1000)
    values[0] = 1e6
    assert common_scale(values).vmax == 1


def test_attention_equals_a_slow_loop(pictures, rows, cells, randn):
    student, teacher = randn(1, 3, 4, 6), randn(1, 2, 8, 12)
    (row,) = rows(attention_grid(pictures(), student, teacher, "p3"))
    shown = [cells(axes) for axes in row[1:]]
    expected = []
    for side, factor in ((student, 1), (teacher, 2)):
        energy = torch.zeros(4, 6, dtype=torch.float64)
        for y in range(4):
            for x in range(6):
                for channel in side[0]:
                    # The teacher's map is pooled to the student's size first, as AT does.
                    window = channel[y * factor : (y + 1) * factor, x * factor : (x + 1) * factor]
                    energy[y, x] += window.mean() ** 2 / side.shape[1]
        expected.append(energy / math.sqrt(sum(v.item() ** 2 for v in energy.flatten())))
    expected.append(expected[1] - expected[0])
    for drawn, values in zip(shown, expected, strict=True):
        torch.testing.assert_close(drawn, values)


def test_cells_lie_on_the_pixels_they_stand_for_and_padding_is_cut_off(pictures, rows, randn):
    batch = pictures((30, 41), padded=(32, 48))
    # 50 pixels would need a seventh cell of stride 8 that stands over the edge.
    ((_, student, teacher),) = rows(feature_grid(batch, randn(1, 2, 4, 6), randn(1, 2, 2, 3), "p"))
    for axes in (student, teacher):
        assert axes.images[-1].get_extent() == [0, 48, 32, 0]
        assert axes.get_xlim() == (0, 41)
        assert axes.get_ylim() == (30, 0)
    over = pictures((50, 50), padded=(50, 50))
    ((_, axes, _),) = rows(feature_grid(over, randn(1, 2, 7, 7), randn(1, 2, 7, 7), "p"))
    assert axes.images[-1].get_extent() == [0, 56, 56, 0]


def test_the_mask_shows_exactly_the_cells_of_fgfi(pictures, rows, cells):
    sizes = {"p2": (8, 12), "p3": (4, 6)}
    anchors = []
    for (h, w), side in zip(sizes.values(), (8.0, 20.0), strict=True):
        stride = 32 / h
        y, x = torch.meshgrid(
            (torch.arange(h) + 0.5) * stride, (torch.arange(w) + 0.5) * stride, indexing="ij"
        )
        centre = torch.stack([x, y, x, y], dim=-1).view(-1, 4)
        anchors.append(centre + side / 2 * torch.tensor([-1.0, -1, 1, 1]))
    boxes = [torch.tensor([[3.0, 4, 13, 12], [20, 8, 40, 30]]), torch.zeros(0, 4)]
    masks = fgfi_mask(anchors, boxes, list(sizes.values()), assign="anchor")
    assert all(0 < mask[0].sum() < mask[0].numel() for mask in masks)
    figure = mask_grid(
        pictures((32, 48), (32, 48)), dict(zip(sizes, masks, strict=True)), boxes, "imitation"
    )
    for n, row in enumerate(rows(figure)):
        assert all(len(axes.patches) == len(boxes[n]) for axes in row)
        for axes, mask in zip(row[1:], masks, strict=True):
            opaque = cells(axes)[..., 3] > 0
            assert torch.equal(opaque, mask[n])
            assert axes.get_xlabel() == f"{int(mask[n].sum())} cells"
            assert axes.images[-1].get_extent() == [0, 48, 32, 0]


def test_half_precision_and_many_channels_are_drawn(pictures, half, generator):
    x = torch.full((1, 300, 2, 3), 300.0).to(half)  # its square has no place in float16
    attention = attention_grid(pictures(), x, x, "p5")
    image = to_pixels(attention)
    assert image.dtype == torch.uint8
    assert image.shape[0] == 3
    assert image.float().std() > 0
