"""Rocket launching: a light net and a booster that share their lower layers and train together
(Zhou et al., "Rocket Launching: A Universal and Efficient Framework for Training Well-performing
Light Net", AAAI 2018, https://arxiv.org/abs/1708.04106).

The light net is the run's student and stays a stock model with all of its keys; what the two
share belongs to it. The booster is trained beside it and left behind at deployment.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from kd_det.core.errors import check_known, fail
from kd_det.procedures.base import BOOSTER, Procedure, register

if TYPE_CHECKING:
    from fvcore.common.config import CfgNode

_NORMS = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm)


@register
class Joint(Procedure):
    """A booster beside the student instead of a frozen teacher; the host builds and trains both."""

    name = "JOINT"
    defaults: ClassVar[Mapping[str, Any]] = {
        "ENABLED": False,
        "NAME": "",  # the booster, a model as in MODEL.NAME
        "SHARED": [],  # modules that both nets have, such as [conv1, bn1, relu, layer1.0]
        # True: shared convolutions run twice, each path with its own norms, as in the reference.
        "SEPARATE_NORM": False,
    }
    needs = frozenset({BOOSTER})
    in_training = False

    @classmethod
    def check(cls, cfg: CfgNode, offers: frozenset[str]) -> None:
        if not cfg.KD.JOINT.NAME:
            fail(
                expected="KD.JOINT.NAME to name the booster",
                received="''",
                remedy="give a model such as resnet32, or set KD.JOINT.ENABLED False",
            )


class Booster(nn.Module):
    """The heavy net of a joint model.

    Args:
        net: the heavy classifier. Its shared children are replaced.
        light: the light classifier.
        shared: paths of modules that both have, of equal shape, such as ``conv1`` and
            ``layer1.0``. Run once, they must follow each other from the input on.
        separate_norm: False (default): shared layers run once, for both. True: their weights are
            shared but run twice, each net with its own normalisation, as the reference does.
    """

    def __init__(
        self, net: nn.Module, light: nn.Module, shared: Sequence[str], separate_norm: bool = False
    ) -> None:
        super().__init__()
        self._recalls: dict[str, _Recall] = {}
        own, others = dict(net.named_modules()), dict(light.named_modules())
        for name in shared:
            check_known("module of the booster in KD.JOINT.SHARED", name, own)
            check_known("module of the student in KD.JOINT.SHARED", name, others)
            shapes = [
                [tuple(p.shape) for p in modules[name].parameters()] for modules in (others, own)
            ]
            if shapes[0] != shapes[1]:
                fail(
                    expected=f"'{name}' of KD.JOINT.SHARED to be the same in both nets",
                    received=f"student {shapes[0]}, booster {shapes[1]}",
                    remedy="share layers of equal shape, or choose nets of one family",
                )
            parent, _, leaf = name.rpartition(".")
            if separate_norm:
                setattr(own[parent], leaf, _share_weights(own[name], others[name]))
            else:
                self._recalls[name] = _Recall(name)
                setattr(own[parent], leaf, self._recalls[name])
        self.net = net

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[N, K]``. Without separate norms, to be called inside :meth:`recording`."""
        return self.net(images)

    @contextmanager
    def recording(self, light: nn.Module) -> Iterator[None]:
        """Remember what the light net's shared layers compute, for the booster to go on from."""
        modules = dict(light.named_modules())
        handles = [modules[n].register_forward_hook(r.store) for n, r in self._recalls.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for recall in self._recalls.values():
                recall.release()


class _Recall(nn.Module):
    """Stands in the booster for a layer whose output the light net has just computed."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path
        self.input: Tensor | None = None
        self.value: Tensor | None = None

    def store(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self.input, self.value = inputs[0], output

    def forward(self, x: Tensor) -> Tensor:
        if x is not self.input or self.value is None:
            fail(
                expected=f"'{self.path}' of KD.JOINT.SHARED to see in the booster what it saw in "
                "the student",
                received="another tensor: a layer before it is not shared",
                remedy="share every layer from the input on, or set SEPARATE_NORM True, which "
                "runs shared layers twice",
            )
        return self.value

    def release(self) -> None:
        self.input = self.value = None

    def __deepcopy__(self, memo: dict[int, object]) -> _Recall:
        return _Recall(self.path)


def _share_weights(own: nn.Module, light: nn.Module) -> nn.Module:
    """The booster's layer with the light net's parameters, except those of its norms."""
    twin = copy.deepcopy(own)
    sources = dict(light.named_modules())
    for path, module in twin.named_modules():
        if not isinstance(module, _NORMS):
            for name in list(module._parameters):
                module._parameters[name] = sources[path]._parameters[name]
    return twin
