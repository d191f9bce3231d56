"""``run.json``: the code, teacher and command behind the weights in a run folder.

Versions, git commit, seed, machine, the teacher's fingerprint, every start of the run and how the
last one ended.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import nn

import kd_det
from kd_det.core.files import replace_text
from kd_det.core.teacher import FrozenTeacher
from kd_det.run.folder import RECORD

logger = logging.getLogger(__name__)

RUNNING, DONE, FAILED = "running", "done", "failed"

_PACKAGES = (
    *("torchvision", "lightning", "torchmetrics", "detectron2"),
    *("fvcore", "timm", "numpy", "pycocotools"),
)
# A later start has entries of its own for these where they differ from those of the first start.
_COMPARED = ("seed", "versions", "git", "machine", "teacher")
_GIT_SECONDS = 10


def begin_record(
    output_dir: str | Path,
    cfg: Mapping[str, Any],
    seed: int,
    resumed: bool,
    teacher_file: str | Path = "",
    **facts: Any,
) -> None:
    """Write ``OUTPUT_DIR/run.json`` with status ``"running"``; on the main process only.

    Args:
        output_dir: the run's folder, which is made if it is missing.
        cfg: the run's config.
        seed: the one in use, also where ``SEED`` is negative.
        resumed: whether the run goes on from a checkpoint. The entries of its first start then
            stay, and ``"changed"`` of this start holds those that differ now.
        teacher_file: the teacher's weights on this machine, if ``KD.TEACHER.WEIGHTS`` is an
            address.
        facts: further entries, such as ``parameters``.
    """
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    now: dict[str, Any] = {
        "name": folder.resolve().name,
        "host": cfg["HOST"],
        "seed": seed,
        "versions": _versions(),
        "git": _git(),
        "command": list(sys.argv),
        "machine": _machine(),
        "teacher": _teacher(cfg, teacher_file),
    }
    before = read_record(folder)
    start: dict[str, Any] = {"at": _now(), "command": now["command"], "resumed": resumed}
    record = now
    if resumed and before is not None:
        changed = {key: now[key] for key in _COMPARED if before.get(key) != now[key]}
        start |= {"changed": changed} if changed else {}
        record = {k: v for k, v in (now | before).items() if k not in ("finished", "error")}
    starts = [*(before or {}).get("starts", []), start]
    _write(folder, record | facts | {"status": RUNNING, "starts": starts})


def finish_record(output_dir: str | Path, status: str, **facts: Any) -> None:
    """Write how a run ended, ``"done"`` or ``"failed"``, into its ``run.json`` if there is one.

    Call it on the main process only. ``facts`` are further entries, such as ``error``.
    """
    folder = Path(output_dir)
    record = read_record(folder)
    if record is not None:
        _write(folder, record | facts | {"status": status, "finished": _now()})


@contextmanager
def recorded_run(
    output_dir: str | Path,
    cfg: Mapping[str, Any],
    seed: int,
    resumed: bool,
    main_process: bool = True,
    **facts: Any,
) -> Iterator[None]:
    """:func:`begin_record` before the block and :func:`finish_record` after it.

    An exception, an interruption included, is recorded as ``"failed"`` with its text under
    ``"error"``, and raised again. Other processes than the main one write nothing.
    """
    if not main_process:
        yield
        return
    begin_record(output_dir, cfg, seed, resumed, **facts)
    try:
        yield
    except BaseException as error:
        # An interruption can arrive as the exit that a training loop made of it.
        why = error.__context__ if isinstance(error, SystemExit) and error.__context__ else error
        finish_record(output_dir, FAILED, error=f"{type(why).__name__}: {why}".strip(": "))
        raise
    finish_record(output_dir, DONE)


def read_record(output_dir: str | Path) -> dict[str, Any] | None:
    """The content of a folder's ``run.json``; None where there is none that can be read."""
    path = Path(output_dir) / RECORD
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        logger.warning("%s cannot be read: %s", path, error)
        return None
    return record if isinstance(record, dict) else None


def parameter_counts(
    student: nn.Module, distiller: nn.Module | None, teacher: FrozenTeacher | None
) -> dict[str, int]:
    """Numbers of parameters: ``student``, ``adaptors`` (all that the losses learn), ``teacher``."""
    parts = {
        "student": student,
        "adaptors": distiller,
        "teacher": teacher.model if teacher is not None else None,
    }
    return {
        name: sum(p.numel() for p in part.parameters()) if part is not None else 0
        for name, part in parts.items()
    }


def _write(folder: Path, record: Mapping[str, Any]) -> None:
    replace_text(folder / RECORD, json.dumps(record, indent=2) + "\n")


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _versions() -> dict[str, str]:
    versions = {
        "kd_det": kd_det.__version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
    }
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            # Used from a source folder, as Detectron2 can be.
            version = getattr(sys.modules.get(name), "__version__", None)
            versions |= {name: str(version)} if version else {}
    if torch.version.cuda:
        versions["cuda"] = torch.version.cuda
    return versions


def _git() -> dict[str, Any] | None:
    """Commit of the code that runs: the package's own repository, or that of the user's script."""
    for folder in (Path(kd_det.__file__).parent, Path.cwd()):
        commit = _ask_git(folder, "rev-parse", "HEAD")
        if commit:
            changes = _ask_git(folder, "status", "--porcelain", "--untracked-files=no")
            return {"commit": commit, "dirty": bool(changes)}
    return None


def _ask_git(folder: Path, *arguments: str) -> str | None:
    command = ["git", *arguments]
    try:
        text = subprocess.check_output(
            command, cwd=folder, stderr=subprocess.DEVNULL, text=True, timeout=_GIT_SECONDS
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return text.strip()


def _machine() -> dict[str, Any]:
    gpus = range(torch.cuda.device_count())
    return {
        "name": platform.node(),
        "system": platform.platform(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(k) for k in gpus],
    }


def _teacher(cfg: Mapping[str, Any], file: str | Path) -> dict[str, Any] | None:
    node = cfg["KD"]["TEACHER"]
    if not (cfg["KD"]["ENABLED"] and node["CONFIG_FILE"]):
        return None
    path = Path(file or node["WEIGHTS"])
    # A name of published weights, or a teacher that is random on purpose, has no file.
    is_file = path.is_file()
    return {
        "config": node["CONFIG_FILE"],
        "weights": node["WEIGHTS"],
        "sha256": sha256(path) if is_file else None,
        "bytes": path.stat().st_size if is_file else None,
    }


def sha256(path: Path) -> str:
    """Fingerprint of a file, as ``sha256sum`` prints it."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
