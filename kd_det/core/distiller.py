"""The distiller: named, weighted losses of recorded tensors. It runs no model."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kd_det.core.balance import Balance
from kd_det.core.errors import check_known, fail
from kd_det.core.loss import DistillLoss, TapSpec
from kd_det.core.numerics import zero_in_graph
from kd_det.core.registry import LOSSES
from kd_det.core.terms import Term, missing_arguments, parse_terms

logger = logging.getLogger(__name__)
NamedSpecs = Mapping[str, TapSpec | Sequence[TapSpec]]


class Distiller(nn.Module):
    """The losses of one run with the parameters that they learn.

    It belongs beside the student inside the module that DDP wraps; its parameters join the
    student's optimiser and its state is ``distiller.*`` in the checkpoint.

    Args:
        terms: parsed terms, or the mapping :func:`kd_det.core.terms.parse_terms` reads.
        student_specs, teacher_specs: shapes by tap name; a list of specs for a name that stands
            for several tensors (``box_logits`` of a cascade).
        context: names of the context the caller offers, for losses that need it.
        report_period: number of steps after which terms that contributed nothing are reported.
        balance: adapts the weights to the run. Default: the configured weights.

    Attributes:
        specs, terms: the terms, and the loss of each by name.
        metrics: of the last forward, detached scalars for logging: ``raw/<term>``, the loss
            without its weight; ``weight/<term>``, all that it was multiplied by; and, in steps in
            which the balance measured them, ``share/task`` and ``share/<term>``.

    Raises:
        KDError: an unknown loss, tap, schedule or argument, or taps that cannot be bridged.

    Example:
        >>> distiller = Distiller(
        ...     {"hint": {"LOSS": "FitNet", "WEIGHT": 100.0, "TAPS": ["layer2"]}},
        ...     {"layer2": TapSpec(16, size=(8, 8))},
        ...     {"layer2": TapSpec(64, size=(8, 8))},
        ... )
        >>> losses = distiller(student_taps.read(), teacher_taps.read())
    """

    def __init__(
        self,
        terms: Sequence[Term] | Mapping[str, Mapping[str, Any]],
        student_specs: NamedSpecs,
        teacher_specs: NamedSpecs,
        context: Collection[str] = (),
        report_period: int = 1000,
        balance: Balance | None = None,
    ) -> None:
        super().__init__()
        self.specs = list(parse_terms(terms) if isinstance(terms, Mapping) else terms)
        self.terms = nn.ModuleDict(
            {t.name: build_loss(t, student_specs, teacher_specs, context) for t in self.specs}
        )
        self.balance = Balance() if balance is None else balance
        self._schedules_apply = True
        self.metrics: dict[str, Tensor] = {}
        # On the device for the checkpoint, as an int for the schedules: reading it back from a
        # GPU in every step would make the host wait.
        self.step: Tensor
        self.register_buffer("step", torch.zeros((), dtype=torch.long))
        self._step = 0
        self.register_load_state_dict_post_hook(_read_step)
        self.report_period = report_period
        self._active: dict[str, Tensor] = {}
        self._steps_since_report = 0

    def forward(
        self,
        student: Mapping[str, Any],
        teacher: Mapping[str, Any],
        context: Mapping[str, Any] | None = None,
        task: Mapping[str, Tensor] | None = None,
        shared: Sequence[nn.Parameter] | None = None,
    ) -> dict[str, Tensor]:
        """Weighted scalar losses by term name; trainers sum the dict.

        Args:
            student, teacher: recorded tensors by tap name; a list where a name stands for several.
            context: values beyond features, by the names in ``needs`` of a loss. A mapping by tap
                name is narrowed to the term's taps, in their order.
            task: the student's own losses by name, for a balance.
            shared: the student's parameters on which a balance compares gradients.
        """
        raw: dict[str, Tensor] = {}
        inputs: dict[str, list[Tensor]] = {}
        for term in self.specs:
            loss: DistillLoss = self.terms[term.name]  # type: ignore[assignment]
            s = _gather([tap for tap, _ in term.taps], student)
            t = _gather([tap for _, tap in term.taps], teacher)
            extra = {name: _narrow((context or {})[name], term) for name in loss.needs}
            raw[term.name] = loss(s, t, **extra)
            inputs[term.name] = [*s, *loss.parameters()]
        losses = self._weigh(raw, inputs, task, shared)
        if self.training:
            self.step += 1
            self._step += 1
            self._steps_since_report += 1
            if self._steps_since_report >= self.report_period:
                self.report_silent()
        return losses

    def _weigh(
        self,
        raw: Mapping[str, Tensor],
        inputs: Mapping[str, Sequence[Tensor]],
        task: Mapping[str, Tensor] | None,
        shared: Sequence[nn.Parameter] | None,
    ) -> dict[str, Tensor]:
        factors = {
            term.name: term.schedule(self._step) if self._schedules_apply else 1.0
            for term in self.specs
        }
        shares = {}
        if self.training and torch.is_grad_enabled():
            shares = self.balance.observe(raw, factors, task, shared, self._step)
        self.metrics = {f"share/{name}": share for name, share in shares.items()}
        losses = {}
        for term in self.specs:
            name, loss, factor = term.name, raw[term.name], factors[term.name]
            weight: float | Tensor = 0.0
            if term.weight and factor:
                losses[name] = self.balance.weigh(term, loss, factor)
                weight = self.balance.weight(term, factor)
                active = loss.detach() != 0
            else:
                # It must not let a non-finite loss or gradient through: 0 * inf is nan.
                losses[name] = zero_in_graph([*inputs[name], *self.balance.parameters()])
                active = losses[name].detach() != 0
            self._active[name] = self._active[name] | active if name in self._active else active
            if not isinstance(weight, Tensor):
                # Filled in on the device: copying a number there would make the host wait.
                weight = torch.full_like(loss.detach(), weight)
            self.metrics |= {f"raw/{name}": loss.detach(), f"weight/{name}": weight}
        return losses

    @contextmanager
    def full_weights(self) -> Iterator[None]:
        """Every schedule's factor is 1 inside, to measure terms that a schedule starts later."""
        self._schedules_apply = False
        try:
            yield
        finally:
            self._schedules_apply = True

    def report_silent(self) -> list[str]:
        """Warn about, and return, terms that were zero in every step since the last report."""
        silent = [name for name, active in self._active.items() if not bool(active)]
        for name in silent:
            logger.warning(
                "term '%s' was exactly zero in all of the last %d steps: it taps nothing, has no "
                "positives, or its weight is 0",
                name,
                self._steps_since_report,
            )
        self._active = {}
        self._steps_since_report = 0
        return silent


