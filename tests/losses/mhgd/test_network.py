"""MHGD's attention network: what it learns from the teacher, and that it is frozen then."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from kd_det.losses import MHGDLoss
from kd_det.losses.mhgd.loss import AttentionModule, head_drop
from kd_det.losses.mhgd.singular import teacher_vectors
from tests.losses.mhgd.cases import CHANNELS, build, pyramid, slow_similarity, slow_softmax, unit
from tests.slow import array


def slow_training(pair, front, back, kept):
    s = slow_similarity(pair, front, back, batch_statistics=True)
    value = front @ array(pair.w_value)
    mean, bn = value.mean(axis=0), pair.bn_value
    value = (value - mean) / np.sqrt(((value - mean) ** 2).mean(axis=0) + 1e-5)
    value = np.maximum(value * array(bn.weight) + array(bn.bias), 0)
    total = 0.0
    for i in range(len(front)):
        parts = []
        for h in range(pair.heads):
            row = slow_softmax(s[h, i]) * kept[h, i, 0]
            parts.append(sum(row[j] * value[j] for j in range(len(front))))
        rebuilt = np.concatenate(parts) @ array(pair.w_out) + array(pair.b_out)
        total += 1 - rebuilt @ back[i] / math.sqrt(rebuilt @ rebuilt)
    return total / len(front)


@pytest.mark.parametrize("heads", [1, 3])
def test_network_training_matches_slow_loop(randn, heads):
    pair = build(heads=heads).network.pairs[1]
    front, back = unit(randn(6, 4)), unit(randn(6, 6))
    kept = head_drop(heads, 6).double()
    expected = slow_training(pair, array(front), array(back), array(kept))
    assert pair.training_loss(front, back, kept).item() == pytest.approx(expected, rel=1e-11)


def test_pre_stage_sums_the_pairs_with_the_masks_of_the_step(randn):
    loss = build()
    loss.network.draws += 7
    teacher = pyramid(randn)
    generator = torch.Generator().manual_seed(7)
    vectors = [array(teacher_vectors(t)) for t in teacher]
    expected = 0.0
    for m, pair in enumerate(loss.network.pairs):
        kept = array(head_drop(3, 5, generator))
        expected += slow_training(pair, vectors[m], vectors[m + 1], kept)
    assert loss.pre_stage_loss(teacher).item() == pytest.approx(expected, rel=1e-11)
    assert int(loss.network.draws) == 8


def test_gradcheck_of_the_network_training(randn):
    front, back = unit(randn(5, 4)), unit(randn(5, 6))
    kept = head_drop(3, 5).double()
    pair = AttentionModule(4, 6, 3).double()
    names, parameters = zip(*pair.named_parameters(), strict=True)

    def training(*values):
        given = (front, back, kept)
        return torch.func.functional_call(_Training(pair), _prefixed(names, values), given)

    assert torch.autograd.gradcheck(training, parameters)


class _Training(nn.Module):
    def __init__(self, pair):
        super().__init__()
        self.pair = copy.deepcopy(pair)

    def forward(self, *given):
        return self.pair.training_loss(*given)


def _prefixed(names, values):
    return {f"pair.{name}": value for name, value in zip(names, values, strict=True)}


def test_head_drop_keeps_about_half_and_never_all_or_none():
    kept = head_drop(8, 1000, torch.Generator().manual_seed(0))
    assert kept.shape == (8, 1000, 1)
    assert set(kept.unique().tolist()) == {0.0, 1.0}
    per_row = kept.sum(dim=0)
    assert per_row.min() >= 1
    assert per_row.max() <= 7
    assert kept.mean().item() == pytest.approx(0.5, abs=0.02)


def test_a_single_head_is_never_dropped():
    assert head_drop(1, 5).tolist() == torch.ones(1, 5, 1).tolist()


def test_the_network_is_frozen_outside_its_own_training(randn):
    loss = build().train()
    before = copy.deepcopy(loss.state_dict())
    loss(pyramid(randn, grad=True), pyramid(randn)).backward()
    assert not any(module.training for module in loss.network.modules())
    assert not any(p.requires_grad for p in loss.network.parameters())
    assert all(torch.equal(before[key], value) for key, value in loss.state_dict().items())


@pytest.mark.parametrize("network_training", [False, True])
def test_the_transfer_uses_stored_statistics_in_every_mode(randn, network_training):
    loss, maps = build(), (pyramid(randn), pyramid(randn))
    expected = loss(*maps)
    loss.network.train(network_training)
    assert torch.equal(loss(*maps), expected)


def test_the_network_learns_to_rebuild_back_vectors(randn):
    # The back vector follows from the front one, which the heads can find.
    turn = torch.linalg.qr(randn(4, 4))[0]
    loss = MHGDLoss((4, 4), (4, 4), heads=4)
    loss.start_pre_stage()
    optimizer = torch.optim.SGD(loss.network.parameters(), 0.1, 0.9, nesterov=True)
    values = []
    for _ in range(60):
        front = randn(64, 4)
        maps = [front.float(), (front @ turn).float()]
        value = loss.pre_stage_loss(maps)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert min(values[-5:]) < 0.5 * values[0]


def test_a_fresh_network_refuses_the_transfer(randn, refuses):
    loss = MHGDLoss(CHANNELS, CHANNELS).double()
    with refuses("MHGDLoss", "trained on the teacher", "untrained", "KD.PRE_STAGE.WEIGHTS"):
        loss(pyramid(randn), pyramid(randn))


def test_less_than_two_samples_leave_the_network_as_it_is(randn):
    loss = build()
    loss.start_pre_stage()
    before = copy.deepcopy(loss.network.state_dict())
    value = loss.pre_stage_loss(pyramid(randn, samples=1))
    value.backward()
    assert value.item() == 0.0
    assert all(p.grad is not None and not p.grad.any() for p in loss.network.parameters())
    after = loss.network.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
