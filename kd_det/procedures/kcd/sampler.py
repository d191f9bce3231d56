"""Samplers and a data set view for a training set that shrinks (KCD).

Every order is a function of the seed and the place in the run alone, so that a resumed run
continues with the very points it would have seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Sampler

from kd_det.core.distributed import rank as own_rank
from kd_det.core.distributed import world_size
from kd_det.core.errors import check_choice, fail
from kd_det.core.seeds import keyed_generator
from kd_det.procedures.base import ChangedImages
from kd_det.procedures.kcd.condensation import Blend, Condensation


class _ActivePoints(Sampler[int]):
    """Of the active points of a condensation, the share of one rank.

    ``seed`` is the same on all ranks; rank and world are by default those of the process group.
    """

    def __init__(
        self,
        condensation: Condensation,
        seed: int = 0,
        rank: int | None = None,
        world: int | None = None,
    ) -> None:
        self.condensation, self.seed = condensation, seed
        self.rank = own_rank() if rank is None else rank
        self.world = world_size() if world is None else world
        if not 0 <= self.rank < self.world:
            fail(
                expected=f"a rank below the number of processes, {self.world}",
                received=f"rank {self.rank}",
                remedy="give both, or neither to take them from the process group",
            )


class SubsetSampler(_ActivePoints):
    """One epoch over the active points in random order, for loops that count epochs.

    The active list is read anew in every epoch. The ranks share one order and take every
    ``world``-th point. Where the number of points does not divide, the first ones are repeated so
    that all ranks take as many steps; these extra visits enter the ledger like any other.
    """

    epoch, _start = 0, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next epoch; call it before each."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-len(self.condensation.active) // self.world) - self._start

    def __iter__(self) -> Iterator[int]:
        generator = keyed_generator(self.seed, self.epoch)
        active = self.condensation.active
        order = active[torch.randperm(len(active), generator=generator)]
        # Repeats the whole order where there are fewer points than ranks.
        padded = -(-len(active) // self.world) * self.world
        order = order[torch.arange(padded) % len(active)]
        start, self._start = self._start, 0
        return iter(order[self.rank :: self.world][start:].tolist())

    def state_dict(self, visited: int = 0) -> dict[str, int]:
        """Where this rank is, ``visited`` samples into its epoch.

        Loaders fetch ahead of the training, so the loop must count them.
        """
        return {"seed": self.seed, "epoch": self.epoch, "start": visited}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue there: the next epoch that is drawn leaves out what was visited."""
        self.seed, self.epoch, self._start = state["seed"], state["epoch"], state["start"]


class InfiniteSubsetSampler(_ActivePoints):
    """An endless stream over the active points, for loops that count iterations (Detectron2).

    One random pass follows another; the ranks take every ``world``-th point of the stream, so
    nothing is repeated to make them equal. Each period has its own stream. It begins
    at ``condensation.position``, which is all that a resumed run needs. The condensation must count
    iterations. A loader that fetches ahead needs :class:`kd_det.procedures.base.PeriodLoader`.
    """

    def __init__(self, condensation: Condensation, *arguments: Any, **keywords: Any) -> None:
        super().__init__(condensation, *arguments, **keywords)
        if condensation.batch is None:
            fail(
                expected="an infinite sampler on a condensation that counts iterations",
                received="one that counts epochs",
                remedy="build the condensation with batch, the images per iteration",
            )

    def __iter__(self) -> Iterator[int]:
        state = self.condensation
        assert state.batch is not None
        period, start = state.current_period, state.position * state.batch
        while True:
            for place, index in enumerate(self._stream(period, start), start):
                if state.current_period != period:
                    break
                if place % self.world == self.rank:
                    yield index
            period, start = state.current_period, 0

    def _stream(self, period: int, start: int) -> Iterator[int]:
        active = self.condensation.active
        passes, start = divmod(start, len(active))
        while True:
            generator = keyed_generator(self.seed, period, passes)
            yield from active[torch.randperm(len(active), generator=generator)][start:].tolist()
            passes, start = passes + 1, 0


