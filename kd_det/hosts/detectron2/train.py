"""Training and evaluation with Detectron2's own trainer, launcher and evaluator."""

from __future__ import annotations

import argparse
import atexit
import gc
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.engine import launch
from detectron2.engine.hooks import HookBase
from detectron2.evaluation import verify_results
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from detectron2.utils.file_io import PathManager
from torch.multiprocessing import ProcessRaisedException

from kd_det.core.errors import KDError
from kd_det.core.files import replace_text
from kd_det.hosts.detection.terms import check_detection_terms
from kd_det.hosts.detectron2.config import get_cfg
from kd_det.hosts.detectron2.datasets import prepare_datasets, register_datasets
from kd_det.hosts.detectron2.family import FAMILY
from kd_det.hosts.detectron2.pre_stage import prepare_run
from kd_det.hosts.detectron2.procedures import check_run_procedures
from kd_det.hosts.detectron2.progress import ProgressBar, progress_bar, setup_logging
from kd_det.hosts.detectron2.teacher import find_config
from kd_det.hosts.detectron2.trainer import Trainer, unwrap
from kd_det.hosts.lightning.loggers import check_loggers
from kd_det.run.config import merge_config, read_terms
from kd_det.run.devices import check_devices, under_torchrun
from kd_det.run.folder import LAST_CHECKPOINT, RESULTS, check_output_dir, check_same_run
from kd_det.run.record import parameter_counts, recorded_run

__all__ = ["Trainer", "check_run", "load_cfg", "main", "run"]


def load_cfg(config_file: str, opts: Sequence[str] = ()) -> CfgNode:
    """Read a config file and overrides, register its data sets, and freeze it.

    Raises:
        KDError: see :func:`kd_det.run.config.merge_config`.
    """
    cfg = get_cfg()
    merge_config(cfg, config_file, opts)
    register_datasets(cfg)
    cfg.freeze()
    return cfg


def check_run(cfg: CfgNode, args: argparse.Namespace) -> None:
    """Everything that can be refused before processes start and files are written.

    Raises:
        KDError: devices, output folder, loggers, teacher, terms or procedures do not fit.
    """
    check_devices(cfg.MODEL.DEVICE, args.num_gpus)
    if args.eval_only:
        return
    check_output_dir(cfg.OUTPUT_DIR, args.resume)
    if (Path(cfg.OUTPUT_DIR) / LAST_CHECKPOINT).is_file():
        check_same_run(cfg.OUTPUT_DIR, cfg)
    check_loggers(cfg)
    if cfg.KD.ENABLED and cfg.MODEL.META_ARCHITECTURE.startswith("Distilled"):
        check_detection_terms(read_terms(cfg), FAMILY)
        find_config(cfg.KD.TEACHER.CONFIG_FILE)
    check_run_procedures(cfg)


def run(
    cfg: CfgNode,
    resume: bool = False,
    eval_only: bool = False,
    extra_hooks: Sequence[HookBase] = (),
    bar: ProgressBar | None = None,
) -> dict[str, Any]:
    """Train (or only evaluate) in this process or process group.

    Args:
        cfg: a frozen config of this host.
        resume: continue from the last checkpoint in ``OUTPUT_DIR``. Detectron2's sampler starts
            its data order anew; KCD's does not.
        eval_only: evaluate ``MODEL.WEIGHTS`` (or, with ``resume``, the last checkpoint).
        extra_hooks: further trainer hooks.
        bar: shows the training on a terminal.

    Returns:
        ``{"bbox": {"AP": ...}, "segm": {...}}`` in percent, on the main process.
    """
    test = list(cfg.DATASETS.TEST)
    prepare_datasets(cfg, test if eval_only else [*cfg.DATASETS.TRAIN, *test])
    if not eval_only:
        return _train(cfg, resume, extra_hooks, bar)
    # The teacher plays no part in inference: evaluation needs none.
    plain = cfg.clone()
    plain.defrost()
    plain.KD.ENABLED = False
    model = Trainer.build_model(plain)
    DetectionCheckpointer(model, save_dir=cfg.OUTPUT_DIR).resume_or_load(
        cfg.MODEL.WEIGHTS, resume=resume
    )
    results = Trainer.test(plain, model)
    if comm.is_main_process():
        verify_results(cfg, results)
    return results


