"""What every host checks about a run before it starts: its folder, its devices, its data root."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from kd_det.checks import fail

# Files of which any one shows that a run has trained in a folder. Its config alone does not: a run
# that was refused before its first iteration may be corrected and started again.
_TRACES = (
    "last_checkpoint",
    "last.ckpt",
    "model_final.pth",
    "metrics.json",
    "pre_stage.pth",
)


def check_output_dir(output_dir: str, resume: bool) -> None:
    """Refuse to start anew where another run has written.

    Raises:
        KDError: ``output_dir`` holds a run and ``resume`` is False. Nothing is written.
    """
    traces = [name for name in _TRACES if (Path(output_dir) / name).exists()]
    if traces and not resume:
        fail(
            expected="OUTPUT_DIR to be new or empty",
            received=f"'{output_dir}', which holds {', '.join(traces)} of another run",
            remedy="add --resume to continue that run, or choose another OUTPUT_DIR",
        )


def check_devices(device: str, num_gpus: int) -> None:
    """Refuse GPUs that are not there.

    Raises:
        KDError: the device is CUDA without a GPU, or ``num_gpus`` exceeds what is visible.
    """
    on_gpu = device.startswith("cuda")
    available = torch.cuda.device_count() if on_gpu else 0
    if on_gpu and not available:
        fail(
            expected=f"a GPU for MODEL.DEVICE {device}",
            received="none visible to torch",
            remedy="add MODEL.DEVICE cpu to run on the CPU",
        )
    if num_gpus > max(available, 1):
        fail(
            expected=f"--num-gpus of at most {max(available, 1)} for MODEL.DEVICE {device} here",
            received=f"--num-gpus {num_gpus}",
            remedy="ask for fewer; several CPU processes start with "
            "torchrun --nproc_per_node N tools/train_net.py ...",
        )


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
            remedy="add MODEL.WEIGHTS path/to/model_final.pth",
        )
    return weights or found[0]


def data_root() -> Path:
    """Where data sets live: ``$DETECTRON2_DATASETS``, or ``datasets`` as in Detectron2."""
    return Path(os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets")))


def under_torchrun() -> bool:
    """Whether a launcher has already started this process as one of several."""
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) >= 1
