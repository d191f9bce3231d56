"""The contract of a loss with a network of its own that learns from the teacher beforehand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kd_det.core.errors import fail
from kd_det.core.loss import DistillLoss


class PreStageLoss(DistillLoss):
    """A loss that looks through a network trained on the frozen teacher alone.

    The network depends on the teacher and its taps, never on a student: it is trained once, saved
    as its own file (:mod:`kd_det.procedures.pre_stage`) and reused for every student. Outside its
    own training it is frozen: no gradients, eval mode, also after ``.train()``. It is part of the
    distiller's checkpoint but not of its optimiser.

    Subclasses hand the network to this constructor and implement :meth:`pre_stage_loss`,
    :meth:`fingerprint` and ``forward``.
    """

    ready: Tensor

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        # Whether the network was trained or loaded: in the state for the checkpoint; as a bool
        # besides, because reading it back from a GPU in every step would make the host wait.
        self.register_buffer("ready", torch.zeros((), dtype=torch.bool))
        self.is_ready = False
        self.register_load_state_dict_post_hook(_read_ready)
        self.register_forward_pre_hook(_refuse_untrained)
        self.network.eval().requires_grad_(False)

    def pre_stage_loss(self, teacher: list[Tensor]) -> Tensor:
        """Scalar that the pre-stage minimises, from the teacher's taps alone."""
        raise NotImplementedError

    def fingerprint(self) -> dict[str, Any]:
        """Name, hyper-parameters and teacher widths of a network: numbers, strings and lists."""
        raise NotImplementedError

    def pre_stage_state(self) -> dict[str, Tensor]:
        """The network's weights and statistics, as copies on the CPU."""
        state = self.network.state_dict()
        return {k: v.detach().to("cpu", copy=True) for k, v in state.items()}

    def load_pre_stage_state(self, state: Mapping[str, Tensor]) -> None:
        """Take over a finished network; the loss is ready afterwards."""
        self.network.load_state_dict(state)
        self.finish_pre_stage()

    def start_pre_stage(self) -> None:
        """Let the network learn."""
        self._set_ready(False)
        self.network.train().requires_grad_(True)

    def finish_pre_stage(self) -> None:
        """Freeze the network; the loss is ready."""
        self.network.eval().requires_grad_(False)
        self._set_ready(True)

    def train(self, mode: bool = True) -> PreStageLoss:
        """As usual, but the network stays in eval mode."""
        super().train(mode)
        self.network.eval()
        return self

    def _set_ready(self, ready: bool) -> None:
        self.is_ready = ready
        self.ready.fill_(ready)


def _read_ready(module: Any, incompatible: Any) -> None:
    module.is_ready = bool(module.ready)


def _refuse_untrained(module: Any, args: Any) -> None:
    if not module.is_ready:
        fail(
            expected=f"{type(module).__name__} with a network that was trained on the teacher",
            received="an untrained one",
            remedy="run its pre-stage first, or load one with "
            "kd_det.procedures.pre_stage.load_pre_stage (KD.PRE_STAGE.WEIGHTS)",
        )
