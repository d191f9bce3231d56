"""Samplers over the active points, and blends made at the moment an image is read."""

from __future__ import annotations

from itertools import islice

import pytest
import torch
from torch.utils.data import DataLoader

from kd_det.core.seeds import keyed_generator
from kd_det.procedures.kcd.condensation import Condensation
from kd_det.procedures.kcd.sampler import (
    InfiniteSubsetSampler,
    RecipeDataset,
    SubsetSampler,
    blend_images,
)

SIZE = 23


def make(size=SIZE, **changed):
    arguments = {"rho": 0.4, "period": 1, "total": 6, "epsilon_rule": "paper"}
    return Condensation(size, **(arguments | changed))


def next_stage(kcd, seed=0):
    values = torch.rand(len(kcd.active), generator=keyed_generator(seed))
    kcd.update(kcd.active, values)
    return kcd.condense()


# --- one epoch ------------------------------------------------------------------------------


def test_an_epoch_visits_every_active_point_once():
    kcd = make()
    sampler = SubsetSampler(kcd)
    for stage in range(4):
        sampler.set_epoch(stage)
        visited = list(sampler)
        assert sorted(visited) == sorted(kcd.active.tolist())
        assert len(sampler) == len(visited) == kcd.counts[stage]
        next_stage(kcd, stage)


