"""The frozen teacher.

A frozen model needs four things, none of which implies another:

1. eval mode that survives the parent's ``.train()``;
2. ``requires_grad_(False)``;
3. no gradient graph;
4. no entry in the student's checkpoint, its optimiser or DDP.

:class:`FrozenTeacher` is deliberately *not* an ``nn.Module``: as an attribute of a module it stays
outside the module tree, which gives 1 and 4.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kd_det.core.errors import fail, listed


class FrozenTeacher:
    """A model in eval mode, outside the module tree, whose outputs carry no gradient graph.

    Deep copies share the teacher instead of cloning it: an EMA of the student needs no second
    teacher. Since ``.to()`` or ``.double()`` on the student do not reach it, call
    :meth:`follow` with a student tensor before use. The caller must not train the model any more.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model.eval().requires_grad_(False)
        self._around: Callable[[], AbstractContextManager[object]] = nullcontext

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The output of the teacher, without a gradient graph."""
        with self.inference() as model:
            return model(*args, **kwargs)

    @contextmanager
    def inference(self) -> Iterator[nn.Module]:
        """The model in eval mode under ``no_grad``, for hosts that run only parts of it.

        ``no_grad`` rather than ``inference_mode``, because inference tensors cannot be saved for
        the backward pass of a loss.
        """
        if any(module.training for module in self.model.modules()):
            self.model.eval()
        with self._around(), torch.no_grad():
            yield self.model

    @contextmanager
    def observed(self, around: Callable[[], AbstractContextManager[object]]) -> Iterator[None]:
        """Enter ``around()`` with every :meth:`inference` meanwhile, to time or count it."""
        before, self._around = self._around, around
        try:
            yield
        finally:
            self._around = before

    def follow(self, tensor: Tensor) -> FrozenTeacher:
        """Move the teacher to the device and floating dtype of ``tensor`` if it is elsewhere."""
        own = next(self.model.parameters(), tensor)
        if own.device != tensor.device or own.dtype != tensor.dtype:
            self.model.to(device=tensor.device, dtype=tensor.dtype)
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> FrozenTeacher:
        return self


def load_strict(
    model: nn.Module,
    state_dict: Mapping[str, Tensor],
    source: str,
    optional_parts: tuple[str, ...] = (),
) -> None:
    """Load weights of a teacher, or another stock model; every key of both sides must match.

    Args:
        model: is left untouched after an error.
        state_dict: tensors by key.
        source: their origin, for the message.
        optional_parts: parts of keys that formats legitimately add or drop, such as
            Detectron2's ``anchor_generator.cell_anchors`` in older files.

    Raises:
        KDError: missing, unexpected or mis-shaped keys, which the message lists.
    """
    own = model.state_dict()
    given = {k: v for k, v in state_dict.items() if k in own or not _matches(k, optional_parts)}
    missing = [k for k in own if k not in given and not _matches(k, optional_parts)]
    unexpected = [k for k in given if k not in own]
    mis_shaped = [
        f"{k} (file {tuple(given[k].shape)}, model {tuple(own[k].shape)})"
        for k in own
        if k in given and given[k].shape != own[k].shape
    ]
    if missing or unexpected or mis_shaped:
        kinds = {"missing": missing, "unexpected": unexpected, "mis-shaped": mis_shaped}
        problems = [f"{len(k)} {kind}: {listed(k, 8)}" for kind, k in kinds.items() if k]
        fail(
            expected=f"every one of the teacher's {len(own)} keys in {source}",
            received="; ".join(problems),
            remedy="give the weights that were trained with exactly this teacher config",
        )
    model.load_state_dict(given, strict=False)


def check_teacher_config(config_file: str, example: str) -> None:
    """Refuse a ``KD.TEACHER.CONFIG_FILE`` that is empty or no file; suggest ``example``."""
    if not config_file or not Path(config_file).is_file():
        fail(
            expected="KD.TEACHER.CONFIG_FILE to name the teacher's complete config",
            received=f"'{config_file}'",
            remedy=f"give a path such as {example}, or set KD.ENABLED False",
        )


def check_teacher_weights(weights: str, config_file: str, allow_random: bool) -> None:
    """Refuse empty ``weights``, an untrained teacher, without ``KD.TEACHER.ALLOW_RANDOM``."""
    if not weights and not allow_random:
        fail(
            expected="KD.TEACHER.WEIGHTS to name the teacher's weights",
            received="''",
            remedy=f"train {config_file} and give its model_final.pth, or any .pkl, .pth or "
            ".safetensors file of it; set KD.TEACHER.ALLOW_RANDOM True to distil from an "
            "untrained teacher on purpose",
        )


def _matches(key: str, parts: tuple[str, ...]) -> bool:
    return any(part in key for part in parts)
