"""Which folders are runs, which runs are seeds of one configuration, and what is left of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from kd_det.core.errors import KDError
from kd_det.report.groups import collect
from kd_det.report.runs import percentages, read_run
from tests.report.made_up import config, metric_lines, write_run

TRUTH = Path("/nowhere/truth.json")
RESULTS = {"bbox": {"AP": 30.0}}


def run(folder, seed=1, results=RESULTS, **keys):
    lines = metric_lines(seed)
    return write_run(folder, config(TRUTH, SEED=seed, **keys), results=results, lines=lines)


@pytest.fixture
def baseline(tmp_path):
    return str(run(tmp_path / "baseline"))


def labels(study):
    return {group.label: [r.folder.name for r in group.runs] for group in study.groups}


def test_runs_that_differ_in_their_seed_alone_are_one_configuration(tmp_path, baseline):
    names = [
        str(run(tmp_path / f"kd_seed{seed}", seed, KD__TASK_WEIGHT=0.5)) for seed in (1, 2, 10)
    ]
    names.append(str(run(tmp_path / "kd_long", 1, KD__TASK_WEIGHT=0.5, SOLVER__MAX_ITER=40)))
    study = collect(names, [baseline])
    assert labels(study) == {
        "kd": ["kd_seed1", "kd_seed2", "kd_seed10"],
        "kd_long": ["kd_long"],
    }
    assert [r.seed for r in study.groups[0].runs] == [1, 2, 10]
    assert study.groups[0].values("bbox/AP") == [30.0] * 3


def test_a_folder_of_seeds_and_a_pattern_are_their_runs(tmp_path, baseline):
    for seed in (10, 9):
        run(tmp_path / "many" / f"seed_{seed}", seed, KD__TASK_WEIGHT=0.5)
    run(tmp_path / "other_1", KD__TASK_WEIGHT=0.6)
    (tmp_path / "other_file").touch()
    study = collect([str(tmp_path / "many"), str(tmp_path / "other_*")], [baseline])
    assert labels(study) == {"many": ["seed_9", "seed_10"], "other_1": ["other_1"]}
    assert study.problems == []


def test_a_run_that_is_named_twice_counts_once(tmp_path, baseline):
    name = str(run(tmp_path / "kd", KD__TASK_WEIGHT=0.5))
    study = collect([name, f"{name}/", baseline], [baseline], [name])
    assert labels(study) == {}
    assert study.teacher.label == "kd"
    assert study.baseline.label == "baseline"


def test_a_run_of_stages_counts_with_its_last(tmp_path, baseline):
    for seed in (1, 2):
        top = tmp_path / f"fsp_seed{seed}"
        start = f"{top}/stage_1_flow/model_final.pth"
        # Numbers, not letters, order them.
        for name in ("stage_2_flow", "stage_10_task"):
            run(top / name, seed, MODEL__WEIGHTS=start, SOLVER__STAGE=name)
        (top / "results.json").write_text(json.dumps({"bbox": {"AP": 41.0}}))
        (top / "model_final.pth").write_bytes(b"")
    study = collect([str(tmp_path / "fsp_seed*")], [baseline])
    (group,) = study.groups
    assert [r.last.name for r in group.runs] == ["stage_10_task"] * 2
    assert group.config()["SOLVER.STAGE"] == "stage_10_task"
    assert group.config()["MODEL.WEIGHTS"] == "<run>/stage_1_flow/model_final.pth"


@pytest.mark.parametrize(
    ("named", "what"),
    [
        ({"runs": ["nowhere"]}, "RUN to name a folder"),
        ({"baseline": ["nowhere*"]}, "--baseline to name a folder"),
        ({"teacher": ["nowhere"]}, "--teacher to name a folder"),
    ],
)
def test_an_argument_that_names_no_folder_is_refused(baseline, refuses, named, what):
    with refuses(what, "nowhere"):
        collect(**{"runs": [baseline], "baseline": [baseline], "teacher": [baseline], **named})


def test_one_of_several_runs_that_is_not_there_is_a_problem(tmp_path, baseline):
    study = collect([str(run(tmp_path / "kd", KD__X=1)), "nowhere"], [baseline])
    assert [group.label for group in study.groups] == ["kd"]
    assert [(p.where, p.what) for p in study.problems] == [("nowhere", "no such folder")]


def test_a_baseline_of_two_configurations_is_the_first_of_them(tmp_path, baseline):
    other = str(run(tmp_path / "other", KD__X=1))
    study = collect([str(run(tmp_path / "kd", KD__X=2))], [baseline, other])
    assert [r.folder.name for r in study.baseline.runs] == ["baseline"]
    (problem,) = study.problems
    assert problem.where == "--baseline"
    assert "left out" in problem.what
    assert other in problem.what


def test_configurations_of_one_name_are_told_apart(tmp_path, baseline):
    names = [str(run(tmp_path / part / "kd", KD__X=part)) for part in ("a", "b")]
    assert list(labels(collect(names, [baseline]))) == ["a/kd", "b/kd"]


def test_folders_of_seeds_of_one_name_are_told_apart(tmp_path, baseline):
    for rate in ("0.01", "0.02"):
        for seed in (1, 2):
            run(tmp_path / rate / "kd" / f"seed_{seed}", seed, KD__X=rate)
    study = collect([str(tmp_path / rate / "kd") for rate in ("0.01", "0.02")], [baseline])
    assert list(labels(study)) == ["0.01/kd", "0.02/kd"]


def test_a_path_that_only_begins_like_the_runs_own_folder_is_another(tmp_path, baseline):
    names = []
    for folder in ("frcnn", "frcnn_seed2", "frcnn_seed3"):
        keys = {
            "KD__TEACHER__WEIGHTS": str(tmp_path / "frcnn_teacher" / "model_final.pth"),
            "KD__WEIGHTS": str(tmp_path / folder / "pre.pth"),
        }
        names.append(str(run(tmp_path / folder, len(names), **keys)))
    (group,) = collect(names, [baseline]).groups
    assert len(group.runs) == 3


def test_a_baseline_may_be_the_teacher_and_is_still_whole(tmp_path):
    names = [str(run(tmp_path / f"base_{seed}", seed)) for seed in (1, 2)]
    runs = [str(run(tmp_path / "kd", KD__X=1)), *names]
    study = collect(runs, names, names[:1])
    assert [len(study.baseline.runs), len(study.teacher.runs), len(study.groups)] == [2, 1, 1]
    assert study.problems == []


def test_runs_on_other_data_are_not_compared(tmp_path, baseline):
    teacher = str(run(tmp_path / "t", DATASETS__COCO_JSON={"made_up": ["/other.json", "/images"]}))
    other = str(run(tmp_path / "o", KD__X=1, DATASETS__TEST=["another"]))
    study = collect([str(run(tmp_path / "kd", KD__X=2)), other], [baseline], [teacher])
    by_name = {group.label: group for group in study.everything}
    assert study.recovered(by_name["kd"], "bbox/AP") is None
    assert study.gain(by_name["kd"], "bbox/AP") is not None
    assert study.gain(by_name["o"], "bbox/AP") is None
    told = {problem.where for problem in study.problems if "other data" in problem.what}
    assert told == {"t", "o"}


def test_a_folder_without_traces_is_no_run(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(KDError, match=r"no run: it holds none of config\.yaml, run\.json"):
        read_run(tmp_path / "empty")


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        ({"config.yaml": "KD: ["}, "config.yaml cannot be read"),
        ({"config.yaml": None}, "no config.yaml"),
        ({"run.json": '{"status": "do'}, "run.json cannot be read"),
        ({"run.json": '{"starts": 3, "seed": 5}'}, "run.json cannot be read, or not all of it"),
        ({"metrics.json": None}, "no metrics.json"),
        ({"metrics.json": '{"iteration": 19, "lr'}, "line 1 cut or not JSON"),
        ({"results.json": '{"bbox": {'}, "results.json is not JSON"),
    ],
)
def test_what_is_broken_is_named_and_the_rest_is_read(tmp_path, damage, told):
    folder = run(tmp_path / "kd")
    for name, content in damage.items():
        (folder / name).unlink(missing_ok=True)
        if content is not None:
            (folder / name).write_text(content)
    found = read_run(folder)
    assert any(told in problem for problem in found.problems), found.problems
    if "results.json" not in damage:
        assert found.scores == {"bbox/AP": 30.0}
    if "config.yaml" not in damage:
        assert found.planned == 60


@pytest.mark.parametrize(
    ("weights", "record", "end", "finished", "state"),
    [
        (b"", None, 60, True, "finished"),
        (None, None, 40, False, "not finished, 40 of 60 iterations"),
        (b"", {"status": "running"}, 40, False, "not finished, 40 of 60 iterations"),
        # The weights are written before the last evaluation.
        (b"", {"status": "running"}, 60, False, "not finished, 60 of 60 iterations"),
        (b"", {"status": "failed", "error": "x"}, 60, False, "failed, 60 of 60 iterations (x)"),
        (b"", {"status": "done"}, 60, True, "finished"),
        (
            None,
            {"status": "failed", "error": "FloatingPointError: nan"},
            40,
            False,
            "failed, 40 of 60 iterations (FloatingPointError: nan)",
        ),
    ],
)
def test_a_run_says_how_far_it_came(tmp_path, weights, record, end, finished, state):
    lines = metric_lines(end=end)
    folder = write_run(tmp_path / "kd", config(TRUTH), lines=lines, record=record, weights=weights)
    found = read_run(folder)
    assert (found.finished, found.state) == (finished, state)


def test_a_folder_of_an_evaluation_alone_is_finished(tmp_path):
    folder = write_run(tmp_path / "t", config(TRUTH), results=RESULTS, lines=[], weights=None)
    assert read_run(folder).finished


def test_the_last_evaluation_stands_in_for_missing_results(tmp_path):
    lines = [*metric_lines(), *({"iteration": i, "bbox/AP": 10.0 + i} for i in (39, 19))]
    found = read_run(write_run(tmp_path / "kd", config(TRUTH), lines=lines))
    assert found.scores == {"bbox/AP": 49.0}
    assert found.sources == {"bbox": "the last evaluation in metrics.json"}


def test_unfinished_seeds_do_not_count_beside_finished_ones(tmp_path, baseline):
    run(tmp_path / "kd_1", 1, {"bbox": {"AP": 33.0}}, KD__X=1)
    lines = [{"iteration": 19, "total_loss": 1.0, "bbox/AP": 5.0}]
    content = config(TRUTH, SEED=2, KD__X=1)
    write_run(tmp_path / "kd_2", content, lines=lines, weights=None)
    (group,) = collect([str(tmp_path / "kd_*")], [baseline]).groups
    assert len(group.runs) == 2
    assert group.values("bbox/AP") == [33.0]


def test_of_several_test_sets_the_first_counts_in_the_metrics_too(tmp_path):
    names = ("b/bbox/AP", "a/bbox/AP", "a/bbox/AP-cat")
    lines = [*metric_lines(), {"iteration": 59, **{n: float(i) for i, n in enumerate(names)}}]
    content = config(TRUTH, DATASETS__TEST=["a", "b"])
    found = read_run(write_run(tmp_path / "kd", content, lines=lines))
    assert found.scores == {"bbox/AP": 1.0, "bbox/AP-cat": 2.0}


def test_of_several_test_sets_the_first_counts():
    results = {"b": {"bbox": {"AP": 1.0}}, "a": {"bbox": {"AP": 2.0, "APl": float("nan")}}}
    assert percentages(results, ["a", "b"]) == {"bbox/AP": 2.0}
    assert percentages({"accuracy": {"top1": 3.0}, "kcd": {"cost": 1.0}}) == {"accuracy/top1": 3.0}
    assert percentages([1]) == {}


def test_terms_are_those_of_the_config_that_were_logged(tmp_path):
    content = config(TRUTH, KD__TERMS={"review": {"WEIGHT": 1.0}, "never": {"WEIGHT": 0.0}})
    folder = write_run(tmp_path / "kd", content, lines=metric_lines(terms=["review"]))
    found = read_run(folder)
    assert found.terms == ["review"]
    tags = {"loss/total", "loss/task/cls", "loss/kd/review", "raw/review", "weight/review"}
    assert tags <= set(found.tagged())


def test_a_tuple_in_a_saved_config_is_a_list(tmp_path):
    folder = run(tmp_path / "kd")
    content = yaml.safe_load((folder / "config.yaml").read_text())
    content["DATASETS"]["TEST"] = '("digits_val",)'
    (folder / "config.yaml").write_text(yaml.safe_dump(content))
    assert read_run(folder).test_sets == ["digits_val"]
