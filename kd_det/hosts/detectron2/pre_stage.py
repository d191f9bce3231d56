"""The pre-stage of a run on Detectron2: what its losses learn from the frozen teacher beforehand.

Nodes are images for taps of the backbone and RoIs for taps of the box branch. RoIs must be like
those of the later training, because the network keeps their statistics: the teacher's own
proposals, joined by the ground truth and sampled by the teacher's own rule, are.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from detectron2.data import build_detection_train_loader
from detectron2.engine import SimpleTrainer, hooks
from detectron2.utils.env import seed_all_rng
from fvcore.common.checkpoint import Checkpointer
from torch import Tensor, nn

from kd_det.core.class_map import ClassMap
from kd_det.core.distributed import rank
from kd_det.core.errors import fail
from kd_det.core.taps import Tap, TapRecorder
from kd_det.hosts.base import Teacher
from kd_det.hosts.detection.heads import Step
from kd_det.hosts.detectron2.datasets import training_dicts
from kd_det.hosts.detectron2.family import BOXES, FAMILY
from kd_det.hosts.detectron2.meta_arch import reordered
from kd_det.hosts.detectron2.progress import ProgressBar, ShowProgress
from kd_det.hosts.detectron2.trainer import Trainer, data_parallel, unwrap
from kd_det.hosts.detectron2.writers import PERIOD, build_writers
from kd_det.procedures.base import BeforeRun, before_run, on_losses_built
from kd_det.procedures.pre_stage import PreStageModel
from kd_det.run.curves import CurveTag
from kd_det.run.folder import PRE_STAGE, PRE_STAGE_FOLDER


def prepare_run(trainer: Trainer, resume: bool = False, bar: ProgressBar | None = None) -> None:
    """Load or train what the procedures of a run need, before its first iteration.

    The result is ``OUTPUT_DIR/pre_stage.pth``, its curves and checkpoints are in
    ``OUTPUT_DIR/pre_stage``. Call it on every process.

    Args:
        trainer: of the run, with its weights loaded.
        resume: take or continue what is in ``OUTPUT_DIR``.
        bar: shows it on a terminal.
    """
    cfg, student, distiller = trainer.cfg, unwrap(trainer.model), trainer.distiller
    teacher = student.teacher.frozen if distiller is not None else None

    def train(model: PreStageModel, iterations: int) -> None:
        node, taps = cfg.KD.PRE_STAGE, model.taps
        captures = TeacherCaptures(student.teacher, taps, cfg.INPUT.FORMAT, student.class_map)
        alone = _TeacherAlone(model, captures)
        wrapped = data_parallel(alone, cfg.MODEL.DEVICE, broadcast_buffers=False)
        optimizer = model.optimizer(node.BASE_LR, node.MOMENTUM, node.NESTEROV, node.WEIGHT_DECAY)
        loader = build_detection_train_loader(cfg, dataset=training_dicts(cfg))
        loop = SimpleTrainer(wrapped, loader, optimizer)
        folder = str(Path(cfg.OUTPUT_DIR) / PRE_STAGE_FOLDER)
        checkpointer = Checkpointer(wrapped, folder, trainer=loop)
        own: list[hooks.HookBase] = [hooks.IterationTimer()]
        tag = CurveTag(tuple(model.networks))
        if rank() == 0:
            own.append(hooks.PeriodicCheckpointer(checkpointer, cfg.SOLVER.CHECKPOINT_PERIOD))
            writers = build_writers(folder, iterations, tag)
            own.append(hooks.PeriodicWriter(writers, period=PERIOD))
        if bar is not None:
            own.append(ShowProgress(bar, tag, name="Pre-stage"))
        loop.register_hooks(own)
        checkpointer.resume_or_load("", resume=resume)
        done = loop.iter + 1 if resume and checkpointer.has_checkpoint() else 0
        loop.train(done, iterations)

    def iterations(epochs: int) -> int:
        return epochs * len(training_dicts(cfg)) // cfg.SOLVER.IMS_PER_BATCH

    file = Path(cfg.OUTPUT_DIR) / PRE_STAGE
    loaded = on_losses_built(cfg, distiller, teacher)
    if loaded | before_run(BeforeRun(cfg, distiller, teacher, file, resume, train, iterations)):
        # The student's random numbers must not depend on whether it was trained or loaded.
        seed_all_rng(None if cfg.SEED < 0 else cfg.SEED + rank())


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

    Taps that mean nothing without a student are refused. ``input_format`` is the channel order of
    the images in a batch; the class map leads from the teacher's classes to the student's.
    """

    def __init__(
        self,
        teacher: Teacher,
        wanted: Collection[str],
        input_format: str,
        class_map: ClassMap | None = None,
    ) -> None:
        self._frozen, self._class_map = teacher.frozen, class_map
        self._flip = input_format != teacher.cfg.INPUT.FORMAT
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
                step = Step(
                    None,
                    {BOXES: [own.proposal_boxes for own in sampled]},
                    teacher=model,
                    features=values["features"],
                    class_map=self._class_map,
                )
                for head, names in FAMILY.heads_of(self._box_taps):
                    values |= head.teacher_values(step, names)
        return values
