"""What a balance is: the weights of the terms, and what may adapt them to the run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from kd_det.core.terms import Term


class Balance(nn.Module):
    """Constant weights, and what every scheme has.

    Args:
        terms: the terms of the run.
    """

    def __init__(self, terms: Sequence[Term]) -> None:
        super().__init__()
        self.configured = {term.name: term.weight for term in terms}

    def observe(
        self,
        raw: Mapping[str, Tensor],
        factors: Mapping[str, float],
        task: Mapping[str, Tensor] | None,
        shared: Sequence[nn.Parameter] | None,
        step: int,
    ) -> dict[str, Tensor]:
        """Look at one training step before its terms are weighted.

        Every process calls it in every step.

        Args:
            raw: unweighted losses by term name, in the graph.
            factors: what each term's schedule says in this step.
            task: the student's own losses by name.
            shared: parameters to compare gradients on.
            step: counts training steps from 0.

        Returns:
            The shares of ``"task"`` and of each term, with the weights of this step; nothing in
            steps without a measurement.
        """
        return {}

    def weight(self, name: str, factor: float) -> float | Tensor:
        """All that the loss of a term is multiplied by, without a graph."""
        return self.configured[name] * factor

    def weigh(self, name: str, raw: Tensor, factor: float) -> Tensor:
        """The loss of a term as it is trained."""
        return raw * self.weight(name, factor)
