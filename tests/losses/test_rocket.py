"""Rocket: the hint between a light net and its booster."""

from __future__ import annotations

import pytest
import torch

from kd_det.losses import RocketLoss, TapSpec, rocket_hint

BLOCKS = [True, False]


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize(("samples", "classes"), [(5, 3), (1, 7), (4, 1)])
def test_matches_slow_loop(randn, samples, classes, block):
    light, booster = 3 * randn(samples, classes), 3 * randn(samples, classes)
    expected = sum(
        (a - b) ** 2
        for row_l, row_b in zip(light.tolist(), booster.tolist(), strict=True)
        for a, b in zip(row_l, row_b, strict=True)
    )
    value = rocket_hint(light, booster, block).item()
    assert value == pytest.approx(expected / samples, rel=1e-12)


def test_zero_when_equal(randn):
    logits = randn(5, 3)
    assert rocket_hint(logits, logits).item() == 0.0


def test_a_partial_batch_counts_as_much_per_sample_as_a_full_one(randn):
    light, booster = randn(8, 5), randn(8, 5)
    light[3:6], booster[3:6], light[6:], booster[6:] = light[:3], booster[:3], 0, 0
    full = rocket_hint(light[:6], booster[:6])
    torch.testing.assert_close(rocket_hint(light[:3], booster[:3]), full)


def test_the_mean_is_over_classes_too(randn, refuses):
    light, booster = randn(4, 5), randn(4, 5)
    expected = rocket_hint(light, booster) / 5
    torch.testing.assert_close(rocket_hint(light, booster, reduction="mean"), expected)
    torch.testing.assert_close(RocketLoss(reduction="mean")([light], [booster]), expected)
    with refuses("'sum'"):
        RocketLoss(reduction="sum")


def test_the_hint_compares_logits_not_probabilities(randn):
    light = randn(4, 6)
    # A shift leaves the probabilities as they are.
    torch.testing.assert_close(rocket_hint(light, light + 0.5), torch.tensor(6 * 0.25).double())


def test_gradcheck(randn):
    light, booster = randn(4, 3, grad=True), randn(4, 3, grad=True)
    assert torch.autograd.gradcheck(lambda a: rocket_hint(a, booster), light)
    assert torch.autograd.gradcheck(lambda a, b: rocket_hint(a, b, block=False), (light, booster))


def test_gradient_is_twice_the_difference_over_the_batch(randn):
    light, booster = randn(6, 5, grad=True), randn(6, 5)
    rocket_hint(light, booster).backward()
    torch.testing.assert_close(light.grad, 2 * (light.detach() - booster) / 6)


def test_with_the_block_no_gradient_reaches_the_booster(randn):
    light, booster = randn(4, 3, grad=True), randn(4, 3, grad=True)
    RocketLoss()([light], [booster]).backward()
    assert light.grad is not None
    assert booster.grad is None


def test_without_the_block_the_booster_is_pulled_as_hard_as_the_light_net(randn):
    light, booster = randn(4, 3, grad=True), randn(4, 3, grad=True)
    RocketLoss(block=False)([light], [booster]).backward()
    assert light.grad.any()
    torch.testing.assert_close(booster.grad, -light.grad)


def test_the_block_leaves_shared_layers_their_gradient_through_the_light_path(randn):
    shared, light_head, booster_head = randn(5, 4, grad=True), randn(4, 3), randn(4, 3)
    x = randn(6, 5)
    blocked = rocket_hint(x @ shared @ light_head, x @ shared @ booster_head)
    (gradient,) = torch.autograd.grad(blocked, shared)
    difference = (x @ shared @ (light_head - booster_head)).detach()
    torch.testing.assert_close(gradient, 2 / 6 * x.t() @ difference @ light_head.t())


def test_several_pairs_are_averaged(randn):
    lights, boosters = [randn(5, 3), randn(2, 3)], [randn(5, 3), randn(2, 3)]
    pairs = [rocket_hint(s, t) for s, t in zip(lights, boosters, strict=True)]
    torch.testing.assert_close(RocketLoss()(lights, boosters), sum(pairs) / 2)


@pytest.mark.parametrize("block", BLOCKS)
def test_empty_stays_in_graph(randn, block):
    light, booster = randn(0, 6, grad=True), randn(0, 6, grad=True)
    loss = RocketLoss(block)([light], [booster])
    assert loss.item() == 0.0
    loss.backward()
    assert light.grad is not None
    assert (booster.grad is None) == block


def test_shape_error_names_both_shapes(randn, refuses):
    with refuses("student (4, 3), teacher (4, 5)"):
        rocket_hint(randn(4, 3), randn(4, 5))
    # One row would be broadcast over the batch in silence.
    with refuses("student (4, 3), teacher (1, 3)"):
        RocketLoss()([randn(4, 3)], [randn(1, 3)])


@pytest.mark.parametrize("block", BLOCKS)
def test_half_precision_is_computed_in_float32(half, block):
    # 300 squared exceeds what float16 can hold.
    light = torch.full((4, 3), 300.0, dtype=half).requires_grad_()
    booster = torch.zeros(4, 3, dtype=half, requires_grad=not block)
    loss = rocket_hint(light, booster, block)
    assert loss.dtype == torch.float32
    assert loss.item() == 270000.0
    loss.backward()
    assert light.grad.dtype == half


def test_autocast_changes_nothing(randn):
    light, booster = randn(4, 3).float(), randn(4, 3).float()
    expected = rocket_hint(light, booster)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(rocket_hint(light, booster), expected)


def test_float64_passes_through(randn):
    assert rocket_hint(randn(4, 3), randn(4, 3)).dtype == torch.float64


def test_non_contiguous_input_gives_the_same_loss(randn):
    light, booster = randn(3, 5).t(), randn(10, 6)[::2, ::2]
    assert not light.is_contiguous()
    expected = rocket_hint(light.contiguous(), booster.contiguous())
    torch.testing.assert_close(rocket_hint(light, booster), expected)


def test_lists_of_different_length_are_refused(randn, refuses):
    with refuses("received 2 student and 1 teacher tensors"):
        RocketLoss()([randn(4, 3), randn(4, 3)], [randn(4, 3)])


def test_a_booster_of_other_classes_is_refused_when_built(refuses):
    with refuses("student 10 logits, teacher 100 logits"):
        RocketLoss.tap_arguments([TapSpec(10)], [TapSpec(100)], {})
    assert RocketLoss.tap_arguments([TapSpec(10)], [TapSpec(10)], {}) == {}
