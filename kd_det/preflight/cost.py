"""Cost of the run: time of an iteration by part, memory, hours, and possible savings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kd_det.bench.looks import evaluating
from kd_det.bench.workbench import Side, latency, macs, side_model
from kd_det.preflight.budget import Stopwatch, timed
from kd_det.preflight.context import Context
from kd_det.preflight.findings import Section, counted
from kd_det.preflight.inputs import entry

_PARTS = ("data", "student", "teacher", "losses", "backward")
# A forward in half precision can take minutes on a CPU without instructions for it.
_CROP = 128  # pixels
_LONG = 0.5  # seconds of a forward that is measured only once


def inspect_cost(section: Section, context: Context) -> None:
    """Fill the section."""
    steps, cfg = context.steps, context.cfg
    assert steps is not None
    whole = cfg.SOLVER.IMS_PER_BATCH
    # The loader loads whole batches, however many of their images are then taken.
    factors = dict.fromkeys(_PARTS, whole / steps.images) | {"data": 1.0}
    seconds = {part: steps.mean(part) * factor for part, factor in factors.items()}
    workers = cfg.DATALOADER.NUM_WORKERS
    iteration = iteration_seconds(seconds, workers)
    on_gpu = context.device.startswith("cuda")
    cpu = f"CPU with {torch.get_num_threads()} threads"
    rows = [
        (f"data (one of {workers} loader processes)" if part == "data" and workers else part,
         f"{value:.3f}", f"{value / iteration:.0%}")
        for part, value in seconds.items()
    ]  # fmt: skip
    section.table(
        f"Seconds of an iteration of {counted(whole, 'image')} on one "
        f"{torch.cuda.get_device_name() if on_gpu else cpu}",
        ("part", "seconds", "of an iteration"),
        [*rows, ("iteration", f"{iteration:.3f}", "")],
    )
    if steps.images < whole:
        section.note(
            f"measured with {steps.images} of {whole} images per batch, and multiplied (all but "
            "the data, of which whole batches are loaded): a whole batch would not fit here, or "
            "take too long"
        )
    iterations = context.bench.iterations()
    hours = iterations * iteration / 3600
    section.data |= {"seconds": seconds, "iteration": iteration, "hours": hours}
    section.data["memory_mib"] = steps.memory
    kind = "of GPU memory" if on_gpu else "of this process's memory"
    section.note(
        f"{hours:,.{'2g' if hours < 10 else '0f'}} hours for {iterations:,} iterations on this "
        "device, without evaluation"
    )
    section.note(
        f"peak {kind} in a step of {counted(steps.images, 'image')}: {steps.memory:,.0f} MiB"
    )
    if context.bench.teacher is not None:
        _savings(section, context, seconds)
    _models(section, context)


def iteration_seconds(seconds: Mapping[str, float], workers: int) -> float:
    """Seconds of an iteration; loader processes run beside the model.

    ``seconds["data"]`` is the time of one process to load a batch; with 0 ``workers`` the training
    process loads.
    """
    compute = sum(value for part, value in seconds.items() if part != "data")
    return max(compute, seconds["data"] / workers) if workers else compute + seconds["data"]


def _savings(section: Section, context: Context, seconds: Mapping[str, float]) -> None:
    workers = context.cfg.DATALOADER.NUM_WORKERS
    iteration = iteration_seconds(seconds, workers)
    # Less computation saves little where an iteration waits for the loader.
    alone = iteration_seconds({**seconds, "teacher": 0.0, "losses": 0.0}, workers)
    section.data["without_distillation"] = alone
    section.note(
        f"without teacher and losses an iteration would take {alone:.3f} instead of "
        f"{iteration:.3f} seconds ({1 - alone / iteration:.0%} less)"
    )
    ratio, dtype = _half_precision(context)
    section.data["half_precision"] = ratio
    if ratio is None:
        return
    if context.bench.cfg.SOLVER.AMP.ENABLED:
        section.note("the teacher runs in half precision already: SOLVER.AMP.ENABLED")
        return
    saving = f"nothing: it takes {ratio:.1f} times as long on this device"
    if ratio < 1:
        halved = {**seconds, "teacher": seconds["teacher"] * ratio}
        saved = iteration - iteration_seconds(halved, workers)
        saving = f"{saved:.3f} seconds ({saved / iteration:.0%} of an iteration)"
    section.note(f"a teacher in {dtype} would save {saving}")


def _half_precision(context: Context) -> tuple[float | None, str]:
    """Time of the teacher's backbone in half precision relative to full, and the dtype's name."""
    x = context.steps.teacher_input if context.steps else None
    if x is None:
        return None, ""
    part = entry(side_model(context.bench, "teacher"))
    on_gpu = context.device.startswith("cuda")
    dtype = torch.float16 if on_gpu else torch.bfloat16
    if not on_gpu:
        x = x[:1, :, :_CROP, :_CROP]

    def seconds(enabled: bool) -> float:
        with evaluating(part), torch.autocast(x.device.type, dtype, enabled=enabled):
            return timed(lambda: part(x), context.device, _LONG)

    return seconds(True) / seconds(False), str(dtype).removeprefix("torch.")


def _models(section: Section, context: Context) -> None:
    sides: tuple[Side, ...] = ("teacher", "student") if context.bench.teacher else ("student",)
    rows = []
    for side in sides:
        with Stopwatch(context.device) as watch:
            count = macs(context.bench, side) / 1e9
        # The overhead of counting is negligible in a long forward.
        quick = watch.seconds < _LONG
        elapsed = latency(context.bench, side) if quick else watch.seconds
        section.data[side] = {"seconds": elapsed, "gmacs": count}
        rows.append((side, f"{count:.2f}", f"{1000 * elapsed:,.1f}"))
    section.table(
        f"Inference on one image ({_image_size(context.bench.example(sides[0]))})",
        ("side", "GMACs", "milliseconds"),
        rows,
    )


def _image_size(arguments: Any) -> str:
    """Height and width of the first tensor inside the arguments of a model."""
    while not isinstance(arguments, Tensor):
        arguments = next(iter(arguments.values() if isinstance(arguments, dict) else arguments))
    return f"{arguments.shape[-2]}×{arguments.shape[-1]}"
