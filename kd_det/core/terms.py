"""A term: one loss of a run with its taps, weight and schedule, checked when it is read."""

from __future__ import annotations

import inspect
import math
import typing
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from kd_det.core.errors import check_choice, check_known, fail, nearest
from kd_det.core.registry import LOSSES, SCHEDULES
from kd_det.core.schedules import Constant, Schedule

_OWN_KEYS = ("LOSS", "WEIGHT", "TAPS", "SCHEDULE", "CLIP")
Clip = Literal["none", "task_norm"]
TapPair = tuple[str, str]


@dataclass(frozen=True)
class Term:
    """One entry of ``KD.TERMS``, and the only place that holds its weight.

    Attributes:
        name: the key of the entry, and the name of the logged loss.
        loss: a name in the registry.
        taps: pairs of student and teacher tap names or module paths.
        weight: meaningless without the loss's reduction.
        arguments: constructor arguments of the loss, in lower case.
        schedule: the factor of the weight in each training step.
        clip: ``"task_norm"`` limits the term's gradient to that of the task, tensor by tensor
            (MHGD; :mod:`kd_det.balance.clip`).
    """

    name: str
    loss: str
    taps: tuple[TapPair, ...]
    weight: float = 1.0
    arguments: Mapping[str, Any] = field(default_factory=dict)
    schedule: Schedule = field(default_factory=Constant)
    clip: Clip = "none"


def parse_terms(terms: Mapping[str, Mapping[str, Any]]) -> list[Term]:
    """Read ``{name: {LOSS, WEIGHT, TAPS, SCHEDULE, CLIP, <argument>...}}``.

    Raises:
        KDError: an unknown loss, schedule or key, a value of the wrong type, or no taps.
    """
    return [_parse_term(name, node) for name, node in terms.items()]


def _parse_term(name: str, node: Mapping[str, Any]) -> Term:
    where = f"term '{name}'"
    # The name becomes that of a submodule.
    if not name or "." in name or hasattr(nn.ModuleDict(), name):
        fail(
            expected="the name of a term to be free and without dots",
            received=f"'{name}'",
            remedy=f"write for example 'kd_{name.replace('.', '_')}'",
        )
    if not isinstance(node, Mapping):
        fail(
            expected=f"{where} to be a mapping with a LOSS",
            received=repr(node),
            remedy=f"to change a weight, set KD.TERMS.{name}.WEIGHT",
        )
    if not isinstance(node.get("LOSS"), str):
        fail(
            expected=f"{where} to have a LOSS",
            received=f"keys {', '.join(node) or '(none)'}",
            remedy=nearest(str(node.get("LOSS")), [name for name, _ in LOSSES]),
        )
    loss_class = LOSSES.get(node["LOSS"])
    weight = node.get("WEIGHT", 1.0)
    _check_type(where, "WEIGHT", weight, float)
    if not math.isfinite(weight):
        fail(
            expected=f"WEIGHT of {where} to be finite",
            received=str(weight),
            remedy="give a number; 0 switches the term off",
        )
    raw_schedule = node.get("SCHEDULE", {"NAME": "constant"})
    if not isinstance(raw_schedule, Mapping) or "NAME" not in raw_schedule:
        fail(
            expected=f"SCHEDULE of {where} to be a mapping with a NAME",
            received=repr(raw_schedule),
            remedy="write for example SCHEDULE: {NAME: linear_warmup, ITERS: 1000}",
        )
    schedule = build_schedule(where, raw_schedule)
    clip = node.get("CLIP", "none")
    check_choice(f"CLIP of {where}", clip, Clip)
    arguments = {k.lower(): v for k, v in node.items() if k not in _OWN_KEYS}
    for key in node:
        if key not in _OWN_KEYS and key != key.upper():
            fail(
                expected=f"keys of {where} in upper case",
                received=f"'{key}'",
                remedy=f"write {key.upper()}",
            )
    _check_arguments(f"loss {node['LOSS']} of {where}", loss_class.__init__, arguments)
    return Term(
        name=name,
        loss=node["LOSS"],
        taps=_parse_taps(where, node.get("TAPS", ())),
        weight=float(weight),
        arguments=arguments,
        schedule=schedule,
        clip=clip,
    )


