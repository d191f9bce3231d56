"""Checks of the taps: shapes and strides of both sides, and the modules a loss learns."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from kd_det.preflight.context import Context
from kd_det.preflight.findings import Section, counted
from kd_det.preflight.steps import Steps


def inspect_taps(section: Section, context: Context) -> None:
    """Fill the section."""
    distiller, steps = context.bench.distiller, context.steps
    if distiller is None or steps is None:
        section.note("the run has no distillation")
        return
    n, _, h, w = steps.entered
    rows = []
    for term in distiller.specs:
        module = distiller.terms[term.name]
        learned = sum(p.numel() for p in module.parameters() if p.requires_grad)
        macs = steps.macs.get(term.name, 0.0) / n / 1e9
        for index, (student, teacher) in enumerate(term.taps):
            pair = steps.student[student], steps.teacher[teacher]
            strides = [_stride(value, steps) for value in pair]
            own = (term.name, _parts(module), f"{learned:,}", f"{macs:.3f}")
            name, *learns = own if index == 0 else [""] * len(own)
            taps = f"{student} {_shape(pair[0])}", f"{teacher} {_shape(pair[1])}"
            rows.append((name, *taps, _both(strides), *learns))
            if None not in strides and strides[0] != strides[1]:
                section.warn(
                    f"term '{term.name}' compares student '{student}' (stride {strides[0]}) with "
                    f"teacher '{teacher}' (stride {strides[1]}): one of them is resized"
                )
        section.data[term.name] = {"parameters": learned, "gmacs_per_image": macs}
    section.table(
        f"Shapes for a batch of {counted(n, 'image')} of {h}×{w} pixels, padded; GMACs of the loss "
        "per image",
        ("term", "student", "teacher", "stride", "learns", "parameters", "GMACs"),
        rows,
    )
    if not any(f.level == "warning" for f in section.findings):
        section.ok("the losses can compare the tensors of both sides at every tap")


def _shape(value: Any) -> str:
    """``4×256×40×40``; of several tensors all."""
    if isinstance(value, Tensor):
        return "×".join(map(str, value.shape))
    return ", ".join(map(_shape, value))


def _stride(value: Any, steps: Steps) -> int | None:
    """Pixels per cell of a map of the whole image; None of anything else."""
    if not isinstance(value, Tensor) or value.dim() != 4:
        return None
    if value.shape[0] != steps.entered[0]:
        return None  # RoIs
    return round(steps.entered[-1] / value.shape[-1])


def _both(strides: Sequence[int | None]) -> str:
    if None in strides:
        return "-"
    return str(strides[0]) if strides[0] == strides[1] else f"{strides[0]} / {strides[1]}"


def _parts(module: nn.Module) -> str:
    """``"3 ABF"``: the kinds of modules a loss is made of, one level down."""
    kinds: Counter[str] = Counter()
    for child in module.children():
        inner = child.children() if isinstance(child, (nn.ModuleList, nn.ModuleDict)) else [child]
        kinds.update(type(m).__name__ for m in inner if any(True for _ in m.parameters()))
    texts = (f"{count} {kind}" if count > 1 else kind for kind, count in kinds.items())
    return ", ".join(texts) or "-"
