"""The contract of a detector's head: one object holds all that the head offers to distillation.

A head that distillation should know is one :class:`Head` in the ``heads`` of its host's
:class:`~kd_det.hosts.detection.family.Family`. Checks, class maps, recording, the teacher's pass
and the values of images go over that list; nothing else knows a head by its name.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from kd_det.core.class_map import ClassMap, map_logits
from kd_det.core.errors import fail
from kd_det.core.loss import TapSpec
from kd_det.core.taps import Tap

#: Names of the taps of a box branch, on every host.
BOX_TAPS = ("box_pooled", "box_features", "box_logits")

Specs = dict[str, TapSpec | list[TapSpec]]

# A stock detector. As nn.Module its attributes would all be "Tensor | Module".
Detector = Any


@dataclass(frozen=True)
class HeadTap:
    """What one tap of a head delivers.

    Attributes:
        rows: what dimension 0 counts: ``"images"``, ``"RoIs"``, ``"positive RoIs"``, ``"anchors"``
            or something else. Only taps with the same rows correspond.
        activation: what the head was trained with; None for what is no logit.
        background: where the background stands among the channels, if there is one.
        classes: whether the channels are the classes, which a class map translates.
    """

    rows: str
    activation: Literal["softmax", "sigmoid"] | None = None
    background: Literal["first", "last"] | None = None
    classes: bool = False

    def mapped(self, logits: Tensor, class_map: ClassMap | None) -> Tensor:
        """The teacher's class logits ``[..., K_t]`` as logits of the student's classes."""
        return map_logits(logits, class_map, self.background, self.activation == "softmax")


@dataclass(frozen=True)
class TapTable:
    """What one detector offers.

    Attributes:
        taps: where maps of the backbone are recorded, by tap name.
        specs: of these maps and of the taps of the heads.
        levels: tap names of the maps that anchors are on, in the anchor generator's order.
        heads: the taps of the heads, as the options of the model make them.
    """

    model: Detector
    taps: dict[str, Tap]
    specs: Specs
    levels: list[str]
    heads: Mapping[str, HeadTap] = field(default_factory=dict)


@dataclass(frozen=True)
class Call:
    """A method to record that is no module's forward, so that no hook reaches it.

    Attributes:
        path: of the module that has the method; empty for the model itself.
        argument: position of the argument to keep; None keeps the result.
    """

    path: str
    method: str
    argument: int | None = None


@dataclass(frozen=True)
class Step:
    """One training step as the heads see it.

    Attributes:
        student: the stock student; None in a pre-stage, where the teacher is alone.
        recorded: what the student's forward left, by the names of :meth:`Head.places` and of the
            family. A head may store here what it computes for both sides.
        teacher: for the teacher's values, the stock teacher in eval mode and without gradients.
        features: the output of its backbone, of the whole padded batch.
        pixels: the input of its backbone, ``[N, 3, H, W]``.
        class_map: from the teacher's classes to the student's; None where they agree.
    """

    student: Detector
    recorded: dict[str, Any]
    batch: Any = None
    levels: Sequence[str] = ()
    teacher: Detector = None
    features: Mapping[str, Tensor] = field(default_factory=dict)
    pixels: Tensor | None = None
    class_map: ClassMap | None = None


class Head(ABC):
    """What one head of a detector offers to distillation.

    Attributes:
        taps: by tap name, what it delivers in a model with default options.
        uncertain: the tap whose logits tell how uncertain a student is about an image (KCD); None
            for a head that does not tell.
    """

    taps: ClassVar[Mapping[str, HeadTap]]
    uncertain: ClassVar[str | None] = None

    def describe(self, model: Detector) -> Mapping[str, HeadTap]:
        """:attr:`taps` as the options of ``model`` make them."""
        return self.taps

    @abstractmethod
    def specs(self, model: Detector) -> Specs:
        """The spec of each tap that ``model`` has; empty where it has no such head."""

    def teacher_specs(self, student: TapTable, teacher: TapTable, wanted: Collection[str]) -> Specs:
        """The specs of the teacher's values, aligned with this student.

        Rows, class counts and the activation of a loss are compared for every head already.
        ``wanted`` are the taps of this head that terms use.

        Raises:
            KDError: the values of the wanted taps do not correspond.
        """
        return self.specs(teacher.model)

    @abstractmethod
    def places(self, model: Detector, wanted: Collection[str]) -> Mapping[str, Tap | Call]:
        """What to record on the student for the wanted taps of either side.

        Names beside those of taps are the head's own (sampled boxes, matched ground truth).
        """

    def student_values(self, step: Step, wanted: Collection[str]) -> dict[str, Any]:
        """The student's value of each wanted tap, with its gradient graph."""
        return {name: step.recorded[name] for name in wanted}

    @abstractmethod
    def teacher_values(self, step: Step, wanted: Collection[str]) -> dict[str, Any]:
        """The teacher's value of each wanted tap, row by row aligned with the student's."""

    def uncertainty_places(self, model: Detector) -> Mapping[str, Tap | Call]:
        """What :meth:`image_values` needs recorded."""
        return self.places(model, [self.uncertain] if self.uncertain else [])

    def image_values(self, step: Step) -> Tensor:
        """How uncertain the student is about each image, ``[N]`` in 0..1, without a gradient."""
        raise NotImplementedError


@contextmanager
def recorded_calls(model: nn.Module, calls: Mapping[str, Call]) -> Iterator[dict[str, Any]]:
    """What the last call of each method gave, by name, while the block runs."""
    captures: dict[str, Any] = {}
    replaced = []
    try:
        for name, call in calls.items():
            owner = model.get_submodule(call.path)
            replaced.append((owner, call.method, vars(owner).get(call.method)))
            setattr(owner, call.method, _recording(name, call, owner, captures))
        yield captures
    finally:
        for owner, method, own in reversed(replaced):
            # Without an attribute of the instance the method of the class is there again.
            delattr(owner, method)
            if own is not None:
                setattr(owner, method, own)


def _recording(name: str, call: Call, owner: nn.Module, captures: dict[str, Any]) -> Any:
    stock = getattr(owner, call.method)

    def record(*args: Any, **kwargs: Any) -> Any:
        result = stock(*args, **kwargs)
        captures[name] = result if call.argument is None else args[call.argument]
        return result

    return record


def check_anchors(
    student: TapTable, teacher: TapTable, per_cell: Callable[[Detector], Sequence[int]]
) -> None:
    """Refuse dense heads whose rows do not correspond; ``per_cell``: anchors of each level."""
    layouts = [dict(zip(t.levels, per_cell(t.model), strict=True)) for t in (student, teacher)]
    if layouts[0] != layouts[1]:
        fail(
            expected="dense heads with the same levels and the same anchors per cell",
            received=f"student {layouts[0]}, teacher {layouts[1]}",
            remedy="use the same levels and anchors on both sides, or distil features",
        )


def own_channel(masks: Tensor, classes: Tensor) -> Tensor:
    """``[R, K, M, M] -> [R, M, M]``: of every row the channel of its class.

    The other channels are not trained and hold noise.
    """
    if masks.shape[1] == 1:  # a class-agnostic head
        return masks[:, 0]
    return masks[torch.arange(len(classes), device=masks.device), classes]
