"""Runs that consist of several: stages one after the other, and the same run with several seeds.

``STAGES`` lists what differs from stage to stage; each stage is an ordinary run of its host, in a
folder of its own below ``OUTPUT_DIR``, with its own optimiser and schedule. What is finished is
not run again, so a run that was interrupted in its second stage continues there.

.. code-block:: yaml

    STAGES:
      - NAME: flow                          # the folder is stage_1_flow
        TERMS: [flow]                       # default: all of KD.TERMS; []: no distillation
        TASK: False                         # default: True, the task losses are on
        OVERRIDES: {SOLVER.MAX_EPOCH: 30}   # any config key
      - NAME: task
        TERMS: []
        CARRY: [student]                    # from the stage before; the default
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kd_det.core.errors import check_known, fail
from kd_det.run.config import literal, load_yaml
from kd_det.run.folder import CONFIG, FINAL, RESULTS, SEED_RESULTS

CARRIED = ("student", "distiller")
_PLANNED = ("OUTPUT_DIR", "STAGES", "SEEDS", "PREFLIGHT")
_KEYS = ("NAME", "TERMS", "TASK", "CARRY", "OVERRIDES")

Host = Callable[[argparse.Namespace], Any]


@dataclass(frozen=True)
class Stage:
    """One entry of ``STAGES``.

    Attributes:
        name: names its folder.
        terms: the terms that are on; None for all.
        task: whether the task losses are on.
        carry: what is taken over from the stage before.
        overrides: config keys and their values in this stage.
    """

    name: str
    terms: tuple[str, ...] | None = None
    task: bool = True
    carry: tuple[str, ...] = ("student",)
    overrides: Mapping[str, Any] = field(default_factory=dict)

    def options(self, before: Path | None) -> list[str]:
        """``KEY VALUE`` pairs; ``before`` is the folder of the stage before, if there is one."""
        opts: list[str] = []
        if self.terms == ():
            opts += ["KD.ENABLED", "False"]
        elif self.terms is not None:
            opts += ["KD.ACTIVE_TERMS", repr(list(self.terms))]
        if not self.task:
            opts += ["KD.TASK_WEIGHT", "0.0"]
        if before is not None and "student" in self.carry:
            opts += ["MODEL.WEIGHTS", str(before / FINAL)]
        if before is not None and "distiller" in self.carry and self.terms != ():
            opts += ["KD.WEIGHTS", str(before / FINAL)]
        for key, value in self.overrides.items():
            opts += [key, value if isinstance(value, str) else repr(value)]
        return opts


@dataclass(frozen=True)
class Plan:
    """What a command line asks for: one run, or several.

    Attributes:
        output: ``OUTPUT_DIR``.
        stages: empty for a run in one piece.
        seeds: empty for the config's own seed.
        preflight: whether each run is looked at before it starts.
    """

    output: Path
    stages: tuple[Stage, ...] = ()
    seeds: tuple[int, ...] = ()
    preflight: bool = False


def read_plan(config_file: str, opts: Sequence[str] = ()) -> Plan:
    """The stages and seeds of a config file with its overrides.

    Raises:
        KDError: an entry that is no stage or no seed, or names that are used twice.
    """
    content: dict[str, Any] = load_yaml(config_file)
    given = {key: literal(value) for key, value in zip(opts[::2], opts[1::2], strict=False)}
    found = {key: given.get(key, content.get(key)) for key in _PLANNED}
    stages = tuple(_parse_stage(node) for node in _listed("STAGES", found["STAGES"]))
    seeds = tuple(_listed("SEEDS", found["SEEDS"]))
    for seed in seeds:
        if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
            fail(
                expected="SEEDS to list whole numbers from 0",
                received=repr(seed),
                remedy="write for example SEEDS: [1, 2, 3]",
            )
    for what, names in (("STAGES", [s.name for s in stages]), ("SEEDS", list(seeds))):
        if len(set(names)) != len(names):
            fail(
                expected=f"every entry of {what} once",
                received=", ".join(map(str, names)),
                remedy="give each a value of its own",
            )
    output = Path(str(found["OUTPUT_DIR"] or "./output"))
    return Plan(output, stages, seeds, preflight=bool(found["PREFLIGHT"]))


def run_plan(host: Host, args: argparse.Namespace, plan: Plan) -> Any:
    """Run everything a plan asks for, and return what the host returns.

    Args:
        host: the entry point of a host, ``args -> results``.
        args: the command line.
        plan: see :func:`read_plan`.

    Returns:
        The host's results; with several seeds, their mean and standard deviation.
    """
    several = bool(plan.stages or plan.seeds)
    if several and getattr(args, "num_gpus", 1) > 1:
        fail(
            expected="a run with STAGES or SEEDS to start its processes with torchrun",
            received=f"--num-gpus {args.num_gpus}",
            remedy=f"torchrun --standalone --nproc_per_node {args.num_gpus} tools/train_net.py ...",
        )
    if not plan.seeds:
        return _run_stages(host, args, plan.output, plan.stages)
    results = {}
    for seed in plan.seeds:
        output = plan.output / f"seed_{seed}"
        own = _with(args, ["SEEDS", "[]", "SEED", str(seed), "OUTPUT_DIR", str(output)])
        results[seed] = _run_stages(host, own, output, plan.stages)
    summary = summarize(results)
    if summary and not args.eval_only:
        text = {"seeds": {str(s): r for s, r in results.items()}, "summary": summary}
        (plan.output / SEED_RESULTS).write_text(json.dumps(text, indent=2) + "\n")
    return summary


def check_single_run(cfg: Mapping[str, Any]) -> None:
    """Refuse, where one run begins, a config that asks for several.

    Raises:
        KDError: ``STAGES`` or ``SEEDS`` is not empty.
    """
    if cfg["STAGES"] or cfg["SEEDS"]:
        fail(
            expected="the config of a single run",
            received=f"{len(cfg['STAGES'])} STAGES, {len(cfg['SEEDS'])} SEEDS",
            remedy="start it with tools/train_net.py, which makes one run of each",
        )


def summarize(results: Mapping[int, Any]) -> dict[str, dict[str, dict[str, float]]]:
    """``{kind: {metric: {"mean", "std"}}}`` over seeds; the sample standard deviation.

    Processes other than the first may have no results; then there is no summary.
    """
    runs = [run for run in results.values() if run]
    if len(runs) < len(results) or not runs:
        return {}
    summary: dict[str, dict[str, dict[str, float]]] = {}
    for kind, metrics in runs[0].items():
        summary[kind] = {}
        for name in metrics:
            values = [run[kind][name] for run in runs]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            summary[kind][name] = {"mean": statistics.mean(values), "std": spread}
    return summary


def _run_stages(host: Host, args: argparse.Namespace, output: Path, stages: Sequence[Stage]) -> Any:
    if not stages or args.eval_only:
        return _run(host, _with(args, ["STAGES", "[]"]) if stages else args, output)
    results = None
    before: Path | None = None
    for number, stage in enumerate(stages, start=1):
        folder = output / f"stage_{number}_{stage.name}"
        done = (folder / FINAL).is_file()
        last = number == len(stages)
        # The last stage is always handed to the host: with --resume it trains no further, but
        # says again what it reached.
        if last or not (args.resume and done):
            opts = ["STAGES", "[]", "OUTPUT_DIR", str(folder), *stage.options(before)]
            results = _run(host, _with(args, opts), folder)
        before = folder
    assert before is not None
    for name in (FINAL, RESULTS, CONFIG):
        if (before / name).is_file():
            shutil.copyfile(before / name, output / name)
    return results


def _run(host: Host, args: argparse.Namespace, output: Path) -> Any:
    results = host(args)
    # A host that starts processes of its own has no results to return, only those it wrote.
    if results is None and not args.eval_only and (output / RESULTS).is_file():
        results = json.loads((output / RESULTS).read_text())
    return results


def _with(args: argparse.Namespace, opts: Sequence[str]) -> argparse.Namespace:
    return argparse.Namespace(**{**vars(args), "opts": [*args.opts, *opts]})


def _parse_stage(node: Any) -> Stage:
    if not isinstance(node, Mapping) or not isinstance(node.get("NAME"), str):
        fail(
            expected="each entry of STAGES to be a mapping with a NAME",
            received=repr(node),
            remedy="write for example {NAME: hint, TERMS: [hint], TASK: False}",
        )
    for key in node:
        check_known(f"key of stage '{node['NAME']}'", key, _KEYS)
    terms, carry = node.get("TERMS"), _listed("CARRY", node.get("CARRY", ["student"]))
    for part in carry:
        check_known(f"part to CARRY into stage '{node['NAME']}'", part, CARRIED)
    overrides = node.get("OVERRIDES", {})
    task = node.get("TASK", True)
    if not isinstance(task, bool) or not isinstance(overrides, Mapping):
        fail(
            expected=f"TASK of stage '{node['NAME']}' to be True or False, OVERRIDES a mapping",
            received=f"TASK {task!r}, OVERRIDES {overrides!r}",
            remedy="write for example TASK: False and OVERRIDES: {SOLVER.BASE_LR: 0.01}",
        )
    return Stage(
        name=node["NAME"],
        terms=None if terms is None else tuple(_listed("TERMS", terms)),
        task=task,
        carry=tuple(carry),
        overrides=dict(overrides),
    )


def _listed(what: str, value: Any) -> list[Any]:
    if value is None:
        return []
    if not isinstance(value, (list, tuple)):
        fail(expected=f"{what} to be a list", received=repr(value), remedy="put it in brackets")
    return list(value)
