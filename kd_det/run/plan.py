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

import json
import shutil
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kd_det.core.errors import check_known, fail
from kd_det.run.config import literal
from kd_det.run.folder import CONFIG, FINAL, RESULTS, SEED_RESULTS
from kd_det.run.yaml_files import ConfigFile, read_config

CARRIED = ("student", "distiller")
_PLANNED = ("OUTPUT_DIR", "STAGES", "SEEDS", "PREFLIGHT")
_KEYS = ("NAME", "TERMS", "TASK", "CARRY", "OVERRIDES")

Results = dict[str, dict[str, float]]
"""``{kind: {metric: percent}}``."""


@dataclass(frozen=True)
class Start:
    """How a run is started, beside its config."""

    resume: bool = False  # go on from the last checkpoint in OUTPUT_DIR, if there is one
    eval_only: bool = False  # evaluate MODEL.WEIGHTS, or else the weights in OUTPUT_DIR
    num_gpus: int = 1  # processes on this machine where MODEL.DEVICE is cuda
    num_machines: int = 1
    machine_rank: int = 0
    dist_url: str = "auto"  # the address at which the processes of several machines connect


NEW = Start()
"""A new run on one device of this machine."""


@dataclass(frozen=True)
class Stage:
    """One entry of ``STAGES``."""

    name: str
    terms: tuple[str, ...] | None = None  # those that are on; None: all
    task: bool = True  # whether the task losses are on
    carry: tuple[str, ...] = ("student",)  # from the stage before
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


Run = Callable[[Sequence[str]], Results]
"""Carries out one run, from the overrides of its config."""


@dataclass(frozen=True)
class Plan:
    """What a config file with its overrides describes: one run, or several."""

    file: ConfigFile  # the content of every run of the plan
    opts: tuple[str, ...]  # KEY VALUE
    output: Path
    stages: tuple[Stage, ...] = ()  # empty for a run in one piece
    seeds: tuple[int, ...] = ()  # empty for the config's own seed
    preflight: bool = False  # whether each run has one before it starts


def read_plan(config: str | ConfigFile, opts: Sequence[str] = ()) -> Plan:
    """The stages and seeds of a config file with its overrides.

    Raises:
        KDError: see :func:`kd_det.run.yaml_files.read_config`; an entry that is no stage or no
            seed, or names that are used twice.
    """
    file = read_config(config)
    given = {key: literal(value) for key, value in zip(opts[::2], opts[1::2], strict=False)}
    content = {key: given.get(key, file.content.get(key)) for key in _PLANNED}
    stages = tuple(_parse_stage(node) for node in _listed("STAGES", content["STAGES"]))
    seeds = tuple(_listed("SEEDS", content["SEEDS"]))
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
    output = Path(str(content["OUTPUT_DIR"] or "./output"))
    return Plan(file, tuple(opts), output, stages, seeds, preflight=bool(content["PREFLIGHT"]))


def run_plan(run: Run, plan: Plan, start: Start) -> Any:
    """Carry out all runs of a plan.

    Returns:
        The results of the run, or of its last stage; with several seeds see :func:`summarize`.

    Raises:
        KDError: ``start`` has several GPUs and the plan several runs.
    """
    if (plan.stages or plan.seeds) and start.num_gpus > 1:
        fail(
            expected="a run with STAGES or SEEDS to start its processes with torchrun",
            received=f"--num-gpus {start.num_gpus}",
            remedy=f"torchrun --standalone --nproc_per_node {start.num_gpus} tools/train_net.py "
            "...",
        )
    if not plan.seeds:
        return _run_stages(run, plan, start, plan.output, ())
    results = {}
    for seed in plan.seeds:
        output = plan.output / f"seed_{seed}"
        own = ("SEEDS", "[]", "SEED", str(seed), "OUTPUT_DIR", str(output))
        results[seed] = _run_stages(run, plan, start, output, own)
    summary = summarize(results)
    if summary and not start.eval_only:
        text = json.dumps({"seeds": results, "summary": summary}, indent=2)
        (plan.output / SEED_RESULTS).write_text(text + "\n")
    return summary


def check_single_run(cfg: Mapping[str, Any]) -> None:
    """Refuse the config of several runs where one run begins.

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

    def spread(values: Sequence[float]) -> dict[str, float]:
        std = statistics.stdev(values) if len(values) > 1 else 0.0
        return {"mean": statistics.mean(values), "std": std}

    return {
        kind: {name: spread([run[kind][name] for run in runs]) for name in metrics}
        for kind, metrics in runs[0].items()
    }


def _run_stages(
    run: Run, plan: Plan, start: Start, output: Path, own: Sequence[str]
) -> Results | None:
    """Run all stages in folders of ``output``, with the overrides ``own`` after those of the plan.

    The results, the config and the weights of the last stage are copied to ``output``.
    """
    common = [*plan.opts, *own]
    if not plan.stages or start.eval_only:
        return run([*common, *(("STAGES", "[]") if plan.stages else ())])
    results = None
    before: Path | None = None
    for number, stage in enumerate(plan.stages, start=1):
        folder = output / f"stage_{number}_{stage.name}"
        done = start.resume and (folder / FINAL).is_file()
        # The last stage always runs: with --resume it trains no further, but returns its results.
        if not done or number == len(plan.stages):
            opts = ("STAGES", "[]", "OUTPUT_DIR", str(folder), *stage.options(before))
            results = run([*common, *opts])
        before = folder
    assert before is not None
    for name in (FINAL, RESULTS, CONFIG):
        if (before / name).is_file():
            shutil.copyfile(before / name, output / name)
    return results


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
    overrides, task = node.get("OVERRIDES", {}), node.get("TASK", True)
    if not isinstance(task, bool) or not isinstance(overrides, Mapping):
        fail(
            expected=f"TASK of stage '{node['NAME']}' to be True or False, OVERRIDES a mapping",
            received=f"TASK {task!r}, OVERRIDES {overrides!r}",
            remedy="write for example TASK: False and OVERRIDES: {SOLVER.BASE_LR: 0.01}",
        )
    terms = None if terms is None else tuple(_listed("TERMS", terms))
    return Stage(node["NAME"], terms, task, tuple(carry), dict(overrides))


def _listed(what: str, value: Any) -> list[Any]:
    if value is None:
        return []
    if not isinstance(value, (list, tuple)):
        fail(expected=f"{what} to be a list", received=repr(value), remedy="put it in brackets")
    return list(value)
