"""Logits: which RoIs are shown, whose probabilities, under which names."""

from __future__ import annotations

import pytest
import torch
from matplotlib.patches import Rectangle

from kd_det.losses.kd import kd_loss
from kd_det.visualize.canvas import to_pixels
from kd_det.visualize.logits import ROIS, Head, class_grid, disputed_rois, head_labels, roi_grid


def random_boxes(count, generator):
    corner = torch.rand(count, 2, generator=generator) * 20
    return torch.cat([corner, corner + 2 + torch.rand(count, 2, generator=generator) * 8], dim=1)


def bars(axes):
    """Lengths of the bars, the student's before the teacher's."""
    return [[bar.get_width() for bar in side] for side in axes.containers]


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_divergences_are_the_rows_of_the_loss(randn, activation):
    student, teacher = randn(7, 4), randn(7, 4)
    head = Head("abcd", temperature=2.0, activation=activation)
    whole = kd_loss(student, teacher, 2.0, "batchmean", activation)
    assert head.divergences(student, teacher).mean().item() == pytest.approx(whole.item())


def test_names_follow_the_place_of_the_background():
    assert head_labels(["cat", "dog"], 3, "first") == ["background", "cat", "dog"]
    assert head_labels(["cat", "dog"], 3, "last") == ["cat", "dog", "background"]
    assert head_labels(["cat", "dog"], 2, "last") == ["cat", "dog"]
    assert head_labels(None, 3, "last") == ["0", "1", "2"]
    assert head_labels(["cat", "dog"], 5, "last") == ["0", "1", "2", "3", "4"]


def test_the_most_disputed_rois_are_chosen_none_twice(generator):
    boxes = random_boxes(40, generator)
    divergences = torch.rand(40, generator=generator)
    boxes[7] = boxes[3]
    divergences[[3, 7]] = torch.tensor([9.0, 8.0])
    chosen = disputed_rois(boxes, divergences).tolist()
    assert chosen[0] == 3
    assert 7 not in chosen
    assert len(chosen) == ROIS
    values = [divergences[i].item() for i in chosen]
    assert values == sorted(values, reverse=True)


def test_rois_are_drawn_with_the_top_probability_of_each_side(pictures, randn, generator):
    counts = [5, 3]
    boxes = [random_boxes(n, generator) for n in counts]
    student, teacher = randn(8, 4), randn(8, 4)
    head = Head(["background", "a", "b", "c"])
    figure = roi_grid(pictures((32, 48), (32, 48)), boxes, student, teacher, head, "soft")
    first = 0
    for k, count in enumerate(counts):
        image, chart = figure.axes[2 * k : 2 * k + 2]
        s, t = student[first : first + count], teacher[first : first + count]
        chosen = disputed_rois(boxes[k], head.divergences(s, t))
        drawn = [p for p in image.patches if isinstance(p, Rectangle)]
        corners = [[*p.get_xy(), p.get_width(), p.get_height()] for p in drawn]
        expected = boxes[k][chosen].clone()
        expected[:, 2:] -= expected[:, :2]
        torch.testing.assert_close(torch.tensor(corners).float(), expected)
        for lengths, side in zip(bars(chart), (s, t), strict=True):
            top = side[chosen].softmax(dim=1).amax(dim=1)
            assert lengths == pytest.approx(top.tolist())
        labels = {text.get_text() for text in chart.texts}
        best = t[chosen[0]].softmax(dim=0).max(dim=0)
        assert f"{head.labels[int(best.indices)]} ({float(best.values):.2f})" in labels
        assert image.get_xlabel() == f"{len(chosen)} of {count} RoIs"
        first += count


def test_an_image_without_rois_says_so(pictures):
    logits = torch.zeros(0, 4)
    figure = roi_grid(pictures(), [torch.zeros(0, 4)], logits, logits, Head("abcd"), "soft")
    assert "no RoIs" in [text.get_text() for axes in figure.axes for text in axes.texts]
    assert to_pixels(figure).float().std() > 0


def test_a_single_roi_is_drawn(pictures):
    boxes = [torch.tensor([[1.0, 2, 9, 9]])]
    figure = roi_grid(pictures(), boxes, torch.ones(1, 2), torch.ones(1, 2), Head("ab"), "soft")
    assert [len(side) for side in bars(figure.axes[1])] == [1, 1]


def test_classifiers_show_the_teachers_top_classes_at_the_terms_temperature(pictures, randn):
    student, teacher = randn(3, 12), randn(3, 12)
    head = Head([f"class {k}" for k in range(12)], temperature=4.0)
    truth = torch.tensor([3, 1, 0])
    figure = class_grid(pictures((8, 8), (8, 8)), student, teacher, head, "soft", truth)
    for k in range(2):
        image, chart = figure.axes[2 * k : 2 * k + 2]
        order = sorted(range(12), key=lambda i: -teacher[k, i].item())[:5]
        assert [label.get_text() for label in chart.get_yticklabels()] == [
            f"class {i}" for i in order
        ]
        for lengths, side in zip(bars(chart), (student, teacher), strict=True):
            powers = [(side[k, i] / 4).exp().item() for i in range(12)]
            assert lengths == pytest.approx([powers[i] / sum(powers) for i in order])
        assert image.get_xlabel() == f"true: class {truth[k]}"
    assert "temperature 4" in figure.get_suptitle()
