"""From a config to PNG files."""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

from fvcore.common.config import CfgNode
from torch import Tensor

from kd_det.bench.workbench import Workbench
from kd_det.core.errors import fail
from kd_det.core.files import writable_folder
from kd_det.hosts.base import load_config, open_bench
from kd_det.run.config import read_terms
from kd_det.run.folder import PICTURES
from kd_det.visualize.draw import draw
from kd_det.visualize.pixels import read_pictures
from kd_det.visualize.watch import Recording, watching

logger = logging.getLogger(__name__)


def visualize(
    config_file: str,
    overrides: Sequence[str] = (),
    *,
    weights: str = "",
    images: Sequence[Path] = (),
    batches: int = 1,
    rows: int = 4,
    output: Path | None = None,
) -> list[Path]:
    """Draw what a config distils, on its first training batches or on given images.

    Args:
        config_file: of any host.
        overrides: of config keys, ``KEY VALUE``.
        weights: the student's; empty takes ``MODEL.WEIGHTS``.
        images: files to draw in place of training batches, as one batch without ground truth.
        batches: how many training batches; with several, each has a folder ``batch_<k>``.
        rows: how many images of each batch.
        output: a new or empty folder; None: ``OUTPUT_DIR/visualize``.

    Returns:
        The files.

    Raises:
        KDError: a config without terms or with none that can be drawn, images that cannot be
            decoded, an output folder that is not empty or not writable, or whatever the host
            refuses.
    """
    for name, number in (("--batches", batches), ("--rows", rows)):
        if number < 1:
            fail(expected=f"{name} of at least 1", received=str(number), remedy="correct it")
    cfg = load_config(config_file, overrides)
    _check_terms(cfg)
    pictures = read_pictures(images)
    folder = _writable(output or Path(cfg.OUTPUT_DIR) / PICTURES)
    bench = open_bench(cfg, weights)
    if bench.distiller is None:
        fail(
            expected="a model that distils",
            received=f"MODEL.META_ARCHITECTURE {cfg.MODEL.META_ARCHITECTURE}",
            remedy="use DistilledRCNN, DistilledRetinaNet or DistilledFCOS",
        )
    if bench.pre_stage:
        logger.warning(
            "the networks of %s are not trained yet: give --weights of a run, or "
            "KD.PRE_STAGE.WEIGHTS",
            ", ".join(bench.pre_stage),
        )
    if pictures:
        return _save(bench, _of_pictures(bench, pictures), folder)
    files = []
    for k, recording in enumerate(_of_batches(bench, batches, rows), 1):
        files += _save(bench, recording, folder if batches == 1 else folder / f"batch_{k}")
    return files


def _of_batches(bench: Workbench, batches: int, rows: int) -> Iterator[Recording]:
    for batch in itertools.islice(bench.batches(), batches):
        with watching(bench, rows) as recordings:
            bench.losses(batch)
        yield recordings[-1]


def _of_pictures(bench: Workbench, pictures: Sequence[Tensor]) -> Recording:
    with watching(bench, len(pictures)) as recordings:
        bench.losses(bench.unannotated(pictures))
    # The classes of the batch are placeholders.
    context = {k: v for k, v in recordings[-1].context.items() if k != "targets"}
    return dataclasses.replace(recordings[-1], context=context)


def _save(bench: Workbench, recording: Recording, folder: Path) -> list[Path]:
    assert bench.distiller is not None
    figures = draw(bench, recording)
    if not figures:
        fail(
            expected="terms that compare something to draw: maps, box_logits, logits, or graphs",
            received=", ".join(f"{t.name} ({t.loss})" for t in bench.distiller.specs),
            remedy="see docs/visualize.md for what has a picture",
        )
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for name, figure in figures.items():
        files.append(folder / f"{name}.png")
        figure.savefig(files[-1])
    return files


def _check_terms(cfg: CfgNode) -> None:
    if not cfg.KD.ENABLED or not read_terms(cfg):
        fail(
            expected="a config that distils: KD.ENABLED True and KD.TERMS",
            received=f"KD.ENABLED {cfg.KD.ENABLED} and {len(cfg.KD.TERMS)} terms",
            remedy="give the config of a distillation",
        )


def _writable(folder: Path) -> Path:
    """The folder, made; nothing that lies there is overwritten."""
    writable_folder(folder)
    if any(folder.iterdir()):
        fail(
            expected="the output folder to be new or empty",
            received=f"'{folder}', which holds files",
            remedy="give another --output, or remove what is there",
        )
    return folder
