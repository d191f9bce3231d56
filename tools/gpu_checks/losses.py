"""Every registered loss on the device, in three precisions, against the CPU in float32."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import yaml
from torch import Tensor

from kd_det import Distiller
from kd_det.losses import PreStageLoss, TapSpec

# Largest relative error of the value, and of the gradient in the L2 norm. In half precision the
# inputs are rounded for the reference as well; what remains are adaptors that compute in half
# precision and the rounding of the gradients.
TOLERANCES = {"float32": (1e-4, 1e-3), "bfloat16": (2e-2, 5e-2), "float16": (5e-3, 1e-2)}

WIDTHS, SIDES, STRIDES = (8, 16, 32), (16, 8, 4), (4, 8, 16)
STAGES = ["stage1", "stage2", "stage3"]
EXAMPLES: dict[str, dict[str, Any]] = yaml.safe_load("""
    KD: {TAPS: [logits], TEMPERATURE: 4.0}
    FitNet: {TAPS: [stage2]}
    AT: {TAPS: &stages [stage1, stage2, stage3]}
    FSP:
      TAPS: &pairs [stage1_first, stage1, stage2_first, stage2, stage3_first, stage3]
      ADAPT: True
    FGFI: {TAPS: *stages, ASSIGN: all}
    ReviewKD: {TAPS: *stages}
    Rocket: {TAPS: [logits]}
    IRG: {TAPS: [logits, [stage2, stage3], stage3]}
    IRG-t: {TAPS: *pairs}
    MTK: {TAPS: [logits, stage3, stage1_first, stage1, stage3_first, stage3]}
    MHGD: {TAPS: *stages, HEADS: 4}
""")
"""Registered loss -> the rest of its term."""


def check_loss(name: str, dtype: torch.dtype, device: str) -> str:
    """Value and gradient of a loss under autocast, against the CPU in float32.

    Args:
        name: of a registered loss.
        dtype: of the recorded tensors and of autocast; float32 is without autocast.
        device: ``"cpu"`` or ``"cuda"``.

    Returns:
        Both relative errors.

    Raises:
        AssertionError: an error is above its tolerance.
        KeyError: the loss has no example here.
    """
    if name not in EXAMPLES:
        raise KeyError(f"no example of {name} in tools/gpu_checks/losses.py: add one to EXAMPLES")
    torch.manual_seed(0)
    student, teacher = recorded(1), recorded(2)
    term = {"LOSS": name, **EXAMPLES[name]}
    context = ("anchors", "gt_boxes")
    distiller = Distiller({"term": term}, specs_of(student), specs_of(teacher), context)
    for loss in distiller.terms.values():
        if isinstance(loss, PreStageLoss):
            loss.finish_pre_stage()  # its networks stay as they were initialised
    rounded = [{k: v.to(dtype) for k, v in side.items()} for side in (student, teacher)]
    expected = loss_and_gradient(copy.deepcopy(distiller), rounded, torch.float32, "cpu")
    # As GradScaler does: small gradients vanish in float16.
    scale = 1 / max(float(expected[1].abs().max()), 1e-30)
    with full_float32():
        found = loss_and_gradient(distiller.to(device), rounded, dtype, device, scale)
    errors = []
    for kind, ours, theirs, allowed in zip(
        ("value", "gradient"), found, expected, TOLERANCES[str(dtype)[6:]], strict=True
    ):
        error = float((ours - theirs).norm() / theirs.norm().clamp(min=1e-12))
        if not error <= allowed:
            raise AssertionError(f"relative error of the {kind} {error:.1e}, allowed {allowed:g}")
        errors.append(f"{kind} {error:.1e}")
    return "relative error: " + ", ".join(errors)


def recorded(factor: int) -> dict[str, Tensor]:
    """Taps of eight images: two maps of each of three stages, and logits."""
    taps = {}
    for stage, width, side in zip(STAGES, WIDTHS, SIDES, strict=True):
        for part in ("_first", ""):
            taps[stage + part] = torch.randn(8, width * factor, side, side)
    return taps | {"logits": 3 * torch.randn(8, 10)}


def specs_of(taps: Mapping[str, Tensor]) -> dict[str, TapSpec]:
    specs = {"logits": TapSpec(taps["logits"].shape[1])}
    for stage, side, stride in zip(STAGES, SIDES, STRIDES, strict=True):
        for name in (stage, f"{stage}_first"):
            specs[name] = TapSpec(taps[name].shape[1], stride, (side, side))
    return specs


def loss_and_gradient(
    distiller: Distiller,
    sides: list[dict[str, Tensor]],
    dtype: torch.dtype,
    device: str,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """The loss, and its gradient for the student's taps and the loss's parameters in one vector."""
    student, teacher = (
        {name: value.to(device, dtype, copy=True) for name, value in side.items()} for side in sides
    )
    inputs = [value.requires_grad_() for value in student.values()]
    boxes = torch.tensor([[4.0, 4.0, 30.0, 40.0], [20.0, 10.0, 60.0, 58.0]], device=device)
    context = {"gt_boxes": [boxes] * 8, "anchors": dict(zip(STAGES, anchors(device), strict=True))}
    with torch.autocast(device, dtype, enabled=dtype != torch.float32):
        loss = distiller(student, teacher, context)["term"]
    (loss * scale).backward()
    learned = [p for p in distiller.parameters() if p.requires_grad]
    gradients = [v.grad.flatten().float().cpu() for v in [*inputs, *learned] if v.grad is not None]
    return loss.detach().float().cpu(), torch.cat(gradients) / scale


def anchors(device: str) -> Iterator[Tensor]:
    """One anchor per cell of each level, two cells wide."""
    for side, stride in zip(SIDES, STRIDES, strict=True):
        steps = (torch.arange(side, device=device) + 0.5) * stride
        centres = torch.cartesian_prod(steps, steps).flip(1)
        yield torch.cat([centres - stride, centres + stride], dim=1)


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    """Convolutions in float32 rather than in TF32, which is cuDNN's default."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before
