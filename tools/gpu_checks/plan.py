"""The list of checks, and the process that works it off."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from gpu_checks import runs
from gpu_checks.configs import FAMILIES
from gpu_checks.losses import check_loss
from kd_det import LOSSES

PACKAGES = {
    "torchvision_detection": ("lightning", "torchvision", "pycocotools", "sklearn", "cv2", "rich"),
    "detectron2": ("detectron2", "torchvision", "pycocotools", "sklearn", "cv2", "rich"),
    "classification": ("lightning", "torchvision", "sklearn", "rich"),
}


@dataclass(frozen=True)
class Check:
    """One line of the page.

    Attributes:
        name: ``"<part>: <what>"``.
        run: raises, or returns what is worth a note; one that begins with ``"undecided"`` is
            no success.
        needs: packages, and ``"CUDA"``.
    """

    name: str
    run: Callable[[], str]
    needs: tuple[str, ...] = ()

    def missing(self, device: str) -> list[str]:
        """What it needs and this machine lacks."""
        packages = [name for name in self.needs if name != "CUDA"]
        absent = [name for name in packages if importlib.util.find_spec(name) is None]
        return [*absent, *(["CUDA"] if "CUDA" in self.needs and device == "cpu" else [])]


def all_checks(machine: runs.Machine) -> list[Check]:
    """Every check in the order it runs."""
    checks = []

    def add(name: str, check: Callable[..., str], *arguments: str, cuda: bool = False) -> None:
        needs = (*PACKAGES[arguments[0]], *(["CUDA"] if cuda else []))
        checks.append(Check(name, functools.partial(check, machine, *arguments), needs))

    for name in sorted(known for known, _ in LOSSES):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            run = functools.partial(check_loss, name, dtype, machine.device)
            checks.append(Check(f"losses: {name} {str(dtype)[6:]}", run))
    for host, families in FAMILIES.items():
        for family in families:
            add(f"identity: {host} {family}", runs.check_identity, host, family)
    for host in FAMILIES:
        for name in ("KCD", "balance"):
            add(f"training: {host} {name}, resumed", runs.check_resumed, host, name)
        for name in ("MHGD", *(("UNIX", "booster") if host == "classification" else ())):
            add(f"training: {host} {name}", runs.check_run, host, name)
    for host in FAMILIES:
        add(f"loaders: {host}", runs.check_loaders, host, cuda=True)
        add(f"memory: {host}", runs.check_memory, host, cuda=True)
    return checks


def work_off(machine: runs.Machine, selected: list[str], results: Path) -> int:
    """Run checks by name; a JSON line as each begins and another as it ends.

    Returns:
        0, or 3 after an error of CUDA, after which nothing works in this process.
    """
    with contextlib.ExitStack() as stack:
        log = stack.enter_context(machine.log.open("a", buffering=1))
        lines = stack.enter_context(results.open("a", buffering=1))
        stack.enter_context(contextlib.redirect_stdout(log))
        stack.enter_context(contextlib.redirect_stderr(log))
        for check in all_checks(machine):
            if check.name not in selected:
                continue
            lines.write(json.dumps({"name": check.name}) + "\n")
            log.write(f"\n===== {check.name}\n")
            begun, status, error_of_cuda = time.monotonic(), "passed", False
            try:
                if absent := check.missing(machine.device):
                    status, note = "skipped", f"needs {', '.join(absent)}"
                else:
                    note = check.run()
                    status = "undecided" if note.startswith("undecided") else "passed"
            except Exception as error:  # whatever it is, the next check runs
                log.write(traceback.format_exc())
                status, note = "failed", traceback.format_exception_only(error)[-1].strip()
                error_of_cuda = "CUDA error" in note
            seconds = round(time.monotonic() - begun, 2)
            line = {"name": check.name, "status": status, "note": note, "seconds": seconds}
            lines.write(json.dumps(line) + "\n")
            if error_of_cuda:
                return 3
    return 0
