"""Limits of time: how many images and batches a machine can take in the seconds there are."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

Item = TypeVar("Item")


def now(device: str) -> float:
    """Seconds on a clock that has waited for the device."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter()


class Stopwatch:
    """The total time of blocks, of which each ends when the device has finished its work."""

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


def timed(work: Callable[[], Item], device: str, long: float = 1.0) -> tuple[Item, float]:
    """The result of ``work``, and its seconds in a second call.

    First calls are slower, most of all on a GPU. One of more than ``long`` seconds on a CPU counts
    itself.
    """
    watch = Stopwatch(device)
    with watch.running():
        result = work()
    if device.startswith("cuda") or watch.seconds < long:
        watch = Stopwatch(device)
        with watch.running():
            result = work()
    return result, watch.seconds


def within(items: Iterable[Item], seconds: float, at_least: int = 1) -> Iterator[Item]:
    """Items as long as another one of average duration still fits into ``seconds``.

    The duration of an item is the time until the next one is requested. The first ``at_least``
    items come in any case.
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
