"""One golden file, read in one precision, and the tolerances of the golden README."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

PART_A = {  # relative to the largest magnitude of the array
    torch.float64: {"out": 1e-9, "grad": 1e-8, "absolute": 1e-9},
    torch.float32: {"out": 1e-5, "grad": 1e-5, "absolute": 1e-7},
}
PART_B = {  # of each element, relative to at least a thousandth of the largest magnitude
    torch.float64: {"out": 1e-9, "grad": 1e-8},
    torch.float32: {"out": 2e-4, "grad": 2e-4},
}
PART_B_METHODS = ("IRG", "MHGD", "KCD", "UNIX", "KCD+UNIX cost")
MHGD_FLOAT32 = 2e-2  # gaps between singular values amplify rounding
_NEARLY_ZERO = 1e-9


@dataclass
class Golden:
    """One file, read in one precision. Inputs are leaves that can be differentiated."""

    name: str
    meta: dict[str, Any]
    arrays: dict[str, np.ndarray]
    dtype: torch.dtype

    def __post_init__(self) -> None:
        self.cache: dict[str, Tensor] = {}

    def has(self, key: str) -> bool:
        return key in self.arrays

    def __getitem__(self, key: str) -> Tensor:
        if key not in self.cache:
            tensor = torch.from_numpy(np.array(self.arrays[key]))
            if tensor.is_floating_point():
                tensor = tensor.to(self.dtype)
                if key.startswith(("in_", "param_")) and "anchors" not in key:
                    tensor.requires_grad_(True)
            self.cache[key] = tensor
        return self.cache[key]

    def series(self, prefix: str) -> list[Tensor]:
        """``prefix0``, ``prefix1``, ... as far as they go."""
        found: list[Tensor] = []
        while self.has(f"{prefix}{len(found)}"):
            found.append(self[f"{prefix}{len(found)}"])
        return found

    def gradients(self, loss: Tensor, keys: dict[str, str]) -> dict[str, Tensor]:
        """``{gradient key: gradient of loss}`` for ``{gradient key: leaf key}``."""
        present = {g: leaf for g, leaf in keys.items() if self.has(g)}
        if not present:
            return {}
        leaves = [self[leaf] for leaf in present.values()]
        grads = torch.autograd.grad(loss, leaves, retain_graph=True, allow_unused=True)
        return {
            g: torch.zeros_like(leaf) if grad is None else grad
            for g, grad, leaf in zip(present, grads, leaves, strict=True)
        }

    def parameters(self) -> dict[str, str]:
        """Gradient key to parameter key, for every stored parameter gradient."""
        return {k: k.removeprefix("grad_") for k in self.arrays if k.startswith("grad_param_")}

    def load(self, module: torch.nn.Module, rename: Callable[[str], str]) -> None:
        """Put stored parameters in place of a module's own, so gradients reach the stored ones."""
        module.to(self.dtype)
        for key in self.arrays:
            if key.startswith("param_"):
                owner, _, leaf = rename(key.removeprefix("param_")).rpartition(".")
                target = module.get_submodule(owner)
                assert getattr(target, leaf).shape == self[key].shape, key
                del target._parameters[leaf]
                setattr(target, leaf, self[key])


@dataclass
class Row:
    """The error of one key."""

    key: str
    error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance


def compare(
    key: str, ours: Tensor | None, theirs: np.ndarray, dtype: torch.dtype, method: str = ""
) -> Row:
    """Error of one key as the golden README defines it; infinite where nothing was computed."""
    if ours is None or tuple(ours.shape) != theirs.shape:
        return Row(key, float("inf"), 0.0)
    mine = ours.detach().to(torch.float64).numpy()
    if theirs.dtype.kind in "biu":
        return Row(key, float(np.abs(mine - theirs.astype(np.float64)).max(initial=0)), 0.0)
    with np.errstate(invalid="ignore"):
        difference = np.where(mine == theirs, 0.0, np.abs(mine - theirs))  # inf equals inf
    if np.isnan(difference).any():
        return Row(key, float("inf"), 0.0)
    kind = "grad" if key.startswith("grad") else "out"
    finite = np.abs(theirs[np.isfinite(theirs)])
    scale = float(finite.max(initial=0))
    if scale < _NEARLY_ZERO:
        return Row(key, float(difference.max(initial=0)), PART_A[dtype]["absolute"])
    if method in PART_B_METHODS:
        tolerance = PART_B[dtype][kind]
        if method == "MHGD" and dtype == torch.float32:
            tolerance = MHGD_FLOAT32
        floor = np.maximum(np.abs(theirs), 1e-3 * scale)
        error = np.where(difference == 0, 0.0, difference / floor)
        return Row(key, float(error.max(initial=0)), tolerance)
    return Row(key, float(difference.max(initial=0)) / scale, PART_A[dtype][kind])
