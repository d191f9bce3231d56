"""The command line of training and evaluation, the same for all hosts."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from kd_det.app.arguments import config_parser
from kd_det.core.errors import KDError
from kd_det.hosts.base import load_config, require_detectron2
from kd_det.run.config import read_host
from kd_det.run.folder import check_output_dir
from kd_det.run.plan import Host, read_plan, run_plan

_DESCRIPTION = "Train or evaluate a distilled detector or classifier."
_EXAMPLE = """\
example:
  %(prog)s --config-file configs/reviewkd_frcnn_r50_r101.yaml --num-gpus 4"""


def argument_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """Detectron2's own flags, with the same meaning on every host."""
    parser = config_parser(_DESCRIPTION, _EXAMPLE, prog)
    parser.add_argument("--resume", action="store_true", help="continue the run in OUTPUT_DIR")
    parser.add_argument("--eval-only", action="store_true", help="evaluate MODEL.WEIGHTS only")
    parser.add_argument("--num-gpus", type=int, default=1, help="GPUs per machine (default 1)")
    parser.add_argument("--num-machines", type=int, default=1, help="number of machines")
    parser.add_argument("--machine-rank", type=int, default=0, help="rank of this machine")
    # Different users of a machine must not meet on one port.
    port = 2**15 + 2**14 + hash(os.getuid() if hasattr(os, "getuid") else 1) % 2**14
    parser.add_argument("--dist-url", default=f"tcp://127.0.0.1:{port}", help="rendezvous URL")
    return parser


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run the host a config names. Returns the exit status: 2 for a mistake in the input."""
    args = argument_parser(prog).parse_args(argv)
    try:
        host = read_host(args.config_file)
        if host == "detectron2":
            require_detectron2()
        entry = importlib.import_module(f"kd_det.hosts.{host}.train").main
        plan = read_plan(args.config_file, args.opts)
        results = run_plan(_preflighted(entry) if plan.preflight else entry, args, plan)
        if plan.seeds and results:
            print(_table(results, len(plan.seeds)))
    except KDError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _preflighted(host: Host) -> Host:
    """The host's entry point; in front of a new run, a preflight on the first process."""

    def entry(args: argparse.Namespace) -> Any:
        # torchrun gives RANK; the processes that Lightning starts have only the other two.
        ranks = (os.environ.get(name, "0") for name in ("RANK", "LOCAL_RANK", "NODE_RANK"))
        first = args.machine_rank == 0 and not any(int(rank) for rank in ranks)
        if first and not (args.eval_only or args.resume):
            cfg = load_config(args.config_file, args.opts)
            check_output_dir(cfg.OUTPUT_DIR, resume=False)
            # Not needed by, and not loaded for, runs without one.
            importlib.import_module("kd_det.preflight").require(cfg)
        return host(args)

    return entry


def _table(summary: Mapping[str, Mapping[str, Mapping[str, float]]], seeds: int) -> str:
    lines = [f"mean and sample standard deviation over {seeds} seeds:"]
    for kind, metrics in summary.items():
        values = (f"{k} {v['mean']:.2f} ± {v['std']:.2f}" for k, v in metrics.items())
        lines.append(f"{kind}: " + ", ".join(values))
    return "\n".join(lines)
