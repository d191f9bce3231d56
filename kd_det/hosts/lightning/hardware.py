"""Lightning's arguments for devices and precision, and seeds, from a config."""

from __future__ import annotations

import logging
import os
import warnings
from pathlib import Path
from typing import Any

from fvcore.common.config import CfgNode
from lightning.fabric import Fabric

from kd_det.run.plan import Start

logger = logging.getLogger(__name__)


def announce_rendezvous(start: Start) -> None:
    """Put the place where several machines meet into the environment, where Lightning reads it."""
    if start.num_machines > 1 and "WORLD_SIZE" not in os.environ:
        address, _, port = start.dist_url.rpartition("//")[2].partition(":")
        os.environ.update(MASTER_ADDR=address, MASTER_PORT=port, NODE_RANK=str(start.machine_rank))


def hardware_arguments(cfg: CfgNode, start: Start) -> dict[str, Any]:
    """Lightning's arguments for devices."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    on_cpu = cfg.MODEL.DEVICE == "cpu"
    devices = local if on_cpu else max(local, start.num_gpus, 1)
    return {
        "accelerator": "cpu" if on_cpu else "cuda",
        "devices": devices,
        "num_nodes": max(start.num_machines, world // local),
        "strategy": "ddp" if max(world, devices * start.num_machines) > 1 else "auto",
        # The samplers know their rank.
        "use_distributed_sampler": False,
    }


def precision(cfg: CfgNode) -> str:
    """Lightning's name for what ``SOLVER.AMP.ENABLED`` means on ``MODEL.DEVICE``."""
    if not cfg.SOLVER.AMP.ENABLED:
        return "32-true"
    if cfg.MODEL.DEVICE != "cpu":
        return "16-mixed"
    if not computes_in_bfloat16():
        logger.warning("SOLVER.AMP.ENABLED: this CPU only emulates bfloat16; training in float32")
        return "32-true"
    return "bf16-mixed"


def one_device(cfg: CfgNode) -> Fabric:
    """Device and precision of a run, for a model that is examined in this process."""
    return Fabric(
        accelerator="cpu" if cfg.MODEL.DEVICE == "cpu" else "cuda",
        devices=1,
        precision=precision(cfg),  # type: ignore[arg-type]
    )


def computes_in_bfloat16() -> bool:
    """Whether this CPU has instructions for bfloat16, and does not take longer than float32."""
    flag = Path("/proc/cpuinfo")
    if flag.is_file():
        return "avx512_bf16" in (text := flag.read_text()) or " bf16" in text
    return False


def common_seed() -> int:
    """A new seed, the same in all processes of a run."""
    if int(os.environ.get("LOCAL_RANK", 0)) > 0 and "PL_GLOBAL_SEED" in os.environ:
        # Started by Lightning from a process that has drawn one.
        return int(os.environ["PL_GLOBAL_SEED"])
    name = os.environ.get("TORCHELASTIC_RUN_ID", "") + os.environ.get("MASTER_PORT", "")
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or not name:
        return int.from_bytes(os.urandom(3), "big")
    return sum(ord(c) * 31**i for i, c in enumerate(name)) % 2**24


def quiet() -> None:
    """Hints of Lightning that do not apply here."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for message in (
        # It is resumed by iteration, in LitDetector.train_dataloader.
        ".*resuming from a checkpoint that ended before the epoch ended.*",
        ".*does not have many workers.*",
        # Small data sets; and losses whose networks are frozen on purpose.
        ".*is smaller than the logging interval.*",
        ".*module.s. in eval mode at the start of training.*",
        ".*Checkpoint directory .* exists and is not empty.*",
        ".*Experiment logs directory .* exists and is not empty.*",
        # Lightning's own use of torch.
        ".*isinstance.treespec, LeafSpec.. is deprecated.*",
    ):
        warnings.filterwarnings("ignore", message)
