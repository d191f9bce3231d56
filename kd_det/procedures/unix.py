"""UNIX: uncertainty-aware mixup (Xu, Liu and Loy, "Computation-Efficient Knowledge Distillation via
Uncertainty-Aware Mixup", 2020, https://arxiv.org/abs/2012.09413).

A first pass of the student scores the whole batch; the batch is sorted by uncertainty and mixed,
the certain images most; only the first k mixed images go through teacher, student and backward.

Shapes: B images of the batch, k of them kept, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from kd_det.core.errors import check_choice, check_share, fail
from kd_det.core.numerics import (
    descending,
    full_precision,
    logit_entropy,
    no_autocast,
    zero_in_graph,
)
from kd_det.core.seeds import keyed_generator
from kd_det.procedures.base import (
    MIXED_BATCHES,
    Procedure,
    TrainingLoop,
    TrainingSet,
    active_procedures,
    register,
)

if TYPE_CHECKING:
    from fvcore.common.config import CfgNode

Strategy = Literal["entropy", "confidence", "margin", "random"]


class MixedBatch(NamedTuple):
    """The k images to train on, ``[k, ...]``. Row i mixes two images of the raw batch.

    Targets of the more uncertain images weigh ``1 - mu``, those of their partners ``mu``, which is
    ``[k]`` in the dtype of the images.
    """

    images: Tensor
    target_a: Tensor
    target_b: Tensor
    mu: Tensor


def uncertainty(
    logits: Tensor, strategy: Strategy = "entropy", generator: torch.Generator | None = None
) -> Tensor:
    """How unsure the student is of each image; larger is less sure.

    Args:
        logits: ``[B, C]`` with at least two classes, any floating dtype, computed in at least
            float32.
        strategy: ``"entropy"`` in nats (the default of the released code); ``"confidence"``:
            1 minus the largest probability; ``"margin"``: minus the distance of the two
            largest; ``"random"``: uniform numbers.
        generator: a CPU generator, for ``"random"`` only.

    Returns:
        ``[B]`` without a gradient.
    """
    check_choice("strategy", strategy, Strategy)
    if logits.dim() != 2 or logits.shape[1] < 2:
        fail(
            expected="UNIX to get logits [B, C] of at least two classes",
            received=f"shape {tuple(logits.shape)}",
            remedy="tap the classifier's output",
        )
    if strategy == "entropy":
        return logit_entropy(logits)
    if strategy == "random":
        return torch.rand(len(logits), generator=generator).to(logits.device)
    with no_autocast(logits):
        log_p = F.log_softmax(full_precision(logits.detach()), dim=1)
        if strategy == "confidence":
            return -torch.expm1(log_p.amax(dim=1))
        first, second = log_p.topk(2, dim=1).values.exp().unbind(dim=1)
        return second - first


def mixup_weights(
    batch: int, b: float, slope: float = 10.0, nominal_batch: int | None = None
) -> Tensor:
    """How strongly each rank may be mixed, from the most uncertain on: ``[batch]`` float64.

    ``1 / (1 + exp(-slope * (i/B - m)))`` with ``m = (2b - 1) / (2B)`` for rank i.

    Args:
        batch: number of images.
        b: how many of B images stay nearly pure; at rank ``b - 1/2`` the weight is 1/2.
        slope: w; 10 in the published commands, 1000 is nearly a step.
        nominal_batch: B; ``batch`` by default.
    """
    size = nominal_batch or batch
    middle = (2 * b - 1) / (2 * size)
    return torch.sigmoid(slope * (torch.arange(batch, dtype=torch.float64) / size - middle))


def mix(
    images: Tensor, targets: Tensor, order: Tensor, partners: Tensor, weights: Tensor
) -> MixedBatch:
    """Mix row ``order[i]`` with row ``partners[i]``, for as many rows as there are weights.

    Args:
        images: ``[B, ...]``, floating.
        targets: ``[B, ...]``.
        order: rows by descending uncertainty, ``[B]`` int64.
        partners: rows to mix in, ``[B]`` int64. A row may meet itself, or one that is less sure.
        weights: mu, the partner's share, ``[k]``.
    """
    if not images.is_floating_point():
        fail(
            expected="UNIX to mix floating images",
            received=str(images.dtype),
            remedy="normalise them first",
        )
    mu = weights.to(images)
    first, second = order[: len(mu)], partners[: len(mu)]
    share = mu.view(-1, *[1] * (images.dim() - 1))
    mixed = (1 - share) * images[first] + share * images[second]
    return MixedBatch(mixed, targets[first], targets[second], mu)


def unix_task_loss(logits: Tensor, target_a: Tensor, target_b: Tensor, mu: Tensor) -> Tensor:
    """Cross-entropy with both targets of each mixed image, weighted as the images are.

    The released commands give it weight 0 and learn from the teacher alone.

    Args:
        logits: student's, ``[k, C]``, computed in at least float32.
        target_a: classes ``[k]`` int64; weight ``1 - mu``.
        target_b: classes ``[k]`` int64; weight ``mu``.
        mu: ``[k]``.

    Returns:
        Scalar mean over the k images. An exact zero in the graph if there are none.
    """
    if len(logits) == 0:
        return zero_in_graph([logits])
    with no_autocast(logits):
        z = full_precision(logits)
        share = mu.to(z)
        loss_a = F.cross_entropy(z, target_a, reduction="none")
        loss_b = F.cross_entropy(z, target_b, reduction="none")
        return ((1 - share) * loss_a + share * loss_b).mean()


def unix_cost(flops_ratio: float, share: float, backward: float = 1.0) -> float:
    """Computation of UNIX as a share of plain distillation's: ``share + 1 / (R + 1 + backward)``.

    Args:
        flops_ratio: R, a forward pass of the teacher over one of the student.
        share: r = k/B, the part of a batch that is trained on.
        backward: cost of a backward pass in forward passes. 1 gives the published
            ``r + 1/(R+2)``; 2 is closer to the truth.
    """
    return share + 1 / (flops_ratio + 1 + backward)


class UnixMixup:
    """Selects and mixes batches, and counts what it saves.

    Draws depend on the seed, the rank and the number of batches so far, so that the checkpoint of
    one rank resumes them all.

    Args:
        k_frac: part of the batch that is trained on, in (0, 1]; 48 of 64 in the published
            commands.
        b_frac: part of the batch that stays nearly pure, in (0, 1]; 32 of 64.
        slope: see :func:`mixup_weights`; 10 in the published commands.
        strategy: see :func:`uncertainty`.
        nominal: ``(k, b, batch)`` in images instead of parts, as the released code counts: a
            short last batch is then hardly mixed, and not reduced below k.
        seed: the same on all ranks.
        rank: this process; ranks draw differently.

    Attributes:
        scored: number of images that the student has scored without a gradient.
        trained: number of images that went through teacher, student and backward.
    """

    def __init__(
        self,
        k_frac: float = 0.75,
        b_frac: float = 0.5,
        slope: float = 10.0,
        strategy: Strategy = "entropy",
        nominal: tuple[int, int, int] | None = None,
        seed: int = 0,
        rank: int = 0,
    ) -> None:
        check_choice("strategy", strategy, Strategy)
        check_share("UNIX's k_frac, a part of the batch", k_frac, remedy="use 0.75")
        check_share("UNIX's b_frac, a part of the batch", b_frac, remedy="use 0.5")
        if nominal is not None and not all(1 <= part <= nominal[2] for part in nominal[:2]):
            fail(
                expected="UNIX's nominal (k, b, batch) with k and b from 1 to batch",
                received=str(nominal),
                remedy="use (48, 32, 64), or None for parts of each batch",
            )
        self.k_frac, self.b_frac, self.slope = k_frac, b_frac, slope
        self.strategy: Strategy = strategy
        self.nominal, self.seed, self.rank = nominal, seed, rank
        self.batches = self.scored = self.trained = 0

    def sizes(self, batch: int) -> tuple[int, float, int]:
        """``(k, b, B)`` for a batch of this many images."""
        if self.nominal is None:
            return max(1, round(self.k_frac * batch)), self.b_frac * batch, batch
        k, b, nominal_batch = self.nominal
        return min(k, batch), b, nominal_batch

    def __call__(self, images: Tensor, targets: Tensor, logits: Tensor) -> MixedBatch:
        """The k images to train on.

        Args:
            images: the raw batch, ``[B, ...]``, floating.
            targets: ``[B, ...]``.
            logits: the student's on the raw batch, ``[B, C]``; no gradient flows into them.
        """
        size = len(images)
        if not size == len(targets) == len(logits):
            fail(
                expected="UNIX to get one target and one row of logits per image",
                received=f"{size} images, {len(targets)} targets, {len(logits)} rows of logits",
                remedy="score the batch that is to be mixed",
            )
        k, b, nominal_batch = self.sizes(size) if size else (0, 0, 1)
        generator = keyed_generator(self.seed, self.rank, self.batches)
        # Beta(1, 1) is the uniform distribution.
        strength = torch.rand((), dtype=torch.float64, generator=generator)
        partners = torch.randperm(size, generator=generator).to(images.device)
        order = descending(uncertainty(logits, self.strategy, generator))
        weights = strength * mixup_weights(size, b, self.slope, nominal_batch)
        mixed = mix(images, targets, order, partners, weights[:k])
        self.batches += 1
        self.scored += size
        self.trained += k
        return mixed

    def measured_cost(self, flops_ratio: float) -> float:
        """:func:`unix_cost` of the images counted so far; short batches make it differ."""
        return unix_cost(flops_ratio, self.trained / max(1, self.scored))

    def state_dict(self) -> dict[str, Any]:
        """The counts, from which the next draws follow too."""
        return {name: getattr(self, name) for name in ("seed", "batches", "scored", "trained")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with the draws and counts that follow."""
        self.seed, self.batches = state["seed"], state["batches"]
        self.scored, self.trained = state["scored"], state["trained"]


