"""Public checkpoints of classifiers: their names of parameters to ours, every key accounted for.

RepDistiller and mdistiller share one layout for the CIFAR teachers and students; each network
knows how it differs (``public_names``). Torchvision's files fit torchvision's networks, but for
two that carry auxiliary heads and one of an old layout. Weights that already have our names load
unchanged.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torchvision.models import DenseNet, GoogLeNet, Inception3

from kd_det.core.errors import fail
from kd_det.core.teacher import load_strict

#: Torchvision's own loader knows this too, but not when it is given a file.
_DENSENET_NAMES = ((r"(\.denselayer\d+\.(?:norm|conv))\.([12])\.", r"\1\2."),)

#: Heads for training that these networks are built without.
_AUXILIARY: dict[type[nn.Module], str] = {GoogLeNet: r"aux[12]\.", Inception3: r"AuxLogits\."}

_COUNTER = "num_batches_tracked"


def load_public(
    model: nn.Module, state_dict: Mapping[str, Tensor], source: str = "the checkpoint"
) -> None:
    """Load weights in a public collection's layout, or in our own.

    Args:
        model: from :func:`kd_det.hosts.classification.models.build_classifier`; changed in place.
        state_dict: tensors by key.
        source: their origin, for the message.

    Raises:
        KDError: two keys mean one parameter, or a key of either side is left over or has another
            shape; the message lists them. The model is left untouched.
    """
    renamed = own_names(model, state_dict, source)
    # Files from before PyTorch 0.4.1 lack this counter, which no network here reads.
    for key, value in model.state_dict().items():
        if key.endswith(_COUNTER) and key.removesuffix(_COUNTER) + "running_mean" in renamed:
            renamed.setdefault(key, torch.zeros_like(value))
    load_strict(model, renamed, source)


def own_names(model: nn.Module, state: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """Tensors of a public layout, or of our own, by our names."""
    rules = _DENSENET_NAMES if isinstance(model, DenseNet) else getattr(model, "public_names", ())
    auxiliary = _AUXILIARY.get(type(model))
    renamed: dict[str, Tensor] = {}
    for key, value in state.items():
        if auxiliary and re.match(auxiliary, key):
            continue
        name = key
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        if name in renamed:
            fail(
                expected=f"every key of {source} to mean another tensor",
                received=f"two that mean {name} of {type(model).__name__}",
                remedy="give a checkpoint of one layout",
            )
        renamed[name] = value
    return renamed
