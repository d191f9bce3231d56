"""The files of a run folder by name, and what every host checks about a folder before a run."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kd_det.core.errors import fail
from kd_det.run.yaml_files import load_yaml

CONFIG, RECORD, LOG = "config.yaml", "run.json", "log.txt"
METRICS, RESULTS, SEED_RESULTS = "metrics.json", "results.json", "seeds.json"

FINAL = "model_final.pth"
# What a resumed run continues from: Lightning's checkpoint, and Detectron2's note of its last one.
CHECKPOINT, LAST_CHECKPOINT = "last.ckpt", "last_checkpoint"
PRE_STAGE, PRE_STAGE_CHECKPOINT, PRE_STAGE_FOLDER = "pre_stage.pth", "pre_stage.ckpt", "pre_stage"

# Predictions of the last evaluation, of detectors and of classifiers.
INFERENCE = "inference"
DETECTIONS = f"{INFERENCE}/coco_instances_results.json"
PREDICTIONS = f"{INFERENCE}/predictions.json"

PREFLIGHT, PICTURES = "preflight", "visualize"

# Files of which any one shows that a run has trained in a folder. Its config alone does not: a run
# that was refused before its first iteration may be corrected and started again.
_TRACES = (LAST_CHECKPOINT, CHECKPOINT, FINAL, METRICS, PRE_STAGE)

# What a checkpoint is made of. Anything else may be changed between two starts of a run.
_LASTING = (
    *("HOST", "MODEL.META_ARCHITECTURE", "MODEL.NAME", "MODEL.NUM_CLASSES", "MODEL.BACKBONE"),
    *("MODEL.RESNETS", "MODEL.FPN", "MODEL.ROI_HEADS.NUM_CLASSES", "MODEL.RETINANET.NUM_CLASSES"),
    "KD.ENABLED",
)


def check_output_dir(output_dir: str, resume: bool) -> None:
    """Refuse to start anew in the folder of another run, or in one that is not writable.

    Nothing is written.

    Raises:
        KDError: ``output_dir`` holds a run and ``resume`` is False; or see :func:`check_writable`.
    """
    check_writable(output_dir)
    traces = [name for name in _TRACES if (Path(output_dir) / name).exists()]
    if traces and not resume:
        fail(
            expected="OUTPUT_DIR to be new or empty",
            received=f"'{output_dir}', which holds {', '.join(traces)} of another run",
            remedy="add --resume to continue that run, or choose another OUTPUT_DIR",
        )


def check_writable(output_dir: str | Path) -> None:
    """Refuse a folder that cannot be written.

    Raises:
        KDError: it, or the nearest existing folder above it, is a file or read-only.
    """
    folder = Path(output_dir).absolute()
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        fail(
            expected=f"OUTPUT_DIR '{output_dir}' to be a folder that can be written",
            received=f"'{folder}', which is {'read-only' if folder.is_dir() else 'a file'}",
            remedy="choose another OUTPUT_DIR",
        )


def check_same_run(output_dir: str | Path, cfg: Mapping[str, Any]) -> None:
    """Refuse to go on with the checkpoint of a run of another model or with other losses.

    Without a ``config.yaml`` in ``output_dir`` nothing is compared.

    Raises:
        KDError: keys that a checkpoint depends on differ; the message lists them.
    """
    path = Path(output_dir) / CONFIG
    if not path.is_file():
        return
    then, now = _lasting(load_yaml(str(path))), _lasting(cfg)
    differing = [key for key in {**then, **now} if then.get(key) != now.get(key)]
    if differing:
        changes = (f"{k} {now.get(k, '(none)')}, then {then.get(k, '(none)')}" for k in differing)
        fail(
            expected=f"to resume the run that {path} describes",
            received="; ".join(changes),
            remedy="use that config, or choose another OUTPUT_DIR to start afresh",
        )


def _lasting(cfg: Mapping[str, Any]) -> dict[str, str]:
    """The values of a config that a checkpoint depends on, as text, by key."""
    lasting: dict[str, Any] = {}
    for key in _LASTING:
        value: Any = cfg
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        entries = value.items() if isinstance(value, Mapping) else [("", value)]
        for name, entry in entries:
            # Weights are where a run began.
            if entry is not None and name != "WEIGHTS":
                lasting[f"{key}.{name}".rstrip(".")] = entry
    distillation = cfg.get("KD", {})
    if distillation.get("ENABLED"):
        for name in distillation.get("ACTIVE_TERMS") or distillation.get("TERMS", {}):
            term = distillation["TERMS"].get(name, {})
            for part in ("LOSS", "TAPS"):
                lasting[f"KD.TERMS.{name}.{part}"] = term.get(part)
    # As text, because a tuple in a config is a list in its file.
    return {key: json.dumps(value, sort_keys=True) for key, value in lasting.items()}


def evaluated_weights(weights: str, output_dir: str | Path, candidates: Sequence[str]) -> str:
    """What ``--eval-only`` evaluates: ``weights``, or the first of ``candidates`` in the folder.

    Raises:
        KDError: there is neither.
    """
    found = [str(p) for p in (Path(output_dir) / name for name in candidates) if p.is_file()]
    if not weights and not found:
        fail(
            expected="weights to evaluate",
            received=f"no MODEL.WEIGHTS, and nothing in OUTPUT_DIR {output_dir}",
            remedy=f"add MODEL.WEIGHTS path/to/{FINAL}",
        )
    return weights or found[0]
