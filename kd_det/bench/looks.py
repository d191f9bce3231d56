"""What workbenches share: forwards that leave a model as it was, and batches that repeat."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from kd_det.core.checkpoint import DISTILLER_PREFIX, load_distiller, read_weights
from kd_det.core.distiller import Distiller
from kd_det.core.errors import KDError
from kd_det.core.teacher import FrozenTeacher
from kd_det.procedures.pre_stage import load_pre_stage, pre_stage_losses, teacher_fingerprint

# Between two evaluations of the same weights on a GPU; nothing on a CPU.
_RTOL, _ATOL = 1e-5, 1e-6


@contextmanager
def modes_kept(*models: nn.Module) -> Iterator[None]:
    """Train and eval modes may change inside; every module has its own mode again afterwards."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """The model in eval mode and without gradients; see :func:`modes_kept`."""
    with modes_kept(model), torch.no_grad():
        yield model.eval()


def training_losses(
    model: nn.Module, distiller: Distiller | None, *arguments: Any
) -> dict[str, Tensor]:
    """The losses of one training forward that changes nothing but the random streams.

    They are in the graph of the model's own parameters. BatchNorm's statistics and all other
    buffers are copies; the step of schedules and balance stays.

    Args:
        model: what trains.
        distiller: the part of it that counts steps.
        *arguments: of the model's forward.
    """
    with modes_kept(model):
        model.train()
        if distiller is not None:
            # Of this module alone: it counts the steps, and the losses inside must train.
            distiller.training = False
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        losses: dict[str, Tensor] = functional_call(model, buffers, arguments)
        return losses


def repeatable(loader: Iterable[Any], seed_all: Callable[[int], Any], seed: int) -> Iterator[Any]:
    """Batches of a loader in this process, the same whatever is drawn between two of them.

    Args:
        loader: draws its augmentation from global streams.
        seed_all: seeds these streams.
        seed: of the first batch; each further one has the next.
    """
    batches, end = iter(loader), object()
    seed_all(seed)
    while (batch := next(batches, end)) is not end:
        yield batch
        seed += 1
        seed_all(seed)


def load_learned(distiller: Distiller, weights: str) -> None:
    """Take over what the losses of a run have learnt, if its checkpoint is one of a distillation.

    Raises:
        KDError: the checkpoint is one of other terms.
    """
    if any(key.startswith(DISTILLER_PREFIX) for key in read_weights(weights, keep_distiller=True)):
        load_distiller(distiller, weights)


def open_pre_stage(distiller: Distiller, teacher: FrozenTeacher | None, given: str) -> list[str]:
    """Let terms run whose network the run will first train on the teacher; names of these terms.

    Until then the networks are random: shapes and costs are those of the run, values are not.

    Args:
        distiller: the run's losses.
        teacher: None beside a booster.
        given: ``KD.PRE_STAGE.WEIGHTS``; loaded where terms need it, and then nothing is random.

    Raises:
        KDError: it is a pre-stage of another teacher or other taps.
    """
    losses = {name: x for name, x in pre_stage_losses(distiller).items() if not x[0].is_ready}
    if losses and given and teacher is not None:
        load_pre_stage(given, losses, teacher_fingerprint(teacher))
        return []
    for loss, _ in losses.values():
        loss.finish_pre_stage()
    return list(losses)


def as_bytes(image: Tensor) -> Tensor:
    """An image of floats in 0..1 as uint8.

    Rounded, unlike ``to_dtype(scale=True)``, so that a pixel is again what it was read from.
    """
    return (image * 255).round().clamp(0, 255).to(torch.uint8)


def export_problems(
    model: nn.Module,
    student: nn.Module,
    reload: Callable[[Path, Path], nn.Module],
    outputs: Callable[[nn.Module], Mapping[str, Tensor]],
) -> list[str]:
    """A sentence per difference of a student and the stock model that loads its checkpoint.

    Nothing is left on disk.

    Args:
        model: what trains; its ``state_dict()`` is what the run would write.
        student: the stock model inside.
        reload: ``(checkpoint, new folder) -> stock model``: exports the checkpoint into the
            folder, builds the stock model from the files there, and loads it.
        outputs: named tensors of one forward in eval mode.
    """
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "model_final.pth"
        torch.save({"model": model.state_dict()}, checkpoint)
        try:
            stock = reload(checkpoint, Path(folder) / "export")
        except (KDError, KeyError) as error:  # yacs names unknown keys by the latter
            return [f"the stock model refuses the checkpoint: {error}"]
    mine, theirs = outputs(student), outputs(stock.to(next(student.parameters()).device))
    return [
        f"{name} of the stock model: {difference}"
        for name, value in mine.items()
        if (difference := _difference(value, theirs[name]))
    ]


def _difference(one: Tensor, other: Tensor) -> str:
    if one.shape != other.shape:
        return f"shape {tuple(other.shape)} instead of {tuple(one.shape)}"
    if torch.allclose(one, other, _RTOL, _ATOL):
        return ""
    return f"differs by up to {(one - other).abs().max().item():.3g}"
