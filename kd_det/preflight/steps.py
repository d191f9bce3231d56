"""Measurements of a few training steps that change no weight: values, gradients, shapes, times."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from kd_det.balance.shares import TASK, gradient_norms
from kd_det.bench.looks import evaluating
from kd_det.bench.workbench import Workbench
from kd_det.preflight.budget import Stopwatch, within
from kd_det.preflight.inputs import entry
from kd_det.run.devices import peak_memory

_LOSS_SCALE = 1024.0  # of half-precision losses in the step's backward pass, as in training


@dataclass(frozen=True)
class TermValues:
    """One term on one batch: its loss, weight at full schedule, and gradient.

    ``norm`` is that of the gradient of the weighted loss on the shared parameters, ``cosine`` that
    of its angle to the task's. Both are None where the weighted loss is not finite, and not finite
    where the gradient is not.
    """

    raw: float
    weight: float
    norm: float | None
    cosine: float | None


@dataclass(frozen=True)
class Step:
    """One training step: the task's losses, the terms and the seconds of each part, by name.

    ``task_norm`` is that of the gradient of the task's losses on the shared parameters: 0 where the
    run has no such losses, and not finite where the gradient is not.
    """

    task: dict[str, float]
    task_norm: float
    terms: dict[str, TermValues]
    seconds: dict[str, float]


@dataclass
class Steps:
    """Some training steps, and details of the first.

    Attributes:
        images: number in each step; fewer than the run's where those would take too long.
        memory: peak of a step in MiB: of the GPU, or of this process.
        student: recorded tensors of the first step, by tap; likewise ``teacher``.
        entered: shape of the student's input ``[N, C, H, W]`` in the first step.
        teacher_input: the teacher's input in the first step; None without one.
        macs: per term, multiply-accumulates of convolutions and matrix products of one step.
    """

    images: int
    steps: list[Step] = field(default_factory=list)
    memory: float = 0.0
    student: dict[str, Any] = field(default_factory=dict)
    teacher: dict[str, Any] = field(default_factory=dict)
    entered: tuple[int, ...] = ()
    teacher_input: Tensor | None = None
    macs: dict[str, float] = field(default_factory=dict)

    def mean(self, part: str) -> float:
        """Mean seconds of a part; the first step warms up and does not count if there are more."""
        counted = self.steps[1:] or self.steps
        return sum(step.seconds[part] for step in counted) / len(counted)


def take_steps(bench: Workbench, batches: int, images: int, seconds: float) -> Steps:
    """Forward and backward on the first ``images`` of each of the run's first batches.

    There are fewer steps than ``batches``, but at least one, where they exceed ``seconds``.

    Raises:
        KDError: the run's first step would raise it, too.
    """
    watch = _Watch(bench)
    result = Steps(images)
    loaded = itertools.islice(_loaded(bench.batches()), batches)
    for batch, loading in within(loaded, seconds):
        result.steps.append(watch.step(_first(batch, images), loading))
        result.memory = max(result.memory, watch.memory)
        if len(result.steps) == 1:
            watch.describe(result)
    return result


def shared_name(student: nn.Module) -> str:
    """Name of the module whose parameters task and terms have in common."""
    return "the student's backbone" if hasattr(student, "backbone") else "the student"


class _Watch:
    """Takes one step at a time, with hooks that time parts of it and keep tensors."""

    def __init__(self, bench: Workbench) -> None:
        self.bench = bench
        self.device = str(bench.cfg.MODEL.DEVICE)
        self.on_gpu = self.device.startswith("cuda")
        self.memory = 0.0
        self._inputs: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self._entered: dict[str, Tensor] = {}
        amp = self.on_gpu and bench.cfg.SOLVER.AMP.ENABLED
        self._scale = _LOSS_SCALE if amp else 1.0

    def step(self, batch: Any, loading: float) -> Step:
        bench = self.bench
        watches = {name: Stopwatch(self.device) for name in ("forward", "teacher", "losses")}
        self._forget_peak()
        with self._hooks(watches), watches["forward"]:
            losses = bench.losses(batch)
        peak = peak_memory(self.device)
        # Memory that only the measurement takes does not count.
        terms, task, norm = self._measure(losses)
        self._forget_peak()
        with Stopwatch(self.device) as backward:
            (torch.stack([loss.float() for loss in losses.values()]).sum() * self._scale).backward()
        self.memory = max(peak, peak_memory(self.device))
        bench.model.zero_grad(set_to_none=True)
        teacher, distiller = watches["teacher"].seconds, watches["losses"].seconds
        parts = {
            "data": loading,
            "student": watches["forward"].seconds - teacher - distiller,
            "teacher": teacher,
            "losses": distiller,
            "backward": backward.seconds,
        }
        return Step(task, norm, terms, parts)

    def describe(self, result: Steps) -> None:
        """Add shapes, and operations of the losses, of the last step."""
        result.entered = tuple(self._entered["student"].shape)
        result.teacher_input = self._entered.get("teacher")
        distiller = self.bench.distiller
        if distiller is None or self._inputs is None:
            return
        args, kwargs = self._inputs
        given = dict(zip(("student", "teacher", "context"), args, strict=False)) | kwargs
        result.student, result.teacher = dict(given["student"]), dict(given["teacher"])
        with evaluating(distiller), FlopCounterMode(display=False) as counter:
            distiller(given["student"], given["teacher"], given.get("context"))
        counts = counter.get_flop_counts()
        for name in distiller.terms:
            path = f"{type(distiller).__name__}.terms.{name}"
            result.macs[name] = sum(counts.get(path, {}).values()) / 2
        self._inputs = None

    def _measure(
        self, losses: Mapping[str, Tensor]
    ) -> tuple[dict[str, TermValues], dict[str, float], float]:
        distiller = self.bench.distiller
        names = list(distiller.terms) if distiller is not None else []
        task = {name: loss for name, loss in losses.items() if name not in names}
        metrics = distiller.metrics if distiller is not None else {}
        finite = {k: losses[k] for k in names if bool(torch.isfinite(losses[k]))}
        # What task and terms have in common: the backbone, or all of a classifier.
        shared = [p for p in entry(self.bench.student).parameters() if p.requires_grad]
        # A stage that trains terms alone (KD.TASK_WEIGHT 0) may have no such losses at all.
        total = torch.zeros((), device=shared[0].device if shared else None)
        for loss in task.values():
            total = total + loss.float()
        report = gradient_norms({TASK: total, **finite}, shared)
        terms = {
            name: TermValues(
                float(metrics[f"raw/{name}"]),
                float(metrics[f"weight/{name}"]),
                float(report.norms[name]) if name in finite else None,
                float(report.cosines[name]) if name in finite else None,
            )
            for name in names
        }
        values = {name: float(loss.detach()) for name, loss in task.items()}
        return terms, values, float(report.norms[TASK])

    def _forget_peak(self) -> None:
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()

    @contextmanager
    def _hooks(self, watches: Mapping[str, Stopwatch]) -> Iterator[None]:
        """Keep the inputs of both models and of the distiller; time the latter and the teacher."""
        bench, timing = self.bench, ExitStack()

        def keep(side: str, module: nn.Module, args: tuple[Any, ...]) -> None:
            self._entered[side] = args[0].detach()

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._inputs = args, kwargs
            timing.enter_context(watches["losses"])

        def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            timing.close()

        with ExitStack() as stack:
            models = {"student": bench.student}
            if bench.teacher is not None:
                models["teacher"] = bench.teacher.model
                stack.enter_context(bench.teacher.observed(lambda: watches["teacher"]))
            handles = [
                entry(model).register_forward_pre_hook(partial(keep, side))
                for side, model in models.items()
            ]
            if bench.distiller is not None:
                stack.enter_context(bench.distiller.full_weights())
                handles.append(bench.distiller.register_forward_pre_hook(before, with_kwargs=True))
                handles.append(bench.distiller.register_forward_hook(after))
            for handle in handles:
                stack.callback(handle.remove)
            yield


def _loaded(batches: Iterator[Any]) -> Iterator[tuple[Any, float]]:
    """Batches, each with the seconds until it was loaded."""
    while True:
        start = time.perf_counter()
        batch = next(batches, None)
        if batch is None:
            return
        yield batch, time.perf_counter() - start


def _first(batch: Any, images: int) -> Any:
    """The first images of a batch: a list of samples, or parts with one entry per image.

    Lists of parts exist as well: a classifier's loader returns ``[images, targets, indices]``.
    """
    if isinstance(batch[0], Mapping):
        return batch[:images]
    return type(batch)(part[:images] for part in batch)
