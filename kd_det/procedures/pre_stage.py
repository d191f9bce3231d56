"""The pre-stage: networks that losses need learn from the frozen teacher alone, before a run.

The result belongs to a teacher and its taps, not to a student. It is a file of its own that any
later run with the same teacher loads instead of training again.

Example:
    >>> losses = pre_stage_losses(distiller)
    >>> model = PreStageModel(losses)  # its parameters join the pre-stage's optimiser
    >>> sum(model(teacher_taps.read()).values()).backward()  # ... in a loop
    >>> model.finish()
    >>> save_pre_stage("pre_stage.pth", losses, teacher_fingerprint(teacher))
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kd_det.core.distiller import Distiller
from kd_det.core.distributed import rank, world_size
from kd_det.core.errors import fail
from kd_det.core.teacher import FrozenTeacher
from kd_det.losses.mhgd.pre_training import PreStageLoss
from kd_det.procedures.base import BeforeRun, Procedure, register

if TYPE_CHECKING:
    from fvcore.common.config import CfgNode

# Term name to its loss and the teacher taps it reads, in order.
PreStageLosses = Mapping[str, tuple[PreStageLoss, Sequence[str]]]

_FORMAT = "kd_det pre-stage 1"
_SHOWN_DIGITS = 12

logger = logging.getLogger(__name__)


@register
class PreStage(Procedure):
    """What losses with a network of their own (MHGD) learn from the teacher alone, beforehand."""

    name = "PRE_STAGE"
    defaults: ClassVar[Mapping[str, Any]] = {
        # A finished pre-stage of the same teacher and taps; empty trains one into OUTPUT_DIR.
        "WEIGHTS": "",
        # SGD as in MHGD, section 5 of its supplement.
        "EPOCHS": 20,
        "MAX_ITER": 0,  # above 0: iterations instead of epochs
        "BASE_LR": 0.1,  # constant
        "MOMENTUM": 0.9,  # of SGD
        "NESTEROV": True,  # momentum in this form
        # Its code adds 5e-4 * sum w^2: twice what an optimiser calls a decay of 5e-4.
        "WEIGHT_DECAY": 0.001,
    }
    in_training = False

    @classmethod
    def is_on(cls, cfg: CfgNode) -> bool:
        """With every distillation; the losses decide whether there is something to do."""
        return bool(cfg.KD.ENABLED)

    @classmethod
    def on_losses_built(
        cls, cfg: CfgNode, distiller: Distiller | None, teacher: FrozenTeacher | None
    ) -> bool:
        """Load ``KD.PRE_STAGE.WEIGHTS``, which only a run whose terms have a pre-stage may name."""
        given = cfg.KD.PRE_STAGE.WEIGHTS
        if not given:
            return False
        needed = pre_stage_losses(distiller) if distiller is not None else {}
        if not needed:
            fail(
                expected="KD.PRE_STAGE.WEIGHTS only with a term that has a pre-stage, such as MHGD",
                received=f"'{given}' and terms {', '.join(cfg.KD.TERMS)}",
                remedy="leave it empty",
            )
        losses = _unready(needed)
        if losses and teacher is not None:
            load_pre_stage(given, losses, teacher_fingerprint(teacher))
        return bool(losses)

    @classmethod
    def before_run(cls, run: BeforeRun) -> bool:
        """Train what the terms need, or take the finished file of an interrupted run.

        Nothing is done where no term needs a pre-stage or all have theirs already, from a file,
        a checkpoint or an earlier stage of the run. A finished file without ``resume`` is refused.
        """
        losses = _unready(pre_stage_losses(run.distiller)) if run.distiller is not None else {}
        if not losses or run.teacher is None:
            return False
        if run.file.is_file() and not run.resume:
            fail(
                expected="OUTPUT_DIR without a finished pre-stage",
                received=f"'{run.file}' of another run",
                remedy=f"add --resume to continue that run, set KD.PRE_STAGE.WEIGHTS {run.file} to "
                "use it elsewhere, or choose another OUTPUT_DIR",
            )
        fingerprint = teacher_fingerprint(run.teacher)
        if run.file.is_file():
            load_pre_stage(run.file, losses, fingerprint)
            return True
        node = run.cfg.KD.PRE_STAGE
        iterations = node.MAX_ITER or run.iterations(node.EPOCHS)
        if iterations < 1:
            fail(
                expected="a pre-stage of at least one iteration",
                received=f"KD.PRE_STAGE.EPOCHS {node.EPOCHS}, MAX_ITER {node.MAX_ITER}",
                remedy="use the default 20 epochs, or give a finished one as KD.PRE_STAGE.WEIGHTS",
            )
        logger.info("pre-stage: %d iterations on the teacher alone", iterations)
        model = PreStageModel(losses)
        run.train(model, iterations)
        model.finish()
        if rank() == 0:
            save_pre_stage(run.file, losses, fingerprint)
        if world_size() > 1:
            dist.barrier()
        return True


def _unready(losses: PreStageLosses) -> dict[str, tuple[PreStageLoss, Sequence[str]]]:
    return {name: entry for name, entry in losses.items() if not entry[0].is_ready}


def pre_stage_losses(distiller: Distiller) -> dict[str, tuple[PreStageLoss, list[str]]]:
    """The terms that need a pre-stage: name to loss and teacher taps. Empty if none does."""
    return {
        term.name: (loss, [tap for _, tap in term.taps])
        for term in distiller.specs
        if isinstance(loss := distiller.terms[term.name], PreStageLoss)
    }


class PreStageModel(nn.Module):
    """The networks of all terms that learn beforehand, as one module to train.

    Other parts of the losses, such as adaptors for the student, are not among its parameters.
    """

    def __init__(self, losses: PreStageLosses) -> None:
        super().__init__()
        self._losses = {name: (loss, tuple(taps)) for name, (loss, taps) in losses.items()}
        self.networks = nn.ModuleDict({name: loss.network for name, (loss, _) in losses.items()})
        self.idle: list[str] = []  # networks whose loss in the last batch was zero
        for loss, _ in self._losses.values():
            loss.start_pre_stage()

    @property
    def taps(self) -> set[str]:
        """Names of the teacher's taps that :meth:`forward` reads."""
        return {tap for _, taps in self._losses.values() for tap in taps}

    def forward(self, teacher: Mapping[str, Any]) -> dict[str, Tensor]:
        """Scalar losses by term name; a loop sums them.

        Args:
            teacher: recorded teacher tensors by tap name; a list where a name stands for several.
        """
        losses = {
            name: loss.pre_stage_loss(_flatten([teacher[tap] for tap in taps]))
            for name, (loss, taps) in self._losses.items()
        }
        self.idle = [name for name, loss in losses.items() if not loss.detach().any()]
        return losses

    def optimizer(
        self, lr: float, momentum: float, nesterov: bool, weight_decay: float
    ) -> torch.optim.Optimizer:
        """SGD on the networks whose loss in the last batch was not zero.

        A single sample has no relations: without this, momentum and weight decay would move the
        network all the same.
        """
        return _PreStageSGD(
            self, lr=lr, momentum=momentum, nesterov=nesterov, weight_decay=weight_decay
        )

    def finish(self) -> None:
        """Freeze all networks; their losses are ready."""
        for loss, _ in self._losses.values():
            loss.finish_pre_stage()


