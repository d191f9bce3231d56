"""KCD's value of an image, recomputed one box and one anchor at a time."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

pytest.importorskip("detectron2")

from detectron2.modeling.meta_arch.dense_detector import permute_to_N_HWA_K
from detectron2.utils.events import EventStorage

from kd_det.hosts.detection.uncertainty import anchor_values, roi_values
from tests.hosts.detectron2.models import batch, build, distilled_cfg, write_teacher

pytestmark = pytest.mark.detectron2

LOOK = {"look": {"LOSS": "AT", "TAPS": ["p2"]}}


def entropy(row):
    p = np.exp(row - row.max())
    p /= p.sum()
    return -sum(x * math.log(x) for x in p)


def binary(row):
    p = 1 / (1 + np.exp(-row))
    return -sum(x * math.log(x) + (1 - x) * math.log(1 - x) for x in p)


def sides(labels, classes):
    """Positive anchors and background in Detectron2's labels."""
    return (labels >= 0) & (labels < classes), labels == classes


@pytest.mark.parametrize("mean_first", [False, True])
def test_a_roi_value_is_the_mean_entropy_of_an_images_rows(mean_first, randn):
    logits = randn(5, 4)
    rows = logits.numpy()
    expected = [
        np.mean([entropy(r) for r in rows[:2]]),
        0.0,
        np.mean([entropy(r) for r in rows[2:]]),
    ]
    found = roi_values([logits], [[2, 0, 3]], mean_first=mean_first)
    np.testing.assert_allclose(found, np.array(expected) / math.log(4))


def test_a_cascades_boxes_count_alike(randn):
    stages = [randn(3, 4), randn(2, 4)]
    first, second = (s.numpy() for s in stages)
    expected = [
        np.mean([entropy(first[0])]),
        np.mean([entropy(r) for r in (*first[1:], *second)]),
    ]
    found = roi_values(stages, [[1, 2], [0, 2]])
    np.testing.assert_allclose(found, np.array(expected) / math.log(4))


def test_a_sigmoid_head_has_no_background_column(randn):
    logits = randn(3, 4)
    expected = np.mean([binary(r[:3]) for r in logits.numpy()]) / (3 * math.log(2))
    assert roi_values([logits[:, :3]], [[3]], sigmoid=True).item() == pytest.approx(expected)


@pytest.mark.parametrize("sigmoid", [False, True])
def test_knowing_nothing_is_one_and_certainty_is_zero(sigmoid):
    certain = torch.full((2, 5), -1e4)
    certain[:, 1] = 1e4
    assert roi_values([torch.zeros(2, 5)], [[2]], sigmoid).item() == pytest.approx(1)
    assert roi_values([certain], [[2]], sigmoid).item() == 0


def test_anchors_that_matter_are_positive_or_the_highest_background(randn):
    classes, negatives = 3, 2
    logits = randn(2, 6, classes)
    labels = torch.tensor([[3, 0, -1, 3, 3, 2], [3, -1, -1, -1, -1, -1]])
    expected = []
    for rows, own in zip(logits.numpy(), labels.tolist(), strict=True):
        background = [a for a in range(6) if own[a] == classes]
        background.sort(key=lambda a: -rows[a].max())
        chosen = [a for a in range(6) if 0 <= own[a] < classes] + background[:negatives]
        expected.append(np.mean([binary(rows[a]) for a in chosen]) / (classes * math.log(2)))
    values = anchor_values(logits, *sides(labels, classes), negatives)
    np.testing.assert_allclose(values, expected)


def test_an_image_of_ignored_anchors_has_the_value_zero(randn):
    assert anchor_values(randn(1, 4, 3), *sides(torch.full((1, 4), -1), 3), 2).tolist() == [0]


def test_values_carry_no_gradient(randn):
    assert not roi_values([randn(2, 4, grad=True)], [[2]]).requires_grad
    labels = torch.zeros(1, 4, dtype=torch.long)
    assert not anchor_values(randn(1, 4, 3, grad=True), *sides(labels, 3), 2).requires_grad


@pytest.mark.parametrize("name", ["faster", "cascade"])
def test_a_training_step_leaves_the_value_of_each_image(name, tmp_path):
    cfg = distilled_cfg(name, write_teacher(tmp_path, name), LOOK)
    cfg.KD.KCD.ENABLED = True
    model = build(cfg)
    rows, counts = [], []
    heads = model.roi_heads
    stages = heads.box_predictor if name == "cascade" else [heads.box_predictor]
    for predictor in stages:
        predictor.register_forward_hook(lambda m, args, out: rows.append(out[0].detach().numpy()))
    heads.box_pooler.register_forward_pre_hook(
        lambda module, args: counts.append([len(b) for b in args[1]])
    )
    with EventStorage():
        losses = model(batch())
    assert losses.keys() - LOOK.keys()
    entropies = [[], []]
    for stage, (n, m) in zip(rows, counts, strict=True):
        assert len(stage) == n + m
        entropies[0] += [entropy(r.astype(np.float64)) for r in stage[:n]]
        entropies[1] += [entropy(r.astype(np.float64)) for r in stage[n:]]
    expected = [np.mean(values) / math.log(11) for values in entropies]
    np.testing.assert_allclose(model.image_values, expected, rtol=1e-5)


@pytest.mark.parametrize("name", ["retinanet", "fcos"])
def test_dense_detectors_use_the_labels_of_their_own_loss(name, tmp_path):
    cfg = distilled_cfg(name, write_teacher(tmp_path, name), LOOK)
    cfg.KD.KCD.ENABLED = True
    model = build(cfg)
    model.max_detections_per_image = 3
    levels, found = [], []
    model.head.register_forward_hook(lambda module, args, out: levels.extend(out[0]))
    losses = type(model).losses

    def listen(anchors, logits, labels, *rest):
        found.append(torch.stack(labels))
        return losses(model, anchors, logits, labels, *rest)

    model.losses = listen
    with EventStorage():
        model(batch())
    rows = torch.cat([permute_to_N_HWA_K(x, 10) for x in levels], dim=1)
    assert ((found[0] >= 0) & (found[0] < 10)).any()
    expected = anchor_values(rows, *sides(found[0], 10), 3)
    assert torch.equal(model.image_values, expected)
    assert ((expected > 0) & (expected <= 1)).all()


def test_without_kcd_nothing_is_measured(tmp_path):
    model = build(distilled_cfg("faster", write_teacher(tmp_path, "faster"), LOOK))
    with EventStorage():
        model(batch())
    assert model.image_values is None
