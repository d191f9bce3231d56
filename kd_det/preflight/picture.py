"""The picture of what the teacher sees, beside the truth."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib import pyplot as plt
from torch import Tensor

from kd_det.bench.workbench import Detections
from kd_det.document.detections import MIN_SCORE, annotated
from kd_det.preflight.answers import Answer, Example

_CELL = 2.6  # inches


def draw_answers(
    examples: Sequence[Example],
    answers: Sequence[Answer],
    student_names: Sequence[str] | None,
    teacher_names: Sequence[str] | None,
    path: Path,
) -> None:
    """Two rows: the annotations of training images, and what the teacher says about them.

    Args:
        examples: the images.
        answers: the teacher's, one per image.
        student_names: of the classes that annotations use; None shows indices.
        teacher_names: of the teacher's own classes; likewise.
        path: the PNG to write.
    """
    pairs = zip(examples, answers, strict=True)
    rows = [
        [_truth(example, student_names) for example in examples],
        [_said(example, answer, teacher_names) for example, answer in pairs],
    ]
    size = (_CELL * len(examples), 2 * _CELL + 0.6)
    figure, grid = plt.subplots(2, len(examples), figsize=size, squeeze=False, layout="constrained")
    for row, cells, title in zip(grid, rows, ("annotation", "teacher"), strict=True):
        for column, (axes, (image, label)) in enumerate(zip(row, cells, strict=True)):
            axes.imshow(image.permute(1, 2, 0).numpy())
            axes.set(xticks=[], yticks=[], xlabel=label)
            if column == 0:
                axes.set_ylabel(title, fontsize=12)
    if isinstance(answers[0].said, Detections):
        figure.suptitle(f"Detections with a score of at least {MIN_SCORE}", fontsize=10)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _truth(example: Example, names: Sequence[str] | None) -> tuple[Tensor, str]:
    if example.boxes is None:
        return example.picture, _name(int(example.classes[0]), names)
    ones = torch.ones(len(example.classes))
    return annotated(example.picture, Detections(example.boxes, example.classes, ones), names), ""


def _said(example: Example, answer: Answer, names: Sequence[str] | None) -> tuple[Tensor, str]:
    if isinstance(answer.said, Detections):
        return annotated(example.picture, answer.said, names), ""
    best = int(answer.said.argmax())
    return example.picture, f"{_name(best, names)} ({float(answer.said[best]):.2f})"


def _name(index: int, names: Sequence[str] | None) -> str:
    return names[index] if names else str(index)
