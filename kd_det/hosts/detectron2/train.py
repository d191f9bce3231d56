"""Training and evaluation with Detectron2's own trainer, launcher and evaluator."""

from __future__ import annotations

import argparse
import atexit
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
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

from kd_det.core.distributed import end_process_groups
from kd_det.core.errors import KDError, fail
from kd_det.core.files import replace_text
from kd_det.hosts.base import MakePictures, Progress
from kd_det.hosts.detection.terms import check_detection_terms
from kd_det.hosts.detectron2.datasets import prepare_datasets, register_datasets
from kd_det.hosts.detectron2.family import FAMILY
from kd_det.hosts.detectron2.pre_stage import prepare_run
from kd_det.hosts.detectron2.procedures import check_run_procedures
from kd_det.hosts.detectron2.progress import (
    ProgressBar,
    ReportProgress,
    progress_bar,
    setup_logging,
)
from kd_det.hosts.detectron2.teacher import find_config
from kd_det.hosts.detectron2.trainer import Trainer, unwrap
from kd_det.hosts.lightning.loggers import check_loggers
from kd_det.run.config import read_terms
from kd_det.run.devices import check_devices, under_torchrun
from kd_det.run.folder import LAST_CHECKPOINT, RESULTS, check_output_dir, check_same_run
from kd_det.run.plan import NEW, Results, Start, check_single_run
from kd_det.run.record import parameter_counts, recorded_run


def check_run(cfg: CfgNode, start: Start) -> None:
    """Refuse a run that cannot be carried out here and now. Nothing is written.

    Raises:
        KDError: several runs in one config; or devices, weights, output folder, loggers, teacher,
            terms or procedures do not fit.
    """
    check_single_run(cfg)
    check_devices(cfg.MODEL.DEVICE, start.num_gpus)
    begun = (Path(cfg.OUTPUT_DIR) / LAST_CHECKPOINT).is_file()
    if not (start.resume and begun):
        check_weights(cfg.MODEL.WEIGHTS)
    if start.eval_only:
        return
    check_output_dir(cfg.OUTPUT_DIR, start.resume)
    if begun:
        check_same_run(cfg.OUTPUT_DIR, cfg)
    check_loggers(cfg)
    if cfg.KD.ENABLED and cfg.MODEL.META_ARCHITECTURE.startswith("Distilled"):
        check_detection_terms(read_terms(cfg), FAMILY)
        find_config(cfg.KD.TEACHER.CONFIG_FILE)
    check_run_procedures(cfg)


def check_weights(weights: str) -> None:
    """Refuse a file that is not there, which Detectron2 would meet with an assertion.

    Args:
        weights: ``MODEL.WEIGHTS``. Addresses are left to Detectron2.

    Raises:
        KDError: it is a path to no file.
    """
    path = weights.partition("?")[0]  # options of the loader follow
    if path and "://" not in path and not Path(path).is_file():
        fail(
            expected="MODEL.WEIGHTS to be a file, an address, or empty",
            received=f"'{weights}', where no file is",
            remedy="correct the path, or set MODEL.WEIGHTS '' to start at random",
        )


def run(
    cfg: CfgNode,
    start: Start = NEW,
    *,
    progress: Progress | None = None,
    pictures: MakePictures | None = None,
    callbacks: Sequence[HookBase] = (),
) -> Results:
    """See :class:`kd_det.hosts.base.RunHost`: in this process, in new ones, or under torchrun.

    Returns:
        ``{"bbox": {"AP": ...}, "segm": {...}}`` in percent.
    """
    arguments = (cfg, start, progress, pictures, callbacks)
    if under_torchrun():
        return _run_under_torchrun(*arguments)
    check_run(cfg, start)
    if start.num_gpus * start.num_machines == 1:
        return _work(*arguments)
    try:
        launch(
            _work,
            start.num_gpus,
            num_machines=start.num_machines,
            machine_rank=start.machine_rank,
            dist_url=start.dist_url,
            args=arguments,
        )
    except ProcessRaisedException as error:
        # What a child process refuses reaches its parent as the text of a traceback.
        _, _, message = str(error).rpartition(f"{KDError.__name__}: ")
        if message == str(error):
            raise
        raise KDError(message.strip()) from None
    path = Path(cfg.OUTPUT_DIR) / RESULTS
    return {} if start.eval_only or not path.is_file() else json.loads(path.read_text())


