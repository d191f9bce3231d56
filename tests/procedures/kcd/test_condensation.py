"""KCD: how many points stay, which, with which blends, at what cost; and the resumable run."""

from __future__ import annotations

import copy
import math
import random

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing

from kd_det.procedures.kcd.condensation import Condensation
from kd_det.procedures.kcd.selection import blend_ratios, kcd_cost, keep_counts, partition

SIZE = 40
LABELS = [(7 * i) % 11 % 4 for i in range(SIZE)]


def visits(epoch, active):
    """The points of an epoch in the order of training and their values; a few are left out."""
    rng = random.Random(epoch)
    values = [rng.random() for _ in range(SIZE)]
    seen = [i for i in active if (i + epoch) % 7]
    rng.shuffle(seen)
    return seen, [values[i] for i in seen]


def run_epoch(kcd, epoch):
    indices, values = visits(epoch, kcd.active.tolist())
    kcd.update(torch.tensor(indices), torch.tensor(values, dtype=torch.float64))
    return kcd.step()


def slow_ranks(sums, counts, alpha, among):
    def score(i):
        return sums[i] / counts[i] * counts[i] ** alpha if counts[i] else math.inf

    return sorted(among, key=lambda i: (-score(i), i))


def slow_run(rho, period, total, alpha, schedule, pool, epsilon, rule, minimum):
    """(active, recipes) after every epoch, from the definition with lists and dictionaries."""
    sums, counts = [0.0] * SIZE, [0] * SIZE
    active, recipes, stage, planned = list(range(SIZE)), {}, 0, SIZE
    for epoch in range(total):
        for i, value in zip(*visits(epoch, active), strict=True):
            sums[i] += value
            counts[i] += 1
        if (epoch + 1) % period == 0 and epoch + 1 < total:
            stage += 1
            if schedule == "exp":
                planned = round(SIZE * rho ** (stage * period / total))
            else:
                planned = max(int(rho * SIZE), planned - int(SIZE * (1 - rho) / (total / period)))
            order = slow_ranks(sums, counts, alpha, range(SIZE) if pool == "all" else active)
            kept = order[:planned]
            for label in set(LABELS):
                of_class = [i for i in order if LABELS[i] == label]
                kept += [i for i in of_class[:minimum] if i not in kept]
            kept.sort(key=order.index)
            dropped = [i for i in order[planned : len(active)] if i not in kept]
            pairs = min(len(dropped), len(kept))
            tail = kept[len(kept) - pairs :]
            recipes = {}
            for j in range(pairs):
                share = epsilon * (j if rule == "reference" else j + 1) / len(dropped)
                recipes[tail[j]] = (dropped[j], pytest.approx(share, rel=1e-12))
            active = kept
        yield list(active), dict(recipes)


@pytest.mark.parametrize("pool", ["all", "active"])
@pytest.mark.parametrize(
    ("rho", "period", "total", "schedule", "rule", "minimum"),
    [
        (0.7, 2, 8, "exp", "reference", 0),
        (0.5, 1, 6, "linear", "paper", 0),
        (0.3, 3, 11, "exp", "paper", 0),
        (0.2, 2, 10, "exp", "reference", 5),
        (0.3, 1, 5, "linear", "reference", 7),
        (0.1, 1, 2, "exp", "reference", 0),
        (0.6, 3, 10, "linear", "reference", 0),
    ],
)
def test_a_run_selects_what_a_slow_loop_selects(pool, rho, period, total, schedule, rule, minimum):
    alpha, epsilon = 0.2, 0.4
    kcd = Condensation(
        SIZE,
        rho,
        period,
        total,
        alpha=alpha,
        schedule=schedule,
        pool=pool,
        epsilon=epsilon,
        epsilon_rule=rule,
        min_per_class=minimum,
        labels=LABELS,
    )
    slow = slow_run(rho, period, total, alpha, schedule, pool, epsilon, rule, minimum)
    samples = 0
    for epoch, (active, recipes) in enumerate(slow):
        samples += len(visits(epoch, kcd.active.tolist())[0])
        run_epoch(kcd, epoch)
        assert kcd.active.tolist() == active
        assert kcd.recipes == recipes
    assert kcd.samples_seen == samples
    assert len(kcd.active) < SIZE