def check_heads(terms: Sequence[Term], sigmoid_taps: Collection[str]) -> None:
    """Refuse softmax distillation of taps whose logits belong to independent (sigmoid) classes."""
    for term in terms:
        parameters = inspect.signature(LOSSES.get(term.loss).__init__).parameters
        if "activation" not in parameters:
            continue
        activation = term.arguments.get("activation", parameters["activation"].default)
        for tap, _ in term.taps:
            if activation == "softmax" and tap in sigmoid_taps:
                fail(
                    expected=f"ACTIVATION sigmoid for term '{term.name}' on '{tap}', a head with "
                    "independent classes",
                    received="softmax",
                    remedy="set ACTIVATION: sigmoid",
                )


def build_schedule(where: str, node: Mapping[str, Any]) -> Schedule:
    """The schedule a ``SCHEDULE`` mapping describes."""
    factory, what = SCHEDULES.get(node["NAME"]), f"schedule {node['NAME']} of {where}"
    arguments = {k.lower(): v for k, v in node.items() if k != "NAME"}
    _check_arguments(what, factory, arguments)
    if missing := missing_arguments(factory, arguments):
        fail(
            expected=f"{what} to get {', '.join(missing).upper()}",
            received=", ".join(arguments).upper() or "nothing",
            remedy="add the missing key",
        )
    return factory(**arguments)


def _parse_taps(where: str, taps: Any) -> tuple[TapPair, ...]:
    pairs: list[TapPair] = []
    for tap in taps if isinstance(taps, (list, tuple)) else (taps,):
        if isinstance(tap, str) and tap:
            pairs.append((tap, tap))
        elif _fits(tap, tuple[str, str]):
            pairs.append((tap[0], tap[1]))
        else:
            fail(
                expected=f"TAPS of {where} to list tap names, or [student, teacher] pairs",
                received=repr(tap),
                remedy="write for example TAPS: [p2, p3] or [[layer2, layer3.5]]",
            )
    if not pairs:
        fail(
            expected=f"{where} to have TAPS",
            received="none",
            remedy="name what to compare, for example TAPS: [p2, p3, p4, p5, p6]",
        )
    return tuple(pairs)


def _parameters(function: Any) -> dict[str, inspect.Parameter]:
    return {
        name: parameter
        for name, parameter in inspect.signature(function).parameters.items()
        if name != "self"
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    }


def missing_arguments(function: Any, given: Collection[str]) -> list[str]:
    """Names of the parameters without default that ``given`` lacks."""
    parameters = _parameters(function).items()
    return [name for name, p in parameters if p.default is p.empty and name not in given]


def _check_arguments(what: str, function: Any, arguments: Mapping[str, Any]) -> None:
    """Check names and types against the signature of ``function``."""
    hints, parameters = typing.get_type_hints(function), _parameters(function)
    for name, value in arguments.items():
        check_known(f"argument of {what}", name, parameters)
        _check_type(what, name, value, hints.get(name, Any))


def _check_type(what: str, name: str, value: Any, hint: Any) -> None:
    if not _fits(value, hint):
        fail(
            expected=f"{name.upper()} of {what} to be {_describe(hint)}",
            received=f"{value!r} ({type(value).__name__})",
            remedy="correct the value in the config",
        )


def _fits(value: Any, hint: Any) -> bool:
    origin = typing.get_origin(hint)
    if hint is Any:
        return True
    if origin is Literal:
        return value in typing.get_args(hint)
    if origin is tuple and ... not in typing.get_args(hint):
        members = typing.get_args(hint)
        fits_length = isinstance(value, (list, tuple)) and len(value) == len(members)
        return fits_length and all(map(_fits, value, members))
    if origin in (list, tuple, Sequence) or origin is Sequence.__mro__[0]:
        inner = typing.get_args(hint)[0] if typing.get_args(hint) else Any
        return isinstance(value, (list, tuple)) and all(_fits(v, inner) for v in value)
    if origin is not None:  # unions
        return any(_fits(value, option) for option in typing.get_args(hint))
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _describe(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(map(repr, typing.get_args(hint)))
    return getattr(hint, "__name__", str(hint))
