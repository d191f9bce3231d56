"""Parameter groups and the learning-rate schedule of the hosts on Lightning."""

from __future__ import annotations

from typing import Any

from fvcore.common.config import CfgNode
from torch import nn
from torch.optim import SGD
from torchvision.ops import FrozenBatchNorm2d

_NORMS = (
    nn.modules.batchnorm._BatchNorm,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.LocalResponseNorm,
    FrozenBatchNorm2d,
)


def learning_rate_factor(solver: CfgNode, step: int) -> float:
    """Detectron2's ``WarmupMultiStepLR``: linear warm-up, then ``GAMMA`` at each of ``STEPS``."""
    factor = solver.GAMMA ** sum(step >= s for s in solver.STEPS)
    if step >= solver.WARMUP_ITERS:
        return factor
    share = step / solver.WARMUP_ITERS
    return factor * (solver.WARMUP_FACTOR * (1 - share) + share)


def build_sgd(model: nn.Module, solver: CfgNode) -> SGD:
    """SGD with the values of ``SOLVER``; ``NESTEROV`` where a host has that key."""
    return SGD(
        parameter_groups(model, solver.WEIGHT_DECAY, solver.WEIGHT_DECAY_NORM),
        lr=solver.BASE_LR,
        momentum=solver.MOMENTUM,
        nesterov=solver.get("NESTEROV", False),
    )


def parameter_groups(model: nn.Module, decay: float, decay_norm: float) -> list[dict[str, Any]]:
    """Trainable parameters, those of normalisation layers with their own weight decay."""
    norm = {
        id(p) for m in model.modules() if isinstance(m, _NORMS) for p in m.parameters(recurse=False)
    }
    trainable = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trainable if id(p) not in norm], "weight_decay": decay},
        {"params": [p for p in trainable if id(p) in norm], "weight_decay": decay_norm},
    ]
