"""Check golden files: ``python -m tests.golden FILE...``.

Prints the error of every ``out_`` and ``grad_`` key in float64 and float32 and exits with 1 if
one is outside its tolerance, or if a file holds a method nothing here can check.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from kd_det.losses import (
    FGFILoss,
    FitNetLoss,
    ReviewKDLoss,
    fgfi_mask,
    hcl_loss,
    hint_loss,
    imitation_loss,
    kd_loss,
)

TOLERANCE = {  # relative to the largest magnitude of the array
    torch.float64: {"out": 1e-9, "grad": 1e-8, "absolute": 1e-9},
    torch.float32: {"out": 1e-5, "grad": 1e-5, "absolute": 1e-7},
}
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


def check_kd(g: Golden) -> dict[str, Tensor]:
    out = {}
    if g.has("in_boxes_0"):
        logits_s, logits_t, out = _roi_logits(g)
    else:
        logits_s, logits_t = g["in_logits_s"], g["in_logits_t"]
    temperature = g.meta["hyper"]["T"]
    loss = kd_loss(logits_s, logits_t, temperature)
    out["out_loss_kd"] = loss
    out["out_loss_kd_elementmean"] = kd_loss(logits_s, logits_t, temperature, "mean")
    keys = {"grad_logits_s": "in_logits_s"}
    for key in g.arrays:
        if key.startswith("grad_feat_s_"):
            keys[key] = key.replace("grad_", "in_", 1)
    out |= g.gradients(loss, keys | g.parameters())
    if g.has("out_loss_ce"):
        hyper = g.meta["hyper"]
        ce = F.cross_entropy(logits_s, g["in_target"])
        total = hyper["ce_weight"] * ce + hyper["kd_weight"] * loss
        out |= {"out_loss_ce": ce, "out_loss_total": total}
        out |= g.gradients(total, {"grad_total_logits_s": "in_logits_s"})
    return out


def _roi_logits(g: Golden) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Both heads on the student's boxes, with torchvision's aligned RoIAlign."""
    from torchvision.ops import roi_align

    hyper = g.meta["hyper"]
    boxes = [b.detach() for b in g.series("in_boxes_")]
    rows = torch.cat(boxes)
    image = torch.repeat_interleave(torch.tensor([len(b) for b in boxes])).to(rows)
    side = (rows[:, 2:] - rows[:, :2]).prod(dim=1).sqrt()
    lowest = int(np.log2(hyper["strides"][0]))
    level = hyper["canonical_level"] + torch.log2(side / hyper["canonical_box_size"] + 1e-8)
    level = level.floor().clamp(lowest, lowest + len(hyper["levels"]) - 1).long() - lowest

    def logits(who: str) -> Tensor:
        features = [g[f"in_feat_{who}_{name}"] for name in hyper["levels"]]
        size = hyper["pooler_resolution"]
        pooled = features[0].new_zeros(len(rows), features[0].shape[1], size, size)
        for k, (feature, stride) in enumerate(zip(features, hyper["strides"], strict=True)):
            here = (level == k).nonzero().flatten()
            rois = torch.cat([image[here, None], rows[here]], dim=1)
            values = roi_align(
                feature, rois, size, 1 / stride, hyper["sampling_ratio"], aligned=True
            )
            pooled = pooled.index_put((here,), values)
        hidden = F.linear(
            pooled.flatten(1),
            g[f"param_{who}.box_head.fc1.weight"],
            g[f"param_{who}.box_head.fc1.bias"],
        )
        return F.linear(
            hidden.relu(),
            g[f"param_{who}.box_predictor.cls_score.weight"],
            g[f"param_{who}.box_predictor.cls_score.bias"],
        )

    student, teacher = logits("s"), logits("t")
    # Stored levels are absolute (p3, p4) or counted from the lowest tapped one.
    offset = lowest if g.has("out_box_level") and int(g["out_box_level"].min()) >= lowest else 0
    return (
        student,
        teacher,
        {
            "out_box_level": level + offset,
            "out_logits_s": student,
            "out_logits_t": teacher,
        },
    )


def check_fitnet(g: Golden) -> dict[str, Tensor]:
    s, t = g["in_feat_s"], g["in_feat_t"]
    relu = "ReLU" in g.meta["hyper"]["adaptor"]
    module = FitNetLoss(
        [s.shape[1]], [t.shape[1]], [tuple(s.shape[2:])], [tuple(t.shape[2:])], relu
    )
    g.load(module, lambda key: f"adaptors.0.{key}")
    adapted = module.adaptors[0](s)
    loss = module([s], [t])
    assert torch.equal(loss, hint_loss(adapted, t))
    keys = {"grad_feat_s": "in_feat_s"} | g.parameters()
    return {"out_adapted": adapted, "out_loss_hint": loss} | g.gradients(loss, keys)


def check_reviewkd(g: Golden) -> dict[str, Tensor]:
    student, teacher = g.series("in_s"), g.series("in_t")
    out: dict[str, Tensor] = {}
    if any(key.startswith("param_abfs") for key in g.arrays):
        hyper = g.meta["hyper"]
        module = ReviewKDLoss(hyper["in_channels"], hyper["out_channels"], hyper["mid_channels"])
        g.load(module, lambda key: key)
        fused = module.fuse(student, [t.shape[-2:] for t in teacher])
        out |= {f"out_f{i}": f for i, f in enumerate(fused)}
        loss = module(student, teacher)
    else:
        fused = student
        loss = hcl_loss(student, teacher)
    out["out_loss_hcl"] = loss
    out["out_loss_level"] = torch.stack(
        [hcl_loss(f, t) for f, t in zip(fused, teacher, strict=True)]
    )
    keys = {f"grad_s{i}": f"in_s{i}" for i in range(len(student))}
    return out | g.gradients(loss, keys | g.parameters())


