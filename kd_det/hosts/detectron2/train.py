"""Training and evaluation with Detectron2's own trainer, launcher and evaluator."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import detectron2.engine.defaults
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.engine import DefaultTrainer, create_ddp_model, default_setup, launch
from detectron2.engine.hooks import HookBase
from detectron2.evaluation import COCOEvaluator, DatasetEvaluator, verify_results
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from torch.multiprocessing import ProcessRaisedException

from kd_det.checks import KDError, fail
from kd_det.config import merge_config
from kd_det.hosts.detectron2.config import get_cfg
from kd_det.hosts.detectron2.datasets import prepare_datasets, register_datasets
from kd_det.hosts.detectron2.teacher import find_config
from kd_det.runs import check_devices, check_output_dir, under_torchrun


class Trainer(DefaultTrainer):
    """``DefaultTrainer`` with the COCO evaluator, and data-parallel on CPU too."""

    def __init__(self, cfg: CfgNode, extra_hooks: Sequence[HookBase] = ()) -> None:
        with _ddp_for(cfg.MODEL.DEVICE):
            super().__init__(cfg)
        self.register_hooks([_ReportSilentTerms(), *extra_hooks])

    @classmethod
    def test(cls, cfg: CfgNode, model: torch.nn.Module, evaluators: Any = None) -> dict[str, Any]:
        """Evaluate the model that the checkpoint holds, on all ranks."""
        _share_buffers(model)
        return super().test(cfg, model, evaluators)

    @classmethod
    def build_evaluator(
        cls, cfg: CfgNode, dataset_name: str, output_folder: str | None = None
    ) -> DatasetEvaluator:
        """The COCO evaluator for any COCO-format data set.

        Raises:
            KDError: the data set is evaluated by other rules.
        """
        kind = getattr(MetadataCatalog.get(dataset_name), "evaluator_type", None)
        if kind != "coco":
            fail(
                expected=f"DATASETS.TEST '{dataset_name}' to be in COCO instance format",
                received=f"evaluator type {kind!r}",
                remedy="register it through DATASETS.COCO_JSON",
            )
        folder = output_folder or os.path.join(cfg.OUTPUT_DIR, "inference")
        return COCOEvaluator(dataset_name, output_dir=folder)


def _share_buffers(model: torch.nn.Module) -> None:
    """Give every rank the buffers of the main process, which are the ones in the checkpoint.

    ``DefaultTrainer`` does not broadcast buffers, so BatchNorm's running statistics differ between
    ranks, and each rank would evaluate its share of the images with its own.
    """
    if comm.get_world_size() > 1:
        for buffer in model.buffers():
            torch.distributed.broadcast(buffer, src=0)


class _ReportSilentTerms(HookBase):
    """A run may be shorter than the distiller's report period: report at its end, too."""

    def after_train(self) -> None:
        model = self.trainer.model
        distiller = getattr(getattr(model, "module", model), "distiller", None)
        if distiller is not None and comm.is_main_process():
            distiller.report_silent()


@contextmanager
def _ddp_for(device: str) -> Iterator[None]:
    """Let ``DefaultTrainer`` wrap a CPU model: DDP takes device ids for GPU modules only.

    The trainer's constructor offers no other way to pass ``device_ids``.
    """
    if device.startswith("cuda"):
        yield
        return
    on_cpu = partial(create_ddp_model, device_ids=None)
    with mock.patch.object(detectron2.engine.defaults, "create_ddp_model", on_cpu):
        yield


def load_cfg(config_file: str, opts: Sequence[str] = ()) -> CfgNode:
    """Read a config file and overrides, register its data sets, and freeze it.

    Raises:
        KDError: see :func:`kd_det.config.merge_config`.
    """
    cfg = get_cfg()
    merge_config(cfg, config_file, opts)
    register_datasets(cfg)
    cfg.freeze()
    return cfg


def check_run(cfg: CfgNode, args: argparse.Namespace) -> None:
    """Everything that can be refused before processes start and files are written.

    Raises:
        KDError: devices, output folder or teacher do not fit.
    """
    check_devices(cfg.MODEL.DEVICE, args.num_gpus)
    if args.eval_only:
        return
    check_output_dir(cfg.OUTPUT_DIR, args.resume)
    if cfg.KD.ENABLED and cfg.MODEL.META_ARCHITECTURE.startswith("Distilled"):
        find_config(cfg.KD.TEACHER.CONFIG_FILE)


def run(
    cfg: CfgNode,
    resume: bool = False,
    eval_only: bool = False,
    extra_hooks: Sequence[HookBase] = (),
) -> dict[str, Any]:
    """Train (or only evaluate) in this process or process group.

    Args:
        cfg: a frozen config of this host.
        resume: continue from the last checkpoint in ``OUTPUT_DIR``. Detectron2's sampler starts
            its data order anew.
        eval_only: evaluate ``MODEL.WEIGHTS`` (or, with ``resume``, the last checkpoint).
        extra_hooks: further trainer hooks.

    Returns:
        ``{"bbox": {"AP": ...}, "segm": {...}}`` in percent, on the main process.
    """
    test = list(cfg.DATASETS.TEST)
    prepare_datasets(cfg, test if eval_only else [*cfg.DATASETS.TRAIN, *test])
    if eval_only:
        # The teacher plays no part in inference: evaluation needs none.
        plain = cfg.clone()
        plain.defrost()
        plain.KD.ENABLED = False
        model = Trainer.build_model(plain)
        DetectionCheckpointer(model, save_dir=cfg.OUTPUT_DIR).resume_or_load(
            cfg.MODEL.WEIGHTS, resume=resume
        )
        results = Trainer.test(plain, model)
    else:
        trainer = Trainer(cfg, extra_hooks)
        trainer.resume_or_load(resume=resume)
        trainer.train()
        results = getattr(trainer, "_last_eval_results", {})
    if comm.is_main_process():
        verify_results(cfg, results)
    return results


def main(args: argparse.Namespace) -> None:
    """Entry point of :mod:`kd_det.cli`: check, then launch or join the process group."""
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
    on_gpu = cfg.MODEL.DEVICE.startswith("cuda")
    if on_gpu:
        torch.cuda.set_device(local_rank)
    torch.distributed.init_process_group("nccl" if on_gpu else "gloo")
    comm.create_local_process_group(local_size)
    comm.synchronize()
    try:
        _worker(args)
    finally:
        torch.distributed.destroy_process_group()


def _worker(args: argparse.Namespace) -> None:
    cfg = load_cfg(args.config_file, args.opts)
    default_setup(cfg, args)
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="kd_det")
    run(cfg, args.resume, args.eval_only)
