"""Lightning's ``Trainer`` as a run of any host configures it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.logger import Logger

from kd_det.hosts.base import MakePictures
from kd_det.hosts.lightning.hardware import precision
from kd_det.hosts.lightning.loggers import build_loggers
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

    Args:
        run: the run.
        tag: names the curves.
        callbacks: a progress bar and further ones.
        pictures: see :class:`kd_det.hosts.base.RunHost`.
        saving: when ``last.ckpt`` is written, as arguments of Lightning's ``ModelCheckpoint``.
        schedule: Lightning's arguments for lengths, evaluation and data.
    """
    clip = run.cfg.SOLVER.CLIP_GRADIENTS
    clock = DataClock()
    own: list[pl.Callback] = []
    if not run.start.eval_only:
        own = [
            MetricsWriter(run.output / METRICS, tag, clock),
            ModelCheckpoint(
                run.output,
                filename=run.checkpoint.stem,
                enable_version_counter=False,
                **saving,
            ),
        ]
        if pictures is not None and run.cfg.VIS_PERIOD > 0:
            own.append(DrawPictures(run.cfg, pictures))
    return pl.Trainer(
        **run.hardware,
        **schedule,
        precision=precision(run.cfg),  # type: ignore[arg-type]
        logger=False,
        callbacks=[*own, *callbacks],
        profiler=clock,
        enable_checkpointing=not run.start.eval_only,
        # Without it Lightning adds a bar of its own where there is none.
        enable_progress_bar=any(isinstance(each, ProgressBar) for each in callbacks),
        enable_model_summary=False,
        log_every_n_steps=LOG_PERIOD,
        num_sanity_val_steps=0,
        gradient_clip_val=clip.CLIP_VALUE if clip.ENABLED else None,
        gradient_clip_algorithm=clip.CLIP_TYPE if clip.ENABLED else None,
        default_root_dir=str(run.output),
    )


def run_loggers(run: Run) -> list[Logger]:
    """Loggers of CSV and TensorBoard files in ``OUTPUT_DIR``, and those of ``LOGGERS``."""
    return [
        # A version for every start: Lightning's CSV writer begins by removing what is there.
        CSVLogger(run.output, name="csv"),
        TensorBoardLogger(run.output, name="tensorboard", version=""),
        *build_loggers(run.cfg, run.output),
    ]
