"""From a config to PNG files."""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor

from kd_det.bench.workbench import Workbench
from kd_det.core.errors import check_at_least, fail
from kd_det.core.files import writable_folder
from kd_det.hosts.base import load_config, open_bench
from kd_det.run.config import read_terms
from kd_det.run.folder import PICTURES
from kd_det.visualize.draw import draw
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
        overrides: ``KEY VALUE`` of config keys.
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
    check_at_least("--batches", batches, 1)
    check_at_least("--rows", rows, 1)
    cfg = load_config(config_file, overrides)
    if not cfg.KD.ENABLED or not read_terms(cfg):
        fail(
            expected="a config that distils: KD.ENABLED True and KD.TERMS",
            received=f"KD.ENABLED {cfg.KD.ENABLED} and {len(cfg.KD.TERMS)} terms",
            remedy="give the config of a distillation",
        )
    pictures = [read_picture(path) for path in images]
    folder = writable_folder(output or Path(cfg.OUTPUT_DIR) / PICTURES)
    if any(folder.iterdir()):
        fail(
            expected="the output folder to be new or empty",
            received=f"'{folder}', which holds files",
            remedy="give another --output, or remove what is there",
        )
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


def read_picture(path: Path) -> Tensor:
    """An image file as uint8 RGB ``[3, H, W]``.

    Raises:
        KDError: the file is missing or cannot be decoded.
    """
    try:
        with Image.open(path) as file:
            return pil_to_tensor(ImageOps.exif_transpose(file).convert("RGB"))
    # Broken files make Pillow raise anything: TypeError and struct.error of a damaged EXIF, too.
    except Exception as error:
        fail(
            expected="image files that Pillow can decode",
            received=f"'{path}' ({' '.join(str(error).split())})",
            remedy="correct the path, or convert the file to PNG or JPEG",
        )