class _PreStageSGD(torch.optim.SGD):
    def __init__(self, model: PreStageModel, **arguments: Any) -> None:
        super().__init__(model.parameters(), **arguments)
        self._model = model

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        # Lightning's forward and backward pass are in the closure.
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        for name in self._model.idle:
            for parameter in self._model.networks[name].parameters():
                parameter.grad = None
        super().step()
        return result


def save_pre_stage(path: str | Path, losses: PreStageLosses | Distiller, teacher: str) -> None:
    """Write the finished networks and what they belong to, as one file, completely or not at all.

    ``teacher`` is the :func:`teacher_fingerprint` of the teacher they were trained on.
    """
    entries = []
    for name, (loss, taps) in _as_losses(losses).items():
        if not loss.is_ready:
            fail(
                expected=f"the pre-stage of term '{name}' to be finished before it is saved",
                received="an untrained or still learning network",
                remedy="call PreStageModel.finish() after training",
            )
        entries.append({**_identity(loss, taps), "state": loss.pre_stage_state()})
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        torch.save({"format": _FORMAT, "teacher": teacher, "entries": entries}, temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_pre_stage(path: str | Path, losses: PreStageLosses | Distiller, teacher: str) -> None:
    """Give the losses the networks of a file; they are ready afterwards.

    Terms are recognised by loss, hyper-parameters, taps and teacher widths, not by name.

    Raises:
        KDError: no such file, not a pre-stage, or one of another teacher, taps or
            hyper-parameters; the message names both sides. No loss is changed.
    """
    content, losses = _read(path), _as_losses(losses)
    entries = content["entries"]
    found = {}
    for name, (loss, taps) in losses.items():
        wanted = _identity(loss, taps)
        matching = [e for e in entries if all(e[key] == wanted[key] for key in wanted)]
        if matching:
            found[name] = matching[0]["state"]
    if content["teacher"] != teacher or len(found) < len(losses):
        fail(
            expected=f"'{path}' to hold a pre-stage of this run: "
            + _describe(teacher, [_identity(loss, taps) for loss, taps in losses.values()]),
            received=_describe(content["teacher"], entries),
            remedy="give the file of this teacher and these taps, or leave KD.PRE_STAGE.WEIGHTS "
            "empty to train one",
        )
    for name, state in found.items():
        losses[name][0].load_pre_stage_state(state)


def teacher_fingerprint(model: nn.Module | FrozenTeacher) -> str:
    """SHA-256 over the keys, dtypes, shapes and bytes of a model's state, as 64 hex digits.

    Equal on every device. Converting the model to another dtype changes it.
    """
    module = model.model if isinstance(model, FrozenTeacher) else model
    digest = hashlib.sha256()
    for key, tensor in sorted(module.state_dict().items()):
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
        digest.update(memoryview(data.numpy()))
    return digest.hexdigest()


def _as_losses(losses: PreStageLosses | Distiller) -> PreStageLosses:
    return pre_stage_losses(losses) if isinstance(losses, Distiller) else losses


def _identity(loss: PreStageLoss, taps: Sequence[str]) -> dict[str, Any]:
    return {"taps": list(taps), "fingerprint": loss.fingerprint()}


def _describe(teacher: str, entries: Sequence[Mapping[str, Any]]) -> str:
    terms = [
        f"{', '.join(f'{k} {v}' for k, v in entry['fingerprint'].items())} on "
        f"{', '.join(entry['taps'])}"
        for entry in entries
    ]
    return f"teacher {teacher[:_SHOWN_DIGITS]}, {'; '.join(terms) or 'no terms'}"


def _read(path: str | Path) -> dict[str, Any]:
    if not Path(path).is_file():
        fail(
            expected="a pre-stage file",
            received=f"'{path}', which does not exist",
            remedy="leave KD.PRE_STAGE.WEIGHTS empty to train one",
        )
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file may raise nearly anything
        received = type(error).__name__
    else:
        if isinstance(content, dict) and content.get("format") == _FORMAT:
            return content
        received = "another kind of file"
    fail(
        expected=f"'{path}' to be a pre-stage that save_pre_stage wrote",
        received=received,
        remedy="give the right file, or leave KD.PRE_STAGE.WEIGHTS empty to train one",
    )


def _flatten(values: Sequence[Any]) -> list[Tensor]:
    flat: list[Tensor] = []
    for value in values:
        flat.extend(value if isinstance(value, (list, tuple)) else [value])
    return [tensor.detach() for tensor in flat]
