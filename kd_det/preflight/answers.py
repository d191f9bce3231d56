"""What a model predicts for objects of known class, in one form for detectors and classifiers.

Shapes: G objects of an image (of a classifier: 1), K_s classes of the student, K_t of the model
that is asked.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torchvision.ops import box_iou

from kd_det.bench.workbench import Detections, Side, Workbench
from kd_det.document.detections import annotated, class_label, draw_grid

_MATCH_IOU = 0.5


@dataclass(frozen=True)
class Example:
    """A training image, uint8 RGB ``[3, H, W]``, with its annotation in the student's classes.

    ``boxes`` are ``[G, 4]`` in its pixels; None for a classifier, which has one object.
    """

    picture: Tensor
    boxes: Tensor | None
    classes: Tensor


@dataclass(frozen=True)
class Answer:
    """What a model predicts for the objects of an example.

    Attributes:
        classes: ``[G]`` true classes of the student.
        confidence: ``[G, K_t]``: of each object the largest score of a detection of that class
            that overlaps it by half (IoU), or the probability a classifier gives to the class.
        prediction: detections, or a classifier's probabilities ``[K_t]``, on the CPU.
    """

    classes: Tensor
    confidence: Tensor
    prediction: Detections | Tensor


def examples(bench: Workbench) -> Iterator[Example]:
    """Training images that have objects, as the run augments them."""
    for batch in bench.batches():
        for picture, truth in zip(bench.pictures(batch), bench.ground_truth(batch), strict=True):
            if isinstance(truth, Tensor):
                yield Example(picture, None, truth.reshape(1).cpu())
            elif len(truth.classes):
                yield Example(picture, truth.boxes.cpu(), truth.classes.cpu())


def answer(bench: Workbench, side: Side, example: Example, num_classes: int) -> Answer:
    """The prediction of a side's model, with ``num_classes`` classes, for one example."""
    prediction = bench.predict(side, example.picture)
    if isinstance(prediction, Tensor):
        prediction = prediction.detach().float().cpu()
        return Answer(example.classes, prediction.reshape(1, -1), prediction)
    assert example.boxes is not None
    boxes, classes, scores = (
        part.detach().cpu() for part in (prediction.boxes, prediction.classes, prediction.scores)
    )
    overlaps = box_iou(example.boxes.float(), boxes.float()) >= _MATCH_IOU
    confidence = torch.zeros(len(example.classes), num_classes)
    for column in classes.unique().tolist():
        own = classes == column
        confidence[:, column] = (overlaps[:, own] * scores[own].float()).max(dim=1).values
    return Answer(example.classes, confidence, Detections(boxes, classes, scores))


def truth_confidence(answers: Sequence[Answer], indices: Sequence[int]) -> Tensor:
    """Per image, the mean confidence in the true class of its objects, ``[N]`` in 0..1.

    ``indices`` has the model's index of each of the student's classes, -1 where it has none.
    """
    columns = torch.tensor(indices)
    means = []
    for one in answers:
        places = columns[one.classes]
        own = one.confidence[torch.arange(len(places)), places.clamp(min=0)]
        means.append((own * (places >= 0)).mean())
    return torch.stack(means)


def agreed(answers: Sequence[Answer], indices: Sequence[int]) -> list[int]:
    """Per class of the student, the class in which a model is most confident for its objects.

    These are the right indices even where the classes are in another order than their names.
    Classes without objects keep those of ``indices``.
    """
    result = list(indices)
    truth = torch.cat([a.classes for a in answers])
    confidence = torch.cat([a.confidence for a in answers])
    for k in truth.unique().tolist():
        result[k] = int(confidence[truth == k].mean(dim=0).argmax())
    return result


def confusion(answers: Sequence[Answer], floor: float) -> Tensor:
    """Counts ``[K_s, K_t]`` of objects by true class and by the predicted class.

    Objects for which no class has a confidence of ``floor`` are left out.
    """
    truth = torch.cat([a.classes for a in answers])
    best, predicted = torch.cat([a.confidence for a in answers]).max(dim=1)
    counts = torch.zeros(int(truth.max()) + 1, answers[0].confidence.shape[1], dtype=torch.long)
    sure = best >= floor
    ones = torch.ones(int(sure.sum()), dtype=torch.long)
    return counts.index_put((truth[sure], predicted[sure]), ones, accumulate=True)


def draw_answers(
    examples: Sequence[Example],
    answers: Sequence[Answer],
    student_names: Sequence[str] | None,
    teacher_names: Sequence[str] | None,
    path: Path,
) -> None:
    """Write a PNG of two rows: training images with annotations, and the teacher's predictions.

    Classes without names are shown by their indices.
    """
    images: list[list[Tensor]] = [[], []]
    labels: list[list[str]] = [[], []]
    for example, one in zip(examples, answers, strict=True):
        above = below = example.picture
        texts = ("", "")
        if isinstance(one.prediction, Detections):
            assert example.boxes is not None
            truth = Detections(example.boxes, example.classes, torch.ones(len(example.classes)))
            above = annotated(above, truth, student_names)
            below = annotated(below, one.prediction, teacher_names)
        else:
            best = int(one.prediction.argmax())
            predicted = f"{class_label(best, teacher_names)} ({float(one.prediction[best]):.2f})"
            texts = (class_label(int(example.classes[0]), student_names), predicted)
        for row, image, text in zip((0, 1), (above, below), texts, strict=True):
            images[row].append(image)
            labels[row].append(text)
    detections = isinstance(answers[0].prediction, Detections)
    draw_grid(images, path, rows=("annotation", "teacher"), labels=labels, detections=detections)