def test_the_order_depends_on_seed_and_epoch_alone():
    def order(seed, epoch):
        sampler = SubsetSampler(make(), seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(3, 5) == order(3, 5)
    orders = [tuple(order(seed, epoch)) for seed in range(4) for epoch in range(4)]
    assert len(set(orders)) == 16


@pytest.mark.parametrize("world", [2, 3, 30])
def test_ranks_share_an_epoch_and_take_as_many_steps(world):
    kcd = make()
    next_stage(kcd)
    whole = list(SubsetSampler(kcd, 7, 0, 1))
    shards = [list(SubsetSampler(kcd, 7, rank, world)) for rank in range(world)]
    steps = -(-len(whole) // world)
    assert [len(shard) for shard in shards] == [steps] * world
    assert len(SubsetSampler(kcd, 7, 1, world)) == steps
    dealt = [shards[i % world][i // world] for i in range(steps * world)]
    # Beyond the last point the first ones are repeated.
    assert dealt == [whole[i % len(whole)] for i in range(steps * world)]


@pytest.mark.parametrize("visited", [0, 4, 8])
def test_an_epoch_continues_where_it_was_left(visited):
    kcd = make()
    first, second = SubsetSampler(kcd, 5, 1, 3), SubsetSampler(kcd, 0, 1, 3)
    first.set_epoch(2)
    whole = list(first)
    second.load_state_dict(first.state_dict(visited))
    second.set_epoch(2)  # as loops do
    assert len(second) == 8 - visited
    assert list(second) == whole[visited:]
    assert len(second) == 8
    assert list(second) == whole


def test_a_loader_reads_the_active_points_of_each_epoch():
    kcd = make()
    loader = DataLoader(range(SIZE), batch_size=4, sampler=SubsetSampler(kcd))
    for stage in range(3):
        batches = list(loader)
        assert len(batches) == len(loader) == -(-kcd.counts[stage] // 4)
        assert sorted(torch.cat(batches).tolist()) == sorted(kcd.active.tolist())
        next_stage(kcd, stage)


def test_a_rank_outside_the_world_is_refused(refuses):
    with refuses("a rank below the number of processes, 2", "rank 2"):
        SubsetSampler(make(), rank=2, world=2)


# --- an endless stream ----------------------------------------------------------------------


def take(sampler, count):
    return list(islice(iter(sampler), count))


def test_every_pass_of_the_stream_visits_every_active_point_once():
    kcd = make(batch=4, period=50, total=200)
    next_stage(kcd)
    size = len(kcd.active)
    stream = take(InfiniteSubsetSampler(kcd, rank=0, world=1), 3 * size)
    passes = [stream[i * size : (i + 1) * size] for i in range(3)]
    assert all(sorted(p) == sorted(kcd.active.tolist()) for p in passes)
    assert passes[0] != passes[1] != passes[2]


def test_ranks_deal_out_one_stream():
    kcd = make(batch=4, period=50, total=200)
    whole = take(InfiniteSubsetSampler(kcd, 3, 0, 1), 60)
    shards = [take(InfiniteSubsetSampler(kcd, 3, rank, 2), 30) for rank in range(2)]
    assert [i for pair in zip(*shards, strict=True) for i in pair] == whole


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("batch", [4, 5])
def test_the_stream_continues_at_the_position_of_the_condensation(world, batch):
    kcd = make(batch=batch, period=50, total=200)
    whole = take(InfiniteSubsetSampler(kcd, 3, 0, 1), 150)
    for _ in range(17):
        kcd.step()
    for rank in range(world):
        own = [i for place, i in enumerate(whole) if place >= 17 * batch and place % world == rank]
        assert take(InfiniteSubsetSampler(kcd, 3, rank, world), 20) == own[:20]


def test_a_new_stage_begins_its_own_stream():
    kcd = make(batch=4, period=50, total=200)
    running = iter(InfiniteSubsetSampler(kcd, 3, 0, 1))
    before = list(islice(running, 9))
    kcd.position = 2
    next_stage(kcd)
    after = list(islice(running, len(kcd.active)))
    assert sorted(after) == sorted(kcd.active.tolist())
    assert after == take(InfiniteSubsetSampler(kcd, 3, 0, 1), len(kcd.active))
    assert after[:9] != before


def test_stages_of_the_same_points_draw_other_orders():
    kcd = make(rho=1.0, batch=4, period=50, total=200)
    first = take(InfiniteSubsetSampler(kcd, rank=0, world=1), SIZE)
    kcd.current_period = 1
    assert take(InfiniteSubsetSampler(kcd, rank=0, world=1), SIZE) != first


def test_counting_epochs_and_an_endless_stream_do_not_fit(refuses):
    with refuses("counts iterations", "counts epochs"):
        InfiniteSubsetSampler(make())


# --- blends ---------------------------------------------------------------------------------


def test_blends_follow_their_formulas(randn):
    image, partner = randn(3, 4, 5), randn(3, 4, 5)
    for c, y, x in ((0, 0, 0), (2, 3, 4), (1, 2, 0)):
        a, z = image[c, y, x].item(), partner[c, y, x].item()
        convex, added = blend_images(image, partner, 0.2), blend_images(image, partner, 0.2, "add")
        assert convex[c, y, x].item() == pytest.approx(0.8 * a + 0.2 * z, rel=1e-12)
        assert added[c, y, x].item() == pytest.approx(a + 0.2 * z, rel=1e-12)


@pytest.mark.parametrize("mode", ["convex", "add"])
def test_a_blend_without_partner_is_the_image(randn, mode):
    image = randn(3, 4, 5)
    assert torch.equal(blend_images(image, randn(3, 4, 5), 0.0, mode), image)


def test_a_partner_of_another_size_is_resized():
    image, partner = torch.zeros(1, 4, 6), torch.tensor([[[0.0, 1.0]]])
    blend = blend_images(image, partner, 0.5)
    assert blend.shape == image.shape
    # Bilinear between two pixels whose centres are at 1/4 and 3/4 of the width.
    expected = [0.5 * min(max((i + 0.5) / 6 * 2 - 0.5, 0), 1) for i in range(6)]
    for row in blend[0].tolist():
        assert row == pytest.approx(expected, abs=1e-6)


def test_images_that_cannot_be_blended_are_refused(refuses, randn):
    with refuses("torch.uint8"):
        blend_images(torch.zeros(3, 2, 2, dtype=torch.uint8), randn(3, 2, 2), 0.1)
    with refuses("one of 'convex', 'add'"):
        blend_images(randn(3, 2, 2), randn(3, 2, 2), 0.1, "sum")


class Images:
    """Each image holds its own index."""

    def __init__(self, size=SIZE, make=lambda i: torch.full((1, 2, 2), float(i))):
        self.size, self.make = size, make

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        return self.make(index), f"target {index}"


@pytest.mark.parametrize("mode", ["convex", "add"])
def test_recipes_are_applied_to_original_images_before_augmentation(mode):
    kcd = make(blend=mode)
    points = RecipeDataset(Images(), kcd, transform=lambda image: image.square())
    blended_before = set()
    for stage in range(4):
        assert len(points) == SIZE
        for i in range(SIZE):
            image, target, index = points[i]
            partner, epsilon = kcd.recipes.get(i, (i, 0.0))
            value = i + epsilon * (partner if mode == "add" else partner - i)
            assert image.flatten().tolist() == pytest.approx([value**2] * 4)
            assert (target, index) == (f"target {i}", i)
        assert kcd.recipes or stage == 0
        blended_before |= set(kcd.recipes)
        next_stage(kcd, stage)
    # Points were blended in one stage and pure or blended anew in the next: nothing adds up.
    assert blended_before - set(kcd.recipes)


def test_a_loader_process_that_stays_alive_sees_new_recipes():
    kcd = make()
    points = RecipeDataset(Images(), kcd)
    loader = DataLoader(points, batch_size=8, num_workers=1, persistent_workers=True)
    for stage in range(2):
        values = torch.cat([images[:, 0, 0, 0] for images, _, _ in loader])
        expected = torch.stack([points[i][0][0, 0, 0] for i in range(SIZE)])
        assert torch.equal(values, expected)
        assert torch.equal(values, torch.arange(float(SIZE))) == (stage == 0)
        next_stage(kcd)


def test_data_sets_that_do_not_fit_are_refused_before_training(refuses):
    with refuses("a data set of 23 points", "received 22 points"):
        RecipeDataset(Images(22), make())
    with refuses("floating image tensors", "torch.uint8"):
        RecipeDataset(Images(make=lambda i: torch.zeros(1, 2, 2, dtype=torch.uint8)), make())
    with refuses("floating image tensors", "received object"):
        RecipeDataset(Images(make=lambda i: object()), make())


def test_without_blending_images_may_be_anything():
    points = RecipeDataset(Images(make=lambda i: f"picture {i}"), make(epsilon=0.0))
    assert points[3] == ("picture 3", "target 3", 3)
