"""A run as its config describes it, built and ready to be looked at. Nothing here trains.

:class:`Workbench` is what preflight, pictures and reports need of a run on any host. Every host has
its own in ``hosts/<host>/workbench.py``; :func:`kd_det.hosts.base.open_bench` builds it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from fvcore.common.config import CfgNode
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from kd_det.bench.looks import evaluating
from kd_det.core.checkpoint import strip_distiller
from kd_det.core.distiller import Distiller
from kd_det.core.errors import fail
from kd_det.core.taps import Tap
from kd_det.core.teacher import FrozenTeacher

Side = Literal["student", "teacher"]

_WARM_UP = 2  # forwards before the first that is timed


@dataclass(frozen=True)
class Detections:
    """What a detector sees on one image.

    Attributes:
        boxes: ``[D, 4]`` absolute ``(x1, y1, x2, y2)`` pixels.
        classes: ``[D]``, from 0.
        scores: ``[D]``.
    """

    boxes: Tensor
    classes: Tensor
    scores: Tensor


@dataclass(frozen=True)
class PixelInput:
    """What a model expects of its pixels.

    Attributes:
        order: channel order, ``"RGB"`` or ``"BGR"``.
        mean: per channel, in that order.
        std: likewise.
        scale: the largest pixel value these refer to, 255 or 1.
        divisor: sides are padded to a multiple of it.
    """

    order: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    scale: float
    divisor: int


class Workbench(Protocol):
    """One run, built.

    A look changes nothing: every method leaves parameters, buffers, counters of steps and modes
    as they were. Random streams may have moved on.
    """

    cfg: CfgNode
    teacher_cfg: CfgNode | None
    model: nn.Module
    """What trains: the student with its distiller, on ``MODEL.DEVICE``."""
    student: nn.Module
    """The stock model whose module paths the taps name."""
    teacher: FrozenTeacher | None
    """None without distillation, and beside a booster."""
    distiller: Distiller | None
    pre_stage: list[str]
    """Terms whose network the run will first train on the teacher; here it is still random."""
    box_tap: Tap | None
    """Where the student's sampled boxes pass; None without RoIs. See :meth:`sampled_boxes`."""

    def batches(self) -> Iterator[Any]:
        """Training batches as the run sees them from its first iteration on.

        Loaded in this process, with the run's augmentation; the same in every call, whatever is
        drawn between two batches. ``SEED`` decides (0 where it is negative). ``losses`` and
        ``pictures`` take them as they are.
        """
        ...

    def losses(self, batch: Any) -> dict[str, Tensor]:
        """One training forward in the run's precision: task losses and weighted terms.

        They are in the graph of the model's parameters: differentiate them, or detach them. With
        ``SOLVER.AMP`` on a GPU they are half precision without a loss scale, as they leave the
        model in the run: scale what you differentiate.
        """
        ...

    def sampled_boxes(self, capture: Any) -> list[Tensor]:
        """What ``box_tap`` delivers as tensors: per image ``[R, 4]`` in pixels of the model's
        padded input. Of a cascade the first stage's, which are the sampled proposals.
        """
        ...

    def pictures(self, batch: Any) -> list[Tensor]:
        """The images of a batch as uint8 RGB ``[3, H, W]``, before any normalisation."""
        ...

    def ground_truth(self, batch: Any) -> list[Detections] | Tensor:
        """What a batch's annotations say, in the student's classes.

        Of detectors per image, in the pixels of :meth:`pictures` and with scores of 1; of
        classifiers the labels ``[N]``.
        """
        ...

    def unannotated(self, pictures: Sequence[Tensor]) -> Any:
        """A batch for :meth:`losses` of images that nobody has annotated.

        Detectors get no boxes, classifiers the first class, so that losses of the task say nothing.

        Args:
            pictures: uint8 RGB ``[3, H, W]``.
        """
        ...

    def iterations(self) -> int:
        """Training iterations of the whole run."""
        ...

    def validation_pictures(self, count: int) -> list[Tensor]:
        """The first ``count`` validation images as uint8 RGB ``[3, H, W]``, as they are on disk.

        Fewer where there are fewer, none without ``DATASETS.TEST``.
        """
        ...

    def pixel_input(self, side: Side) -> PixelInput:
        """What this side's model expects of its pixels, read from the model that was built."""
        ...

    def class_names(self, side: Side) -> list[str] | None:
        """Names of this side's classes in the order of its outputs; None if nobody knows them."""
        ...

    def evaluate(self, side: Side, images: int) -> dict[str, dict[str, float]]:
        """``{"bbox": {"AP": ...}}`` or ``{"accuracy": {"top1": ...}}`` in percent.

        Each side sees images of the test size of its own config, as in its own evaluation.

        Args:
            side: whom to evaluate, by the student's data and classes. Where the teacher's classes
                are others, its answers are translated, and those of classes the student lacks do
                not count.
            images: how many validation images, from the first on.
        """
        ...

    def predict(self, side: Side, picture: Tensor) -> Detections | Tensor:
        """Detections of a uint8 RGB image ``[3, H, W]``, or a classifier's probabilities ``[K]``.

        In pixels of the picture and in this side's own classes; the model resizes as in its
        evaluation.
        """
        ...

    def example(self, side: Side) -> tuple[Any, ...]:
        """Arguments of one inference forward of :func:`side_model`, of the test size, to count
        its operations and measure its time: the first validation image, or a grey one of 4:3.
        """
        ...

    def check_export(self) -> list[str]:
        """Load the checkpoint this run would write into the stock model; what does not fit.

        Keys must match exactly and outputs must be equal. Nothing is left on disk.
        """
        ...


def side_model(workbench: Workbench, side: Side) -> nn.Module:
    """The stock model of a side.

    Raises:
        KDError: the teacher of a run that has none.
    """
    if side == "student":
        return workbench.student
    if workbench.teacher is None:
        fail(
            expected="a run with a frozen teacher",
            received="one without",
            remedy="set KD.ENABLED True and KD.TEACHER, or look at the student alone",
        )
    return workbench.teacher.model


def parameters(model: nn.Module) -> int:
    """Number of parameters of a stock model, without those of a distiller beside it."""
    return sum(p.numel() for p in strip_distiller(dict(model.named_parameters())).values())


def macs(workbench: Workbench, side: Side) -> float:
    """Multiply-accumulates of one inference forward of ``example``.

    As torch counts them, in convolutions and matrix products; RoIAlign, NMS and whatever is
    elementwise count nothing.
    """
    arguments = workbench.example(side)
    with (
        evaluating(side_model(workbench, side)) as model,
        FlopCounterMode(display=False) as counter,
    ):
        model(*arguments)
    return counter.get_total_flops() / 2


def latency(workbench: Workbench, side: Side, repeats: int = 10) -> float:
    """Median seconds of one inference forward of ``example``, after two that are not counted.

    Args:
        workbench: whose models are measured where they are.
        side: which of them.
        repeats: forwards that are timed.
    """
    arguments, times = workbench.example(side), []
    with evaluating(side_model(workbench, side)) as model:
        on_gpu = next(model.parameters()).is_cuda
        for _ in range(_WARM_UP + repeats):
            if on_gpu:
                torch.cuda.synchronize()
            start = time.perf_counter()
            model(*arguments)
            if on_gpu:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
    return statistics.median(times[_WARM_UP:])
