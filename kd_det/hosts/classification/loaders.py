"""Batches for training and evaluation, in an order that a resumed run repeats exactly."""

from __future__ import annotations

from collections.abc import Iterator, Sized
from typing import Any

import torch
from fvcore.common.config import CfgNode
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Sampler

from kd_det.core.errors import fail
from kd_det.core.seeds import keyed_generator
from kd_det.hosts.classification.data import ClassificationData, augmentation
from kd_det.procedures.base import ChangedImages, Procedures

Item = tuple[Tensor, int, int]


class SeededItems(Dataset):
    """Items by ``(epoch, index)``, whose random augmentation depends on these two and the seed.

    So it is the same in every number of loader processes, and in a run that was interrupted.
    """

    def __init__(self, items: Any, seed: int) -> None:
        self.items, self.seed = items, seed

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, key: tuple[int, int]) -> Item:
        epoch, index = key
        state = keyed_generator(self.seed, epoch, index).get_state()
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(state)
            return self.items[index]


class EpochSampler(Sampler[tuple[int, int]]):
    """``(epoch, index)`` for every index of a sampler with ``set_epoch``."""

    def __init__(self, sampler: Any) -> None:
        self.sampler = sampler

    def set_epoch(self, epoch: int) -> None:
        """Lightning calls it before each epoch."""
        self.sampler.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return ((self.sampler.epoch, index) for index in self.sampler)


def train_loader(
    cfg: CfgNode,
    data: ClassificationData,
    seed: int,
    rank: int,
    world: int,
    procedures: Procedures | None = None,
) -> DataLoader:
    """Batches ``(images, classes, indices)`` of one epoch.

    ``seed`` decides order and augmentation; one of the ``procedures`` may choose the images.
    """
    procedures = procedures or Procedures()
    sampler = procedures.chooser.sampler(seed, rank, world)
    if sampler is None:
        sampler = DistributedSampler(data, world, rank, shuffle=True, seed=seed)
    items = ChangedImages(data, procedures.chooser.image_change(), augmentation(cfg))
    return DataLoader(
        SeededItems(items, seed),
        batch_size=per_process(cfg, world),
        sampler=EpochSampler(sampler),
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        pin_memory=cfg.MODEL.DEVICE != "cpu",
    )


def evaluation_loader(cfg: CfgNode, data: Sized, rank: int, world: int) -> DataLoader:
    """Batches ``(images, classes)`` of this process's share of the test set, nothing twice."""
    return DataLoader(
        data,  # type: ignore[arg-type]
        batch_size=per_process(cfg, world),
        sampler=list(range(len(data)))[rank::world],  # type: ignore[arg-type]
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        pin_memory=cfg.MODEL.DEVICE != "cpu",
    )


def per_process(cfg: CfgNode, world: int) -> int:
    """Images per batch of one process, which must divide ``SOLVER.IMS_PER_BATCH``."""
    total = cfg.SOLVER.IMS_PER_BATCH
    if total % world:
        fail(
            expected=f"SOLVER.IMS_PER_BATCH to divide by the {world} processes",
            received=str(total),
            remedy=f"use a multiple of {world}",
        )
    return total // world
