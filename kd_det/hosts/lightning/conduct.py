"""The course of a run on Lightning, from a model to its results."""

from __future__ import annotations

import atexit
import json
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from kd_det.core.distributed import end_process_groups, world_size
from kd_det.core.files import replace_text
from kd_det.hosts.lightning.loggers import build_loggers
from kd_det.hosts.lightning.module import DistillationModule
from kd_det.hosts.lightning.run import Run
from kd_det.run.folder import CONFIG, FINAL, LOG, RESULTS
from kd_det.run.plan import Results
from kd_det.run.record import parameter_counts, recorded_run

logger = logging.getLogger(__name__)


def conduct(
    run: Run,
    lit: DistillationModule,
    trainer: pl.Trainer,
    pre_stage: Callable[[], None],
    save_at_end: bool,
) -> Results:
    """Train and evaluate, or only evaluate; leave everything in ``OUTPUT_DIR``, print the results.

    ``pre_stage`` trains what the losses need beforehand, and is called unless a checkpoint of the
    run itself follows. ``save_at_end`` writes the checkpoint once more after the last iteration,
    where the trainer does so at intervals only.
    """
    if run.start.eval_only:
        trainer.validate(lit, verbose=False)
        results = lit.results
    else:
        with _documented(run, lit, trainer):
            if not run.resumed:
                pre_stage()
            # Random numbers drawn so far must not show in training, and every process needs a
            # stream of its own.
            pl.seed_everything(run.seed + trainer.global_rank, verbose=False)
            trainer.fit(lit, ckpt_path=str(run.checkpoint) if run.resumed else None)
            if save_at_end:
                trainer.save_checkpoint(run.checkpoint)
            if trainer.is_global_zero:
                torch.save({"model": lit.model.state_dict()}, run.output / FINAL)
            if run.cfg.DATASETS.TEST and lit.evaluated_at != trainer.global_step:
                trainer.validate(lit, verbose=False)
            results = lit.final_results()
            if trainer.is_global_zero:
                replace_text(run.output / RESULTS, json.dumps(results, indent=2) + "\n")
    if world_size() > 1:
        # Kept until the end: STAGES and SEEDS are several runs of one process group.
        atexit.register(end_process_groups)
    if trainer.is_global_zero:
        print(*_result_lines(results), sep="\n")
    return results


def _result_lines(results: Results) -> list[str]:
    """``bbox: AP 31.20, AP50 ...``, one line per kind."""
    return [
        f"{kind}: " + ", ".join(f"{k} {v:.2f}" for k, v in metrics.items())
        for kind, metrics in results.items()
    ]


@contextmanager
def _documented(run: Run, lit: DistillationModule, trainer: pl.Trainer) -> Iterator[None]:
    """Config, record, log and loggers around a training; the main process writes them."""
    main_process = trainer.is_global_zero
    if main_process:
        run.output.mkdir(parents=True, exist_ok=True)
        (run.output / CONFIG).write_text(run.cfg.dump())
    run.log.write_to(run.output / LOG if main_process else None)
    counts = parameter_counts(lit.student, lit.distiller, lit.teacher)
    with recorded_run(run.output, run.cfg, run.seed, run.resumed, main_process, parameters=counts):
        beginning = "continued from its checkpoint" if run.resumed else "started"
        logger.info("run %s: %s", beginning, " ".join(sys.argv))
        logger.info("seed %d; parameters: %s", run.seed, counts)
        trainer.loggers = [
            # A version for every start: Lightning's CSV writer begins by removing what is there.
            CSVLogger(run.output, name="csv"),
            TensorBoardLogger(run.output, name="tensorboard", version=""),
            *build_loggers(run.cfg, run.output),
        ]
        try:
            yield
        except BaseException:
            # The traceback is for the file; the caller shows it on the screen.
            logger.info("the run failed", exc_info=True)
            raise
        for line in _result_lines(lit.results):
            logger.info("%s", line)
        logger.info("done")
