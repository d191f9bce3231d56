"""Runs as they lie on disk, made up from seeded random numbers, and what a report says of them."""

from __future__ import annotations

import io
import json
from html.parser import HTMLParser

import numpy as np
import yaml
from PIL import Image
from rich.console import Console

from kd_det.report.build import write_report

NAMES = ["cat", "dog", "fish"]
SIDE = 160
# Two classes of objects by area, in pixels: below and above 32 * 32.
SIDES = [12, 20, 48, 60]


def write_truth(folder, images=8, seed=0):
    """A COCO json with masks, categories 2, 5 and 9, and its images; the json's path."""
    rng = np.random.default_rng(seed)
    (folder / "images").mkdir(parents=True)
    records, annotations = [], []
    for image in range(1, images + 1):
        name = f"{image:03d}.png"
        pixels = rng.integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / name)
        records.append({"id": image, "file_name": name, "width": SIDE, "height": SIDE})
        for _ in range(4):
            side = int(rng.choice(SIDES))
            x, y = (float(v) for v in rng.integers(0, SIDE - side, 2))
            box = [x, y, float(side), float(side)]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image,
                    "category_id": int(rng.choice([2, 5, 9])),
                    "bbox": box,
                    "area": float(side * side),
                    "iscrowd": 0,
                    "segmentation": [corners(box)],
                }
            )
    content = {
        "images": records,
        "annotations": annotations,
        "categories": [{"id": k, "name": n} for k, n in zip([2, 5, 9], NAMES, strict=True)],
    }
    path = folder / "truth.json"
    path.write_text(json.dumps(content))
    return path


def corners(box):
    x, y, w, h = box
    return [x, y, x + w, y, x + w, y + h, x, y + h]


def detections(truth, share, seed, masks=False):
    """Detections that find about this share of the objects, and some that are none."""
    from pycocotools import mask as rle

    rng = np.random.default_rng(seed)
    found = []
    for annotation in json.loads(truth.read_text())["annotations"]:
        if rng.random() < share:
            box = [v + float(rng.normal(0, 1.5)) for v in annotation["bbox"]]
            score = float(rng.uniform(0.4, 1))
        else:
            box = [float(v) for v in (*rng.uniform(0, 100, 2), *rng.uniform(10, 50, 2))]
            score = float(rng.uniform(0.1, 0.7))
        entry = {
            "image_id": annotation["image_id"],
            "category_id": annotation["category_id"],
            "bbox": box,
            "score": score,
        }
        if masks:
            (encoded,) = rle.frPyObjects([corners(box)], SIDE, SIDE)
            entry["segmentation"] = {"size": [SIDE, SIDE], "counts": encoded["counts"].decode()}
        found.append(entry)
    return found


def config(truth, **keys):
    """A config.yaml with dotted keys on top of what every run has."""
    content = {
        "HOST": "torchvision_detection",
        "SEED": -1,
        "DATASETS": {
            "TEST": ["made_up"],
            "COCO_JSON": {"made_up": [str(truth), str(truth.parent / "images")]},
        },
        "SOLVER": {"MAX_ITER": 60, "BASE_LR": 0.04},
        "KD": {"ENABLED": False, "TERMS": {}},
        "MODEL": {"BACKBONE": {"WIDTH": 16}},
    }
    for key, value in keys.items():
        node = content
        *parents, last = key.split("__")
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return content


def metric_lines(seed=0, terms=(), seconds=0.5, end=60):
    rng = np.random.default_rng(seed)
    lines = []
    for iteration in range(19, end, 20):
        line = {
            "iteration": iteration,
            "total_loss": float(3 - iteration / 50 + rng.normal(0, 0.1)),
            "loss_cls": float(1 - iteration / 100),
            "lr": 0.04,
            "time": seconds,
            "data_time": seconds / 5,
            "max_mem": 512.0,
        }
        for term in terms:
            line |= {term: 0.5, f"raw/{term}": 2.0, f"weight/{term}": 0.25}
        lines.append(line)
    return lines


