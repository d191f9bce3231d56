"""UNIX: who is uncertain, who is mixed with whom, and what that saves."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from kd_det.procedures.unix import (
    UnixMixup,
    mix,
    mixup_weights,
    uncertainty,
    unix_cost,
    unix_task_loss,
)


def probabilities(row):
    exponentials = [math.exp(value - max(row)) for value in row]
    return [e / sum(exponentials) for e in exponentials]


def slow_score(row, strategy):
    p = sorted(probabilities(row), reverse=True)
    if strategy == "entropy":
        return -sum(q * math.log(q) for q in p if q > 0)
    return 1 - p[0] if strategy == "confidence" else p[1] - p[0]


STRATEGIES = ["entropy", "confidence", "margin"]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("shape", [(7, 5), (1, 2)])
def test_scores_match_slow_loop(randn, strategy, shape):
    logits = 2 * randn(*shape)
    expected = [slow_score(row, strategy) for row in logits.tolist()]
    assert uncertainty(logits, strategy).tolist() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_saturated_logits_are_the_most_certain(strategy):
    logits = torch.tensor([[0.0, 800.0, 0.0], [0.0, 0.0, 0.0], [0.0, 3.0, 0.0]])
    scores = uncertainty(logits, strategy)
    assert torch.isfinite(scores).all()
    assert scores.sort(descending=True).indices.tolist() == [1, 2, 0]
    assert scores[0] == (-1 if strategy == "margin" else 0)


@pytest.mark.parametrize("strategy", [*STRATEGIES, "random"])
def test_scores_are_computed_in_float32_without_a_gradient(randn, half, strategy):
    logits = randn(4, 3, dtype=torch.float32).to(half).requires_grad_()
    scores = uncertainty(logits, strategy)
    assert scores.dtype == torch.float32
    assert not scores.requires_grad
    if strategy != "random":
        assert torch.equal(scores, uncertainty(logits.float(), strategy))


@pytest.mark.parametrize(("batch", "b", "slope"), [(64, 32, 10.0), (7, 2, 3.5), (1, 1, 10.0)])
@pytest.mark.parametrize("nominal", [None, 16])
def test_weights_match_slow_loop(batch, b, slope, nominal):
    size = nominal or batch
    middle = (2 * b - 1) / (2 * size)
    expected = [1 / (1 + math.exp(-slope * (i / size - middle))) for i in range(batch)]
    weights = mixup_weights(batch, b, slope, nominal)
    assert weights.tolist() == pytest.approx(expected, rel=1e-12)


def test_a_steep_slope_is_a_step_after_b_images():
    assert mixup_weights(12, 6, 1e6).tolist() == [0.0] * 6 + [1.0] * 6


def raw_batch(randn, size=16, classes=5):
    """Targets are the rows themselves, so that they tell who was mixed with whom."""
    return randn(size, 3, 4, 4), torch.arange(size), 2 * randn(size, classes)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_batch_is_mixed_as_a_slow_loop_mixes_it(randn, strategy):
    images, targets, logits = raw_batch(randn)
    mixed = UnixMixup(strategy=strategy)(images, targets, logits)
    scores = [slow_score(row, strategy) for row in logits.tolist()]
    order = sorted(range(16), key=lambda i: (-scores[i], i))
    assert mixed.target_a.tolist() == order[:12]
    partners = mixed.target_b.tolist()
    assert len(set(partners)) == 12  # from a permutation
    strength = mixed.mu[0].item() * (1 + math.exp(10 * 7.5 / 16))
    assert 0 < strength < 1
    for i in range(12):
        mu = strength / (1 + math.exp(-10 * (i / 16 - 7.5 / 16)))
        assert mixed.mu[i].item() == pytest.approx(mu, rel=1e-9)
        expected = (1 - mu) * images[order[i]] + mu * images[partners[i]]
        torch.testing.assert_close(mixed.images[i], expected)


def test_equal_scores_keep_the_order_of_the_batch(randn):
    images, targets, _ = raw_batch(randn)
    logits = torch.zeros(16, 5)
    logits[3, 0] = 50.0
    mixed = UnixMixup(k_frac=1.0)(images, targets, logits)
    assert mixed.target_a.tolist() == [*range(3), *range(4, 16), 3]


def test_random_strategy_ignores_the_logits(randn):
    images, targets, logits = raw_batch(randn)
    batches = [UnixMixup(strategy="random")(images, targets, z) for z in (logits, -logits)]
    assert torch.equal(batches[0].target_a, batches[1].target_a)
    assert batches[0].target_a.tolist() != sorted(batches[0].target_a.tolist())


def test_strengths_are_uniform_and_partners_change(randn):
    images, targets, logits = raw_batch(randn, 2, 2)
    transform = UnixMixup(k_frac=1.0, b_frac=0.5, slope=0.0)  # every weight is one half
    drawn = [transform(images[:, :1, :1, :1], targets, logits) for _ in range(500)]
    strengths = torch.tensor([2 * float(m.mu[0]) for m in drawn])
    quartiles = torch.histc(strengths, bins=4, min=0, max=1) / 500
    assert (quartiles - 0.25).abs().max() < 0.08
    swapped = sum(m.target_b.tolist() == [1, 0] for m in drawn) / 500
    assert swapped == pytest.approx(0.5, abs=0.08)


def test_a_resumed_transform_draws_what_would_have_come(randn):
    images, targets, logits = raw_batch(randn)
    whole, first, second = (UnixMixup(strategy="random", seed=s) for s in (4, 4, 9))
    batches = [whole(images, targets, logits) for _ in range(5)]
    for _ in range(3):
        first(images, targets, logits)
    second.load_state_dict(first.state_dict())
    for expected in batches[3:]:
        for a, b in zip(second(images, targets, logits), expected, strict=True):
            assert torch.equal(a, b)
    assert second.state_dict() == whole.state_dict()


def test_ranks_and_seeds_draw_differently(randn):
    images, targets, logits = raw_batch(randn)
    transforms = [UnixMixup(seed=s, rank=r) for s in range(3) for r in range(3)]
    strengths = {t(images, targets, logits).mu[0].item() for t in transforms}
    assert len(strengths) == 9


@pytest.mark.parametrize(("size", "k"), [(64, 48), (10, 8), (3, 2), (1, 1), (0, 0)])
def test_a_short_batch_is_reduced_by_the_same_part(randn, size, k):
    transform = UnixMixup()
    mixed = transform(*raw_batch(randn, size))
    assert [len(part) for part in mixed] == [k] * 4
    assert torch.isfinite(mixed.images).all()
    assert (transform.scored, transform.trained) == (size, k)


def test_the_released_code_hardly_mixes_a_short_batch(randn):
    transform = UnixMixup(nominal=(12, 8, 16))
    full, short = transform(*raw_batch(randn, 16)), transform(*raw_batch(randn, 5))
    assert (len(full.mu), len(short.mu)) == (12, 5)
    assert short.mu.max() < mixup_weights(5, 8, 10.0, 16).max() < 0.11


README = [  # F_t / F_s and the computation that the released code's README prints, in percent
    (3.25, 94.06),
    (38.17, 77.49),
    (174.0, 75.57),
    (13.56, 81.43),
    (27.16, 78.43),
    (23.49, 78.92),
    (8.22, 84.79),
]


@pytest.mark.parametrize(("ratio", "percent"), README)
def test_cost_is_the_published_one(ratio, percent):
    assert 100 * unix_cost(ratio, 48 / 64) == pytest.approx(percent, abs=0.02)


@pytest.mark.parametrize("backward", [1.0, 2.0])
def test_cost_is_the_count_of_passes(backward):
    batch, k, teacher = 64, 40, 3.25
    plain = batch * (teacher + 1 + backward)
    unix = k * teacher + batch + k * (1 + backward)
    assert unix_cost(teacher, k / batch, backward) == pytest.approx(unix / plain)
    # Scoring is not free: training on everything costs more than plain distillation.
    assert unix_cost(1.0, 1.0) > 1


def test_measured_cost_counts_images(randn):
    transform = UnixMixup()
    for size in (64, 64, 3):
        transform(*raw_batch(randn, size))
    share = (48 + 48 + 2) / (64 + 64 + 3)
    assert (transform.scored, transform.trained) == (131, 98)
    assert transform.measured_cost(3.25) == unix_cost(3.25, share) != unix_cost(3.25, 0.75)


def test_task_loss_is_cross_entropy_with_both_labels(randn):
    logits, mu = randn(6, 4), torch.rand(6, dtype=torch.float64)
    a, b = torch.tensor([0, 1, 2, 3, 0, 1]), torch.tensor([3, 1, 0, 2, 1, 0])
    expected = 0.0
    for i, row in enumerate(logits.tolist()):
        p, share = probabilities(row), mu[i].item()
        expected -= (1 - share) * math.log(p[a[i]]) + share * math.log(p[b[i]])
    assert unix_task_loss(logits, a, b, mu).item() == pytest.approx(expected / 6, rel=1e-12)
    unmixed = unix_task_loss(logits, a, b, torch.zeros(6))
    torch.testing.assert_close(unmixed, F.cross_entropy(logits, a))


def test_task_loss_gradcheck(randn):
    logits, mu = randn(3, 4, grad=True), torch.rand(3, dtype=torch.float64)
    a, b = torch.tensor([0, 1, 2]), torch.tensor([3, 1, 0])
    assert torch.autograd.gradcheck(lambda z: unix_task_loss(z, a, b, mu), logits)


def test_task_loss_is_computed_in_float32(randn, half):
    logits, mu = randn(3, 4, dtype=torch.float32).to(half), torch.rand(3)
    a, b = torch.tensor([0, 1, 2]), torch.tensor([3, 1, 0])
    loss = unix_task_loss(logits, a, b, mu)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, unix_task_loss(logits.float(), a, b, mu))


def test_empty_task_loss_stays_in_graph(randn):
    logits, none = randn(0, 4, grad=True), torch.zeros(0, dtype=torch.int64)
    loss = unix_task_loss(logits, none, none, torch.zeros(0))
    loss.backward()
    assert loss.item() == 0.0
    assert logits.grad is not None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k_frac": 0.0}, "k_frac, a part of the batch, in (0, 1]; received 0.0"),
        ({"b_frac": 1.5}, "b_frac, a part of the batch, in (0, 1]; received 1.5"),
        ({"strategy": "entropi"}, "did you mean 'entropy'"),
        ({"nominal": (65, 32, 64)}, "received (65, 32, 64)"),
        ({"nominal": (48, 0, 64)}, "received (48, 0, 64)"),
    ],
)
def test_bad_arguments_are_refused(refuses, arguments, message):
    with refuses(message):
        UnixMixup(**arguments)


def test_bad_batches_are_refused(refuses, randn):
    images, targets, logits = raw_batch(randn)
    with refuses("16 images, 16 targets, 15 rows of logits"):
        UnixMixup()(images, targets, logits[1:])
    with refuses("floating images", "torch.uint8"):
        UnixMixup()(images.to(torch.uint8), targets, logits)
    with refuses("at least two classes", "(16, 1)"):
        UnixMixup()(images, targets, logits[:, :1])
    with refuses("did you mean 'margin'"):
        uncertainty(logits, "margins")


def test_mixing_any_shape_takes_rows_by_order_and_partner(randn):
    rows = randn(4, 3)
    mixed = mix(rows, rows, torch.tensor([2, 0, 1, 3]), torch.tensor([3, 3, 0, 1]), torch.ones(2))
    assert torch.equal(mixed.images, rows[[3, 3]])
    assert torch.equal(mixed.target_a, rows[[2, 0]])
