"""The contents of the sections of a report."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from kd_det.document.blocks import Block, Cell, Figure, Table, Text, Tone, row, table_of
from kd_det.report.classified import answer_blocks, read_answers
from kd_det.report.cost import Measured, deployment_table, open_plain, training_table
from kd_det.report.detected import detection_blocks
from kd_det.report.groups import Group, Problem, Study
from kd_det.report.plots import dots, panels
from kd_det.report.runs import MAIN, Run, describe
from kd_det.report.scores import Truths, read_predictions, truth_of
from kd_det.report.stats import Gain, spread
from kd_det.report.summary import LABELS, Headline, facts, sentences
from kd_det.run.curves import GROUPS
from kd_det.run.folder import DETECTIONS, PREDICTIONS

_KINDS = {"bbox": "Boxes", "segm": "Masks", "accuracy": "Accuracy"}
_METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "top1", "top5", "top1_best")
_MANY_CLASSES = 20
_MARK = " †"
_NAMED = 4
_VALIDATION = tuple(MAIN.values())
_LOOP = ("lr", "time", "data_time", "max_mem")


def summary(study: Study, best: Headline | None, measured: Sequence[Measured]) -> list[Block]:
    """One sentence, the numbers, and every run as a dot."""
    blocks: list[Block] = [*sentences(study, best, measured), facts(study, best, measured)]
    for kind in study.kinds:
        label = LABELS[MAIN[kind]]
        picture = dots(study.everything, MAIN[kind], f"{label} (%)", f"dots_{kind}")
        note = "A dot is a run, a bar the mean of its seeds; the lines are baseline and teacher."
        blocks.append(Figure(f"{label[0].upper()}{label[1:]} of every run", picture, note))
    return blocks


def accuracy(study: Study) -> list[Block]:
    """All scores, and those by class."""
    blocks: list[Block] = []
    for kind in study.kinds:
        blocks.append(_scores_table(study, kind))
        if (by_class := _class_table(study, kind)) is not None:
            blocks.append(by_class)
    return blocks or [Text("No run left any scores.")]


def cost(study: Study, measured: Sequence[Measured]) -> list[Block]:
    """Inference, as far as it was measured, and training."""
    return [*([deployment_table(measured)] if measured else []), training_table(study)]


def curves(study: Study) -> list[Block]:
    """Validation, task losses, terms and the loop; then all of these of each earlier stage."""
    terms = sorted({term for run in study.runs for term in run.terms})
    of_terms = [name for t in terms for name in (f"loss/kd/{t}", *(f"{g}/{t}" for g in GROUPS))]
    tags = sorted({tag for run in study.runs for tag in run.tagged()})
    drawings: list[tuple[str, Sequence[str], str, str]] = [
        ("Validation", _VALIDATION, "", ""),
        ("Task losses", _task_losses(tags), "", ""),
        ("Distillation terms", of_terms, _terms_note(tags, terms), ""),
        ("Loop", _LOOP, "time and data_time in seconds, max_mem in MB.", ""),
    ]
    # By the folder of the stage, stage_<number>_<name>.
    stages = sorted({stage for run in study.runs for stage in run.earlier})
    for stage in stages:
        tags = sorted({tag for run in study.runs for tag in run.tagged(stage)})
        shown = [*_VALIDATION, *_task_losses(tags), *of_terms]
        _, number, title = stage.split("_", 2)
        drawings.append((f"Stage {number}: {title}", shown, _terms_note(tags, terms), stage))
    blocks: list[Block] = []
    for title, names, note, stage in drawings:
        name = f"curves_{stage or title.lower().replace(' ', '_')}"
        smooth = names is not _VALIDATION  # evaluations are few
        text = f"{title} over iterations"
        picture = panels(study.everything, names, name, text, smooth, stage)
        if picture is not None:
            blocks.append(Figure(title, picture, note))
    if not blocks:
        return [Text("No run left any curves.")]
    text = (
        "Over iterations; every seed thin, the mean of a configuration's seeds on top. Long curves "
        "are averaged to 200 points."
    )
    if stages:
        text += " Of runs in stages the last one is shown first, then the earlier ones by name."
    return [Text(text), *blocks]


def examples(study: Study, best: Headline | None, truths: Truths, build: bool) -> list[Block]:
    """Images on which a run, the best one that left predictions, and the baseline differ most.

    ``build`` is whether the host of a classifier may be opened, which alone can find its images.
    Problems with images and predictions are added to the study.
    """
    kind = best.metric.split("/")[0] if best else "bbox"
    source = PREDICTIONS if kind == "accuracy" else DETECTIONS
    pair = _choose(study, best, source)
    if pair is None:
        return [
            Text(
                "No examples: they need usable predictions of a run and of the baseline "
                f"({source}; tools/train_net.py --eval-only writes them)."
            )
        ]
    label, run, baseline = pair
    runs = {"baseline": baseline, label: run}
    if study.teacher and study.on_same_data(study.teacher):
        runs |= zip(["teacher"], _with_predictions(study.teacher, source), strict=False)
    compared = Text(f"{run.folder} beside {baseline.folder}.")
    if kind == "accuracy":
        return [compared, *_of_classifiers(study, run, runs, build)]
    truth = truth_of(run, truths)
    predictions = {
        name: read_predictions(path, truth)
        for name, one in runs.items()
        if (path := one.predictions)
    }
    blocks, problems = detection_blocks(truth, label, predictions)
    study.problems += [Problem(truth.name, what) for what in problems]
    return [compared, *blocks]


def differences(study: Study) -> list[Block]:
    """Between students, and between baseline and teacher."""
    blocks: list[Block] = []
    students = [group for group in study.students if group.runs[0].config]
    if len(students) > 1:
        blocks.append(_difference_table(students, "Between the runs"))
    if study.teacher and study.baseline and study.teacher.runs[0].config:
        pair = [study.baseline, study.teacher]
        blocks.append(_difference_table(pair, "Between baseline and teacher", folded=True))
    return blocks or [Text("No two configs can be compared.")]


def runs(study: Study) -> list[Block]:
    """Seed, state and origin of every run, as far as they are recorded."""
    origins = [_origin(run) for run in study.runs]
    names = origins[0] if origins else {}
    columns = {name: [origin[name] for origin in origins] for name in names}
    return [table_of("Runs", "folder", [str(run.folder) for run in study.runs], columns)]


def problems(study: Study) -> list[Block]:
    """Everything that could not be read, measured or shown; the same problem of many runs once."""
    merged: dict[str, list[str]] = {}
    own = [Problem(str(run.folder), what) for run in study.runs for what in run.problems]
    ends = [Problem(str(r.folder), r.state) for r in study.runs if not r.finished]
    for problem in [*study.problems, *ends, *own]:
        merged.setdefault(problem.what, []).append(problem.where)
    if not merged:
        return [Text("None: everything was found and could be read.")]
    rows = []
    for what, places in merged.items():
        more = f" and {len(places) - _NAMED} more" if len(places) > _NAMED else ""
        rows.append(row(", ".join(places[:_NAMED]) + more, what))
    return [Table("Problems", ["where", "what"], rows)]


def _scores_table(study: Study, kind: str) -> Table:
    """A row per configuration: mean, spread, gain over the baseline and its verdict."""
    names = [f"{kind}/{name}" for name in _METRICS]
    names = [n for n in names if any(group.values(n) for group in study.everything)]
    main = MAIN[kind]
    rows = []
    for group in study.everything:
        gain, share = study.gain(group, main), study.recovered(group, main)
        label = f"{group.label}{_MARK if _marked(group, kind) else ''}"
        scores = [_score(study, group, name) for name in names]
        verdict = Cell(gain.verdict if gain else "", _tone(gain))
        closed = "" if share is None else f"{share:.0%}"
        gap = Cell(closed, "" if gain and gain.counts else "muted")
        rows.append(row(label, str(len(group.values(main))), *scores, verdict, gap))
    note = (
        "Percent, mean ± sample standard deviation over seeds; below it the gain over the "
        "baseline. A gain counts beyond twice the larger of the two deviations."
    )
    if any(_marked(group, kind) for group in study.everything):
        note += (
            f"{_MARK} Not from saved predictions but from results.json or, of unfinished runs, "
            "the last evaluation."
        )
    elif kind != "accuracy":
        note += " By pycocotools from the saved predictions."
    columns = ["model", "seeds", *(n.split("/")[1] for n in names), "verdict", "of the gap"]
    return Table(_KINDS[kind], columns, rows, note)


def _class_table(study: Study, kind: str) -> Table | None:
    """A row per class: the score of every configuration, and its gain over the baseline."""
    prefix = f"{MAIN[kind]}-"
    groups = study.everything
    names = dict.fromkeys(
        name for group in groups for run in group.counted for name in run.scores
        if name.startswith(prefix)
    )  # fmt: skip
    shown = [group for group in groups if any(group.values(name) for name in names)]
    if not shown:
        return None
    return Table(
        f"{_KINDS[kind]} by class ({MAIN[kind].split('/')[1]})",
        ["class", *(group.label for group in shown)],
        [
            row(name.removeprefix(prefix), *(_score(study, group, name, 1) for group in shown))
            for name in names
        ],
        note="Mean over seeds; below it the gain over the baseline, in colour beyond 2 sd. With "
        "many classes, a few exceed that by chance.",
        folded=len(names) > _MANY_CLASSES,
    )


def _difference_table(groups: Sequence[Group], title: str, folded: bool = False) -> Table:
    """The config keys in which configurations differ."""
    configs = [group.config() for group in groups]
    rows = []
    for key in sorted({key for config in configs for key in config}):
        values = [_value(config[key]) if key in config else "–" for config in configs]
        if len(set(values)) > 1:
            rows.append(row(key, *values))
    columns = ["key", *(group.label for group in groups)]
    return Table(title, columns, rows, "" if rows else "None.", folded)


def _score(study: Study, group: Group, name: str, digits: int = 2) -> Cell:
    values, gain = group.values(name), study.gain(group, name)
    # By class a column is narrow: the mean alone.
    text = spread(values) if digits > 1 else spread([statistics.mean(values)] if values else [], 1)
    return Cell(text, note=f"{gain.difference:+.{digits}f}" if gain else "", note_tone=_tone(gain))


def _tone(gain: Gain | None) -> Tone:
    if gain is None or not gain.counts:
        return "muted"
    return "good" if gain.is_better else "bad"


def _marked(group: Group, kind: str) -> bool:
    sources = [run.sources[kind] for run in group.counted if kind in run.sources]
    return any(source not in (DETECTIONS, PREDICTIONS) for source in sources)


def _task_losses(tags: Sequence[str]) -> list[str]:
    return ["loss/total", *(t for t in tags if t.startswith("loss/task/")), "share/task"]


def _terms_note(tags: Sequence[str], terms: Sequence[str]) -> str:
    note = "loss/kd is the summand of the loss"
    if any(tag.startswith("raw/") for tag in tags):
        return f"{note}; raw is its value before its weight, share its share of the gradient."
    return f"{note}. These runs did not log values before the weight (raw)." if terms else note


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_value, value))}]"
    return str(value) if value != "" else "''"


def _origin(run: Run) -> dict[str, str]:
    record = run.record
    starts, versions = record.get("starts", []), record.get("versions", {})
    git, teacher = record.get("git") or {}, record.get("teacher") or {}
    changes = " with changes" if git.get("dirty") else ""
    return {
        "seed": "" if run.seed is None else str(run.seed),
        "state": run.state,
        "scores from": ", ".join(dict.fromkeys(run.sources.values())),
        "versions": ", ".join(f"{k} {versions[k]}" for k in ("kd_det", "torch") if k in versions),
        "commit": f"{str(git['commit'])[:8]}{changes}" if git else "",
        "started": str(starts[0].get("at", "")) if starts and isinstance(starts[0], dict) else "",
        "starts": str(len(starts) or ""),
        "teacher's sha256": str(teacher.get("sha256") or "")[:12],
        "command": " ".join(map(str, record.get("command", []))),
    }


def _choose(study: Study, best: Headline | None, source: str) -> tuple[str, Run, Run] | None:
    """Label and run of a configuration, the best if possible, and the baseline's run beside it."""
    alone = _with_predictions(study.baseline, source) if study.baseline else []
    usable = [group for group in study.groups if study.on_same_data(group)]
    for group in sorted(usable, key=lambda group: best is None or group is not best.group):
        for run in _with_predictions(group, source):
            # The same seed had the same start and the same order of images.
            same = [other for other in alone if other.seed == run.seed]
            if alone:
                return group.label, run, (same or alone)[0]
    return None


def _with_predictions(group: Group, source: str) -> list[Run]:
    """Runs whose predictions were usable."""
    return [run for run in group.counted if source in run.sources.values()]


def _of_classifiers(study: Study, run: Run, runs: Mapping[str, Run], build: bool) -> list[Block]:
    answers = {
        name: read_answers(path) for name, one in runs.items() if (path := one.file(PREDICTIONS))
    }
    if build:
        try:
            bench = open_plain(run)
            names = bench.class_names("student")
            return answer_blocks(answers, names, bench.validation_pictures)
        # Without its data or its host there is still a table.
        except Exception as error:
            what = f"its validation images are not shown: {describe(error)}"
            study.problems.append(Problem(str(run.folder), what))
    return answer_blocks(answers)
