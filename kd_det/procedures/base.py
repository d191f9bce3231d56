"""The contract of a procedure: a method that chooses or changes the batches of a run, or that
trains something before the run or beside its student.

A procedure is one class, with its config node, checks, state, hooks and report of cost. A host adds
the nodes of all procedures that it supports, builds those that are on, and calls their hooks in the
order of registration.

Example:
    >>> @register
    ... class Halve(Procedure):
    ...     name = "HALVE"
    ...
    ...     def on_batch(self, batch, loop):
    ...         return loop.select(batch, range(0, loop.size(batch), 2))

``KD.HALVE.ENABLED: True`` turns it on in the config of every host.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor
from torch.utils.data import Dataset, Sampler

from kd_det.core.distiller import Distiller
from kd_det.core.errors import fail
from kd_det.core.teacher import FrozenTeacher

if TYPE_CHECKING:
    from fvcore.common.config import CfgNode

LABELS = "labels"
"""A host with this offer has one class per image. Others have boxes of many classes."""

MIXED_BATCHES = "mixed_batches"
"""Batches are ``(images, classes, indices)``, where a ``MixedBatch`` may stand for the classes."""

BOOSTER = "booster"
"""A second network can train beside the student."""

# Reads an original image of the training set by its index: floats ``[C, H, W]`` in the range of
# the host's pixels.
Read = Callable[[int], Tensor]
# ``(index, read)`` to the image in place of ``read(index)``, before augmentation; None leaves it.
# Loader processes get a copy.
ImageChange = Callable[[int, Read], "Tensor | None"]


@dataclass(frozen=True)
class TrainingSet:
    """The arguments of a procedure; ``images``, N, is the size of the training set."""

    images: int
    seed: int = 0
    rank: int = 0
    #: The class of every image, [N], where the host offers them.
    labels: Tensor | None = None


class TrainingLoop:
    """What a host's training loop offers to the hooks of a procedure."""

    def size(self, batch: Any) -> int:
        """The number of images in a batch."""
        return len(self.indices(batch))

    def select(self, batch: Any, rows: Sequence[int]) -> Any:
        """The batch of the images in ``rows``."""
        raise NotImplementedError

    def indices(self, batch: Any) -> Tensor:
        """The places of its images in the training set, int64 ``[M]``."""
        raise NotImplementedError

    def uncertainties(self) -> Tensor:
        """How uncertain the student was about each image of the last training step, ``[M]``."""
        raise NotImplementedError

    def score(self, images: Tensor, training: bool) -> Tensor:
        """The student's logits ``[M, K]`` without a gradient, with :data:`MIXED_BATCHES` only.

        ``training``: normalise with the statistics of the batch instead of the stored ones.
        """
        raise NotImplementedError

    def flops_ratio(self) -> float:
        """Operations of the teacher's forward over the student's, with :data:`MIXED_BATCHES`."""
        raise NotImplementedError


@dataclass(frozen=True)
class BeforeRun:
    """What a host offers before the first iteration."""

    cfg: CfgNode
    distiller: Distiller | None  #: None for a plain student
    teacher: FrozenTeacher | None  #: None likewise, and beside a booster
    file: Path  #: where something trained beforehand is kept for a resumed run
    resume: bool  #: take or continue what an interrupted run has left
    #: ``(model, iterations)``: trains a module whose input are the teacher's tensors by tap name
    #: and whose output are losses by name, with its own ``optimizer``.
    train: Callable[[Any, int], None]
    iterations: Callable[[int], int]  #: of so many epochs


