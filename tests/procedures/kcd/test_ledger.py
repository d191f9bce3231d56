"""The ledger: entropies, running means, ranks, and merging over processes."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing

from kd_det.core.numerics import binary_entropy, logit_entropy
from kd_det.procedures.kcd.ledger import SampleLedger, rank

SIZE = 12


def slow_entropy(row):
    exponentials = [math.exp(value - max(row)) for value in row]
    p = [e / sum(exponentials) for e in exponentials]
    return -sum(q * math.log(q) for q in p if q > 0)


def slow_binary_entropy(row):
    total = 0.0
    for value in row:
        p = 1 / (1 + math.exp(-value))
        total -= sum(q * math.log(q) for q in (p, 1 - p) if q > 0)
    return total


@pytest.mark.parametrize(
    ("entropy", "slow"), [(logit_entropy, slow_entropy), (binary_entropy, slow_binary_entropy)]
)
@pytest.mark.parametrize("shape", [(6, 4), (1, 9), (3, 2)])
def test_entropy_matches_slow_loop(randn, entropy, slow, shape):
    logits = 4 * randn(*shape)
    expected = torch.tensor([slow(row) for row in logits.tolist()], dtype=torch.float64)
    torch.testing.assert_close(entropy(logits), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("saturated", [800.0, 1e30, math.inf])
def test_entropy_of_a_certain_row_is_zero_and_finite(dtype, saturated):
    logits = torch.tensor([[0.0, -saturated, -saturated], [-saturated, 0.0, -5e4]], dtype=dtype)
    assert logit_entropy(logits).tolist() == [0.0, 0.0]
    assert binary_entropy(logits).tolist() == pytest.approx([math.log(2)] * 2)


def test_entropy_of_equal_logits_is_the_largest():
    assert logit_entropy(torch.full((1, 7), 3.0)).item() == pytest.approx(math.log(7))
    assert binary_entropy(torch.zeros(1, 7)).item() == pytest.approx(7 * math.log(2))


@pytest.mark.parametrize("entropy", [logit_entropy, binary_entropy])
def test_entropy_is_computed_in_float32_without_a_gradient(randn, entropy, half):
    logits = randn(4, 3, dtype=torch.float32).to(half).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        values = entropy(logits)
    assert values.dtype == torch.float32
    assert not values.requires_grad
    assert torch.equal(values, entropy(logits.float()))
    assert entropy(randn(4, 3)).dtype == torch.float64
    assert entropy(randn(0, 3)).shape == (0,)


def test_rank_is_descending_and_ties_go_to_the_lower_index():
    scores = torch.tensor([1.0, 3.0, 1.0, math.inf, 0.0, 3.0, 1.0, math.inf])
    expected = sorted(range(8), key=lambda i: (-scores[i], i))
    assert rank(scores).tolist() == expected == [3, 7, 1, 5, 0, 2, 6, 4]
    assert rank(scores, among=torch.tensor([6, 4, 2, 7])).tolist() == [7, 2, 6, 4]
    many = (torch.arange(5000) % 3).double()
    assert rank(many).tolist() == sorted(range(5000), key=lambda i: (-(i % 3), i))


def test_rank_refuses_nan_by_name(refuses):
    scores = torch.zeros(10)
    scores[[2, 9]] = math.nan
    with refuses("nan at point 2, nan at point 9"):
        rank(scores)


def visits(steps=30, batch=5):
    """Random batches; a point may occur more than once in one."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        indices = torch.randint(SIZE - 1, (batch,), generator=generator)  # the last is never seen
        yield indices, torch.rand(batch, generator=generator, dtype=torch.float64)


def test_the_mean_is_the_running_mean_of_all_visits():
    ledger = SampleLedger(SIZE)
    mean, count = [0.0] * SIZE, [0] * SIZE
    for indices, values in visits():
        ledger.update(indices, values)
        for i, value in zip(indices.tolist(), values.tolist(), strict=True):
            count[i] += 1
            mean[i] = (count[i] - 1) / count[i] * mean[i] + value / count[i]
    assert ledger.count.tolist() == count
    assert ledger.means().tolist() == pytest.approx(mean, rel=1e-12)
    for alpha in (0.03, 0.0, -1.0):
        scores = [v * n**alpha if n else math.inf for v, n in zip(mean, count, strict=True)]
        assert ledger.scores(alpha).tolist() == pytest.approx(scores, rel=1e-12)


