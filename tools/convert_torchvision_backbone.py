#!/usr/bin/env python
"""Convert a torchvision ImageNet checkpoint into backbone weights for Detectron2.

    wget https://download.pytorch.org/models/resnet18-f37072fd.pth
    python tools/convert_torchvision_backbone.py resnet18-f37072fd.pth weights/resnet18.pkl

    wget https://download.pytorch.org/models/mobilenet_v2-b0353104.pth
    python tools/convert_torchvision_backbone.py mobilenet_v2-b0353104.pth weights/mobilenet_v2.pkl

It knows resnet18, resnet34, resnet50, resnet101 and mobilenet_v2, and recognises which one it was
given. The result is a file in Detectron2's model-zoo format: set ``MODEL.WEIGHTS`` to its path.
The classifier is dropped by name; any other key that is left over, missing or of another shape
stops the conversion.

torchvision's models saw RGB images scaled by their own statistics, whereas Detectron2's defaults
are BGR. A config that uses the converted weights therefore needs (the tool prints it, too)::

    INPUT:
      FORMAT: RGB
    MODEL:
      PIXEL_MEAN: [123.675, 116.280, 103.530]
      PIXEL_STD: [58.395, 57.120, 57.375]
      RESNETS:
        STRIDE_IN_1X1: False    # resnet50 and deeper: torchvision strides in the 3x3 convolution
"""

from __future__ import annotations

import argparse
import pickle
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kd_det.core.errors import KDError, fail

#: Keys without a counterpart: the classifiers, MobileNetV2's 1x1 expansion in front of its own,
#: and the batch counters that frozen norms lack and running norms need not be given.
DROPPED = re.compile(r"^(fc|classifier|features\.18)\.|\.num_batches_tracked$")

#: torchvision's names inside a ResNet and Detectron2's, applied in order.
RESNET_NAMES = (
    (re.compile(r"^layer(\d)\."), lambda m: f"res{int(m[1]) + 1}."),
    (re.compile(r"^(conv1|bn1)\."), lambda m: f"stem.{m[1]}."),
    (re.compile(r"\bbn(\d)\."), lambda m: f"conv{m[1]}.norm."),
    (re.compile(r"\bdownsample\.0\."), lambda m: "shortcut."),
    (re.compile(r"\bdownsample\.1\."), lambda m: "shortcut.norm."),
)


def convert(state_dict: Mapping[str, Tensor], width_mult: float = 1.0) -> tuple[str, dict]:
    """Rename the backbone's weights.

    Args:
        state_dict: of a torchvision classifier, with or without its classifier.
        width_mult: of MobileNetV2; ResNets have none.

    Returns:
        The architecture's name, and the checkpoint to be pickled.

    Raises:
        KDError: if the architecture is not known, or any key is left over, missing or
            mis-shaped. The message lists the keys.
    """
    arch = recognise(state_dict)
    weights = {key: value for key, value in state_dict.items() if not DROPPED.search(key)}
    _check_complete(arch, weights, width_mult)
    rename = _mobilenetv2_name if arch == "mobilenet_v2" else _resnet_name
    model = {rename(key): value.detach().cpu().float().numpy() for key, value in weights.items()}
    checkpoint: dict[str, Any] = {"model": model, "__author__": "torchvision"}
    if arch != "mobilenet_v2":
        # These names end in the right way but lack the prefix, which depends on the detector.
        checkpoint["matching_heuristics"] = True
    return arch, checkpoint


def recognise(state_dict: Mapping[str, Tensor]) -> str:
    """Name the torchvision builder that ``state_dict`` belongs to, by its keys."""
    if "features.1.conv.0.0.weight" in state_dict:
        return "mobilenet_v2"
    blocks = {key.split(".")[1] for key in state_dict if key.startswith("layer3.")}
    bottleneck = "layer1.0.conv3.weight" in state_dict
    known = {(2, False): 18, (6, False): 34, (6, True): 50, (23, True): 101}
    depth = known.get((len(blocks), bottleneck))
    if depth is None:
        shown = ", ".join(list(state_dict)[:5])
        fail(
            expected="the weights of torchvision's resnet18, 34, 50, 101 or mobilenet_v2",
            received=f"{len(state_dict)} keys that fit none of them: {shown} ...",
            remedy="convert one of those",
        )
    return f"resnet{depth}"


