"""Limits of time: how many images and batches a machine can take in the seconds there are."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch

Item = TypeVar("Item")


class Stopwatch:
    """The total time of blocks, of which each ends when the device has finished its work."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.seconds = self._started = 0.0

    def __enter__(self) -> Stopwatch:
        self._started = self._now()
        return self

    def __exit__(self, *error: object) -> None:
        self.seconds += self._now() - self._started

    def _now(self) -> float:
        if self.device.startswith("cuda"):
            torch.cuda.synchronize()
        return time.perf_counter()


def timed(work: Callable[[], object], device: str, long: float = 1.0) -> float:
    """Seconds of ``work`` in a second call, as first calls are slower.

    On a CPU, a first call of more than ``long`` seconds counts itself.
    """
    with Stopwatch(device) as watch:
        work()
    if watch.seconds < long or device.startswith("cuda"):
        with Stopwatch(device) as watch:
            work()
    return watch.seconds


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
