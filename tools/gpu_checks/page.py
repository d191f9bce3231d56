"""The page of the documentation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gpu_checks.losses import TOLERANCES

_TOLERATED = ", ".join(f"{name} {v:g} and {g:g}" for name, (v, g) in TOLERANCES.items())
_ABOUT = f"""\
`python tools/gpu_check.py --page docs/results/gpu.md` checks in five minutes on one GPU what the
tests check on the CPU, and writes this page; its docstring names the packages that it needs.

* **Losses**: value and gradient under autocast against the CPU in float32 on the same rounded
  inputs. Tolerated relative errors of the value and of the gradient (L2 norm): {_TOLERATED}.
* **Identity**: with every weight 0, a run ends in the weights of the stock model's, bit by bit.
* **Training**: in mixed precision (Detectron2 has none on a CPU, and the other hosts need bfloat16
  instructions), a run that is interrupted and resumed ends in the weights of one that is not, bit
  by bit (except that Detectron2 begins its order of images anew where KCD does not decide it);
  the others end in finite weights.
* **Loaders, memory**: batches from two processes, and the peak of tensors on the GPU.

Runs that are compared use PyTorch's deterministic kernels. A comparison is *undecided* where the
reference run does not repeat itself.
"""


def page(report: Mapping[str, Any]) -> str:
    """Markdown of what ``gpu_check.json`` holds."""
    machine, checks = report["machine"], report["checks"]
    versions = ", ".join(f"{k} {machine[k]}" for k in ("torch", "cuda") if k in machine)
    state = f"Run on {machine['date']} on one {machine['device']}"
    if machine["device"] == "CPU":
        state = f"**It has not been run on a GPU yet.** This is a run on a CPU, {machine['date']}"
    counts = ", ".join(f"{v} {k}" for k, v in report["counts"].items())
    spent = f"{report['seconds']:.0f} s of {report['budget']:g}"
    lines = ["# On a GPU", "", f"{state} ({versions}), {spent}: {counts}.", "", _ABOUT.rstrip()]
    if failed := [check for check in checks if check["status"] == "failed"]:
        lines += ["", "## Failures", ""]
        lines += [f"* {check['name']}: `{_last_line(check)}`" for check in failed]
    for part in dict.fromkeys(check["name"].partition(":")[0] for check in checks):
        lines += ["", f"## {part.capitalize()}", ""]
        lines += ["| check | result | s | |", "| --- | --- | ---: | --- |"]
        for check in checks:
            of_part, _, name = check["name"].partition(": ")
            if of_part == part:
                note = _last_line(check).replace("|", "\\|")
                lines.append(f"| {name} | {check['status']} | {check['seconds']:.1f} | {note} |")
    return "\n".join(lines) + "\n"


def _last_line(check: Mapping[str, Any]) -> str:
    return (check["note"].splitlines() or [""])[-1]
