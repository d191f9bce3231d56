"""The command line of training and evaluation, the same for all hosts."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from typing import Any

from fvcore.common.config import CfgNode
from torch import nn

from kd_det.app.arguments import config_parser, reports_mistakes
from kd_det.hosts.base import Pictures, get_host, open_bench, read_host
from kd_det.run.plan import Plan, Results, Start, read_plan, run_plan

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


@reports_mistakes
def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run the host a config names. Returns the exit status: 2 for a mistake in the input."""
    args = vars(argument_parser(prog).parse_args(argv))
    plan = read_plan(args.pop("config_file"), args.pop("opts"))
    results = train(plan, Start(**args))
    if plan.seeds and results:
        print(_table(results, len(plan.seeds)))
    return 0


def train(plan: Plan, start: Start) -> Any:
    """Carry out the runs of a plan on its host; see :func:`kd_det.run.plan.run_plan`."""
    host = get_host(read_host(plan.file))

    def run(opts: Sequence[str]) -> Results:
        cfg = host.load_config(plan.file, opts)
        if plan.preflight and not (start.eval_only or start.resume) and _is_first(start):
            # Imported only where it is wanted: it draws, and counts operations.
            from kd_det.preflight import require

            host.check_run(cfg, start)
            require(cfg)
        return host.run(cfg, start, pictures=make_pictures)

    return run_plan(run, plan, start)


def make_pictures(cfg: CfgNode, model: nn.Module) -> Pictures:
    """The pictures of a run with ``VIS_PERIOD`` above 0."""
    # Imported only where it is wanted, because of the libraries that draw.
    from kd_det.visualize.periodic import PeriodicPictures

    return PeriodicPictures(open_bench(cfg, model=model), cfg.VIS_PERIOD)


def _is_first(start: Start) -> bool:
    """Whether this is the first of the processes that carry out a run together."""
    # torchrun gives RANK; the processes that Lightning starts have only the other two.
    ranks = (os.environ.get(name, "0") for name in ("RANK", "LOCAL_RANK", "NODE_RANK"))
    return start.machine_rank == 0 and not any(int(rank) for rank in ranks)


def _table(summary: Mapping[str, Mapping[str, Mapping[str, float]]], seeds: int) -> str:
    lines = [f"mean and sample standard deviation over {seeds} seeds:"]
    for kind, metrics in summary.items():
        values = (f"{k} {v['mean']:.2f} ± {v['std']:.2f}" for k, v in metrics.items())
        lines.append(f"{kind}: " + ", ".join(values))
    return "\n".join(lines)