def write_run(
    folder,
    content,
    found=None,
    results=None,
    lines=None,
    record=None,
    weights=b"weights",
):
    """A run's folder; what is None is not written."""
    folder.mkdir(parents=True)
    content = content | {"OUTPUT_DIR": str(folder)}
    (folder / "config.yaml").write_text(yaml.safe_dump(content))
    if lines is not None:
        (folder / "metrics.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if found is not None:
        (folder / "inference").mkdir()
        (folder / "inference" / "coco_instances_results.json").write_text(json.dumps(found))
    if results is not None:
        (folder / "results.json").write_text(json.dumps(results))
    if record is not None:
        (folder / "run.json").write_text(json.dumps(record))
    if weights is not None:
        (folder / "model_final.pth").write_bytes(weights)
    return folder


def write_study(root, seeds=(1, 2, 3), masks=False):
    """Teacher, baseline and one distilled configuration, with predictions; the truth's path."""
    truth = write_truth(root / "data")
    kd = {
        "KD__ENABLED": True,
        "KD__TERMS": {"review": {"LOSS": "ReviewKD", "WEIGHT": 0.25}},
    }
    for seed in seeds:
        write_run(
            root / f"baseline_seed{seed}",
            config(truth, SEED=seed),
            detections(truth, 0.35, seed, masks),
            lines=metric_lines(seed),
        )
        write_run(
            root / f"review_seed{seed}",
            config(truth, SEED=seed, **kd),
            detections(truth, 0.7, 10 + seed, masks),
            lines=metric_lines(seed, ["review"], seconds=0.75),
            record={
                "status": "done",
                "seed": seed,
                "versions": {"kd_det": "0.1.0", "torch": "2.15"},
                "git": {"commit": "0123456789abcdef", "dirty": True},
                "command": ["tools/train_net.py", "--config-file", "review.yaml"],
                "teacher": {"config": "t.yaml", "weights": "t.pth", "sha256": "feed" * 16},
                "starts": [{"at": "2026-01-01T00:00:00+00:00"}],
                "parameters": {"student": 100, "adaptors": 50, "teacher": 300},
            },
        )
    write_run(
        root / "teacher",
        config(truth, MODEL__BACKBONE__WIDTH=32, SOLVER__MAX_ITER=60),
        detections(truth, 0.95, 99, masks),
        lines=metric_lines(5),
    )
    return truth


class Tables(HTMLParser):
    """Every table of a page as rows of texts; a cell's small print follows in brackets."""

    def __init__(self):
        super().__init__()
        self.tables, self._cell = [], None

    def handle_starttag(self, tag, attributes):
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self._cell = ""
        elif tag == "small":
            self._cell += " ("

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self.tables[-1][-1].append(self._cell.strip())
            self._cell = None
        elif tag == "small":
            self._cell += ")"

    def handle_data(self, data):
        if self._cell is not None:
            self._cell += data


def html_tables(page):
    parser = Tables()
    parser.feed(page.read_text())
    return parser.tables


def report(root, runs=("review_seed*",), baseline=("baseline_seed*",), teacher=("teacher",)):
    """The page about runs below ``root``; nothing is measured."""
    named = [[str(root / name) for name in names] for names in (runs, baseline, teacher)]
    screen = Console(file=io.StringIO())
    return write_report(*named, root / "report", measure=False, console=screen)


def rows(page, *columns):
    """First cell to the other cells of the first table with these columns."""
    for table in html_tables(page):
        if set(columns) <= set(table[0]):
            return {cells[0]: dict(zip(table[0], cells, strict=True)) for cells in table[1:]}
    raise AssertionError(f"no table with {columns}")


def problems(page):
    """``where: what``, a line each."""
    (table,) = [t for t in html_tables(page) if t[0] == ["where", "what"]]
    return "\n".join(": ".join(cells) for cells in table[1:])