def test_dropped_points_return_only_from_the_whole_pool():
    """Three points; the dropped one has the larger mean as soon as the others are seen again."""
    for pool, expected in (("all", [2, 0]), ("active", [0])):
        kcd = Condensation(3, 0.2, 1, 3, alpha=0.0, pool=pool, schedule="linear")
        kcd.counts = [3, 2, len(expected), 1]
        kcd.update(torch.arange(3), torch.tensor([0.9, 0.8, 0.7]))
        assert kcd.step().keep.tolist() == [0, 1]
        kcd.update(torch.tensor([0, 1]), torch.tensor([0.1, 0.0]))
        assert kcd.step().keep.tolist() == expected


@pytest.mark.parametrize(
    ("arguments", "counts"),
    [
        ((50000, 0.7, 6), [50000, 47114, 44395, 41833, 39419, 37144, 35000]),
        ((50000, 0.7, 6, "linear"), [50000, 47500, 45000, 42500, 40000, 37500, 35000]),
        ((50000, 0.5, 6, "linear"), [50000, 45834, 41668, 37502, 33336, 29170, 25004]),
        ((10, 1.0, 3), [10] * 4),
        ((5, 0.1, 4), [5, 3, 2, 1, 1]),
        ((3, 0.01, 2, "linear"), [3, 2, 1]),
        ((1000, 0.7, 250 / 40), [1000, 945, 892, 843, 796, 752, 710, 700]),
        ((1000, 0.7, 100 / 30, "linear"), [1000, 910, 820, 730, 700]),
    ],
)
def test_keep_counts(arguments, counts):
    assert keep_counts(*arguments) == counts


@pytest.mark.parametrize(
    ("rho", "total", "period"),
    [(0.7, 240, 40), (0.5, 100, 10), (0.9, 90, 15), (0.3, 7, 7), (0.7, 250, 40)],
)
def test_cost_is_the_published_closed_form(rho, total, period):
    q = rho ** (period / total)
    assert kcd_cost(rho, total, period) == pytest.approx(
        q * (1 - rho) / (1 - q) * period / total, rel=1e-12
    )


def test_the_published_cost_is_81_63_percent_and_the_real_one_86_63():
    assert kcd_cost(0.7, 240, 40) == pytest.approx(0.8163, abs=5e-5)
    assert kcd_cost(0.7, 240, 40, "full") == pytest.approx(0.8663, abs=5e-5)
    assert kcd_cost(0.7, 240, 40, "full", "linear") == pytest.approx(0.875, abs=1e-12)
    assert kcd_cost(1.0, 240, 40) == 1.0


@pytest.mark.parametrize(("schedule", "expected"), [("exp", 0.8663), ("linear", 0.875)])
def test_a_run_costs_what_was_planned(schedule, expected):
    kcd = Condensation(2000, 0.7, 40, 240, schedule=schedule)
    for _ in range(240):
        kcd.update(kcd.active, torch.rand(len(kcd.active)))
        kcd.step()
    assert kcd.measured_cost() == kcd.planned_cost() == pytest.approx(expected, abs=2e-4)
    assert kcd.formula_cost() == pytest.approx(0.8163, abs=5e-5)


def test_a_short_last_stage_is_counted_as_short():
    kcd = Condensation(1000, 0.5, 4, 10)
    assert kcd.lengths == [4, 4, 2]
    assert kcd.planned_cost() == (4 * 1000 + 4 * 758 + 2 * 574) / 10_000
    expected = (4 + 4 * 0.5**0.4 + 2 * 0.5**0.8) / 10
    assert kcd_cost(0.5, 10, 4, "full") == pytest.approx(expected)


def test_nothing_happens_after_the_last_period():
    kcd = Condensation(SIZE, 0.5, 2, 6)
    condensed = [run_epoch(kcd, epoch) is not None for epoch in range(8)]
    assert condensed == [False, True, False, True, False, False, False, False]
    assert kcd.current_period == 2