def _run_under_torchrun(
    cfg: CfgNode,
    start: Start,
    progress: Progress | None,
    pictures: MakePictures | None,
    callbacks: Sequence[HookBase],
) -> Results:
    local_rank, local_size = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    if int(os.environ["RANK"]) == 0:
        # torchrun, not --num-gpus, decides how many processes there are.
        check_run(cfg, replace(start, num_gpus=1))
    if not torch.distributed.is_initialized():
        on_gpu = cfg.MODEL.DEVICE.startswith("cuda")
        if on_gpu:
            torch.cuda.set_device(local_rank)
        torch.distributed.init_process_group("nccl" if on_gpu else "gloo")
        # Kept until the end: stages and seeds are several runs of one process group.
        atexit.register(_leave_torchrun)
        comm.create_local_process_group(local_size)
    comm.synchronize()
    return _work(cfg, start, progress, pictures, callbacks)


def _leave_torchrun() -> None:
    comm._LOCAL_PROCESS_GROUP = None  # Detectron2's own reference
    end_process_groups()


def _work(
    cfg: CfgNode,
    start: Start,
    progress: Progress | None,
    pictures: MakePictures | None,
    callbacks: Sequence[HookBase],
) -> Results:
    """A whole run in one process of a process group, or in the only one."""
    register_datasets(cfg)  # a new process has registered nothing
    hooks = [*callbacks, *([ReportProgress(progress)] if progress else [])]
    with progress_bar(wanted=progress is None and not start.eval_only) as bar:
        arguments = argparse.Namespace(command=list(sys.argv), **asdict(start))
        setup_logging(cfg, arguments, bar, "kd_det", on_screen=progress is None)
        results = run_in_process(cfg, start, hooks, bar, pictures)
        if bar is not None:
            bar.finish(results)
    return results


def run_in_process(
    cfg: CfgNode,
    start: Start = NEW,
    hooks: Sequence[HookBase] = (),
    bar: ProgressBar | None = None,
    pictures: MakePictures | None = None,
) -> Results:
    """Train and evaluate, or only evaluate, without a check and without a log.

    Args:
        cfg: a frozen config of this host, its data sets registered.
        start: how the run is started; of it only ``resume`` and ``eval_only`` are used.
            Detectron2's sampler begins its data order anew in a resumed run; KCD's does not.
        hooks: further trainer hooks.
        bar: shows the training on a terminal.
        pictures: see :class:`kd_det.hosts.base.RunHost`.
    """
    test = list(cfg.DATASETS.TEST)
    prepare_datasets(cfg, test if start.eval_only else [*cfg.DATASETS.TRAIN, *test])
    if not start.eval_only:
        return _train(cfg, start.resume, hooks, bar, pictures)
    # The teacher plays no part in inference: evaluation needs none.
    plain = cfg.clone()
    plain.defrost()
    plain.KD.ENABLED = False
    model = Trainer.build_model(plain)
    DetectionCheckpointer(model, save_dir=cfg.OUTPUT_DIR).resume_or_load(
        cfg.MODEL.WEIGHTS, resume=start.resume
    )
    results = Trainer.test(plain, model)
    if comm.is_main_process():
        verify_results(cfg, results)
    return results


def _train(
    cfg: CfgNode,
    resume: bool,
    hooks: Sequence[HookBase],
    bar: ProgressBar | None,
    pictures: MakePictures | None,
) -> Results:
    cfg = _seeded(cfg)
    trainer = Trainer(cfg, hooks, bar, pictures)
    trainer.resume_or_load(resume=resume)
    resumed = resume and trainer.checkpointer.has_checkpoint()
    with recorded_run(
        cfg.OUTPUT_DIR, cfg, cfg.SEED, resumed, comm.is_main_process(), **_facts(trainer)
    ):
        prepare_run(trainer, resume, bar)
        trainer.train()
        results: Results = dict(getattr(trainer, "_last_eval_results", {}))
        if costs := trainer.costs():
            results["cost"] = costs
        if comm.is_main_process():
            verify_results(cfg, results)
            if results:
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
    """Entries of the record of a run that only this host knows."""
    model, weights = unwrap(trainer.model), trainer.cfg.KD.TEACHER.WEIGHTS
    teacher = getattr(model, "teacher", None)
    counts = parameter_counts(model, trainer.distiller, teacher and teacher.frozen)
    # The losses live inside the model.
    counts["student"] -= counts["adaptors"]
    file = PathManager.get_local_path(weights) if teacher and "://" in weights else ""
    return {"parameters": counts, "teacher_file": file}
