"""FSP: matrices and losses of several pairs, in three variants."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from kd_det.losses import FSPLoss, fsp_loss, fsp_matrix
from tests.golden.reader import Golden

POOLS: tuple[Literal["max", "avg"], ...] = ("max", "avg")
VARIANTS: dict[str, dict[str, Any]] = {
    "paper_max": {"pool": "max", "reduction": "frobenius"},
    "paper_avg": {"pool": "avg", "reduction": "frobenius"},
    "mean_avg": {"pool": "avg", "reduction": "mean"},
}


def check_fsp(g: Golden) -> dict[str, Tensor]:
    count = 0
    while g.has(f"in_p{count}_s_first"):
        count += 1
    layers = [(pair, layer) for pair in range(count) for layer in ("first", "second")]
    student = [g[f"in_p{pair}_s_{layer}"] for pair, layer in layers]
    teacher = [g[f"in_p{pair}_t_{layer}"] for pair, layer in layers]

    results = {}
    for pair in range(count):
        first, second = 2 * pair, 2 * pair + 1
        for pool in POOLS:
            for side, maps in (("s", student), ("t", teacher)):
                matrix = fsp_matrix(maps[first], maps[second], pool)
                results[f"out_p{pair}_G_{side}_{pool}"] = matrix
        for name, arguments in VARIANTS.items():
            results[f"out_p{pair}_loss_{name}"] = fsp_loss(
                student[first], student[second], teacher[first], teacher[second], **arguments
            )
    for name, arguments in VARIANTS.items():
        loss = FSPLoss(**arguments)(student, teacher)
        keys = {f"grad_{name}_p{p}_s_{layer}": f"in_p{p}_s_{layer}" for p, layer in layers}
        results |= {f"out_loss_{name}": loss} | g.gradients(loss, keys)
    return results


CHECKS = {"FSP": check_fsp}
