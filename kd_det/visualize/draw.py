"""The pictures of a recording: those of the tensors that its terms compare."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import pairwise

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from kd_det.bench.workbench import Workbench
from kd_det.core.terms import Term
from kd_det.hosts.detection.heads import BOX_TAPS
from kd_det.losses.at import ATLoss
from kd_det.losses.fgfi import FGFILoss, fgfi_mask
from kd_det.losses.irg.graph import edge_matrix
from kd_det.losses.irg.loss import IRGLoss, MTKLoss
from kd_det.losses.mhgd.loss import MHGDLoss
from kd_det.visualize.graphs import Nodes, edge_grid, head_grid
from kd_det.visualize.logits import Head, class_grid, head_labels, roi_grid
from kd_det.visualize.maps import attention_grid, feature_grid, mask_grid
from kd_det.visualize.watch import Recording, listed

Named = Iterator[tuple[str, Figure]]


@torch.no_grad()
def draw(bench: Workbench, recording: Recording) -> dict[str, Figure]:
    """Every picture of one forward, by the name of its file.

    ``features_<tap>``, ``attention_<tap>``, ``fgfi_mask``, ``rois``, ``logits``, ``irg`` and
    ``mhgd``; the name of the term follows where another term has taken a name.
    """
    figures: dict[str, Figure] = {}
    assert bench.distiller is not None
    for term in bench.distiller.specs:
        for label, s, t in recording.pairs(term):
            name = f"features_{_as_name(label)}"
            # Many terms look at the same maps.
            if _is_map(label, s) and t.dim() == 4 and name not in figures:
                figures[name] = feature_grid(recording.pictures, s, t, label)
        for name, figure in _of_term(bench, recording, term):
            figures[f"{name}_{_as_name(term.name)}" if name in figures else name] = figure
    return figures


def _of_term(bench: Workbench, recording: Recording, term: Term) -> Named:
    assert bench.distiller is not None
    loss = bench.distiller.terms[term.name]
    yield from _logits(bench, recording, term, loss)
    if isinstance(loss, ATLoss):
        for label, s, t in recording.pairs(term):
            if _is_map(label, s):
                name = f"attention_{_as_name(label)}"
                yield name, attention_grid(recording.pictures, s, t, label, loss.p)
    if isinstance(loss, FGFILoss):
        yield from _masks(recording, term, loss)
    if isinstance(loss, (IRGLoss, MTKLoss)):
        yield from _edges(bench, recording, term, loss)
    if isinstance(loss, MHGDLoss):
        yield from _heads(bench, recording, term, loss)


def _logits(bench: Workbench, recording: Recording, term: Term, loss: nn.Module) -> Named:
    boxes_of_stages = iter(recording.boxes)
    for label, s, t in recording.pairs(term):
        if not label.startswith(("box_logits", "logits")):
            continue
        head = Head(
            head_labels(bench.class_names("student"), s.shape[1], bench.background),
            getattr(loss, "temperature", 1.0),
            getattr(loss, "activation", "softmax"),
        )
        if label.startswith("box_logits"):
            boxes = next(boxes_of_stages)
            name = label.replace("box_logits", "rois")
            yield _as_name(name), roi_grid(recording.pictures, boxes, s, t, head, term.name)
        else:
            truth = recording.context.get("targets")
            yield "logits", class_grid(recording.pictures, s, t, head, term.name, truth)


def _masks(recording: Recording, term: Term, loss: FGFILoss) -> Named:
    boxes = recording.narrowed("gt_boxes", term)
    if not any(len(b) for b in boxes):
        return
    pairs = recording.pairs(term)
    masks = fgfi_mask(
        recording.narrowed("anchors", term),
        boxes,
        [(s.shape[2], s.shape[3]) for _, s, _ in pairs],
        loss.strides,
        loss.threshold,
        loss.assign,  # type: ignore[arg-type]
    )
    by_tap = dict(zip((label for label, _, _ in pairs), masks, strict=True))
    yield "fgfi_mask", mask_grid(recording.pictures, by_tap, boxes, term.name)


def _edges(bench: Workbench, recording: Recording, term: Term, loss: IRGLoss | MTKLoss) -> Named:
    _, edges, _ = loss.layout.split(recording.pairs(term))
    layers = []
    for label, s, t in edges:
        index = _thinned(len(s), loss.max_nodes)
        layers.append((label, edge_matrix(s[index]), edge_matrix(t[index])))
    if layers and len(index) > 1:
        nodes = _nodes(bench, recording, edges[0][0], len(edges[0][1])).thinned(index)
        yield "irg", edge_grid(layers, nodes, term.name)


def _heads(bench: Workbench, recording: Recording, term: Term, loss: MHGDLoss) -> Named:
    pairs = recording.pairs(term)
    count = len(pairs[0][1])
    if count < 2:
        return
    # A copy, because adaptors in training update the statistics of their BatchNorm.
    own, others = copy.deepcopy(loss).graphs([s for _, s, _ in pairs], [t for _, _, t in pairs])
    steps = [f"{front} → {back}" for (front, _, _), (back, _, _) in pairwise(pairs)]
    nodes = _nodes(bench, recording, pairs[0][0], count).thinned(_thinned(count, loss.max_nodes))
    yield "mhgd", head_grid(list(zip(steps, own, others, strict=True)), nodes, term.name)


def _nodes(bench: Workbench, recording: Recording, label: str, count: int) -> Nodes:
    """Kind and groups of the rows of a tap."""
    if label.startswith(BOX_TAPS):
        if "box_logits" in recording.teacher:
            logits = listed(recording.teacher["box_logits"])[0]
            names = head_labels(bench.class_names("student"), logits.shape[1], bench.background)
            groups = logits.argmax(dim=1).cpu()
            return Nodes("RoIs", groups, dict(enumerate(names)), "the teacher's class")
        counts = torch.tensor([len(b) for b in recording.boxes[0]])
        groups = torch.arange(len(counts)).repeat_interleave(counts)
        numbers = {k: str(k + 1) for k in range(len(counts))}
        return Nodes("RoIs", groups, numbers, "image")
    targets = recording.context.get("targets")
    if targets is None:
        return Nodes("images", torch.zeros(count, dtype=torch.long), {}, "their place in the batch")
    names = list(bench.class_names("student") or [])
    return Nodes("images", targets.cpu(), dict(enumerate(names)), "true class")


def _thinned(count: int, most: int) -> Tensor:
    """The rows that graph losses relate: all, or ``MAX_NODES`` evenly spaced ones."""
    return torch.arange(most) * count // most if 0 < most < count else torch.arange(count)


def _is_map(label: str, tensor: Tensor) -> bool:
    return tensor.dim() == 4 and not label.startswith(BOX_TAPS)


def _as_name(label: str) -> str:
    return "_".join(label.replace("|", " ").replace("/", " ").split())
