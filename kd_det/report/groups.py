"""The runs that are compared, those of one configuration with several seeds in a group."""

from __future__ import annotations

import glob
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kd_det.core.errors import fail
from kd_det.report.runs import MAIN, Run, describe, read_run
from kd_det.report.stats import Gain, gain, recovered

TEACHER, BASELINE, DISTILLED = "teacher", "baseline", "run"

# Keys that differ between seeds of one configuration.
_OWN_KEYS = ("SEED", "SEEDS", "OUTPUT_DIR")
_SEED_FOLDER = re.compile(r"seed_\d+")
_MOST_FOLDERS = 4  # of a path, in a label
_SEED_ENDING = re.compile(r"[-_.]+(seed|s)?[-_.]*\d+$")


@dataclass(frozen=True)
class Problem:
    """A sentence, and the file, folder or part of the report that it is about."""

    where: str
    what: str


@dataclass
class Group:
    """Runs of one configuration, one per seed, with its name in tables and pictures.

    ``role`` is ``"teacher"``, ``"baseline"`` or ``"run"``.
    """

    role: str
    runs: list[Run]
    label: str = ""

    @property
    def counted(self) -> list[Run]:
        """The finished runs; all of them where none is."""
        return [run for run in self.runs if run.finished] or self.runs

    def values(self, name: str) -> list[float]:
        """A score, of every counted seed that has it."""
        return [run.scores[name] for run in self.counted if name in run.scores]

    @property
    def data(self) -> set[tuple[str, ...]]:
        """Its test data, as in :attr:`kd_det.report.runs.Run.data`."""
        return {run.data for run in self.runs if run.data}

    def config(self) -> dict[str, Any]:
        """The keys that all its seeds share."""
        return _comparable(self.runs[0])


@dataclass
class Study:
    """All groups that are compared, and the damages that were found so far.

    ``groups`` are the distilled runs in the order of the command line, ``baseline`` is the student
    alone; it and the teacher are None where nothing of them could be read.
    """

    groups: list[Group] = field(default_factory=list)
    baseline: Group | None = None
    teacher: Group | None = None
    problems: list[Problem] = field(default_factory=list)

    @property
    def students(self) -> list[Group]:
        """Baseline first."""
        return ([self.baseline] if self.baseline else []) + self.groups

    @property
    def everything(self) -> list[Group]:
        """Baseline, runs, teacher."""
        return self.students + ([self.teacher] if self.teacher else [])

    def on_same_data(self, group: Group) -> bool:
        """Whether a group was evaluated on the baseline's data; True where either is unknown."""
        known = self.baseline.data if self.baseline else set()
        return not known or not group.data or known == group.data

    @property
    def runs(self) -> list[Run]:
        return [run for group in self.everything for run in group.runs]

    @property
    def kinds(self) -> list[str]:
        """Kinds of which there are scores: ``bbox``, ``segm``, ``accuracy``."""
        return [k for k in MAIN if any(g.values(MAIN[k]) for g in self.everything)]

    def gain(self, group: Group, name: str) -> Gain | None:
        """Of a score over the baseline; None for baseline and teacher, and on other data."""
        if self.baseline is None or group.role != DISTILLED or not self.on_same_data(group):
            return None
        return gain(group.values(name), self.baseline.values(name))

    def recovered(self, group: Group, name: str) -> float | None:
        """Share of the teacher-student gap; None for baseline and teacher, and on other data."""
        if self.baseline is None or self.teacher is None or group.role != DISTILLED:
            return None
        if not (self.on_same_data(group) and self.on_same_data(self.teacher)):
            return None
        return recovered(*(g.values(name) for g in (group, self.baseline, self.teacher)))


