"""Runs read from their folders: finished, interrupted or damaged."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kd_det.core.errors import KDError
from kd_det.run.config import flatten, literal
from kd_det.run.curves import CurveTag
from kd_det.run.folder import CONFIG, DETECTIONS, FINAL, INFERENCE, METRICS, RECORD, RESULTS
from kd_det.run.record import FAILED, RUNNING, read_record
from kd_det.run.yaml_files import load_yaml

#: name -> {iterations done: value}
Curves = dict[str, dict[int, float]]

_TRACES = (CONFIG, RECORD, METRICS, RESULTS, FINAL)
_NAMED_LINES = 5  # of those that cannot be read
# The kinds of scores by the first part of their names, each with the one that stands for it.
MAIN = {"bbox": "bbox/AP", "segm": "segm/AP", "accuracy": "accuracy/top1"}
# Entries of run.json that have parts; git and teacher may be null.
_ENTRIES: dict[str, type | tuple[type, ...]] = {
    "starts": list,
    "command": list,
    "versions": dict,
    "parameters": dict,
    "git": (dict, type(None)),
    "teacher": (dict, type(None)),
}


@dataclass
class Run:
    """One run.

    Attributes:
        folder: its ``OUTPUT_DIR``.
        last: the folder of its last stage; ``folder`` itself without stages.
        config: dotted key to value; empty if it cannot be read.
        record: ``run.json``; empty in runs that wrote none.
        curves: of the last stage, as :func:`read_metrics` reads them.
        earlier: folder names of the stages before, to their curves.
        scores: ``bbox/AP``, ``bbox/AP-<class>``, ``accuracy/top1``, ... in percent.
        sources: ``bbox``, ``segm`` or ``accuracy`` to the file of these scores.
        problems: sentences about its damages.
    """

    folder: Path
    last: Path
    config: dict[str, Any] = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=dict)
    curves: Curves = field(default_factory=dict)
    earlier: dict[str, Curves] = field(default_factory=dict)
    scores: dict[str, float] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @property
    def seed(self) -> int | None:
        """The seed it ran with; None if it was drawn and not recorded."""
        seed = self.record.get("seed", self.config.get("SEED"))
        return seed if isinstance(seed, int) and seed >= 0 else None

    @property
    def iterations(self) -> int:
        """Iterations that its metrics reach."""
        return max((max(points) for points in self.curves.values() if points), default=0)

    @property
    def test_sets(self) -> list[str]:
        """Names of the data it is evaluated on."""
        named = literal(self.config.get("DATASETS.TEST"))
        return [str(name) for name in named] if isinstance(named, (list, tuple)) else []

    @property
    def data(self) -> tuple[str, ...]:
        """The first test set and its files, of which its scores are; empty if unknown."""
        if not self.test_sets:
            return ()
        name = self.test_sets[0]
        files = self.config.get(f"DATASETS.COCO_JSON.{name}")
        paths = files if isinstance(files, (list, tuple)) else []
        return (name, *(str(Path(str(path)).resolve()) for path in paths))

    @property
    def predictions(self) -> Path | None:
        """Saved detections of the first test set.

        Of several sets, Detectron2 alone leaves those of the last; kd_det has a folder for each.
        """
        if len(self.test_sets) > 1:
            return self.file(Path(INFERENCE) / self.test_sets[0] / Path(DETECTIONS).name)
        return self.file(DETECTIONS)

    @property
    def planned(self) -> int:
        """Iterations of the whole run; 0 where its config counts epochs."""
        planned = self.config.get("SOLVER.MAX_ITER")
        return planned if isinstance(planned, int) else 0

    @property
    def finished(self) -> bool:
        """Whether it was trained to its end, or only evaluated."""
        if "total_loss" not in self.curves:
            return bool(self.scores)
        # The weights are there before the last evaluation is; results.json comes after it.
        whole = self.iterations >= self.planned and (not self.test_sets or self.file(RESULTS))
        stopped = self.record.get("status") in (RUNNING, FAILED) and not whole
        return not stopped and (self.folder / FINAL).is_file()

    @property
    def state(self) -> str:
        """``finished``, or how far it came and why it ended."""
        if self.finished:
            return "finished"
        reached = f"{self.iterations} of {self.planned}" if self.planned else str(self.iterations)
        error = f" ({self.record['error']})" if self.record.get("error") else ""
        verb = "failed" if self.record.get("status") == FAILED else "not finished"
        return f"{verb}, {reached} iterations{error}"

    @property
    def terms(self) -> list[str]:
        """Names of its distillation terms that were ever logged, in any stage."""
        named = {key.split(".")[2] for key in self.config if key.startswith("KD.TERMS.")}
        return sorted(named & set(self.curves).union(*self.earlier.values()))

    def tagged(self, stage: str = "") -> Curves:
        """Curves by the names that all hosts share, of one of :attr:`earlier` or the last stage."""
        curves = self.earlier.get(stage, {}) if stage else self.curves
        tag = CurveTag(self.terms)
        return {tag(name): points for name, points in curves.items()}

    def take(self, scores: Mapping[str, float], source: str) -> None:
        """Add scores, or replace them by better ones, with the file that they are from."""
        self.scores |= scores
        self.sources |= dict.fromkeys((name.split("/")[0] for name in scores), source)

    def file(self, name: str | Path) -> Path | None:
        """A file of the last stage or of the run itself."""
        for folder in (self.last, self.folder):
            if (folder / name).is_file():
                return folder / name
        return None


def read_run(folder: Path) -> Run:
    """Read the files that there are; damages of others are among the run's problems.

    Raises:
        KDError: none of the files in the folder is that of a run.
    """
    stages = sorted((p for p in folder.glob("stage_*_*") if p.is_dir()), key=_stage_number)
    last = stages.pop() if stages else folder
    if not any((last / name).exists() for name in _TRACES):
        raise KDError(f"no run: it holds none of {', '.join(_TRACES)}")
    run = Run(folder, last)
    if path := run.file(CONFIG):
        try:
            run.config = {k: v for k, v in flatten(load_yaml(str(path))) if v != {}}
        except KDError as error:
            run.problems.append(f"{CONFIG} cannot be read: {error}")
    else:
        run.problems.append(f"no {CONFIG}: neither its data nor its terms are known")
    if path := run.file(RECORD):
        record = read_record(path.parent) or {}
        run.record = {k: v for k, v in record.items() if isinstance(v, _ENTRIES.get(k, object))}
        if run.record != record or not record:
            run.problems.append(f"{RECORD} cannot be read, or not all of it")
    if path := run.file(METRICS):
        run.curves = _curves(run, path)
    else:
        run.problems.append(f"no {METRICS}: no curves and no times")
    run.earlier = {p.name: _curves(run, p / METRICS) for p in stages if (p / METRICS).is_file()}
    _read_results(run)
    return run


def read_metrics(path: Path) -> tuple[Curves, list[str]]:
    """Every scalar of a file of JSON lines, and sentences about damages of the file.

    Of an iteration that occurs again, after a resume, the later value counts. Lines that cannot be
    read are left out.
    """
    values: dict[str, dict[int, float]] = defaultdict(dict)
    broken = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            done = int(record["iteration"]) + 1
        except (ValueError, TypeError, KeyError, OverflowError):
            broken.append(number)
            continue
        for name, value in record.items():
            if name != "iteration" and isinstance(value, (int, float)) and math.isfinite(value):
                values[name][done] = float(value)
    curves = {name: dict(sorted(points.items())) for name, points in sorted(values.items())}
    if not broken:
        return curves, []
    listed = ", ".join(map(str, broken[:_NAMED_LINES]))
    more = f" and {len(broken) - _NAMED_LINES} more" if len(broken) > _NAMED_LINES else ""
    lines = "lines" if len(broken) > 1 else "line"
    return curves, [f"{path.name}: {lines} {listed}{more} cut or not JSON, skipped"]


def describe(error: Exception) -> str:
    """The message of an error, with its type where that is not :class:`KDError`."""
    return str(error) if isinstance(error, KDError) else f"{type(error).__name__}: {error}"


def percentages(results: Any, test: Sequence[str] = ()) -> dict[str, float]:
    """``{"bbox/AP": ...}`` of a host's results; of several test sets, the first of ``test``.

    NaN, the score of nothing, is left out.
    """
    if isinstance(results, Mapping) and test and test[0] in results:
        results = results[test[0]]
    values = dict(flatten(results)) if isinstance(results, Mapping) else {}
    scores = {k: v for k, v in values.items() if k.split(".")[0] in MAIN}
    numbers = {k: float(v) for k, v in scores.items() if isinstance(v, (int, float))}
    return {k.replace(".", "/", 1): v for k, v in numbers.items() if not math.isnan(v)}


def _read_results(run: Run) -> None:
    if path := run.file(RESULTS):
        try:
            run.take(percentages(json.loads(path.read_bytes()), run.test_sets), RESULTS)
        except ValueError as error:
            run.problems.append(f"{RESULTS} is not JSON ({error})")
    if not run.scores:
        scores = {k: c for k, c in run.curves.items() if k.split("/")[0] in MAIN}
        last = {name: list(points.values())[-1] for name, points in scores.items()}
        run.take(last, f"the last evaluation in {METRICS}")


def _curves(run: Run, path: Path) -> Curves:
    curves, problems = read_metrics(path)
    stage = f"{path.parent.name}/" if path.parent not in (run.last, run.folder) else ""
    run.problems += [f"{stage}{problem}" for problem in problems]
    # Of several test sets the names begin with that of the set; the first counts.
    first = f"{run.test_sets[0]}/" if len(run.test_sets) > 1 else ""
    return {name.removeprefix(first): points for name, points in curves.items()}


def _stage_number(path: Path) -> int:
    number = path.name.split("_")[1]
    return int(number) if number.isdigit() else 0
