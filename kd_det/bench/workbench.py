"""A run as its config describes it, built and ready to be examined. Nothing here trains.

Preflight, pictures and reports use :class:`Workbench`, which every host implements in
``hosts/<host>/workbench.py``; :func:`kd_det.hosts.base.open_bench` builds it.
"""

from __future__ import annotations

import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from fvcore.common.config import CfgNode
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from kd_det.bench.looks import evaluating, export_problems, load_learned, open_pre_stage
from kd_det.core.checkpoint import strip_distiller
from kd_det.core.class_map import NAMES_KEY, as_names, translated, translation
from kd_det.core.distiller import Distiller
from kd_det.core.errors import fail
from kd_det.core.taps import Tap
from kd_det.core.teacher import FrozenTeacher

Side = Literal["student", "teacher"]

_WARM_UP = 2  # forwards before the first that is timed
_GREY = torch.full((3, 480, 640), 128, dtype=torch.uint8)


@dataclass(frozen=True)
class Detections:
    """Detections of one image."""

    boxes: Tensor  # [D, 4], absolute (x1, y1, x2, y2) pixels
    classes: Tensor  # [D], from 0
    scores: Tensor  # [D]


@dataclass(frozen=True)
class PixelInput:
    """The pixels that a model expects."""

    order: str  # of the channels, "RGB" or "BGR"
    mean: tuple[float, ...]  # per channel, in that order
    std: tuple[float, ...]
    scale: float  # the largest pixel value that mean and std refer to, 255 or 1
    divisor: int  # sides are padded to a multiple of it


