"""The devices and processes of a run."""

from __future__ import annotations

import os
import resource
import sys

import torch

from kd_det.core.errors import fail


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


def under_torchrun() -> bool:
    """Whether a launcher has already started this process as one of several."""
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) >= 1


def peak_memory(device: torch.device | str) -> float:
    """The largest memory in use so far, in MiB: of tensors on a GPU, else of this process."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Bytes on macOS, elsewhere kibibytes.
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10
