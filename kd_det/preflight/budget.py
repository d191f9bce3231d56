"""Time is limited: what a slow machine cannot look at in time is left out, and said so."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

Item = TypeVar("Item")

_LONG = 1.0  # seconds


def now(device: str) -> float:
    """Seconds on a clock that has waited for the device."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter()


class Stopwatch:
    """Adds up the time of blocks.

    Args:
        device: ``MODEL.DEVICE``; work that is queued on a GPU is waited for.

    Attributes:
        seconds: so far.
        blocks: how many.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self.seconds = 0.0
        self.blocks = 0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count the time of the block."""
        start = now(self.device)
        try:
            yield
        finally:
            self.seconds += now(self.device) - start
            self.blocks += 1

    @property
    def mean(self) -> float:
        """Seconds per block; 0 before the first."""
        return self.seconds / self.blocks if self.blocks else 0.0


def timed(work: Callable[[], Item], device: str) -> tuple[Item, float]:
    """What ``work`` gives, and the seconds it takes when it is done again.

    The first time of a kind is slower, most of all on a GPU. Where a CPU needs long, the first
    time must do.
    """
    watch = Stopwatch(device)
    with watch.running():
        result = work()
    if device.startswith("cuda") or watch.seconds < _LONG:
        watch = Stopwatch(device)
        with watch.running():
            result = work()
    return result, watch.seconds


def within(items: Iterable[Item], seconds: float, at_least: int = 1) -> Iterator[Item]:
    """Items as long as another one of average length still fits into ``seconds``.

    Args:
        items: what to work on; the work between two items counts.
        seconds: the time there is.
        at_least: as many items are given however long they take.
    """
    start = time.perf_counter()
    for done, item in enumerate(items):
        spent = time.perf_counter() - start
        if done >= at_least and spent * (done + 1) / done > seconds:
            return
        yield item


def affordable(wanted: int, each: float, seconds: float, at_least: int = 1) -> int:
    """How many units of ``each`` seconds fit into ``seconds``, up to ``wanted``."""
    fitting = wanted if each * wanted <= seconds else int(seconds / each)
    return min(wanted, max(at_least, fitting))
