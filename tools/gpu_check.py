#!/usr/bin/env python
"""Check on one GPU, in at most five minutes, what the tests check on the CPU.

python tools/gpu_check.py                              # on a GPU where there is one, else the CPU
python tools/gpu_check.py --detectron2 FOLDER          # FOLDER/detectron2, which may be uncompiled
python tools/gpu_check.py --page docs/results/gpu.md   # and write the page of the documentation

The parts, which --only selects by the beginnings of their checks' names:
    losses     every registered loss in float32, bfloat16 and float16: value and gradient against
               the CPU's in float32
    identity   with every weight 0, each model family trains to the weights of the stock model
    training   each host in mixed precision with KCD and with a balance: a run that is interrupted
               and resumed ends in the weights of one that is not; MHGD, UNIX and a booster
    loaders    batches from other processes, pinned where the host pins them
    memory     peak of a plain and of a distilled run, in float32 and in mixed precision

Every failure is listed with the last line of its traceback and none stops the rest: the checks run
in a process of their own, which is started again after a crash, an error of CUDA or a hang. What
does not fit into the budget is listed as not run. --work keeps the runs and the log.

What a bare machine with torch, torchvision, numpy, Pillow, PyYAML and lightning (with torchmetrics,
lightning-utilities and fsspec) may lack, to be put on PYTHONPATH as packages, unpacked wheels or
folders. A check that lacks one is skipped by name.
    all parts         fvcore, with tabulate and tqdm
    all but losses    yacs, iopath, portalocker: config files
                      scikit-learn, scipy, joblib, threadpoolctl, narwhals: the images of digits
                      opencv-python or opencv-python-headless: drawing them, and Detectron2's
                      pycocotools: COCO files; it imports matplotlib
                      rich, markdown-it-py, mdurl, pygments: progress bars
                      tensorboard, protobuf, absl-py, grpcio, markdown, werkzeug: curves
    detectron2        its Python files (detectron2/), cloudpickle, termcolor, packaging,
                      omegaconf, antlr4-python3-runtime, setuptools with pkg_resources (below 82).
                      Its compiled _C serves rotated boxes, deformable convolutions and a faster
                      COCO evaluation: none is used, and nothing fails without it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from gpu_checks.page import page
from gpu_checks.plan import all_checks, work_off
from gpu_checks.runs import Machine
from gpu_checks.supervisor import Supervisor


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 1 if a check failed."""
    args = parse_arguments(argv)
    if args.detectron2:
        sys.path.insert(0, str(args.detectron2.resolve()))
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    with contextlib.ExitStack() as stack:
        work = args.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        work.mkdir(parents=True, exist_ok=True)
        machine = Machine(work.resolve(), args.device)
        if args.child:
            selected = json.loads((work / "selected.json").read_text())
            return work_off(machine, selected, work / "checks.jsonl")
        names = [check.name for check in all_checks(machine)]
        names = [name for name in names if name.startswith(tuple(args.only))]
        # Repeatable matrix products; and compiling would take longer than running.
        os.environ |= {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "TORCHDYNAMO_DISABLE": "1"}
        supervisor = Supervisor(machine.work, names, args.budget, child_command(args, machine))
        checks = supervisor.run()
    states = ("passed", "failed", "undecided", "skipped", "not run")
    report = {
        "machine": describe(args.device),
        "budget": args.budget,
        "seconds": round(time.monotonic() - supervisor.begun, 1),
        "counts": {state: sum(check["status"] == state for check in checks) for state in states},
        "checks": checks,
    }
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(report, indent=1) + "\n")
    if args.page:
        args.page.write_text(page(report))
    counts = ", ".join(f"{number} {state}" for state, number in report["counts"].items())
    print(f"{counts} in {report['seconds']} s: {args.json}")
    return int(report["counts"]["failed"] > 0)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--budget", type=float, default=280.0, help="seconds in all (280)")
    parser.add_argument("--detectron2", type=Path, help="folder that holds detectron2/")
    parser.add_argument("--only", nargs="+", default=[""], metavar="PART", help="of the checks")
    parser.add_argument("--json", type=Path, default=Path("outputs/gpu_check.json"))
    parser.add_argument("--page", type=Path, help="Markdown file to write")
    parser.add_argument("--work", type=Path, help="folder of the runs; temporary by default")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def child_command(args: argparse.Namespace, machine: Machine) -> list[str]:
    command = [sys.executable, str(Path(__file__).resolve()), "--child"]
    command += ["--device", machine.device, "--work", str(machine.work)]
    return command + (["--detectron2", str(args.detectron2)] if args.detectron2 else [])


def describe(device: str) -> dict[str, Any]:
    described = {"date": time.strftime("%Y-%m-%d"), "device": "CPU", "torch": torch.__version__}
    if device != "cpu":
        described |= {"device": torch.cuda.get_device_name(), "cuda": str(torch.version.cuda)}
    return described


if __name__ == "__main__":
    sys.exit(main())
