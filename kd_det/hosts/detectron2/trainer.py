"""Detectron2's default trainer with what distillation adds to it."""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.engine import (
    AMPTrainer,
    DefaultTrainer,
    SimpleTrainer,
    TrainerBase,
    create_ddp_model,
)
from detectron2.engine.hooks import HookBase
from detectron2.evaluation import COCOEvaluator, DatasetEvaluator
from detectron2.utils import comm
from detectron2.utils.events import EventWriter
from detectron2.utils.logger import setup_logger

from kd_det.core.checkpoint import load_distiller
from kd_det.core.distiller import Distiller
from kd_det.core.errors import fail
from kd_det.hosts.base import MakePictures
from kd_det.hosts.detectron2.pictures import DrawPictures
from kd_det.hosts.detectron2.procedures import ProcedureHook, TrainingData, with_new_names
from kd_det.hosts.detectron2.progress import ProgressBar, ShowProgress
from kd_det.hosts.detectron2.writers import RecordMetrics, build_writers
from kd_det.hosts.lightning.loggers import build_loggers
from kd_det.run.curves import CurveTag
from kd_det.run.folder import INFERENCE


class Trainer(DefaultTrainer):
    """``DefaultTrainer`` with the COCO evaluator, procedures, and data-parallel on CPU too.

    Args:
        cfg: a frozen config of this host.
        extra_hooks: further hooks, after all others.
        bar: shows the run on a terminal.
        pictures: see :class:`kd_det.hosts.base.RunHost`.
    """

    def __init__(
        self,
        cfg: CfgNode,
        extra_hooks: Sequence[HookBase] = (),
        bar: ProgressBar | None = None,
        pictures: MakePictures | None = None,
    ) -> None:
        # Not the constructor of DefaultTrainer: its DDP is for models on a GPU only. The parts are
        # the same, in the same order, which decides the random numbers of their parameters.
        TrainerBase.__init__(self)
        if not logging.getLogger("detectron2").isEnabledFor(logging.INFO):
            setup_logger()
        self._bar, self._pictures = bar, pictures
        # Before the plan of the procedures, which counts batches.
        data = TrainingData(self.auto_scale_workers(cfg, comm.get_world_size()))
        cfg = data.cfg
        self._procedure_hooks: list[ProcedureHook] = []
        if data.procedures:
            self._procedure_hooks = [ProcedureHook(data)]
            self.build_train_loader = data.build_loader  # type: ignore[method-assign]
        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        loader = self.build_train_loader(cfg)
        model = data_parallel(model, cfg.MODEL.DEVICE, broadcast_buffers=False)
        trainer = AMPTrainer if cfg.SOLVER.AMP.ENABLED else SimpleTrainer
        self._trainer = trainer(model, loader, optimizer)
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = DetectionCheckpointer(
            model, cfg.OUTPUT_DIR, trainer=weakref.proxy(self)
        )
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.cfg = cfg
        self.register_hooks([*self.build_hooks(), _ReportSilentTerms(), *extra_hooks])

    @property
    def distiller(self) -> Distiller | None:
        """The losses of the run; None for a plain student."""
        return getattr(unwrap(self.model), "distiller", None)

    def build_hooks(self) -> list[HookBase]:
        """The stock hooks, which save, evaluate and write, and before them those that they need."""
        cfg = self.cfg
        own: list[HookBase] = list(self._procedure_hooks)
        own.append(RecordMetrics(self.distiller, torch.device(cfg.MODEL.DEVICE)))
        if self._pictures is not None and cfg.VIS_PERIOD > 0 and self.distiller is not None:
            own.append(DrawPictures(cfg, self._pictures))
        if self._bar is not None:
            evaluated = cfg.TEST.EVAL_PERIOD if cfg.DATASETS.TEST else None
            own.append(ShowProgress(self._bar, self._tag, evaluated))
        return [*own, *super().build_hooks()]

    def build_writers(self) -> list[EventWriter]:
        """See :func:`kd_det.hosts.detectron2.writers.build_writers`."""
        output = self.cfg.OUTPUT_DIR
        return build_writers(output, self.max_iter, self._tag, build_loggers(self.cfg, output))

    @property
    def _tag(self) -> CurveTag:
        return CurveTag(tuple(self.distiller.terms) if self.distiller is not None else ())

    def resume_or_load(self, resume: bool = True) -> None:
        """As usual, except that ``MODEL.WEIGHTS`` start the student only.

        The adaptors of the losses start from ``KD.WEIGHTS``, or anew.
        """
        started = resume and self.checkpointer.has_checkpoint()
        distiller = None if started else self.distiller
        with student_start(distiller, self.cfg):
            super().resume_or_load(resume)

    def costs(self) -> dict[str, float]:
        """Of a finished run; see :meth:`kd_det.procedures.base.Procedures.costs`."""
        return self._procedure_hooks[0].costs if self._procedure_hooks else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As usual, also for checkpoints of former versions."""
        super().load_state_dict(with_new_names(state_dict))

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

        Predictions go to ``inference``; of several test sets to ``inference/<name>``, where the
        next one does not overwrite them.

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
        several = [dataset_name] if len(cfg.DATASETS.TEST) > 1 else []
        folder = output_folder or os.path.join(cfg.OUTPUT_DIR, INFERENCE, *several)
        return COCOEvaluator(dataset_name, output_dir=folder)


@contextmanager
def student_start(distiller: Distiller | None, cfg: CfgNode) -> Iterator[None]:
    """Weights loaded inside start the student only; losses start from ``KD.WEIGHTS``, or anew."""
    own = {k: v.clone() for k, v in distiller.state_dict().items()} if distiller else {}
    yield
    if distiller is not None:
        distiller.load_state_dict(own)
        if cfg.KD.WEIGHTS:
            load_distiller(distiller, cfg.KD.WEIGHTS)


def unwrap(model: torch.nn.Module) -> Any:
    """The module inside DDP, or the module itself."""
    return getattr(model, "module", model)


def data_parallel(model: torch.nn.Module, device: str, **arguments: Any) -> torch.nn.Module:
    """Detectron2's DDP for GPU or CPU: it takes device ids for GPU modules only."""
    if not device.startswith("cuda"):
        arguments["device_ids"] = None
    return create_ddp_model(model, **arguments)


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
        if self.trainer.distiller is not None and comm.is_main_process():
            self.trainer.distiller.report_silent()