def test_with_rho_one_everything_stays_and_nothing_is_blended():
    kcd = Condensation(SIZE, 1.0, 1, 4)
    for epoch in range(4):
        run_epoch(kcd, epoch)
    assert sorted(kcd.active.tolist()) == list(range(SIZE))
    assert kcd.recipes == {}
    assert kcd.planned_cost() == 1.0


def test_recipes_end_with_their_stage():
    kcd = Condensation(10, 0.5, 1, 9, schedule="linear", epsilon_rule="paper")
    kcd.counts = [10, 6, 6, 6, 5, 5, 5, 5, 5, 5]
    for stage, blended in ((1, 4), (2, 0), (3, 0), (4, 1)):
        run_epoch(kcd, stage)
        assert len(kcd.recipes) == blended
        assert (kcd.epsilons > 0).sum() == blended


def test_without_epsilon_nothing_is_blended():
    kcd = Condensation(SIZE, 0.5, 1, 4, epsilon=0.0)
    run_epoch(kcd, 0)
    assert len(kcd.active) < SIZE
    assert kcd.recipes == {}


def test_partition_with_nothing_to_drop_has_no_tail():
    order = torch.tensor([3, 1, 0, 2])
    parts = partition(order, 4, 4)
    assert [p.tolist() for p in parts] == [[3, 1, 0, 2], [3, 1, 0, 2], [], []]
    assert blend_ratios(0).shape == (0,)


@pytest.mark.parametrize("previous", [5, 9])
def test_more_dropped_than_kept_blends_each_kept_point_once(previous):
    parts = partition(torch.arange(10), 2, previous)
    assert parts.keep.tolist() == parts.tail.tolist() == [0, 1]
    assert parts.drop.tolist() == list(range(2, previous))


def test_every_class_keeps_its_best(refuses):
    order, labels = torch.tensor([5, 4, 3, 2, 1, 0]), torch.tensor([9, 2, 9, 2, 2, 2])
    parts = partition(order, 3, 6, min_per_class=1, labels=labels)
    assert parts.keep.tolist() == [5, 4, 3, 2]  # the best of class 9 is point 2
    assert parts.drop.tolist() == [1, 0]
    assert parts.tail.tolist() == [3, 2]
    with refuses("labels with min_per_class"):
        partition(order, 3, 6, min_per_class=1)


def test_blend_ratios_rise_with_the_rank():
    assert blend_ratios(4, 0.2).tolist() == pytest.approx([0, 0.05, 0.1, 0.15])
    assert blend_ratios(4, 0.2, "paper").tolist() == pytest.approx([0.05, 0.1, 0.15, 0.2])


def make(size=SIZE, **changed):
    return Condensation(size, **({"rho": 0.5, "period": 3, "total": 12} | changed))


@pytest.mark.parametrize("killed", [1, 3, 4, 8, 11])
def test_a_resumed_run_makes_the_same_selections(killed):
    whole, first, second = make(), make(), make()
    for epoch in range(killed):
        run_epoch(whole, epoch)
        run_epoch(first, epoch)
    state = copy.deepcopy(first.state_dict())
    run_epoch(first, killed)  # the state is a copy
    second.load_state_dict(state)
    for epoch in range(killed, 12):
        assert second.active.tolist() == whole.active.tolist()
        assert second.recipes == whole.recipes
        run_epoch(whole, epoch)
        run_epoch(second, epoch)
    assert whole.current_period == second.current_period == 3
    assert torch.equal(whole.ledger.sum, second.ledger.sum)
    assert whole.measured_cost() == second.measured_cost()


def test_the_state_survives_a_checkpoint_file(tmp_path):
    kcd = make()
    for epoch in range(4):
        run_epoch(kcd, epoch)
    torch.save(kcd.state_dict(), tmp_path / "state.pt")
    other = make()
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert other.recipes == kcd.recipes != {}
    assert (other.current_period, other.position) == (1, 1)


def test_a_state_that_does_not_fit_is_refused_naming_both(refuses):
    state = make().state_dict()
    with refuses("a ledger of 41 points", "one of 40 points"):
        make(41).load_state_dict(state)
    with refuses("period counts, [40, 39,", "[40, 34,"):
        make(rho=0.9).load_state_dict(state)
    with refuses("period lengths, [6, 6, 6, 6]", "[3, 3, 3, 3]"):
        make(period=6, total=24).load_state_dict(state)


