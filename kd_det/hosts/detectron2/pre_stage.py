"""The pre-stage of a run on Detectron2: what its losses learn from the frozen teacher beforehand.

Nodes are images for taps of the backbone and RoIs for taps of the box branch. RoIs must be like
those of the later training, because the network keeps their statistics: the teacher's own
proposals, joined by the ground truth and sampled by the teacher's own rule, are.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import build_detection_train_loader
from detectron2.engine import SimpleTrainer, hooks
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from fvcore.common.checkpoint import Checkpointer
from torch import Tensor, nn

from kd_det.core.class_map import ClassMap
from kd_det.core.errors import fail
from kd_det.core.taps import Tap, TapRecorder
from kd_det.hosts.detection.heads import TeacherStep
from kd_det.hosts.detectron2.datasets import training_dicts
from kd_det.hosts.detectron2.family import FAMILY
from kd_det.hosts.detectron2.heads import BOXES
from kd_det.hosts.detectron2.meta_arch import reordered
from kd_det.hosts.detectron2.progress import ProgressBar, ShowProgress
from kd_det.hosts.detectron2.teacher import Teacher
from kd_det.hosts.detectron2.trainer import Trainer, data_parallel, unwrap
from kd_det.hosts.detectron2.writers import PERIOD, build_writers
from kd_det.procedures.pre_stage import (
    PreStageLosses,
    PreStageModel,
    load_pre_stage,
    pre_stage_losses,
    save_pre_stage,
    teacher_fingerprint,
)
from kd_det.run.curves import CurveTag
from kd_det.run.folder import PRE_STAGE, PRE_STAGE_FOLDER

logger = logging.getLogger(__name__)


def prepare_pre_stage(
    trainer: Trainer, resume: bool = False, bar: ProgressBar | None = None
) -> None:
    """Load or train what the terms of a run need, before its first iteration.

    Does nothing where no term needs a pre-stage or all have theirs, from a checkpoint or from an
    earlier stage of the run. The result is ``OUTPUT_DIR/pre_stage.pth``, its curves and
    checkpoints are in ``OUTPUT_DIR/pre_stage``. Call it on every process.

    Args:
        trainer: of the run, with its weights loaded.
        resume: take or continue what is in ``OUTPUT_DIR``.
        bar: shows it on a terminal.

    Raises:
        KDError: a file of another teacher or other taps, one where none is needed, a finished
            pre-stage in ``OUTPUT_DIR`` without ``resume``, or no iterations to train.
    """
    cfg, student = trainer.cfg, unwrap(trainer.model)
    needed = pre_stage_losses(trainer.distiller) if trainer.distiller is not None else {}
    given, path = cfg.KD.PRE_STAGE.WEIGHTS, Path(cfg.OUTPUT_DIR) / PRE_STAGE
    if given and cfg.KD.ENABLED and not needed:
        fail(
            expected="KD.PRE_STAGE.WEIGHTS only with a term that has a pre-stage, such as MHGD",
            received=f"'{given}' and terms {', '.join(cfg.KD.TERMS)}",
            remedy="leave it empty",
        )
    losses = {name: entry for name, entry in needed.items() if not entry[0].is_ready}
    if not losses:
        return
    if not given and path.is_file() and not resume:
        fail(
            expected="OUTPUT_DIR without a finished pre-stage",
            received=f"'{path}' of another run",
            remedy=f"add --resume to continue that run, set KD.PRE_STAGE.WEIGHTS {path} to "
            "use it elsewhere, or choose another OUTPUT_DIR",
        )
    fingerprint = teacher_fingerprint(student.teacher.frozen)
    if given or path.is_file():
        load_pre_stage(given or path, losses, fingerprint)
    else:
        _train(cfg, losses, student.teacher, student.class_map, resume, bar)
        if comm.is_main_process():
            save_pre_stage(path, losses, fingerprint)
        comm.synchronize()
    # The student's random numbers must not depend on whether the pre-stage was trained or loaded.
    seed_all_rng(None if cfg.SEED < 0 else cfg.SEED + comm.get_rank())


def _train(
    cfg: CfgNode,
    losses: PreStageLosses,
    teacher: Teacher,
    class_map: ClassMap | None,
    resume: bool,
    bar: ProgressBar | None,
) -> None:
    node, batch = cfg.KD.PRE_STAGE, cfg.SOLVER.IMS_PER_BATCH
    images = training_dicts(cfg)
    iterations = node.MAX_ITER or node.EPOCHS * len(images) // batch
    if iterations < 1:
        fail(
            expected="a pre-stage of at least one iteration",
            received=f"KD.PRE_STAGE.EPOCHS {node.EPOCHS}, MAX_ITER {node.MAX_ITER}",
            remedy="use the default 20 epochs, or give a finished one as KD.PRE_STAGE.WEIGHTS",
        )
    wanted = {tap for _, taps in losses.values() for tap in taps}
    model = PreStageModel(losses)
    captures = TeacherCaptures(teacher, wanted, cfg.INPUT.FORMAT, class_map)
    alone = _TeacherAlone(model, captures)
    wrapped = data_parallel(alone, cfg.MODEL.DEVICE, broadcast_buffers=False)
    optimizer = model.optimizer(node.BASE_LR, node.MOMENTUM, node.NESTEROV, node.WEIGHT_DECAY)
    loader = build_detection_train_loader(cfg, dataset=images)
    trainer = SimpleTrainer(wrapped, loader, optimizer)
    folder = Path(cfg.OUTPUT_DIR) / PRE_STAGE_FOLDER
    checkpointer = Checkpointer(wrapped, str(folder), trainer=trainer)
    own: list[hooks.HookBase] = [hooks.IterationTimer()]
    tag = CurveTag(tuple(losses))
    if comm.is_main_process():
        own.append(hooks.PeriodicCheckpointer(checkpointer, cfg.SOLVER.CHECKPOINT_PERIOD))
        writers = build_writers(str(folder), iterations, tag)
        own.append(hooks.PeriodicWriter(writers, period=PERIOD))
    if bar is not None:
        own.append(ShowProgress(bar, tag, name="Pre-stage"))
    trainer.register_hooks(own)
    checkpointer.resume_or_load("", resume=resume)
    done = trainer.iter + 1 if resume and checkpointer.has_checkpoint() else 0
    logger.info("pre-stage: %d iterations on the teacher alone", iterations)
    trainer.train(done, iterations)
    model.finish()


class _TeacherAlone(nn.Module):
    """What the trainer trains: a batch of Detectron2 to the losses of the pre-stage."""

    def __init__(self, model: PreStageModel, captures: TeacherCaptures) -> None:
        super().__init__()
        self.model = model
        self._captures = captures

    def forward(self, batched_inputs: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        return self.model(self._captures(batched_inputs))


class TeacherCaptures:
    """Batch to teacher tensors by tap name: the stock teacher, recorded, without a student.

    Args:
        teacher: the frozen teacher.
        wanted: names of taps.
        input_format: channel order of the images in a batch.
        class_map: from the teacher's classes to the student's, where they differ.

    Raises:
        KDError: a tap that means nothing without a student.
    """

    def __init__(
        self,
        teacher: Teacher,
        wanted: Collection[str],
        input_format: str,
        class_map: ClassMap | None = None,
    ) -> None:
        self._frozen, self._class_map = teacher.frozen, class_map
        self._flip = input_format != teacher.input_format
        known = FAMILY.features(teacher.frozen.model, wanted).taps
        taps = {name: tap for name, tap in known.items() if name in wanted}
        of_boxes = FAMILY.with_rows("RoIs")
        self._box_taps = set(wanted).intersection(of_boxes)
        if unknown := set(wanted) - taps.keys() - self._box_taps:
            fail(
                expected="a pre-stage on maps of the backbone, or on " + ", ".join(of_boxes),
                received=", ".join(sorted(unknown)),
                remedy="tap one of these",
            )
        if self._box_taps:
            taps["features"] = Tap("roi_heads", at="input", select=1)
            taps["proposals"] = Tap("roi_heads", at="input", select=2)
        self._recorder = TapRecorder(teacher.frozen, taps)

    def __call__(self, batched_inputs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Teacher tensors by tap name, from mapped images with their ground truth."""
        inputs = reordered(batched_inputs, self._flip)
        model: Any
        with self._frozen.inference() as model:
            with self._recorder.recording():
                if self._box_taps:
                    model.inference(inputs, do_postprocess=False)
                else:
                    model.backbone(model.preprocess_image(inputs).tensor)
            values = self._recorder.read()
            self._recorder.release()
            if self._box_taps:
                truth = [x["instances"].to(model.device) for x in batched_inputs]
                sampled = model.roi_heads.label_and_sample_proposals(values["proposals"], truth)
                step = TeacherStep(
                    None,
                    {BOXES: [own.proposal_boxes for own in sampled]},
                    teacher=model,
                    features=values["features"],
                    class_map=self._class_map,
                )
                for head, names in FAMILY.heads_of(self._box_taps):
                    values |= head.teacher_values(step, names)
        return values