class Procedure:
    """One method of one run; every hook does nothing unless a subclass overrides it."""

    name: ClassVar[str]  #: of its config node ``KD.<name>``, whose keys are ``defaults``
    defaults: ClassVar[Mapping[str, Any]] = {"ENABLED": False}
    needs: ClassVar[frozenset[str]] = frozenset()  #: offers that a host must have
    in_training: ClassVar[bool] = True  #: False: never built, has hooks of classes only
    chooses_images: ClassVar[bool] = False  #: has a sampler or changes images; one of a run may
    reads_uncertainties: ClassVar[bool] = False  #: needs :meth:`TrainingLoop.uncertainties`
    old_names: ClassVar[tuple[str, ...]] = ()  #: of its state in checkpoints of former versions

    def __init__(self, cfg: Any, training_set: TrainingSet) -> None:
        """Build the procedure of a run; raises KDError for values that do not fit."""

    @classmethod
    def is_on(cls, cfg: CfgNode) -> bool:
        """Whether a run has this procedure."""
        return bool(cfg.KD.ENABLED and cfg.KD[cls.name].ENABLED)

    @classmethod
    def check(cls, cfg: CfgNode, offers: frozenset[str]) -> None:
        """Raise KDError for what the config or a host with these offers cannot do."""

    @classmethod
    def on_losses_built(
        cls, cfg: CfgNode, distiller: Distiller | None, teacher: FrozenTeacher | None
    ) -> bool:
        """Load what the losses need, before anything is written; True if something was loaded."""
        return False

    @classmethod
    def before_run(cls, run: BeforeRun) -> bool:
        """Train or load what the losses need; True if something was done. On every process."""
        return False

    def planned_config(self, cfg: CfgNode) -> CfgNode:
        """The config whose ``SOLVER`` has the iterations that the run really takes."""
        return cfg

    def periods(self, length: int, images: int) -> list[tuple[int, int]]:
        """``(epochs or iterations, images)`` of each part of the run."""
        return [(length, images)]

    @property
    def current_period(self) -> int:
        """Changes when the sampler's order does: loaders take a new iterator then."""
        return 0

    def sampler(
        self, seed: int, rank: int, world: int, groups: Tensor | None = None
    ) -> Sampler[int] | None:
        """Indices of one epoch, or an endless stream where the host counts iterations.

        ``groups``, ``[N]`` bool: images of one batch must have the same value.
        """
        return None

    def image_change(self) -> ImageChange | None:
        """The change of images before their augmentation; None leaves all as they are."""
        return None

    def on_batch(self, batch: Any, loop: TrainingLoop) -> Any:
        """The batch that is trained on."""
        return batch

    def on_step(self, batch: Any, loop: TrainingLoop) -> None:
        """After the losses of a batch are computed; a checkpoint may follow."""

    def on_epoch_end(self) -> None:
        """After an epoch, on every process, before a checkpoint."""

    def synchronize(self) -> None:
        """Exchange what ranks have seen; on every process before :meth:`state_dict`."""

    def state_dict(self) -> dict[str, Any]:
        """Everything that its future depends on."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where the state was saved; raises KDError for one of another run."""

    def scalars(self) -> dict[str, float]:
        """Numbers to log with the losses, by name."""
        return {}

    def cost(self, loop: TrainingLoop) -> tuple[float, float] | None:
        """Computation as a share of plain distillation's: by the published formula, and measured
        so far. On every process, after :meth:`synchronize`.
        """
        return None


PROCEDURES: dict[str, type[Procedure]] = {}
"""Every procedure by its name; their hooks are called in this order."""


def register(procedure: type[Procedure]) -> type[Procedure]:
    """Decorator that adds a procedure to :data:`PROCEDURES`."""
    if PROCEDURES.setdefault(procedure.name, procedure) is not procedure:
        fail(
            expected="a procedure with a name of its own",
            received=f"'{procedure.name}', which is registered",
            remedy="choose another name",
        )
    return procedure


def add_procedures(cfg: CfgNode, offers: frozenset[str]) -> None:
    """Add the nodes of all procedures that a host with these offers supports, in place."""
    for procedure in PROCEDURES.values():
        if procedure.needs <= offers:
            cfg.KD[procedure.name] = type(cfg)(copy.deepcopy(dict(procedure.defaults)))


def refuse_unsupported(key: str) -> None:
    """Raise KDError for an unknown key if it is that of a procedure the host does not support."""
    node, _, rest = key.partition(".")
    name = rest.partition(".")[0]
    if node == "KD" and name in PROCEDURES:
        fail(
            expected="procedures that the HOST of this config supports",
            received=f"'{key}', whose procedure needs {', '.join(sorted(PROCEDURES[name].needs))}",
            remedy="remove the key, or use another HOST, such as classification",
        )


def active_procedures(cfg: CfgNode) -> list[type[Procedure]]:
    """The procedures that a run has."""
    # The config of a plain student may have no nodes at all.
    return [p for p in PROCEDURES.values() if p.name in cfg.KD and p.is_on(cfg)]


def check_procedures(cfg: CfgNode, offers: frozenset[str]) -> None:
    """Raise KDError for what the procedures of a run cannot do, or if two choose its images."""
    active = active_procedures(cfg)
    for procedure in active:
        procedure.check(cfg, offers)
    choosing = [procedure.name for procedure in active if procedure.chooses_images]
    if len(choosing) > 1:
        fail(
            expected="one procedure that chooses the images of a run",
            received=" and ".join(f"KD.{name}" for name in choosing),
            remedy="disable all but one",
        )


def reads_uncertainties(cfg: CfgNode) -> bool:
    """Whether a run needs values of its images; see :meth:`TrainingLoop.uncertainties`."""
    return any(procedure.reads_uncertainties for procedure in active_procedures(cfg))


