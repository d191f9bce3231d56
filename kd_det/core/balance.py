"""What a balance is: it may adapt the weights of the terms to the run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from kd_det.core.terms import Term


class Balance(nn.Module):
    """The weights of the terms as they are configured; a scheme overrides what it adapts.

    In all methods ``factor`` is the value of a term's schedule in the current step.
    """

    def observe(
        self,
        raw: Mapping[str, Tensor],
        factors: Mapping[str, float],
        task: Mapping[str, Tensor] | None,
        shared: Sequence[nn.Parameter] | None,
        step: int,
    ) -> dict[str, Tensor]:
        """Called in every training step, on every process, before the terms are weighted.

        Args:
            raw: unweighted scalar losses by term name, in the graph.
            factors: by term name.
            task: the student's own losses by name.
            shared: parameters to compare gradients on.
            step: counts training steps from 0.

        Returns:
            The shares of ``"task"`` and of each term; empty in steps without a measurement.
        """
        return {}

    def weight(self, term: Term, factor: float) -> float | Tensor:
        """All that the loss of a term is multiplied by, without a graph."""
        return term.weight * factor

    def weigh(self, term: Term, raw: Tensor, factor: float) -> Tensor:
        """The loss of a term as it is trained: ``raw * weight(term, factor)``."""
        return raw * self.weight(term, factor)
