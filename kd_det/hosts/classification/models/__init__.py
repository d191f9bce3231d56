"""Classifiers by name: the CIFAR networks of the distillation papers, torchvision's and timm's.

==========================  =================================================================
name                        network
==========================  =================================================================
``resnet20``                CIFAR ResNet of depth 8, 14, 20, 32, 44, 56 or 110
``resnet20_x0.5``           CIFAR ResNet of any depth 6n + 2, all widths times a factor
``resnet32x4``              CIFAR ResNet of any depth 6n + 2 with widths 32, 64, 128, 256
``wrn_40_2``                wide ResNet of any depth 6n + 4 and any whole factor
``vgg13``                   VGG 8, 11, 13, 16 or 19 with batch norm, for small images
``mobilenetv2_x0.5``        MobileNetV2 for small images, any width factor
``shufflenetv1``            ShuffleNet V1 for small images; ``shufflenetv1_x0.5``, ...
``shufflenetv2``            ShuffleNet V2 for small images; ``shufflenetv2_x0.5``, 1.5, 2
``resnet50_cifar``          ResNet-50 for small images
``torchvision/resnet18``    torchvision's; also without prefix, where no name above matches
``timm/resnet18``           timm's
==========================  =================================================================
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from typing import Any

import torchvision
from torch import nn

from kd_det.core.checkpoint import SUFFIXES, read_weights
from kd_det.core.errors import check_known, fail, nearest
from kd_det.hosts.classification.checkpoints import load_public
from kd_det.hosts.classification.models.base import CifarNet, scaled
from kd_det.hosts.classification.models.mobilenet import CifarMobileNetV2
from kd_det.hosts.classification.models.resnet import WIDTHS, CifarResNet, CifarResNet50
from kd_det.hosts.classification.models.shufflenet import CifarShuffleNetV1, CifarShuffleNetV2
from kd_det.hosts.classification.models.vgg import CifarVGG
from kd_det.hosts.classification.models.wide_resnet import WideResNet

__all__ = ["CIFAR_NAMES", "FAMILIES", "CifarNet", "build_classifier"]

#: The CIFAR networks of the papers; the patterns in the module's table give more.
CIFAR_NAMES = (
    *(f"resnet{depth}" for depth in (8, 14, 20, 32, 44, 56, 110)),
    *(f"resnet{name}" for name in ("14_x0.5", "20_x0.5", "20_x0.375", "8x4", "32x4")),
    *(f"wrn_{name}" for name in ("16_1", "16_2", "40_1", "40_2")),
    *(f"vgg{depth}" for depth in (8, 11, 13, 16, 19)),
    *("mobilenetv2_x0.5", "shufflenetv1", "shufflenetv2", "resnet50_cifar"),
)

_X4_WIDTHS = (32, 64, 128, 256)
_FACTOR = r"_x(\d+(?:\.\d+)?)"

# Plain resnet50 and resnet152 are 6n + 2 deep too, but everywhere else they mean ImageNet's: so
# the depths of plain names are listed.
FAMILIES: dict[str, Callable[..., CifarNet]] = {
    r"resnet(8|14|20|32|44|56|110)": lambda d, **k: CifarResNet(int(d), **k),
    rf"resnet(\d+){_FACTOR}": lambda d, f, **k: CifarResNet(
        int(d), widths=scaled(float(f), WIDTHS), **k
    ),
    r"resnet(\d+)x4": lambda d, **k: CifarResNet(int(d), widths=_X4_WIDTHS, **k),
    r"wrn_(\d+)_(\d+)": lambda d, f, **k: WideResNet(int(d), int(f), **k),
    r"vgg(8|11|13|16|19)": lambda d, **k: CifarVGG(int(d), **k),
    rf"mobilenetv2{_FACTOR}": lambda f, **k: CifarMobileNetV2(factor=float(f), **k),
    rf"shufflenetv1(?:{_FACTOR})?": lambda f, **k: CifarShuffleNetV1(factor=float(f or 1), **k),
    rf"shufflenetv2(?:{_FACTOR})?": lambda f, **k: CifarShuffleNetV2(factor=float(f or 1), **k),
    r"resnet50_cifar": CifarResNet50,
}
"""The small networks: a pattern of names, and what builds one from the pattern's groups.