def build_loss(
    term: Term, student_specs: NamedSpecs, teacher_specs: NamedSpecs, context: Collection[str]
) -> DistillLoss:
    """The loss of one term for the tapped shapes; for its errors see :class:`Distiller`."""
    where = f"term '{term.name}'"
    for s, t in term.taps:
        check_known(f"student tap of {where}", s, student_specs)
        check_known(f"teacher tap of {where}", t, teacher_specs)
    student: list[TapSpec] = _gather([s for s, _ in term.taps], student_specs)
    teacher: list[TapSpec] = _gather([t for _, t in term.taps], teacher_specs)
    if len(student) != len(teacher):
        fail(
            expected=f"{where} to tap as many student as teacher tensors",
            received=f"{len(student)} and {len(teacher)}",
            remedy="choose models with as many stages or levels, or name pairs of taps",
        )
    loss_class: type[DistillLoss] = LOSSES.get(term.loss)
    for need in loss_class.needs:
        if need not in context:
            fail(
                expected=f"{where} ({term.loss}) to get '{need}' from its host",
                received=f"a host that offers {', '.join(context) or 'nothing'}",
                remedy="use a loss that needs features only, or a detection host",
            )
    given = dict(term.arguments)
    given = loss_class.tap_arguments(student, teacher, given) | given
    if missing := missing_arguments(loss_class.__init__, given):
        fail(
            expected=f"{where} to give {', '.join(missing).upper()} to {term.loss}",
            received=", ".join(term.arguments).upper() or "no arguments",
            remedy="add the missing key",
        )
    return loss_class(**given)


def _gather(names: Sequence[str], values: Mapping[str, Any]) -> list[Any]:
    gathered: list[Any] = []
    for name in names:
        value = values[name]
        gathered.extend(value if isinstance(value, (list, tuple)) else [value])
    return gathered


def _narrow(value: Any, term: Term) -> Any:
    return [value[tap] for tap, _ in term.taps] if isinstance(value, Mapping) else value


def _read_step(module: Any, incompatible: Any) -> None:
    module._step = int(module.step)


def tap_specs(captures: Mapping[str, Any]) -> dict[str, TapSpec | list[TapSpec]]:
    """Specs of recorded tensors, for models of a fixed input size.

    ``captures`` is ``TapRecorder.read()`` after the forward of an example batch. Specs hold
    channels, and ``(H, W)`` for maps; lists of tensors give lists of specs.
    """
    return {
        name: [_spec(v) for v in value] if isinstance(value, (list, tuple)) else _spec(value)
        for name, value in captures.items()
    }


def _spec(value: Tensor) -> TapSpec:
    size = (value.shape[2], value.shape[3]) if value.dim() == 4 else None
    return TapSpec(channels=value.shape[1], size=size)
