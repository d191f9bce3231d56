"""Fewer classes of a COCO-format data set, or the same in another order, on the same images."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from kd_det.core.errors import check_known, fail
from kd_det.core.files import replace_text
from kd_det.data.coco_json import category_names


def write_subset(source: Path, target: Path, classes: Sequence[str]) -> Path:
    """Write the annotations of some classes; returns ``target``.

    Category ids are renumbered from 1 in the order of ``classes``, which is then that of a model's
    outputs. Annotations of other classes are left out. Every image stays.

    Args:
        source: COCO instances annotations.
        target: file to write; a file with the same content is left as it is.
        classes: names of categories of ``source``, each once.

    Raises:
        KDError: no source, an unknown or repeated class, or a target that holds something else.
    """
    source, target = Path(source), Path(target)
    names = category_names(source.name, source)
    if names is None:
        fail(
            expected=f"COCO annotations at {source}",
            received="no such file",
            remedy="write the whole data set first",
        )
    for name in classes:
        check_known(f"class of {source.name}", name, names)
    if not classes or len(set(classes)) != len(classes):
        fail(
            expected="classes to keep, each once",
            received=", ".join(classes) or "none",
            remedy=f"choose among {', '.join(names)}",
        )
    content = json.loads(source.read_bytes())
    kept = [c for c in content["categories"] if c["name"] in classes]
    kept.sort(key=lambda category: classes.index(category["name"]))
    ids = {category["id"]: number for number, category in enumerate(kept, 1)}
    content["categories"] = [{**c, "id": ids[c["id"]]} for c in kept]
    content["annotations"] = [
        {**a, "category_id": ids[a["category_id"]]}
        for a in content["annotations"]
        if a["category_id"] in ids
    ]
    text = json.dumps(content, separators=(",", ":")) + "\n"
    if target.exists():
        if target.is_file() and target.read_text() == text:
            return target
        fail(
            expected=f"an empty place at {target}",
            received="something else",
            remedy="choose another name, or remove it; nothing was changed",
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    replace_text(target, text)
    return target
