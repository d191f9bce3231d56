"""Checks of the teacher: its weights, the pixels it gets, and its score."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import torch

from kd_det.bench.workbench import PixelInput, Side, parameters, side_model
from kd_det.core.checkpoint import read_weights
from kd_det.core.class_map import translation
from kd_det.document.blocks import Picture
from kd_det.preflight import inputs
from kd_det.preflight.answers import Answer, answer, draw_answers, examples, truth_confidence
from kd_det.preflight.budget import Stopwatch, affordable, within
from kd_det.preflight.context import Context
from kd_det.preflight.findings import Section, counted
from kd_det.run.record import sha256

# Shares of Settings.seconds: predictions of the teacher, the same under other inputs, evaluation
# of both sides.
_PREDICT, _TRY, _EVALUATE = 0.15, 0.2, 0.25
_SHOWN_IMAGES = 4
_POOR = 1.0  # AP or accuracy in percent that an untrained model may reach
_SHORT_HASH = 12
_RGB = 3
_SIDES: tuple[Side, Side] = ("teacher", "student")


def inspect_teacher(section: Section, context: Context) -> None:
    """Fill the section."""
    if context.bench.teacher is None:
        section.note("the run has no frozen teacher")
        return
    rows = _describe(section, context)
    for side in _SIDES:
        for oddity in inputs.oddities(context.bench.pixel_input(side)):
            section.warn(f"{side}: {oddity}")
    try:
        seconds = _predict(section, context)
        rows += _evaluate(section, context, seconds)
    finally:
        section.table("The models, and the pixels they expect", ("", *_SIDES), rows)


def _describe(section: Section, context: Context) -> list[tuple[str, ...]]:
    bench, node = context.bench, context.bench.cfg.KD.TEACHER
    counts = [parameters(side_model(bench, side)) for side in _SIDES]
    pixels = [bench.pixel_input(side) for side in _SIDES]
    section.data["parameters"] = dict(zip(_SIDES, counts, strict=True))
    return [
        ("config", node.CONFIG_FILE, ""),
        ("weights", _weights(node.WEIGHTS), _weights(bench.cfg.MODEL.WEIGHTS)),
        ("keys loaded", _coverage(section, context), ""),
        ("parameters", *(f"{count:,}" for count in counts)),
        ("channel order", *(x.order for x in pixels)),
        ("mean", *(inputs.numbers(x.mean) for x in pixels)),
        ("std", *(inputs.numbers(x.std) for x in pixels)),
        ("pixel values", *(f"0..{x.scale:g}" for x in pixels)),
        ("padded to multiples of", *(str(x.divisor) for x in pixels)),
    ]


def _weights(value: str) -> str:
    """A path, address or name, of a file with its size and hash."""
    path = Path(value)
    if not value or not path.is_file():
        return value or "random"
    size = path.stat().st_size / 2**20
    return f"{value} ({size:,.1f} MiB, sha256 {sha256(path)[:_SHORT_HASH]})"


def _coverage(section: Section, context: Context) -> str:
    """How many of the teacher's tensors equal those of its file; loading was strict already."""
    node, bench = context.bench.cfg.KD.TEACHER, context.bench
    own = side_model(bench, "teacher").state_dict()
    if not node.WEIGHTS:
        section.warn("the teacher is untrained: KD.TEACHER.ALLOW_RANDOM is True without WEIGHTS")
        return f"0 of {len(own)}"
    if not Path(node.WEIGHTS).is_file():  # an address or a name, fetched by the host
        return f"{len(own)} of {len(own)}"
    given = read_weights(node.WEIGHTS)
    loaded = {k: v for k, v in own.items() if k in given}
    other = [k for k, v in loaded.items() if not torch.equal(v.cpu(), given[k].to(v.dtype))]
    if other:
        section.error(f"the teacher's {other[0]} is not what {node.WEIGHTS} holds")
    else:
        section.ok(f"{len(loaded)} of {len(own)} keys of the teacher equal those of its file")
    return f"{len(loaded)} of {len(own)}"


def _predict(section: Section, context: Context) -> float:
    """Predictions of the teacher for training images; returns its seconds per image."""
    bench, settings = context.bench, context.settings
    names = bench.class_names("student"), bench.class_names("teacher")
    wanted = list(itertools.islice(examples(bench), settings.images))
    if not wanted:
        section.warn("no training image has an object")
        return 0.0
    count = bench.num_classes("teacher")
    translated = translation(*names, bench.cfg.KD.CLASS_MAP)
    # Without names, class k is the same on both sides.
    table = list(range(count) if translated is None else translated)
    own = range(bench.num_classes("student"))
    context.indices = [table.index(k) if k in table else -1 for k in own]
    watch = Stopwatch(context.device)
    for example in within(wanted, settings.seconds * _PREDICT):
        context.examples.append(example)
        with watch:
            context.answers.append(answer(bench, "teacher", example, count))
    if context.picture is not None:
        shown = slice(_SHOWN_IMAGES)
        draw_answers(context.examples[shown], context.answers[shown], *names, context.picture)
        text = "Training images with their annotation and with the predictions of the teacher"
        section.picture = Picture(context.picture.name, context.picture.read_bytes(), text)
    number = len(context.answers)
    each = watch.seconds / number
    if not context.shares_classes:  # the teacher has no output for any true class
        return each
    sure = float(truth_confidence(context.answers, context.indices).mean())
    section.data |= {"confidence": sure, "asked_images": number}
    section.note(
        f"mean confidence of the teacher in the true class of an object: {sure:.2f} "
        f"(0..1, {counted(number, 'training image')})"
    )
    if bench.cfg.KD.TEACHER.WEIGHTS:
        _try_inputs(section, context, each, count)
    return each


