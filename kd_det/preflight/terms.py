"""Checks of the terms on training batches: tapped tensors, values, gradients and their shares."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from kd_det.preflight.context import Context
from kd_det.preflight.findings import Section, counted
from kd_det.preflight.steps import Step, Steps, TermValues, shared_name

_TOO_MUCH, _TOO_LITTLE = 0.9, 0.001


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


def inspect_terms(section: Section, context: Context) -> None:
    """Fill the section."""
    bench, steps = context.bench, context.steps
    if bench.distiller is None or steps is None:
        section.note("the run has no distillation")
        return
    names, taken, shared = list(bench.distiller.terms), steps.steps, shared_name(bench.student)
    norms = {name: _mean([_finite(step.terms[name].norm) for step in taken]) for name in names}
    task = _mean([_finite(step.task_norm) for step in taken])
    total = _sum([task, *norms.values()])
    rows: list[tuple[str, ...]] = [
        (name, _number(_mean([step.task[name] for step in taken])), "", "", "", "", "")
        for name in taken[0].task
    ]
    rows.append(("task", "", "", "", _number(task), "", _percent(task, total)))
    for name in names:
        values, norm = [step.terms[name] for step in taken], norms[name]
        raw, weight = _mean([v.raw for v in values]), values[0].weight
        weighted = None if raw is None else raw * weight
        cosine = _mean([v.cosine for v in values])
        texts = _number(raw), f"{weight:g}", *map(_number, (weighted, norm, cosine))
        rows.append((name, *texts, _percent(norm, total)))
        section.data[name] = {"raw": raw, "weight": weight, "norm": norm}
        if norm is not None and total:
            section.data[name]["share"] = norm / total
    share = task / total if total and task is not None else None
    section.data["task"] = {"norm": task, "share": share}
    section.table(
        f"Means over {_batches(taken)} of {counted(steps.images, 'image')}, schedules at full "
        f"weight; gradients on {shared}, cosines with the task's",
        ("loss", "raw", "weight", "weighted", "gradient", "cosine", "share"),
        rows,
    )
    _judge_task(section, taken, shared)
    dominant = {name for name in names if total and (norms[name] or 0.0) > _TOO_MUCH * total}
    for name in names:
        # A term is judged without the dominant ones: beside them every share is too small.
        rest = _sum([task, *(norms[other] for other in names if other not in dominant - {name})])
        _judge(section, context, name, norms[name], rest)
    if not any(f.level in ("error", "warning") for f in section.findings):
        section.ok("every term is finite, has a gradient on the student, and none is dominant")


def proposed_weight(weight: float, norm: float, total: float, share: float) -> float:
    """The weight that gives a term a ``share`` (0..1) of the gradient, all else as it is.

    A term's gradient is linear in its weight: with ``u = norm / weight`` and ``r = total - norm``
    of everything else, ``w u / (w u + r) = share`` gives ``w = share / (1 - share) * r / u``.
    """
    return share / (1 - share) * (total - norm) / (norm / weight)


def _judge_task(section: Section, steps: Sequence[Step], shared: str) -> None:
    broken = {
        f"loss '{name}'": [step.task[name] for step in steps if not math.isfinite(step.task[name])]
        for name in steps[0].task
    }
    if not any(broken.values()):
        norms = [step.task_norm for step in steps if not math.isfinite(step.task_norm)]
        broken = {f"gradient on {shared}": norms}
    for what, values in broken.items():
        if values:
            section.error(
                f"the task's {what} is {values[0]} on {len(values)} of {_batches(steps)}, and "
                "training would stop there or learn nothing"
            )


def _judge(section: Section, context: Context, name: str, norm: float | None, total: float) -> None:
    assert context.steps is not None
    steps, shared = context.steps.steps, shared_name(context.bench.student)
    values = [step.terms[name] for step in steps]
    broken = [v for v in values if None in (_finite(v.raw), _finite(v.norm))]
    if broken:
        section.error(
            f"term '{name}' is not finite: {_reason(broken[0], shared)} on {len(broken)} of "
            f"{_batches(steps)}, and training would stop there or learn nothing"
        )
    elif all(v.weight == 0 for v in values):
        section.warn(f"term '{name}' is off: its weight is 0")
    elif all(v.raw == 0 for v in values):
        section.warn(
            f"term '{name}' is exactly zero on all of {_batches(steps)}: its taps have no rows to "
            "compare (no boxes, no positives), or both sides are equal"
        )
    elif norm == 0:
        section.warn(
            f"term '{name}' has a value but no gradient on {shared}: its taps lie behind what is "
            "trained, or the student's part is detached"
        )
    elif norm is not None and _is_comparable(context, name, norm, total):
        share, wanted, weight = norm / total, context.settings.share, values[0].weight
        where = f"of the gradient on {shared} with its WEIGHT {weight:g}"
        proposal = proposed_weight(weight, norm, total, wanted)
        advice = f"KD.TERMS.{name}.WEIGHT {proposal:.3g} would give it {wanted:.0%}"
        if share > _TOO_MUCH:
            section.warn(f"term '{name}' dominates all others: {share:.1%} {where}; {advice}")
        elif share < _TOO_LITTLE:
            section.warn(f"term '{name}' has hardly any effect: {share:.1g} {where}; {advice}")


def _is_comparable(context: Context, name: str, norm: float, total: float) -> bool:
    """Whether the share of a term's gradient is one to judge its weight by."""
    assert context.steps is not None
    assert context.bench.distiller is not None
    term = next(t for t in context.bench.distiller.specs if t.name == name)
    # A share of the term's own gradient alone, or of one that is not finite, is meaningless.
    alone = norm == total or not all(math.isfinite(s.task_norm) for s in context.steps.steps)
    # A balance changes the weights, a clip limits the gradient, and a network of a pre-stage is
    # still random.
    balance = context.bench.cfg.KD.BALANCE.NAME
    managed = balance in ("gradient_share", "gradnorm", "uncertainty") or term.clip != "none"
    return not (alone or managed or name in context.bench.pre_stage)


def _batches(steps: Sequence[Step]) -> str:
    return counted(len(steps), "batch", "es")


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _reason(broken: TermValues, shared: str) -> str:
    if not math.isfinite(broken.raw):
        return f"its loss is {broken.raw}"
    if broken.norm is None:
        return f"its loss is {broken.raw:g}, too large for its weight {broken.weight:g},"
    return f"its gradient on {shared} is {broken.norm}"


def _mean(values: Sequence[float | None]) -> float | None:
    """None where a value is missing."""
    return None if None in values else _sum(values) / len(values)


def _sum(norms: Sequence[float | None]) -> float:
    """Without those that are None."""
    return sum(norm for norm in norms if norm is not None)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _percent(part: float | None, total: float) -> str:
    return f"{part / total:.1%}" if total and part is not None else "-"


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
