"""Lightning's ``Trainer`` as a run of any host configures it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar

from kd_det.hosts.base import MakePictures
from kd_det.hosts.lightning.hardware import precision
from kd_det.hosts.lightning.metrics import LOG_PERIOD, DataClock, MetricsWriter
from kd_det.hosts.lightning.pictures import DrawPictures
from kd_det.hosts.lightning.run import Run
from kd_det.run.curves import CurveTag
from kd_det.run.folder import METRICS


def build_trainer(
    run: Run,
    tag: CurveTag,
    callbacks: Sequence[pl.Callback],
    pictures: MakePictures | None,
    saving: Mapping[str, Any],
    **schedule: Any,
) -> pl.Trainer:
    """The trainer of a run; without loggers yet, because they write as they are built.

    ``saving`` is when ``last.ckpt`` is written, as arguments of Lightning's ``ModelCheckpoint``;
    ``schedule`` are the trainer's arguments for lengths, evaluation and data.
    """
    clip = run.cfg.SOLVER.CLIP_GRADIENTS
    clock = DataClock()
    own: list[pl.Callback] = []
    if not run.start.eval_only:
        own = [
            MetricsWriter(run.output / METRICS, tag, clock),
            saver(run, run.checkpoint.name, **saving),
        ]
        if pictures is not None and run.cfg.VIS_PERIOD > 0:
            own.append(DrawPictures(run.cfg, pictures))
    return plain_trainer(
        run,
        [*own, *callbacks],
        **schedule,
        logger=False,
        profiler=clock,
        enable_checkpointing=not run.start.eval_only,
        log_every_n_steps=LOG_PERIOD,
        gradient_clip_val=clip.CLIP_VALUE if clip.ENABLED else None,
        gradient_clip_algorithm=clip.CLIP_TYPE if clip.ENABLED else None,
    )


def plain_trainer(run: Run, callbacks: Sequence[pl.Callback], **arguments: Any) -> pl.Trainer:
    """A trainer on a run's devices in its precision, without a summary or checks beforehand."""
    return pl.Trainer(
        **run.hardware,
        **arguments,
        precision=precision(run.cfg),  # type: ignore[arg-type]
        callbacks=list(callbacks),
        # Without it Lightning adds a bar of its own where there is none.
        enable_progress_bar=any(isinstance(each, ProgressBar) for each in callbacks),
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=str(run.output),
    )


def saver(run: Run, name: str, **saving: Any) -> ModelCheckpoint:
    """Keeps the newest checkpoint as ``name`` in ``OUTPUT_DIR``."""
    stem = Path(name).stem
    return ModelCheckpoint(run.output, filename=stem, enable_version_counter=False, **saving)
