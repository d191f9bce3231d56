"""Whether a model gets the pixels it was trained on: conventions, and the same images otherwise."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kd_det.bench.workbench import PixelInput
from kd_det.hosts.torchvision_detection.config import load_config
from kd_det.hosts.torchvision_detection.models import build_model
from kd_det.preflight.answers import Answer, agreed, confusion, truth_confidence
from kd_det.preflight.inputs import CONVENTIONS, alternatives, find_better, oddities, under_input
from tests.preflight import squares

RGB = PixelInput("RGB", (123.675, 116.28, 103.53), (58.395, 57.12, 57.375), 255, 32)
BGR = PixelInput("BGR", (103.53, 116.28, 123.675), (1.0, 1.0, 1.0), 255, 32)
FLOATS = PixelInput("RGB", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 1, 32)
HALF = PixelInput("RGB", (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), 1, 32)


@pytest.mark.parametrize("pixels", [RGB, BGR, FLOATS, HALF], ids=lambda p: f"{p.order} {p.scale}")
def test_conventions_that_fit_are_not_odd(pixels):
    assert oddities(pixels) == []


@pytest.mark.parametrize(
    ("pixels", "says"),
    [
        (replace(RGB, order="BGR"), ["ImageNet's in the order RGB", "images are BGR"]),
        (replace(BGR, order="RGB"), ["ImageNet's in the order BGR", "images are RGB"]),
        (replace(FLOATS, mean=FLOATS.mean[::-1]), ["ImageNet's in the order BGR"]),
        (replace(RGB, mean=FLOATS.mean), ["pixels in 0..1"]),
        (replace(FLOATS, mean=RGB.mean), ["pixels in 0..255"]),
        (replace(RGB, std=(1.0, 0.0, 1.0)), ["not positive"]),
    ],
)
def test_an_input_that_contradicts_itself_is_odd(pixels, says):
    (found,) = oddities(pixels)
    for part in says:
        assert part in found


def test_alternatives_are_distinct_and_never_the_configured_input():
    for own in (RGB, BGR, FLOATS, HALF):
        found = alternatives(own, own)
        assert next(iter(found)).startswith("BGR" if own.order == "RGB" else "RGB")
        assert own not in found.values()
        assert len(set(found.values())) == len(found)
        # Of the four conventions, the model's own is not tried again.
        assert len(found) == len(CONVENTIONS) + (1 if own is HALF else 0)


@pytest.mark.parametrize("order", ["RGB", "BGR"])
def test_a_model_that_sees_otherwise_is_the_model_configured_otherwise(order, tmp_path):
    content = squares.model_config({}, tmp_path)
    model = build_model(load_config(str(squares.write_yaml(tmp_path / "c.yaml", content)))).eval()
    other = replace(FLOATS, order=order)
    # 60 rows: padded to 64, and padding must stay what it is.
    image = torch.rand(3, 60, 64)
    entered = []
    handle = model.backbone.body.register_forward_pre_hook(lambda m, args: entered.append(args[0]))
    with torch.no_grad(), under_input(model, HALF, other):
        model([image])
    handle.remove()
    model.transform.image_mean, model.transform.image_std = list(other.mean), list(other.std)
    expected, _ = model.transform([image if order == "RGB" else image.flip(0)])
    torch.testing.assert_close(entered[0], expected.tensors, rtol=1e-4, atol=1e-5)
    assert expected.tensors.shape[-2] == 64
    with torch.no_grad():
        model([image])
    assert len(entered) == 1


def answers_with(confidence, classes):
    pairs = zip(classes, map(torch.tensor, confidence), strict=True)
    return [Answer(torch.tensor([k]), values[None], values) for k, values in pairs]


OWN = answers_with([[0.3, 0.3, 0.4]] * 8, [0, 1, 2, 0, 1, 2, 0, 1])


def test_an_input_that_is_better_on_every_image_is_found_and_the_best_of_several():
    good = answers_with([[0.8 if k == c else 0.1 for k in range(3)] for c in (0, 1, 2) * 3][:8],
                        [0, 1, 2, 0, 1, 2, 0, 1])  # fmt: skip
    others = {"same": (RGB, OWN), "other": (BGR, good)}
    better = find_better(OWN, others, [0, 1, 2])
    assert better is not None
    assert (better.what, better.clear) == ("other", True)
    assert better.own == pytest.approx((3 * 0.3 + 3 * 0.3 + 2 * 0.4) / 8)
    assert better.other == pytest.approx(0.8)


def test_a_gain_within_its_own_spread_is_none():
    gains = [0.5, -0.4, 0.4, -0.35, 0.45, -0.3, 0.3, -0.2]
    confidence = [list(answer.confidence[0]) for answer in OWN]
    for row, answer, gain in zip(confidence, OWN, gains, strict=True):
        row[int(answer.classes)] += gain
    noisy = answers_with([[float(v) for v in row] for row in confidence], [0, 1, 2, 0, 1, 2, 0, 1])
    assert sum(gains) / 8 >= 0.03
    assert find_better(OWN, {"other": (BGR, noisy)}, [0, 1, 2]) is None


def test_classes_in_another_order_are_no_matter_of_the_input():
    """A third right under another input is less than all right under another order of classes."""
    classes = [0, 1, 2, 0, 1, 2]
    shifted = answers_with([[0.9 * ((k + 1) % 3 == j) for j in range(3)] for k in classes], classes)
    swapped = answers_with([[0.9 * (2 - k == j) for j in range(3)] for k in classes], classes)
    assert find_better(shifted, {"other": (BGR, swapped)}, [0, 1, 2]) is None
    assert agreed(shifted, [0, 1, 2]) == [1, 2, 0]
    assert truth_confidence(shifted, [1, 2, 0]).mean() == pytest.approx(0.9)
    assert confusion(shifted, 0.3).tolist() == [[0, 2, 0], [0, 0, 2], [2, 0, 0]]
    assert confusion(shifted, 0.95).sum() == 0


def test_a_class_that_the_teacher_lacks_counts_as_not_known():
    answers = answers_with([[0.9, 0.0], [0.9, 0.0]], [0, 1])
    assert truth_confidence(answers, [0, -1]).tolist() == pytest.approx([0.9, 0.0])
