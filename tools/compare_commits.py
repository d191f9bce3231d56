#!/usr/bin/env python
"""Train the same short runs with two versions of the code and compare them bit by bit.

python tools/compare_commits.py OLD                      # a commit, against this working tree
python tools/compare_commits.py OLD NEW --jobs 2         # two commits
python tools/compare_commits.py OLD --cases classification/kcd detectron2/kd

One run for each host and procedure, 20 iterations each on a few digits. The configs are written
once, by the old version, as complete files that both versions read. What the old version has
computed is kept in --work and used again.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

ROOT = Path(__file__).resolve().parents[1]

# Of two runs these differ by the clock and the machine.
_TIMES = ("time", "data_time", "rank_data_time", "max_mem", "eta_seconds")
# What procedures report has other names, on more hosts and at other iterations than before.
_OF_PROCEDURES = ("kcd/", "cost/")

_DETECTION = {
    "SOLVER.MAX_ITER": 20,
    "SOLVER.STEPS": (12,),
    "SOLVER.WARMUP_ITERS": 5,
    "SOLVER.IMS_PER_BATCH": 4,
    "SOLVER.CHECKPOINT_PERIOD": 10,
    "KD.PRE_STAGE.MAX_ITER": 6,
    "KD.KCD.PERIOD": 7,
}
_CLASSIFICATION = {
    "SOLVER.MAX_ITER": 20,
    "SOLVER.MAX_EPOCH": 4,
    "SOLVER.EPOCH_STEPS": (2,),
    "SOLVER.IMS_PER_BATCH": 16,
    "DATASETS.TRAIN_PER_CLASS": 8,
    "DATALOADER.NUM_WORKERS": 0,
    "KD.PRE_STAGE.MAX_ITER": 6,
    "KD.KCD.PERIOD": 2,
}


@dataclass(frozen=True)
class Family:
    """The runs of one host.

    Attributes:
        folder: of its digits configs in the old version.
        ending: of the names of distilled students' configs.
        teacher: config of the teacher.
        options: overrides of every run.
        stage: overrides of the first stage of a run in stages.
        procedures: beginnings of config names.
    """

    folder: str
    ending: str
    teacher: str
    options: Mapping[str, Any]
    stage: Mapping[str, Any]
    procedures: tuple[str, ...] = ("baseline", "kd", "reviewkd", "kcd", "mhgd", "fsp")
    endings: Mapping[str, str] = field(default_factory=dict)

    def config(self, procedure: str) -> str:
        """Path of a config in the old version."""
        return f"{self.folder}/{procedure}_{self.endings.get(procedure, self.ending)}.yaml"


_FLOW = {"SOLVER.MAX_ITER": 20, "SOLVER.STEPS": (), "DATASETS.TEST": ()}
FAMILIES = {
    "torchvision_detection": Family(
        "configs/digits_torchvision", "frcnn", "teacher_frcnn.yaml", _DETECTION, _FLOW
    ),
    "detectron2": Family("configs/digits", "frcnn", "teacher_frcnn.yaml", _DETECTION, _FLOW),
    "classification": Family(
        "configs/classification/digits",
        "resnet14_x0.5_resnet20",
        "teacher_resnet20.yaml",
        _CLASSIFICATION,
        {"SOLVER.MAX_EPOCH": 4},
        ("baseline", "kd", "reviewkd", "kcd", "mhgd", "unix", "fsp"),
        {"baseline": "resnet14_x0.5"},
    ),
}
CASES = [f"{host}/{name}" for host, family in FAMILIES.items() for name in family.procedures]

# Runs in the old version: the complete config of a file, with overrides.
_DUMP = """
import json, sys
from pathlib import Path

try:
    from kd_det.cli import load_config
except ImportError:
    from kd_det.hosts.base import load_config

path, target = sys.argv[1:3]
options, stage = map(json.loads, sys.argv[3:])
cfg = load_config(path).clone()
cfg.defrost()
for key, value in options.items():
    *nodes, leaf = key.split(".")
    node = cfg
    for name in nodes:
        node = node[name]
    if leaf in node or nodes[-1] == "COCO_JSON":
        node[leaf] = tuple(value) if isinstance(node.get(leaf), tuple) else value
