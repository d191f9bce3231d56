"""How a model answers for objects whose class is known, in one form for detectors and classifiers.

Shapes: G objects of an image (of a classifier: 1), K_s classes of the student, K_t of the model
that answers.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.ops import box_iou

from kd_det.bench.workbench import Detections, Side, Workbench

_MATCH_IOU = 0.5


@dataclass(frozen=True)
class Example:
    """A training image with its annotation.

    Attributes:
        picture: uint8 RGB ``[3, H, W]``.
        boxes: ``[G, 4]`` in its pixels; None for a classifier, which has one object.
        classes: ``[G]`` of the student.
    """

    picture: Tensor
    boxes: Tensor | None
    classes: Tensor


@dataclass(frozen=True)
class Answer:
    """What a model says about the objects of an example.

    Attributes:
        classes: ``[G]`` true classes of the student.
        confidence: ``[G, K_t]``: of each object the largest score of a detection of that class
            that overlaps it by half (IoU), or the probability a classifier gives to the class.
        said: detections, or a classifier's probabilities ``[K_t]``, on the CPU.
    """

    classes: Tensor
    confidence: Tensor
    said: Detections | Tensor


def examples(bench: Workbench, count: int) -> list[Example]:
    """The first ``count`` training images that have objects, as the run augments them."""
    return list(itertools.islice(_examples(bench), count))


def ask(bench: Workbench, side: Side, asked: Sequence[Example], num_classes: int) -> list[Answer]:
    """Let a model look at examples.

    Args:
        bench: the run.
        side: whose model.
        asked: what to look at.
        num_classes: K_t.
    """
    return [_answer(bench.predict(side, e.picture), e, num_classes) for e in asked]


def truth_confidence(answers: Sequence[Answer], indices: Sequence[int]) -> Tensor:
    """Per image, the mean confidence in the true class of its objects, ``[N]`` in 0..1.

    Args:
        answers: of one model.
        indices: per class of the student, that model's index of it; -1 where it has none.
    """
    columns = torch.tensor(indices)
    means = []
    for answer in answers:
        places = columns[answer.classes]
        own = answer.confidence[torch.arange(len(places)), places.clamp(min=0)]
        means.append((own * (places >= 0)).mean())
    return torch.stack(means)


def agreed(answers: Sequence[Answer], indices: Sequence[int]) -> list[int]:
    """Per class of the student, the class a model is surest of where there is such an object.

    With classes in another order than their names say, these are the right ones.

    Args:
        answers: of one model.
        indices: taken for classes of which there is no object.
    """
    found = list(indices)
    truth = torch.cat([a.classes for a in answers])
    confidence = torch.cat([a.confidence for a in answers])
    for k in truth.unique().tolist():
        found[k] = int(confidence[truth == k].mean(dim=0).argmax())
    return found


def confusion(answers: Sequence[Answer], floor: float) -> Tensor:
    """Counts ``[K_s, K_t]`` of objects by true class and by the class a model answers.

    Args:
        answers: of one model.
        floor: objects for which no class has this confidence are left out.
    """
    truth = torch.cat([a.classes for a in answers])
    best, said = torch.cat([a.confidence for a in answers]).max(dim=1)
    counts = torch.zeros(int(truth.max()) + 1, answers[0].confidence.shape[1], dtype=torch.long)
    seen = best >= floor
    ones = torch.ones(int(seen.sum()), dtype=torch.long)
    return counts.index_put((truth[seen], said[seen]), ones, accumulate=True)


def _examples(bench: Workbench) -> Iterator[Example]:
    for batch in bench.batches():
        truth = bench.ground_truth(batch)
        pictures = bench.pictures(batch)
        if isinstance(truth, Tensor):
            yield from (
                Example(picture, None, label.reshape(1).cpu())
                for picture, label in zip(pictures, truth, strict=True)
            )
        else:
            yield from (
                Example(picture, found.boxes.cpu(), found.classes.cpu())
                for picture, found in zip(pictures, truth, strict=True)
                if len(found.classes)
            )


def _answer(said: Detections | Tensor, example: Example, num_classes: int) -> Answer:
    if isinstance(said, Tensor):
        said = said.detach().float().cpu()
        return Answer(example.classes, said.reshape(1, -1), said)
    assert example.boxes is not None
    said = Detections(*(part.detach().cpu() for part in (said.boxes, said.classes, said.scores)))
    overlaps = box_iou(example.boxes.float(), said.boxes.float()) >= _MATCH_IOU
    confidence = torch.zeros(len(example.classes), num_classes)
    for column in said.classes.unique().tolist():
        own = said.classes == column
        confidence[:, column] = (overlaps[:, own] * said.scores[own].float()).max(dim=1).values
    return Answer(example.classes, confidence, said)