class Workbench(ABC):
    """One run, built.

    No method changes parameters, buffers, step counters or train modes. Random streams may
    advance.

    Args:
        cfg: a config of the host.
        model: the module that trains: the student with its distiller, on ``MODEL.DEVICE``.
        student: the stock model whose module paths the taps name.
        distiller: the losses; None without distillation.
        teacher: None without distillation, and beside a booster.
        teacher_cfg: the teacher's own config, where there is a teacher.

    Attributes:
        count_classes: the host's reading of a config: classes of its head without a background.
        data_names: the host's reading of a config: names of the classes in its training data, in
            the order of the outputs; None where they are unknown.
        pre_stage: terms whose network the run will first train on the teacher; here it is random.
        entrance: path of the student's module that receives the normalised batch.
        box_tap: where the student's sampled boxes pass, once per cascade stage; None without RoIs.
        background: position of the background among the logits of a box head.
    """

    count_classes: Callable[[CfgNode], int]
    data_names: Callable[[CfgNode], list[str] | None]
    entrance = "backbone"
    box_tap: Tap | None = None
    background: Literal["first", "last"] = "last"

    def __init__(
        self,
        cfg: CfgNode,
        model: nn.Module,
        student: nn.Module,
        distiller: Distiller | None = None,
        teacher: FrozenTeacher | None = None,
        teacher_cfg: CfgNode | None = None,
    ) -> None:
        self.cfg = cfg
        self.model = model
        self.student = student
        self.distiller = distiller
        self.teacher = teacher
        self.teacher_cfg = teacher_cfg
        self.pre_stage: list[str] = []

    # Training

    @abstractmethod
    def batches(self) -> Iterator[Any]:
        """Training batches as the run receives them from its first iteration on.

        Loaded in this process, with the run's augmentation; the same in every call, whatever is
        drawn between two batches. ``SEED`` decides (0 where it is negative). ``losses`` and
        ``pictures`` accept them unchanged.
        """

    @abstractmethod
    def losses(self, batch: Any) -> dict[str, Tensor]:
        """One training forward in the run's precision: task losses and weighted terms.

        They are in the graph of the model's parameters: differentiate them, or detach them. With
        ``SOLVER.AMP`` on a GPU they are half precision without a loss scale, as they leave the
        model in the run: scale the loss before differentiating it.
        """

    @abstractmethod
    def pictures(self, batch: Any) -> list[Tensor]:
        """The images of a batch as uint8 RGB ``[3, H, W]``, before any normalisation."""

    @abstractmethod
    def ground_truth(self, batch: Any) -> list[Detections] | Tensor:
        """The annotations of a batch, in the student's classes.

        Of detectors per image, in the pixels of :meth:`pictures` and with scores of 1; of
        classifiers the labels ``[N]``.
        """

    @abstractmethod
    def unannotated(self, pictures: Sequence[Tensor]) -> Any:
        """A batch for :meth:`losses` of images without annotations.

        Detectors get no boxes, classifiers the first class, so the task losses mean nothing.

        Args:
            pictures: uint8 RGB ``[3, H, W]``.
        """

    @abstractmethod
    def iterations(self) -> int:
        """Training iterations of the whole run."""

    # Evaluation

    @abstractmethod
    def validation_pictures(self, count: int) -> list[Tensor]:
        """The first ``count`` validation images as uint8 RGB ``[3, H, W]``, as they are on disk.

        Fewer where there are fewer, none without ``DATASETS.TEST``.
        """

    @abstractmethod
    def evaluate(self, side: Side, images: int) -> dict[str, dict[str, float]]:
        """``{"bbox": {"AP": ...}}`` or ``{"accuracy": {"top1": ...}}`` in percent.

        Each side receives images of the test size of its own config, as in its own evaluation.

        Args:
            side: the model to evaluate, on the student's data and classes. Where the teacher's
                classes are others, its predictions are translated, and those of classes that the
                student lacks do not count.
            images: how many validation images, from the first on.
        """

    @abstractmethod
    def predict(self, side: Side, picture: Tensor) -> Detections | Tensor:
        """Detections of a uint8 RGB image ``[3, H, W]``, or a classifier's probabilities ``[K]``.

        In pixels of the picture and in this side's own classes; the model resizes as in its
        evaluation.
        """

    @abstractmethod
    def example(self, side: Side) -> tuple[Any, ...]:
        """Arguments of one inference forward of :func:`side_model`, of the test size.

        The image is the first validation image, or a grey one of 4:3.
        """

    def check_export(self) -> list[str]:
        """Load the checkpoint this run would write into the stock model; a sentence per misfit."""
        arguments = self.example("student")
        return export_problems(
            self.model, self.student, self._reload, lambda model: self._outputs(model, arguments)
        )

    # Facts

    def config(self, side: Side) -> CfgNode:
        """The config of a side.

        Raises:
            KDError: the teacher of a run that has none.
        """
        side_model(self, side)
        return self.cfg if side == "student" else self.teacher_cfg

    @abstractmethod
    def pixel_input(self, side: Side) -> PixelInput:
        """The pixels that this side's model expects, read from the model that was built."""

    def num_classes(self, side: Side) -> int:
        """Classes of a side's head without a background."""
        return self.count_classes(self.config(side))

    def class_names(self, side: Side) -> list[str] | None:
        """Names of this side's classes in the order of its outputs; None where they are unknown.

        Names that are not as many as the classes belong to something else and count as unknown.
        """
        if side == "teacher" and self.teacher_cfg is None:
            return None
        given = self.cfg.KD.TEACHER.CLASS_NAMES if side == "teacher" else ()
        names = list(as_names(NAMES_KEY, given)) or self.data_names(self.config(side))
        return names if names is not None and len(names) == self.num_classes(side) else None

    @property
    def device(self) -> torch.device:
        """The device of the student."""
        return next(self.student.parameters()).device

    # For the hosts

    @abstractmethod
    def _reload(self, checkpoint: Path, folder: Path) -> nn.Module:
        """Export a checkpoint into a new folder; the stock model built from that folder alone."""

    @abstractmethod
    def _outputs(self, model: nn.Module, arguments: tuple[Any, ...]) -> dict[str, Tensor]:
        """Named tensors of one inference forward of a stock student."""

    def prepare_losses(self, weights: str) -> None:
        """Load what the losses of a run have learnt, and let terms run before their pre-stage."""
        if self.distiller is not None:
            if weights:
                load_learned(self.distiller, weights)
            given = self.cfg.KD.PRE_STAGE.WEIGHTS
            self.pre_stage = open_pre_stage(self.distiller, self.teacher, given)

    def _in_students_classes(self, classes: Tensor) -> Tensor:
        """Indices of the teacher's classes as the student's; -1 where the student has none."""
        return translated(classes, self._translation, self.num_classes("student"))

    @cached_property
    def _translation(self) -> list[int] | None:
        names = self.class_names("student"), self.class_names("teacher")
        return translation(*names, self.cfg.KD.CLASS_MAP)

    @cached_property
    def _example_picture(self) -> Tensor:
        first = self.validation_pictures(1)
        return first[0] if first else _GREY


def in_this_process(cfg: CfgNode) -> CfgNode:
    """A copy of a config that loads data without further processes, and whose seed is not negative.

    Loader processes would take longer to start than a few batches take to load.
    """
    cfg = cfg.clone()
    cfg.defrost()
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.SEED = max(cfg.SEED, 0)
    return cfg


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

    As torch counts them, in convolutions and matrix products; RoIAlign, NMS and elementwise
    operations count nothing.
    """
    arguments = workbench.example(side)
    with (
        evaluating(side_model(workbench, side)) as model,
        FlopCounterMode(display=False) as counter,
    ):
        model(*arguments)
    return counter.get_total_flops() / 2


def latency(workbench: Workbench, side: Side, repeats: int = 10) -> float:
    """Median seconds of ``repeats`` inference forwards of ``example``, after two as warm-up."""
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