def check_fgfi(g: Golden) -> dict[str, Tensor]:
    gt = [b.detach() for b in g.series("in_gt_")]
    if g.has("in_feat_s"):
        return _fgfi_single(g, gt)
    hyper = g.meta["hyper"]
    student, teacher = g.series("in_s"), g.series("in_t")
    anchors = g.series("in_anchors_")
    sizes = [(s.shape[2], s.shape[3]) for s in student]
    channels = [s.shape[1] for s in student]
    out: dict[str, Tensor] = {}
    for assign in ("roi", "all", "anchor"):
        masks = fgfi_mask(anchors, gt, sizes, hyper["strides"], hyper["psi"], assign)
        out |= {f"out_mask_{assign}_{i}": m for i, m in enumerate(masks)}
        out[f"out_n_pos_{assign}"] = torch.stack([m.sum() for m in masks])
        for normalizer in ("global", "level_mean", "level_sum"):
            if g.has("param_0.weight"):
                module = FGFILoss(
                    channels, channels, hyper["strides"], hyper["psi"], assign, normalizer
                )
                g.load(module, lambda key: f"adaptors.{key}")
                loss = module(student, teacher, anchors=anchors, gt_boxes=gt)
            else:
                loss = imitation_loss(student, teacher, masks, normalizer)
            out[f"out_loss_{normalizer}_{assign}"] = loss
            keys = {f"grad_s{i}_{normalizer}_{assign}": f"in_s{i}" for i in range(len(student))}
            out |= g.gradients(loss, keys)
    return out


def _fgfi_single(g: Golden, gt: list[Tensor]) -> dict[str, Tensor]:
    s, t = g["in_feat_s"], g["in_feat_t"]
    plus_one = "plus_one" in g.meta["hyper"]["iou_convention"]
    masks = fgfi_mask(
        [g["in_anchors"]],
        gt,
        [(s.shape[2], s.shape[3])],
        None,
        g.meta["hyper"]["psi"],
        inclusive=plus_one,
    )
    module = FGFILoss([s.shape[1]], [t.shape[1]], relu="ReLU" in g.meta["hyper"]["adaptor"])
    g.load(module, lambda key: f"adaptors.{key}")
    adapted = module.adaptors[0](s).relu() if module.relu else module.adaptors[0](s)
    loss = imitation_loss([adapted], [t], masks)
    keys = {"grad_feat_s": "in_feat_s"} | g.parameters()
    return {
        "out_mask": masks[0],
        "out_n_pos": masks[0].sum(),
        "out_adapted": adapted,
        "out_loss_imitation": loss,
    } | g.gradients(loss, keys)


CHECKS: dict[str, Callable[[Golden], dict[str, Tensor]]] = {
    "KD": check_kd,
    "FitNet": check_fitnet,
    "ReviewKD": check_reviewkd,
    "FGFI": check_fgfi,
}


@dataclass
class Row:
    """The error of one key."""

    key: str
    error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance


def compare(key: str, ours: Tensor | None, theirs: np.ndarray, dtype: torch.dtype) -> Row:
    """Error of one key as the golden README defines it; infinite where nothing was computed."""
    if ours is None or tuple(ours.shape) != theirs.shape:
        return Row(key, float("inf"), 0.0)
    mine = ours.detach().to(torch.float64).numpy()
    if theirs.dtype.kind in "biu":
        return Row(key, float(np.abs(mine - theirs.astype(np.float64)).max(initial=0)), 0.0)
    tolerance = TOLERANCE[dtype]
    error = float(np.abs(mine - theirs).max(initial=0))
    scale = float(np.abs(theirs).max(initial=0))
    if not np.isfinite(mine).all():
        return Row(key, float("inf"), 0.0)
    if scale < _NEARLY_ZERO:
        return Row(key, error, tolerance["absolute"])
    return Row(key, error / scale, tolerance["grad" if key.startswith("grad_") else "out"])


def check_file(path: Path, dtype: torch.dtype) -> Iterator[Row]:
    """Rows for every expected key of one file.

    Raises:
        KeyError: the file's method is not implemented.
    """
    with np.load(path, allow_pickle=False) as data:
        arrays = {k: data[k] for k in data.files if k != "meta"}
        meta = json.loads(str(data["meta"]))
    if meta["method"] not in CHECKS:
        raise KeyError(meta["method"])
    ours = CHECKS[meta["method"]](Golden(path.name, meta, arrays, dtype))
    for key, expected in arrays.items():
        if key.startswith(("out_", "grad_")):
            yield compare(key, ours.get(key), expected, dtype)


def main(argv: list[str] | None = None) -> int:
    """Check the files named on the command line; 0 if all keys of all files pass."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path)
    failed = 0
    for path in parser.parse_args(argv).files:
        for dtype in TOLERANCE:
            try:
                rows = list(check_file(path, dtype))
            except KeyError as missing:
                print(f"{path.name}: no check for method {missing}")
                failed += 1
                break
            for row in rows:
                verdict = "ok  " if row.passed else "FAIL"
                precision = str(dtype).removeprefix("torch.")
                print(f"{verdict} {path.name} {precision} {row.key}: {row.error:.1e}")
                failed += not row.passed
    print(f"{failed} failed" if failed else "all passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
