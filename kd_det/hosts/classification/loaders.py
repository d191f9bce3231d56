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
from kd_det.procedures.base import ImageChange, Procedures

Item = tuple[Tensor, int, int]


class TrainingItems(Dataset):
    """``(image, class, index)`` by index, changed by a procedure and randomly augmented."""

    def __init__(self, data: ClassificationData, cfg: CfgNode, change: ImageChange | None) -> None:
        self.data = data
        self.transform = augmentation(cfg)
        self._change = change

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Item:
        image, target = self.data[index]
        if self._change is not None:
            changed = self._change(index, lambda i: image if i == index else self.data[i][0])
            image = image if changed is None else changed
        return self.transform(image), target, index


class SeededItems(Dataset):
    """Items by ``(epoch, index)``, whose random augmentation depends on these two and the seed.

    So it is the same in every number of loader processes, and in a run that was interrupted.
    """

    def __init__(self, items: Any, seed: int) -> None:
        self.items = items
        self.seed = seed

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

    Args:
        cfg: a config of this host.
        data: the training set.
        seed: decides order and augmentation.
        rank: of this process.
        world: number of processes.
        procedures: of the run; one may choose the images.
    """
    procedures = procedures or Procedures()
    sampler = procedures.sampler(seed, rank, world)
    if sampler is None:
        sampler = DistributedSampler(data, world, rank, shuffle=True, seed=seed)
    return DataLoader(
        SeededItems(TrainingItems(data, cfg, procedures.image_change()), seed),
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
    """Images per batch of one process.

    Raises:
        KDError: ``SOLVER.IMS_PER_BATCH`` does not divide.
    """
    total = cfg.SOLVER.IMS_PER_BATCH
    if total % world:
        fail(
            expected=f"SOLVER.IMS_PER_BATCH to divide by the {world} processes",
            received=str(total),
            remedy=f"use a multiple of {world}",
        )
    return total // world