def collect(runs: Sequence[str], baseline: Sequence[str], teacher: Sequence[str] = ()) -> Study:
    """Read and group the runs of a command line: folders, folders of ``SEEDS``, glob patterns.

    Raises:
        KDError: ``baseline``, ``teacher`` or all of ``runs`` name no folder.
    """
    study = Study()
    named = {TEACHER: teacher, BASELINE: baseline, DISTILLED: runs}
    folders = {role: _expand(names, study.problems) for role, names in named.items()}
    for role, names in named.items():
        if names and not folders[role]:
            fail(
                expected=f"{'RUN' if role == DISTILLED else f'--{role}'} to name a folder",
                received=" ".join(names),
                remedy="give the OUTPUT_DIR of a run that was started",
            )
    # A pattern may match them, too. A baseline may be the teacher of its own student.
    apart = {path.resolve() for role in (TEACHER, BASELINE) for path in folders[role]}
    folders[DISTILLED] = [path for path in folders[DISTILLED] if path.resolve() not in apart]
    groups = {role: _grouped(role, paths, study.problems) for role, paths in folders.items()}
    study.teacher = _single(groups[TEACHER], study.problems)
    study.baseline = _single(groups[BASELINE], study.problems)
    study.groups = groups[DISTILLED]
    _name(study.everything)
    what = "evaluated on other data than the baseline: nothing is computed from the difference"
    other = [group for group in study.everything if not study.on_same_data(group)]
    study.problems += [Problem(group.label, what) for group in other]
    return study


def _expand(named: Sequence[str], problems: list[Problem]) -> list[Path]:
    """The folders of single runs; a name without a folder is a problem."""
    folders: list[Path] = []
    for name in named:
        paths = [Path(name)] if Path(name).is_dir() else []
        if not paths and glob.has_magic(name):
            paths = [path for path in map(Path, sorted(glob.glob(name))) if path.is_dir()]
        if not paths:
            problems.append(Problem(name, "no such folder"))
        for path in paths:
            inside = [p for p in path.glob("seed_*") if p.is_dir()]
            seeds = [p for p in inside if _SEED_FOLDER.fullmatch(p.name)]
            folders += sorted(seeds, key=lambda p: int(p.name.split("_")[1])) or [path]
    return list(dict.fromkeys(folders))


def _comparable(run: Run) -> dict[str, Any]:
    """The config without :data:`_OWN_KEYS`; paths inside the run's own folder are relative."""
    # A stage may start from the weights of the stage before, in the same run folder.
    own = str(run.config.get("OUTPUT_DIR", run.last))
    if run.last != run.folder:
        own = str(Path(own).parent)
    inside = re.compile(rf"{re.escape(own)}(?=/|$)")
    return {
        key: inside.sub("<run>", value) if isinstance(value, str) else value
        for key, value in run.config.items()
        if key not in _OWN_KEYS
    }


def _grouped(role: str, folders: Sequence[Path], problems: list[Problem]) -> list[Group]:
    groups: dict[str, Group] = {}
    for folder in folders:
        try:
            run = read_run(folder)
        # Any exception of one run: the report of the others is still of use.
        except Exception as error:
            problems.append(Problem(str(folder), describe(error)))
            continue
        # A run without a config cannot be compared, and is a group of its own.
        config = json.dumps(_comparable(run), sort_keys=True, default=str)
        key = config if run.config else str(folder)
        groups.setdefault(key, Group(role, [])).runs.append(run)
    return list(groups.values())


def _single(groups: list[Group], problems: list[Problem]) -> Group | None:
    if len(groups) > 1:
        first, *others = groups
        left_out = ", ".join(str(run.folder) for group in others for run in group.runs)
        what = (
            f"names {len(groups)} configurations; that of {first.runs[0].folder} is the "
            f"{first.role}, left out: {left_out}"
        )
        problems.append(Problem(f"--{first.role}", what))
    return groups[0] if groups else None


def _name(groups: Sequence[Group]) -> None:
    """Label each group by as many names of folders as make the labels unique."""
    for group in groups:
        group.label = _common_name(group)
    for depth in range(2, _MOST_FOLDERS + 1):
        labels = Counter(group.label for group in groups)
        for group in groups:
            if labels[group.label] > 1:
                group.label = "/".join(_named_folder(group).parts[-depth:])
    labels = Counter(group.label for group in groups)
    for number, group in enumerate(groups, 1):
        if labels[group.label] > 1:
            group.label = f"{group.label} ({number})"


def _named_folder(group: Group) -> Path:
    """The folder of the first run, or that above the folders of ``SEEDS``."""
    folder = group.runs[0].folder.resolve()
    return folder.parent if _SEED_FOLDER.fullmatch(folder.name) else folder


def _common_name(group: Group) -> str:
    folders = [run.folder.resolve() for run in group.runs]
    if all(_SEED_FOLDER.fullmatch(folder.name) for folder in folders):
        return _named_folder(group).name
    if len(folders) == 1:
        return folders[0].name
    stripped = {_SEED_ENDING.sub("", folder.name) for folder in folders}
    return stripped.pop() if len(stripped) == 1 else folders[0].name