def test_a_value_of_exactly_zero_is_a_visit():
    ledger = SampleLedger(2)
    ledger.update(torch.tensor([0]), torch.zeros(1))
    assert ledger.scores().tolist() == [0.0, math.inf]


def test_integer_types_and_half_precision_are_taken(half):
    ledger = SampleLedger(3)
    ledger.update(torch.tensor([1, 2], dtype=torch.int32), torch.tensor([0.5, 0.25], dtype=half))
    assert ledger.sum.tolist() == [0.0, 0.5, 0.25]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_refused_by_name(refuses, bad):
    ledger = SampleLedger(SIZE)
    values = torch.tensor([0.5, bad, 0.5, bad])
    with refuses("finite values", f"{bad} at point 7, {bad} at point 2", "learning rate"):
        ledger.update(torch.tensor([3, 7, 3, 2]), values)
    assert ledger.count.sum() == 0
    with refuses("at point 4 and 3 more"):
        ledger.update(torch.arange(8), torch.full((8,), bad))


@pytest.mark.parametrize(
    ("indices", "values", "message"),
    [
        ([0, SIZE], [1.0, 1.0], f"index {SIZE}"),
        ([-1], [1.0], "index -1"),
        ([0, 1], [1.0], "indices (2,), values (1,)"),
        ([[0]], [[1.0]], "indices (1, 1)"),
    ],
)
def test_indices_that_do_not_fit_are_refused(refuses, indices, values, message):
    with refuses(message):
        SampleLedger(SIZE).update(torch.tensor(indices), torch.tensor(values))


def test_an_empty_training_set_is_refused(refuses):
    with refuses("0 points"):
        SampleLedger(0)


def test_a_saved_ledger_continues_exactly():
    whole, first = SampleLedger(SIZE), SampleLedger(SIZE)
    batches = list(visits())
    for batch in batches[:11]:
        whole.update(*batch)
        first.update(*batch)
    second = SampleLedger(SIZE)
    state = first.state_dict()
    second.load_state_dict(state)
    first.update(*batches[0])  # the state is a copy
    for batch in batches[11:]:
        whole.update(*batch)
        second.update(*batch)
    assert torch.equal(whole.sum, second.sum)
    assert torch.equal(whole.count, second.count)


def test_a_ledger_of_another_training_set_is_refused_naming_both(refuses):
    with refuses("a ledger of 12 points", "one of 60000 points"):
        SampleLedger(SIZE).load_state_dict(SampleLedger(60000).state_dict())


def test_merging_without_a_process_group_changes_nothing():
    ledger = SampleLedger(SIZE)
    for batch in visits():
        ledger.update(*batch)
    before = ledger.state_dict()
    ledger.merge()
    assert torch.equal(ledger.sum, before["sum"])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_values_on_a_gpu_are_collected_and_counted():
    here, there = SampleLedger(SIZE), SampleLedger(SIZE)
    for indices, values in visits(250):
        here.update(indices, values)
        there.update(indices.cuda(), values.cuda())
    assert torch.equal(here.sum, there.sum)
    assert torch.equal(here.count, there.count)


def merge_in_one_of_two(rank_, init, results):
    """Each rank sees every second batch, and merges three times, once with nothing new."""
    dist.init_process_group("gloo", init_method=init, rank=rank_, world_size=2)
    ledger = SampleLedger(SIZE)
    batches = list(visits())[rank_::2]
    refused = False
    for batch in batches[:4]:
        ledger.update(*batch)
    try:
        ledger.state_dict()
    except ValueError as error:
        refused = "known to one rank only" in str(error)
    ledger.merge()
    ledger.merge()
    for batch in batches[4:]:
        ledger.update(*batch)
    ledger.merge()
    torch.save(ledger.state_dict() | {"refused": refused}, f"{results}/{rank_}.pt")
    dist.destroy_process_group()


def test_two_processes_merge_to_the_ledger_of_one(tmp_path):
    init = f"file://{tmp_path}/init"
    multiprocessing.spawn(merge_in_one_of_two, (init, str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{r}.pt") for r in range(2))
    one = SampleLedger(SIZE)
    for batch in visits():
        one.update(*batch)
    assert torch.equal(first["sum"], second["sum"])
    assert torch.equal(first["count"], one.count)
    assert torch.equal(second["count"], one.count)
    torch.testing.assert_close(first["sum"], one.sum, rtol=1e-14, atol=0)
    assert first["refused"]
    assert second["refused"]