def _train(
    cfg: CfgNode, resume: bool, extra_hooks: Sequence[HookBase], bar: ProgressBar | None
) -> dict[str, Any]:
    cfg = _seeded(cfg)
    trainer = Trainer(cfg, extra_hooks, bar)
    trainer.resume_or_load(resume=resume)
    resumed = resume and trainer.checkpointer.has_checkpoint()
    with recorded_run(
        cfg.OUTPUT_DIR, cfg, cfg.SEED, resumed, comm.is_main_process(), **_facts(trainer)
    ):
        prepare_run(trainer, resume, bar)
        trainer.train()
        results: dict[str, Any] = dict(getattr(trainer, "_last_eval_results", {}))
        if costs := trainer.costs():
            results["cost"] = costs
        if comm.is_main_process():
            verify_results(cfg, results)
            if results:
                # What stages and seeds read: processes of their own return nothing.
                path = Path(cfg.OUTPUT_DIR) / RESULTS
                replace_text(path, json.dumps(results, indent=2) + "\n")
    return results


def _seeded(cfg: CfgNode) -> CfgNode:
    """The config with the seed in use, which Detectron2 draws where ``SEED`` is negative."""
    if cfg.SEED >= 0:
        return cfg
    seeded = cfg.clone()
    seeded.defrost()
    seeded.SEED = int(comm.shared_random_seed())
    seeded.freeze()
    seed_all_rng(seeded.SEED + comm.get_rank())
    return seeded


def _facts(trainer: Trainer) -> dict[str, Any]:
    """What only this host can tell about a run."""
    model, weights = unwrap(trainer.model), trainer.cfg.KD.TEACHER.WEIGHTS
    teacher = getattr(model, "teacher", None)
    counts = parameter_counts(model, trainer.distiller, teacher and teacher.frozen)
    # The losses live inside the model.
    counts["student"] -= counts["adaptors"]
    file = PathManager.get_local_path(weights) if teacher and "://" in weights else ""
    return {"parameters": counts, "teacher_file": file}


def main(args: argparse.Namespace) -> None:
    """Entry point of :mod:`kd_det.app.train`: check, then launch or join the process group."""
    if under_torchrun():
        _join_torchrun(args)
    else:
        check_run(load_cfg(args.config_file, args.opts), args)
        try:
            launch(
                _worker,
                args.num_gpus,
                num_machines=args.num_machines,
                machine_rank=args.machine_rank,
                dist_url=args.dist_url,
                args=(args,),
            )
        except ProcessRaisedException as error:
            # What a child process refuses reaches its parent as the text of a traceback.
            _, _, message = str(error).rpartition(f"{KDError.__name__}: ")
            if message == str(error):
                raise
            raise KDError(message.strip()) from None


def _join_torchrun(args: argparse.Namespace) -> None:
    cfg = load_cfg(args.config_file, args.opts)
    local_rank, local_size = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    if int(os.environ["RANK"]) == 0:
        # torchrun, not --num-gpus, says how many processes there are.
        check_run(cfg, argparse.Namespace(**{**vars(args), "num_gpus": 1}))
    if not torch.distributed.is_initialized():
        on_gpu = cfg.MODEL.DEVICE.startswith("cuda")
        if on_gpu:
            torch.cuda.set_device(local_rank)
        torch.distributed.init_process_group("nccl" if on_gpu else "gloo")
        # Kept until the end: stages and seeds are several runs of one process group.
        atexit.register(_leave_torchrun)
        comm.create_local_process_group(local_size)
    comm.synchronize()
    _worker(args)


def _leave_torchrun() -> None:
    """End the threads of the process groups while the interpreter is still there.

    One that is still letting go of tensors after that can abort a process whose work is done. They
    end with the last reference to a group: that of a model in DDP, or Detectron2's own.
    """
    comm._LOCAL_PROCESS_GROUP = None
    gc.collect()
    torch.distributed.destroy_process_group()
    gc.collect()


def _worker(args: argparse.Namespace) -> None:
    cfg = load_cfg(args.config_file, args.opts)
    with progress_bar(wanted=not args.eval_only) as bar:
        setup_logging(cfg, args, bar, "kd_det")
        results = run(cfg, args.resume, args.eval_only, bar=bar)
        if bar is not None:
            bar.finish(results)