class GroupedSampler(InfiniteSubsetSampler):
    """The same stream, dealt in batches of one group (wide or high images) as they fill up.

    A loader that groups behind its sampler would make the place in the run inexact: a few images
    always wait in it for a batch to fill. ``groups``, ``[N]`` bool, has the group of every image;
    ``place`` is rank and world.
    """

    def __init__(
        self, condensation: Condensation, seed: int, groups: Tensor, *place: int | None
    ) -> None:
        super().__init__(condensation, seed, *place)
        self._groups = groups

    def __iter__(self) -> Iterator[int]:
        state = self.condensation
        assert state.batch is not None
        stream = islice(self._stream(state.current_period, 0), self.rank, None, self.world)
        # From the start of the period: what waited at a checkpoint must wait again.
        batches = islice(self._batches(stream, state.batch // self.world), state.position, None)
        return chain.from_iterable(batches)

    def _batches(self, stream: Iterable[int], size: int) -> Iterator[list[int]]:
        waiting: tuple[list[int], list[int]] = ([], [])
        for index in stream:
            batch = waiting[int(self._groups[index])]
            batch.append(index)
            if len(batch) == size:
                yield batch.copy()
                batch.clear()


def blend_images(
    image: Tensor, partner: Tensor, epsilon: float | Tensor, mode: Blend = "convex"
) -> Tensor:
    """Mix a little of one image into another. The label stays that of ``image``.

    Args:
        image: ``[..., H, W]``, floating.
        partner: ``[..., h, w]``, floating; resized to ``image`` (bilinear) if its size differs.
        epsilon: the partner's share, a number or something to broadcast.
        mode: ``"convex"``: ``(1 - epsilon) * image + epsilon * partner``, the released code's,
            which stays in the range of pixels. ``"add"``: ``image + epsilon * partner``, the
            paper's.
    """
    check_choice("blend", mode, Blend)
    if not (image.is_floating_point() and partner.is_floating_point()):
        fail(
            expected="floating images to blend",
            received=f"{image.dtype} and {partner.dtype}",
            remedy="convert them first, for example with image / 255",
        )
    if partner.shape[-2:] != image.shape[-2:]:
        size = (image.shape[-2], image.shape[-1])
        flat = partner.reshape(1, -1, *partner.shape[-2:])
        resized = F.interpolate(flat, size, mode="bilinear", align_corners=False)
        partner = resized.reshape(*partner.shape[:-2], *size)
    share = 1 - epsilon if mode == "convex" else 1
    return share * image + epsilon * partner


class Blends:
    """A condensation's blends as an :data:`kd_det.procedures.base.ImageChange`.

    The recipes are in shared memory: a loader process needs no copy of the ledger, and one that
    stays alive between epochs sees new blends, too.
    """

    def __init__(self, condensation: Condensation) -> None:
        self.partners, self.epsilons = condensation.partners, condensation.epsilons
        self.mode = condensation.blend

    def __call__(self, index: int, read: Callable[[int], Tensor]) -> Tensor | None:
        """The blend, or None where the image stays; ``read(i)`` is floating ``[C, H, W]``."""
        partner, epsilon = int(self.partners[index]), float(self.epsilons[index])
        if partner < 0 or epsilon == 0:
            return None
        return blend_images(read(index), read(partner), epsilon, self.mode)


class RecipeDataset(ChangedImages):
    """Images blended by a condensation's recipes at the moment they are read.

    Raises:
        KDError: the data set has another length than the condensation, or images that cannot be
            blended.
    """

    def __init__(
        self,
        dataset: Any,
        condensation: Condensation,
        transform: Callable[[Tensor], Any] | None = None,
    ) -> None:
        if len(dataset) != len(condensation):
            fail(
                expected=f"a data set of {len(condensation)} points, as the condensation has",
                received=f"{len(dataset)} points",
                remedy="build both from the same training set",
            )
        super().__init__(dataset, Blends(condensation), transform)
        first = dataset[0][0]
        floating = isinstance(first, Tensor) and first.is_floating_point()
        if condensation.epsilon > 0 and not floating:
            fail(
                expected="a data set of floating image tensors, which can be blended",
                received=str(getattr(first, "dtype", type(first).__name__)),
                remedy="convert them in the data set and pass random augmentation as transform",
            )