def test_in_iterations_every_stage_makes_as_many_passes():
    """10 passes of 100 points in batches of 4 per period, on ever fewer points."""
    kcd = Condensation(100, 0.5, 250, 1000, batch=4)
    assert kcd.counts == [100, 84, 71, 59, 50]
    assert kcd.lengths == [250, 210, 178, 148]
    assert kcd.planned_steps() == 786
    assert kcd.planned_cost() == pytest.approx(0.786)
    condensed = []
    for iteration in range(kcd.planned_steps()):
        kcd.update(kcd.active[:4], torch.rand(4))
        if kcd.step() is not None:
            condensed.append(iteration + 1)
    assert condensed == [250, 460, 638]
    assert kcd.measured_cost() == kcd.planned_cost()


def test_points_of_a_schedule_keep_their_place_among_the_passes():
    kcd = Condensation(100, 0.5, 250, 1000, batch=4)
    places = [0, 250, 375, 500, 1000, 1010]
    assert [kcd.planned_step(s) for s in places] == [0, 250, 355, 460, 786, 796]
    epochs = Condensation(100, 0.5, 25, 100)
    assert [epochs.planned_step(s) for s in places] == places
    assert epochs.planned_steps() == 100


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rho": 0.0}, "in (0, 1]; received 0.0"),
        ({"rho": 1.1}, "in (0, 1]; received 1.1"),
        ({"rho": math.nan}, "in (0, 1]; received nan"),
        ({"period": 0}, "KCD's period of at least 1; received 0"),
        ({"total": 0}, "the length of a run with KCD of at least 1; received 0"),
        ({"size": 0}, "0 points"),
        ({"alpha": math.inf}, "alpha to be a finite number"),
        ({"epsilon": 1.5}, "a partner's share, in [0, 1]; received 1.5"),
        ({"min_per_class": -1}, "min_per_class of at least 0; received -1"),
        ({"min_per_class": 1}, "labels of all 40 points; received no labels"),
        ({"min_per_class": 1, "labels": [0] * 39}, "received 39 labels"),
        ({"batch": 0}, "batch of at least 1; received 0"),
        ({"schedule": "exponential"}, "'exp', 'linear'"),
        ({"pool": "activ"}, "did you mean 'active'"),
        ({"blend": "sum"}, "'convex', 'add'"),
        ({"epsilon_rule": "papers"}, "did you mean 'paper'"),
    ],
)
def test_bad_arguments_are_refused(refuses, arguments, message):
    with refuses(message):
        make(**arguments)


def test_a_run_too_short_to_condense_is_reported(caplog):
    make(period=12)
    assert "KCD never condenses: its period 12 is not shorter than the run, 12" in caplog.text


def select_in_one_of_two(rank, init, results):
    """Every rank trains on half of each epoch's points; rank 1's scores are made to differ."""
    dist.init_process_group("gloo", init_method=init, rank=rank, world_size=2)
    kcd = make()
    for epoch in range(12):
        indices, values = (seen[rank::2] for seen in visits(epoch, kcd.active.tolist()))
        kcd.update(torch.tensor(indices), torch.tensor(values, dtype=torch.float64))
        if epoch == 4:  # a checkpoint in the middle of a stage
            kcd.ledger.merge()
        if rank == 1 and epoch == 8:
            kcd.ledger.sum.mul_(-1)
        kcd.step()
    kcd.ledger.merge()
    selected = {"active": kcd.active, "recipes": kcd.recipes, "seen": kcd.samples_seen}
    torch.save(selected, f"{results}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_select_what_one_selects(tmp_path):
    init = f"file://{tmp_path}/init"
    multiprocessing.spawn(select_in_one_of_two, (init, str(tmp_path)), nprocs=2)
    one = make()
    for epoch in range(12):
        run_epoch(one, epoch)
    for rank in range(2):
        selected = torch.load(tmp_path / f"{rank}.pt")
        assert selected["active"].tolist() == one.active.tolist()
        assert selected["recipes"] == one.recipes
        assert selected["seen"] == one.samples_seen