def _try_inputs(section: Section, context: Context, each: float, count: int) -> None:
    bench, indices = context.bench, context.indices
    own = bench.pixel_input("teacher")
    if len(own.mean) != _RGB or indices is None:
        return
    seconds = context.settings.seconds * _TRY
    others = list(inputs.alternatives(own, bench.pixel_input("student")).items())
    # The first ones are the most likely: the other channel order, the student's input.
    others = others[: affordable(len(others), each, seconds)]
    model = side_model(bench, "teacher")
    tried: dict[str, tuple[PixelInput, list[Answer]]] = {what: (x, []) for what, x in others}
    for example in within(context.examples, seconds):
        for pixels, answers in tried.values():
            with inputs.under_input(model, own, pixels):
                answers.append(answer(bench, "teacher", example, count))
    number = len(tried[others[0][0]][1])
    better = inputs.find_better(context.answers[:number], tried, indices)
    if better is None:
        section.ok(
            f"the teacher is most confident under its own input: {len(tried)} others tried on "
            f"{counted(number, 'image')}"
        )
        return
    # Its classes are judged under the input that it was trained with.
    context.answers = tried[better.what][1]
    context.examples = context.examples[:number]
    _report_better(section, context, better)


def _report_better(section: Section, context: Context, better: inputs.Better) -> None:
    bench = context.bench
    own = bench.pixel_input("teacher")
    has_format = bench.teacher_cfg is not None and "FORMAT" in bench.teacher_cfg.INPUT
    only_order = (own.mean, own.std) == (better.pixels.mean, better.pixels.std)
    if only_order and not has_format:
        remedy = (
            "this host's images are RGB: reverse the input channels of the first convolution in "
            "its weights"
        )
    else:
        wrong = ["INPUT.FORMAT"] if has_format and own.order != better.pixels.order else []
        wrong += [] if only_order else ["MODEL.PIXEL_MEAN", "MODEL.PIXEL_STD"]
        remedy = f"correct {', '.join(wrong)} in {bench.cfg.KD.TEACHER.CONFIG_FILE}"
    confidence = {"configured": better.own, "other": better.other}
    section.data["better_input"] = {"what": better.what, **confidence}
    (section.error if better.clear else section.warn)(
        "the teacher's weights were not trained on the pixels it gets. Its mean confidence in the "
        f"true class of an object is {better.own:.2f} as configured ({inputs.describe(own)}) and "
        f"{better.other:.2f} with {better.what} ({inputs.describe(better.pixels)}); {remedy}"
    )


def _evaluate(section: Section, context: Context, each: float) -> list[tuple[str, ...]]:
    bench, settings = context.bench, context.settings
    floor = float(bench.cfg.KD.TEACHER.MIN_AP)
    obstacle = "" if bench.cfg.DATASETS.TEST else "DATASETS.TEST is empty"
    if not obstacle and not context.shares_classes:
        obstacle = "the teacher has none of the student's classes"
    if obstacle:
        section.note(f"nothing is evaluated: {obstacle}")
        if floor:
            section.error(f"KD.TEACHER.MIN_AP {floor:g} cannot be checked: {obstacle}")
        return []
    number = affordable(settings.images, 2 * each, settings.seconds * _EVALUATE)
    scores: dict[Side, float] = {}
    name = ""
    for side in _SIDES:
        with Stopwatch(context.device) as watch:
            name, scores[side] = _score(context, side, number)
        context.seconds_per_image[side] = watch.seconds / number
    section.data["score"] = {"name": name, "images": number, **scores}
    images = counted(number, "validation image")
    teacher = scores["teacher"]
    measured = f"the teacher's {name} on {images} is {teacher:.1f}"
    if floor and not teacher >= floor:
        section.error(f"{measured}, below KD.TEACHER.MIN_AP {floor:g}")
    elif bench.cfg.KD.TEACHER.WEIGHTS and not teacher >= _POOR:
        section.warn(f"{measured}: it is not better than an untrained model")
    if bench.cfg.KD.TEACHER.WEIGHTS and scores["student"] > teacher:
        section.warn(
            f"the student starts with {name} {scores['student']:.1f}, better than its teacher "
            f"({teacher:.1f})"
        )
    texts = [f"{score:.1f}" for score in scores.values()]
    return [(f"{name} on {images} (%)", *texts)]


def _score(context: Context, side: Side, images: int) -> tuple[str, float]:
    results = context.bench.evaluate(side, images)
    for kind, metric, name in (("bbox", "AP", "box AP"), ("accuracy", "top1", "top-1 accuracy")):
        if kind in results:
            value = results[kind][metric]
            return name, value if math.isfinite(value) else 0.0
    raise KeyError(f"no score in {results}")
