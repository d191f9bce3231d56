"""Data on which colour is everything, and a detector that has learned it in seconds.

Of the three colours, only green stays one of them when red and blue are swapped.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
import yaml
from PIL import Image
from torch import Tensor, nn

from kd_det.hosts.torchvision_detection.config import load_config
from kd_det.hosts.torchvision_detection.data import train_dataset, train_loader
from kd_det.hosts.torchvision_detection.models import build_model

NAMES = ("red", "green", "yellow")
CANVAS = 64
# The last two are of no class in NAMES.
_COLOURS = np.array([(220, 40, 40), (40, 200, 40), (220, 200, 40), (40, 40, 220), (220, 220, 220)])


def write_squares(root: Path, images: int, seed: int, names=NAMES) -> tuple[Path, Path]:
    """Noisy canvases with two or three squares; their colour is their class."""
    random = np.random.default_rng(seed)
    root.mkdir(parents=True, exist_ok=True)
    records, annotations = [], []
    for index in range(images):
        canvas = random.integers(60, 140, (CANVAS, CANVAS, 3))
        for place in random.permutation(4)[: random.integers(2, 4)]:
            label = int(random.integers(len(names)))
            side = int(random.integers(14, 25))
            x, y = (int(32 * p + random.integers(1, 31 - side)) for p in divmod(int(place), 2))
            noise = random.integers(-20, 20, (side, side, 3))
            canvas[y : y + side, x : x + side] = (_COLOURS[label] + noise).clip(0, 255)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": index,
                    "category_id": label + 1,
                    "bbox": [x, y, side, side],
                    "area": side * side,
                    "iscrowd": 0,
                }
            )
        name = f"{index:03}.png"
        Image.fromarray(canvas.astype(np.uint8)).save(root / name)
        records.append({"id": index, "file_name": name, "width": CANVAS, "height": CANVAS})
    categories = [{"id": k + 1, "name": name} for k, name in enumerate(names)]
    json_file = root / "annotations.json"
    json_file.write_text(
        json.dumps({"images": records, "annotations": annotations, "categories": categories})
    )
    return json_file, root


def write_yaml(path: Path, content: dict) -> Path:
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def model_config(data: dict[str, tuple[Path, Path]], output: Path) -> dict:
    """A tiny Faster R-CNN of the torchvision host on the squares."""
    return {
        "HOST": "torchvision_detection",
        "SEED": 1,
        "OUTPUT_DIR": str(output),
        "DATASETS": {
            "TRAIN": ["squares_train"],
            "TEST": ["squares_val"],
            "COCO_JSON": {name: [str(part) for part in parts] for name, parts in data.items()},
        },
        "DATALOADER": {"NUM_WORKERS": 0},
        "INPUT": {
            "MIN_SIZE_TRAIN": [CANVAS],
            "MAX_SIZE_TRAIN": CANVAS,
            "MIN_SIZE_TEST": CANVAS,
            "MAX_SIZE_TEST": CANVAS,
        },
        "MODEL": {
            "DEVICE": "cpu",
            "PIXEL_MEAN": [0.5, 0.5, 0.5],
            "PIXEL_STD": [0.25, 0.25, 0.25],
            "BACKBONE": {"NAME": "basic_resnet", "WIDTH": 8, "BLOCKS": [1, 1, 1]},
            "FPN": {"LEVELS": [2, 3, 4], "OUT_CHANNELS": 16},
            "ANCHOR_GENERATOR": {"SIZES": [[12], [20], [32]], "ASPECT_RATIOS": [[1.0]]},
            "RPN": {
                "PRE_NMS_TOPK_TRAIN": 100,
                "PRE_NMS_TOPK_TEST": 50,
                "POST_NMS_TOPK_TRAIN": 50,
                "POST_NMS_TOPK_TEST": 30,
                "BATCH_SIZE_PER_IMAGE": 32,
            },
            "ROI_HEADS": {"NUM_CLASSES": 3, "BATCH_SIZE_PER_IMAGE": 32, "POSITIVE_FRACTION": 0.5},
            "ROI_BOX_HEAD": {
                "NUM_FC": 1,
                "FC_DIM": 32,
                "POOLER_RESOLUTION": 5,
                "POOLER_SAMPLING_RATIO": 1,
            },
        },
        "SOLVER": {
            "IMS_PER_BATCH": 8,
            "BASE_LR": 0.05,
            "MAX_ITER": 150,
            "STEPS": [130],
            "WARMUP_ITERS": 20,
            "WARMUP_FACTOR": 0.05,
            "CHECKPOINT_PERIOD": 1000,
            "CLIP_GRADIENTS": {"ENABLED": True, "CLIP_TYPE": "norm", "CLIP_VALUE": 10.0},
        },
        "TEST": {"DETECTIONS_PER_IMAGE": 10},
        "KD": {"ENABLED": False},
    }


def train(config: Path, iterations: int = 80) -> None:
    """Leave ``model_final.pth`` in the config's ``OUTPUT_DIR``."""
    cfg = load_config(str(config))
    torch.manual_seed(1)
    model = build_model(cfg).train()
    batches = iter(train_loader(cfg, train_dataset(cfg), seed=1))
    fit(model, lambda: model(*next(batches)), iterations)
    Path(cfg.OUTPUT_DIR).mkdir(parents=True, exist_ok=True)
    torch.save({"model": model.state_dict()}, Path(cfg.OUTPUT_DIR) / "model_final.pth")


def fit(model: nn.Module, losses: Callable[[], Mapping[str, Tensor]], iterations: int) -> None:
    """A few steps of Adam, which needs fewer than SGD."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.004)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.004, iterations)
    for _ in range(iterations):
        optimizer.zero_grad()
        torch.stack(list(losses().values())).sum().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        schedule.step()