def on_losses_built(
    cfg: CfgNode, distiller: Distiller | None, teacher: FrozenTeacher | None
) -> bool:
    """:meth:`Procedure.on_losses_built` of all procedures of a run."""
    loaded = [p.on_losses_built(cfg, distiller, teacher) for p in active_procedures(cfg)]
    return any(loaded)


def before_run(run: BeforeRun) -> bool:
    """:meth:`Procedure.before_run` of all procedures of a run."""
    done = [procedure.before_run(run) for procedure in active_procedures(run.cfg)]
    return any(done)


class Procedures(tuple[Procedure, ...]):
    """The procedures of a run during its training, in order."""

    @property
    def chooser(self) -> Procedure:
        """The procedure that chooses the images, or one that changes nothing."""
        return next((p for p in self if p.chooses_images), Procedure(None, TrainingSet(0)))

    def planned_config(self, cfg: CfgNode) -> CfgNode:
        for procedure in self:
            cfg = procedure.planned_config(cfg)
        return cfg

    def on_batch(self, batch: Any, loop: TrainingLoop) -> Any:
        for procedure in self:
            batch = procedure.on_batch(batch, loop)
        return batch

    def on_step(self, batch: Any, loop: TrainingLoop) -> None:
        for procedure in self:
            procedure.on_step(batch, loop)

    def synchronize(self) -> None:
        for procedure in self:
            procedure.synchronize()

    def scalars(self) -> dict[str, float]:
        return {name: value for p in self for name, value in p.scalars().items()}

    def costs(self, loop: TrainingLoop) -> dict[str, float]:
        """``{"formula": ..., "measured": ...}`` in percent of plain distillation's computation.

        Empty if no procedure reports a cost. Every process must call it.
        """
        self.synchronize()
        shares = [share for p in self if (share := p.cost(loop)) is not None]
        if not shares:
            return {}
        formula, measured = (100 * math.prod(column) for column in zip(*shares, strict=True))
        return {"formula": formula, "measured": measured}

    def state_dict(self) -> dict[str, Any]:
        """The states by name, as the entry ``procedures`` of a checkpoint."""
        return {"procedures": {procedure.name: procedure.state_dict() for procedure in self}}

    def load_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Continue from a checkpoint, also of a former version; KDError if it is another run's."""
        states = checkpoint.get("procedures")
        if states is None:
            states = {
                name: checkpoint[old]
                for name, procedure in PROCEDURES.items()
                for old in procedure.old_names
                if old in checkpoint
            }
        own = {procedure.name for procedure in self}
        for name in sorted(own.symmetric_difference(states)):
            fail(
                expected=f"to resume a run with KD.{name}.ENABLED as it began",
                received=f"{name in own} now, {name in states} then",
                remedy="set it as in the config.yaml of OUTPUT_DIR, or start afresh",
            )
        for procedure in self:
            procedure.load_state_dict(states[procedure.name])


def build_procedures(cfg: CfgNode, training_set: Callable[[], TrainingSet]) -> Procedures:
    """The procedures of a run during its training; ``training_set`` is called if there are any."""
    kinds = [procedure for procedure in active_procedures(cfg) if procedure.in_training]
    if not kinds:
        return Procedures()
    facts = training_set()
    return Procedures(procedure(cfg, facts) for procedure in kinds)


class ChangedImages(Dataset[tuple[Any, Any, int]]):
    """A data set whose images a procedure changes at the moment they are read.

    ``dataset`` has ``(image, target)`` by index, floating ``[C, H, W]``, not augmented. Items
    are ``(image, target, index)``, changed, then augmented by ``transform``; nothing is stored.
    """

    def __init__(
        self,
        dataset: Any,
        change: ImageChange | None = None,
        transform: Callable[[Tensor], Any] | None = None,
    ) -> None:
        self.dataset, self.change, self.transform = dataset, change, transform

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, Any, int]:
        image, target = self.dataset[index]
        if self.change is not None:
            changed = self.change(index, lambda i: image if i == index else self.dataset[i][0])
            image = image if changed is None else changed
        return image if self.transform is None else self.transform(image), target, index


class PeriodLoader:
    """Batches of a whole run, from a new iterator of ``loader`` in every period.

    Loader processes fetch ahead: their iterator would still have batches of the period before. The
    ``loader`` is endless, in the order of the procedures' sampler; ``length`` is that of the run in
    iterations.
    """

    def __init__(self, loader: Iterable[Any], procedures: Procedures, length: int) -> None:
        self.loader, self.procedures, self.length = loader, procedures, length

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Any]:
        chooser = self.procedures.chooser
        while True:
            period = chooser.current_period
            for batch in self.loader:
                yield batch
                if chooser.current_period != period:
                    break