def settings(arch: str) -> str:
    """Return the config lines that the converted weights of ``arch`` need, as YAML."""
    lines = [
        "INPUT:",
        "  FORMAT: RGB",
        "MODEL:",
        "  PIXEL_MEAN: [123.675, 116.280, 103.530]",
        "  PIXEL_STD: [58.395, 57.120, 57.375]",
    ]
    if arch == "mobilenet_v2":
        lines += ["  BACKBONE:", "    NAME: build_mobilenetv2_fpn_backbone"]
    else:
        depth = int(arch.removeprefix("resnet"))
        lines += ["  RESNETS:", f"    DEPTH: {depth}"]
        lines += ["    STRIDE_IN_1X1: False" if depth >= 50 else "    RES2_OUT_CHANNELS: 64"]
    return "\n".join(lines)


def load(path: Path) -> dict[str, Tensor]:
    """Read a state dict, also from under ``model`` or ``state_dict`` and a ``module.`` prefix."""
    loaded = torch.load(path, map_location="cpu", weights_only=True)
    for key in ("model", "state_dict"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    if not isinstance(loaded, Mapping):
        fail(
            expected="a state dict",
            received=f"a {type(loaded).__name__}",
            remedy="save model.state_dict()",
        )
    return {key.removeprefix("module."): value for key, value in loaded.items()}


def main(argv: list[str] | None = None) -> int:
    """Convert the file named on the command line. Returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0] if __doc__ else None,
        epilog="The config settings that the result needs are printed at the end.",
    )
    parser.add_argument("source", type=Path, help="torchvision checkpoint (.pth)")
    parser.add_argument("target", type=Path, help="file to write (.pkl)")
    parser.add_argument("--width-mult", type=float, default=1.0, help="of MobileNetV2")
    args = parser.parse_args(argv)
    if args.target.suffix != ".pkl":
        # Detectron2 chooses the reader by this suffix; another one would fail only when training.
        parser.error(f"Expected a target that ends in .pkl. Got {args.target}.")
    if args.target.exists():
        parser.error(f"{args.target} exists already and is left as it is. Name another target.")
    if not args.source.is_file():
        parser.error(f"{args.source} is not a file.")
    try:
        arch, checkpoint = convert(load(args.source), args.width_mult)
    except (KDError, pickle.UnpicklingError) as error:
        print(f"{args.source} was not converted: {error}", file=sys.stderr)
        return 1
    args.target.parent.mkdir(parents=True, exist_ok=True)
    with args.target.open("wb") as file:
        pickle.dump(checkpoint, file)
    print(f"Wrote {len(checkpoint['model'])} arrays of {arch} to {args.target}.")
    print(f"A config that uses them needs:\n\n{settings(arch)}")
    return 0


def _resnet_name(key: str) -> str:
    """Return Detectron2's name of a torchvision ResNet's key, without the detector's prefix."""
    for pattern, replacement in RESNET_NAMES:
        key = pattern.sub(replacement, key)
    return key


def _mobilenetv2_name(key: str) -> str:
    """Return our name of a torchvision MobileNetV2's key, as it stands in a detector."""
    from kd_det.hosts.detectron2.backbones import MOBILENETV2_STAGES

    _, index, rest = key.split(".", 2)
    for name, (start, stop) in MOBILENETV2_STAGES.items():
        if start <= int(index) < stop:
            return f"backbone.bottom_up.{name}.{int(index) - start}.{rest}"
    raise AssertionError(f"{key} is a key of torchvision's model, but of none of our stages")


def _check_complete(arch: str, weights: Mapping[str, Tensor], width_mult: float) -> None:
    """Compare keys and shapes with those of torchvision's own model, and report all differences."""
    import torchvision

    options = {"width_mult": width_mult} if arch == "mobilenet_v2" else {}
    with torch.device("meta"):
        model = torchvision.models.get_model(arch, weights=None, **options)
    expected = {k: tuple(v.shape) for k, v in model.state_dict().items() if not DROPPED.search(k)}
    problems = [f"unexpected: {key}" for key in weights if key not in expected]
    problems += [f"missing: {key}" for key in expected if key not in weights]
    problems += [
        f"shape: {key} expected {expected[key]}, got {tuple(value.shape)}"
        for key, value in weights.items()
        if key in expected and tuple(value.shape) != expected[key]
    ]
    if problems:
        fail(
            expected=f"exactly the keys and shapes of torchvision's {arch}",
            received=f"{len(problems)} that differ:\n  " + "\n  ".join(problems) + "\n",
            remedy="convert an unchanged checkpoint, or pass --width-mult for a MobileNetV2",
        )


if __name__ == "__main__":
    sys.exit(main())