@register
class UNIX(Procedure):
    """Only part of a batch, mixed, goes through teacher and student; its state is ``mixup``."""

    name = "UNIX"
    defaults: ClassVar[Mapping[str, Any]] = {
        "ENABLED": False,
        "K_FRAC": 0.75,  # k of B samples go through the teacher (48 of 64)
        "B_FRAC": 0.5,  # the most uncertain, nearly unmixed (32 of 64)
        "SLOPE": 10.0,  # of the weights of mixing over ranks; 1000 is nearly a step
        "STRATEGY": "entropy",  # or confidence, margin, random
        # The released code takes both parts of the nominal batch: a short last batch is then
        # hardly mixed and not reduced. 0: of every batch as it is.
        "NOMINAL_BATCH": 0,
        # Of the scoring pass: eval leaves BatchNorm's statistics alone; train is the reference's.
        "SCORE_MODE": "eval",
    }
    needs = frozenset({MIXED_BATCHES})
    old_names = ("unix",)

    def __init__(self, cfg: CfgNode, training_set: TrainingSet) -> None:
        node = cfg.KD.UNIX
        k, b, whole = node.K_FRAC, node.B_FRAC, node.NOMINAL_BATCH
        nominal = (round(k * whole), round(b * whole), whole) if whole else None
        seed, rank = training_set.seed, training_set.rank
        self.mixup = UnixMixup(k, b, node.SLOPE, node.STRATEGY, nominal, seed, rank)
        self._scores_in_training = node.SCORE_MODE == "train"

    @classmethod
    def check(cls, cfg: CfgNode, offers: frozenset[str]) -> None:
        check_choice("KD.UNIX.STRATEGY", cfg.KD.UNIX.STRATEGY, Strategy)
        check_choice("KD.UNIX.SCORE_MODE", cfg.KD.UNIX.SCORE_MODE, ("eval", "train"))
        active = {procedure.name for procedure in active_procedures(cfg)}
        for name, reason in (
            ("KCD", "both decide which samples the teacher sees"),
            ("JOINT", "it saves passes of a frozen teacher"),
        ):
            if name in active:
                fail(
                    expected=f"KD.UNIX without KD.{name}: {reason}",
                    received="both",
                    remedy="disable one of the two",
                )

    def on_batch(self, batch: Any, loop: TrainingLoop) -> Any:
        images, targets, indices = batch
        mixed = self.mixup(images, targets, loop.score(images, self._scores_in_training))
        # A mixed image has no place of its own in the training set.
        return mixed.images, mixed, indices.new_full((len(mixed.mu),), -1)

    def state_dict(self) -> dict[str, Any]:
        return self.mixup.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.mixup.load_state_dict(state)

    def cost(self, loop: TrainingLoop) -> tuple[float, float]:
        ratio = loop.flops_ratio()
        return unix_cost(ratio, self.mixup.k_frac), self.mixup.measured_cost(ratio)
