"""Saved predictions of classifiers: accuracy by class, and images on which two of them differ."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from kd_det.core.errors import fail
from kd_det.document.blocks import Block, Gallery, Picture, Table, Text, row, table_of
from kd_det.document.detections import class_label, jpeg

SHOWN = 8  # images in each direction
# Pictures are shown of the first images only: finding others would read the whole data set.
REACHABLE = 1000


@dataclass(frozen=True)
class Answer:
    """A classifier's prediction for one image: classes from 0, ``confidence`` in 0..1."""

    target: int
    prediction: int
    confidence: float

    @property
    def right(self) -> bool:
        return self.target == self.prediction


Answers = dict[int, Answer]


def read_answers(path: Path) -> Answers:
    """Index of a validation image to the answer.

    Raises:
        KDError: no JSON list of entries with index, target, prediction and confidence.
    """
    try:
        return {
            int(entry["index"]): Answer(
                int(entry["target"]), int(entry["prediction"]), float(entry["confidence"])
            )
            for entry in json.loads(path.read_bytes())
        }
    except (ValueError, TypeError, KeyError) as error:
        fail(
            expected=f"a JSON list of answers in {path.name}",
            received=f"something else ({type(error).__name__}: {error})",
            remedy="evaluate the run again (tools/train_net.py --eval-only)",
        )


def accuracy(answers: Answers) -> dict[str, float]:
    """``accuracy/top1`` and ``accuracy/top1-<class>`` in percent."""
    by_class: dict[int, list[bool]] = defaultdict(list)
    for answer in answers.values():
        by_class[answer.target].append(answer.right)
    everything = [right for own in by_class.values() for right in own]
    parts = {"accuracy/top1": everything}
    parts |= {f"accuracy/top1-{target}": by_class[target] for target in sorted(by_class)}
    return {name: 100 * sum(right) / len(right) for name, right in parts.items() if right}


def differing(better: Answers, worse: Answers) -> list[int]:
    """Images that ``better`` alone names rightly, those of the highest confidence of both first."""
    shared = [k for k in better if k in worse and better[k].right and not worse[k].right]
    return sorted(shared, key=lambda k: (-better[k].confidence - worse[k].confidence, k))


def answer_blocks(
    answers: Mapping[str, Answers],
    names: Sequence[str] | None = None,
    pictures: Callable[[int], Sequence[Tensor]] | None = None,
) -> list[Block]:
    """How often two classifiers differ, and images on which they do.

    Args:
        answers: label to answers: the baseline's, the run's and, if there is one, the teacher's.
        names: of the classes.
        pictures: the first ``n`` validation images, uint8 RGB ``[3, H, W]``; without it, a table.
    """
    (baseline, alone), (label, own), *_ = answers.items()
    shared = [k for k in own if k in alone]

    def caption(image: int) -> str:
        shown = [f"{who}: {_shown(a, image, names)}" for who, a in answers.items()]
        return f"{class_label(own[image].target, names)}; {'; '.join(shown)}"

    counts = {
        "by both": sum(own[k].right and alone[k].right for k in shared),
        f"only by {label}": len(differing(own, alone)),
        f"only by {baseline}": len(differing(alone, own)),
        "by neither": sum(not own[k].right and not alone[k].right for k in shared),
    }
    rows = [row(who, f"{number:,}") for who, number in counts.items()]
    blocks: list[Block] = [Table("Images named rightly", ["", "images"], rows)]
    for better, worse, name in ((label, baseline, "better"), (baseline, label, "worse")):
        title = f"{better} right, {worse} wrong"
        images = differing(answers[better], answers[worse])
        images = [k for k in images if pictures is None or k < REACHABLE][:SHOWN]
        if not images:
            blocks.append(Text(f"{title}: no such image."))
        elif pictures is None:
            columns = {"true class": [class_label(own[k].target, names) for k in images]}
            columns |= {who: [_shown(a, k, names) for k in images] for who, a in answers.items()}
            note = "Those of the highest confidence of both."
            blocks.append(table_of(title, "image", list(map(str, images)), columns, note))
        else:
            drawn = pictures(max(images) + 1)
            shown = [
                Picture(f"{name}_{at}.jpg", jpeg(drawn[k]), caption(k))
                for at, k in enumerate(images)
            ]
            note = f"Of the first {REACHABLE:,} images, by the confidence of both."
            blocks.append(Gallery(title, [], [("", shown)], note))
    return blocks


def _shown(answers: Answers, image: int, names: Sequence[str] | None) -> str:
    if image not in answers:
        return "–"
    answer = answers[image]
    return f"{class_label(answer.prediction, names)} ({answer.confidence:.0%})"