if cfg.STAGES:
    cfg.STAGES[0]["OVERRIDES"] = stage
Path(target).write_text(cfg.dump())
"""

_DIGITS = """
import sys

try:
    from kd_det.data.digits import DigitsSpec, write_digits
except ImportError:
    from kd_det.data.digits.detection import DigitsSpec, write_digits

write_digits(sys.argv[1], DigitsSpec(train_images=48, val_images=8))
"""


class Version:
    """A version of the code in a folder of its own, and where its runs go."""

    def __init__(self, code: Path, runs: Path) -> None:
        self.code, self.runs = code, runs

    def python(self, *arguments: str, log: Path) -> bool:
        """Run Python with this version; True if it ends well."""
        log.parent.mkdir(parents=True, exist_ok=True)
        environment = os.environ | {"PYTHONPATH": str(self.code), "OMP_NUM_THREADS": "1"}
        with log.open("a") as file:
            done = subprocess.run(
                [sys.executable, *arguments],
                cwd=self.code,
                env=environment,
                stdout=file,
                stderr=file,
                check=False,
            )
        return done.returncode == 0

    def train(self, case: str, config: Path) -> bool:
        """Train a case, unless it is there already."""
        output = self.runs / case
        if (output / "results.json").is_file():
            return True
        arguments = ("--config-file", str(config), "OUTPUT_DIR", str(output))
        log = self.runs / f"{case}.log"
        return self.python("tools/train_net.py", *arguments, log=log)


def main() -> int:
    args = parse_arguments()
    console = Console()
    work: Path = args.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    old = Version(checked_out(args.old, work), work / "runs_old")
    new = Version(
        checked_out(args.new, work) if args.new else ROOT,
        (args.runs or work / "runs_new").resolve(),
    )
    write_configs(old, work, args.cases)
    todo = [(version, case) for case in args.cases for version in (old, new)]
    with ThreadPoolExecutor(args.jobs) as pool:
        futures = {
            pool.submit(version.train, case, work / "configs" / f"{case}.yaml"): (version, case)
            for version, case in todo
        }
        for future in track(as_completed(futures), "runs", len(futures), console=console):
            version, case = futures[future]
            if not future.result():
                console.print(f"{case} failed: see {version.runs / case}.log")
    different = 0
    for case in args.cases:
        problems = differences(old.runs / case, new.runs / case)
        different += bool(problems)
        console.print(f"{case}: {'; '.join(problems) or 'identical'}", highlight=False)
    console.print(f"{len(args.cases) - different} of {len(args.cases)} runs are identical")
    return int(bool(different))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("old", help="commit to compare with")
    parser.add_argument("new", nargs="?", help="commit; this working tree by default")
    parser.add_argument("--work", type=Path, default=Path("outputs/compare_commits"))
    parser.add_argument("--runs", type=Path, help="of the new version (default WORK/runs_new)")
    parser.add_argument("--jobs", type=int, default=2, help="runs at the same time (2)")
    parser.add_argument("--cases", nargs="+", metavar="HOST/PROCEDURE", help=f"of {CASES}")
    args = parser.parse_args()
    known = [case for case in CASES if installed(case)]
    args.cases = [c for c in known if not args.cases or any(c.startswith(x) for x in args.cases)]
    return args


def installed(case: str) -> bool:
    return not case.startswith("detectron2/") or importlib.util.find_spec("detectron2") is not None


def checked_out(commit: str, work: Path) -> Path:
    """The files of a commit in a folder."""
    git = ["git", "-C", str(ROOT)]
    revision = subprocess.run(
        [*git, "rev-parse", "--short=12", f"{commit}^{{commit}}"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    folder = work / revision
    if not folder.is_dir():
        folder.mkdir()
        archive = subprocess.Popen([*git, "archive", revision], stdout=subprocess.PIPE)
        subprocess.run(["tar", "-x", "-C", str(folder)], stdin=archive.stdout, check=True)
    return folder


def write_configs(old: Version, work: Path, cases: list[str]) -> None:
    """Complete configs of all cases, a trained teacher of each host, and the images."""
    digits = work / "digits"
    if not digits.is_dir() and not old.python("-c", _DIGITS, str(digits), log=work / "digits.log"):
        sys.exit(f"the digits could not be written: see {work / 'digits.log'}")
    data: dict[str, Any] = {
        f"DATASETS.COCO_JSON.few_{split}": [
            str(digits / "annotations" / f"digits_{split}.json"),
            str(digits / split),
        ]
        for split in ("train", "val")
    }
    data |= {"DATASETS.TRAIN": ["few_train"], "DATASETS.TEST": ["few_val"]}
    for host in dict.fromkeys(case.partition("/")[0] for case in cases):
        family = FAMILIES[host]
        common = {**family.options, "SEED": 3, **({} if host == "classification" else data)}
        teacher, weights = work / "configs" / host / "teacher.yaml", work / "runs_old" / host
        distilled = {
            **common,
            "KD.TEACHER.CONFIG_FILE": str(teacher),
            "KD.TEACHER.WEIGHTS": str(weights / "teacher" / "model_final.pth"),
        }
        named = {teacher: (f"{family.folder}/{family.teacher}", common)}
        for procedure in family.procedures:
            path = work / "configs" / host / f"{procedure}.yaml"
            named[path] = (family.config(procedure), distilled)
        for path, (source, options) in named.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            arguments = (source, str(path), json.dumps(options), json.dumps(family.stage))
            log = work / "configs.log"
            if not path.is_file() and not old.python("-c", _DUMP, *arguments, log=log):
                sys.exit(f"{source} could not be read: see {log}")
        if not old.train(f"{host}/teacher", teacher):
            sys.exit(f"the teacher could not be trained: see {weights / 'teacher.log'}")


def differences(old: Path, new: Path) -> list[str]:
    """What differs between two finished runs; empty if nothing does."""
    problems = []
    compared = {"metrics.json": metrics, "results.json": results}
    for path in sorted(old.rglob("*")):
        name, other = path.relative_to(old).as_posix(), new / path.relative_to(old)
        if path.name in ("model_final.pth", "pre_stage.pth"):
            if not other.is_file() or not equal(weights(path), weights(other)):
                problems.append(f"{name} differs")
        elif read := compared.get(path.name):
            problems += [f"{name} differs"] if read(path) != read(other) else []
    return problems if (old / "results.json").is_file() else ["the old version did not finish"]


def weights(path: Path) -> dict[str, Any]:
    """A checkpoint without the states of Detectron2's hooks, whose names have changed."""
    content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    content.get("trainer", {}).pop("hooks", None)
    return content


def equal(one: Any, other: Any) -> bool:
    """Tensors bit by bit, whatever else by value."""
    if isinstance(one, torch.Tensor):
        same = isinstance(other, torch.Tensor) and one.dtype == other.dtype
        if not same or one.shape != other.shape:
            return False
        return bool(((one == other) | (one.isnan() & other.isnan())).all())
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(equal(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool(one == other)


def metrics(path: Path) -> list[str]:
    """Lines without what the clock says; as text, in which nan equals nan."""
    if not path.is_file():
        return ["missing"]
    kept = [
        {
            name: value
            for name, value in json.loads(line).items()
            if name not in _TIMES and not name.startswith(_OF_PROCEDURES)
        }
        for line in path.read_text().splitlines()
    ]
    return [json.dumps(line, sort_keys=True) for line in kept if line.keys() != {"iteration"}]


def results(path: Path) -> str:
    """Results without their costs, which metrics hold, as text."""
    if not path.is_file():
        return "missing"
    found = json.loads(path.read_text())
    return json.dumps({k: v for k, v in found.items() if k not in ("kcd", "cost")}, sort_keys=True)


if __name__ == "__main__":
    sys.exit(main())