A builder also takes ``num_classes`` and ``in_channels``.
"""

#: Without these two their training forward gives a tuple, and their start takes minutes.
_NO_AUXILIARY_HEAD = {"aux_logits": False, "init_weights": True}


def build_classifier(
    name: str, num_classes: int, pretrained_weights: str = "", in_channels: int = 3
) -> nn.Module:
    """The network of a name, on the CPU, in training mode.

    Args:
        name: see the table of this module.
        num_classes: number of logits.
        pretrained_weights: a weights file, or, for torchvision and timm, the name of weights to
            download (``IMAGENET1K_V1``; timm knows ``DEFAULT``). Empty: random weights from torch's
            generator.
        in_channels: of the images; torchvision's networks take 3.

    Raises:
        KDError: an unknown name, depth, width or weights name; timm is asked for and not
            installed; weights of another network or class count.
    """
    library, _, plain = name.rpartition("/")
    from_file = pretrained_weights.endswith(SUFFIXES)
    named = "" if from_file else pretrained_weights
    if library == "timm":
        model = _timm(plain, num_classes, named, in_channels)
    elif library == "torchvision":
        model = _torchvision(plain, num_classes, named, in_channels)
    elif library:
        fail(
            expected="a classifier of this package, torchvision/<name> or timm/<name>",
            received=f"'{name}'",
            remedy="leave the prefix out or use one of these two",
        )
    else:
        model = _plain(name, num_classes, named, in_channels)
    if from_file:
        load_public(model, read_weights(pretrained_weights), source=pretrained_weights)
    return model


def _plain(name: str, num_classes: int, weights: str, in_channels: int) -> nn.Module:
    for pattern, build in FAMILIES.items():
        if match := re.fullmatch(pattern, name):
            if weights:
                fail(
                    expected=f"weights of {name} as a file ({', '.join(SUFFIXES)})",
                    received=f"'{weights}'",
                    remedy="give the path of a downloaded checkpoint, or leave it empty",
                )
            return build(*match.groups(), num_classes=num_classes, in_channels=in_channels)
    if name in _torchvision_names():
        return _torchvision(name, num_classes, weights, in_channels)
    fail(
        expected="the name of a classifier",
        received=f"'{name}'",
        remedy=nearest(name, [*CIFAR_NAMES, *_similar(name, _torchvision_names())])
        + "; also torchvision/<name> and timm/<name>",
    )


def _torchvision_names() -> list[str]:
    return torchvision.models.list_models(module=torchvision.models)


def _torchvision(name: str, num_classes: int, weights: str, in_channels: int) -> nn.Module:
    check_known("torchvision classifier", name, _torchvision_names())
    if in_channels != 3:
        fail(
            expected=f"3 input channels for torchvision's {name}",
            received=str(in_channels),
            remedy="repeat grey images three times, or use a CIFAR network or timm",
        )
    chosen = None
    if weights:
        choices = torchvision.models.get_model_weights(name)
        check_known(f"name of weights of {name}", weights, choices.__members__)
        chosen = choices[weights]
        _check_classes(name, num_classes, len(chosen.meta["categories"]))
    extra: dict[str, Any] = _NO_AUXILIARY_HEAD if name in ("googlenet", "inception_v3") else {}
    return torchvision.models.get_model(name, weights=chosen, num_classes=num_classes, **extra)


def _timm(name: str, num_classes: int, weights: str, in_channels: int) -> nn.Module:
    try:
        import timm
    except ImportError:
        fail(
            expected=f"timm, for timm/{name}",
            received="it is not installed",
            remedy="pip install timm, or choose a network of torchvision",
        )
    if not timm.is_model(name):
        fail(
            expected="a classifier of timm",
            received=f"'{name}'",
            remedy=nearest(name, _similar(name, timm.list_models())),
        )
    if weights:
        check_known("name of timm weights", weights, ["DEFAULT"])
        _check_classes(name, num_classes, timm.get_pretrained_cfg(name).num_classes)
    return timm.create_model(
        name, pretrained=bool(weights), num_classes=num_classes, in_chans=in_channels
    )


def _check_classes(name: str, wanted: int, trained: int) -> None:
    if wanted != trained:
        fail(
            expected=f"as many classes as the weights of {name} were trained on",
            received=f"{wanted} and {trained}",
            remedy=f"set {trained} classes, or leave the weights empty",
        )


def _similar(name: str, known: list[str]) -> list[str]:
    return difflib.get_close_matches(name, known, n=5, cutoff=0.5)
