"""Several runs in one command: stages, seeds, and what an interrupted one does again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from kd_det.run.plan import NEW, Stage, Start, read_plan, run_plan, summarize

TWO = """
OUTPUT_DIR: {output}
STAGES:
  - {{NAME: flow, TERMS: [flow], TASK: False, OVERRIDES: {{SOLVER.BASE_LR: 0.5}}}}
  - {{NAME: task, TERMS: []}}
"""


class Host:
    """Notes its runs; leaves what a host leaves."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.runs: list[dict[str, str]] = []
        self.fail_at = fail_at

    def __call__(self, opts):
        opts = dict(zip(opts[::2], opts[1::2], strict=True))
        self.runs.append(opts)
        if self.fail_at == len(self.runs):
            raise KeyboardInterrupt
        output = Path(opts["OUTPUT_DIR"])
        output.mkdir(parents=True, exist_ok=True)
        (output / "model_final.pth").write_text(str(output))
        results = {"accuracy": {"top1": 10.0 * len(self.runs)}}
        (output / "results.json").write_text(json.dumps(results))
        return results


@pytest.fixture
def plan(tmp_path):
    (tmp_path / "two.yaml").write_text(TWO.format(output=tmp_path / "out"))
    return read_plan(str(tmp_path / "two.yaml"))


def test_each_stage_runs_once_in_its_own_folder_and_hands_on_the_student(plan, tmp_path):
    host = Host()
    results = run_plan(host, plan, NEW)
    first, second = tmp_path / "out/stage_1_flow", tmp_path / "out/stage_2_task"
    assert host.runs == [
        {
            "STAGES": "[]",
            "OUTPUT_DIR": str(first),
            "KD.ACTIVE_TERMS": "['flow']",
            "KD.TASK_WEIGHT": "0.0",
            "SOLVER.BASE_LR": "0.5",
        },
        {
            "STAGES": "[]",
            "OUTPUT_DIR": str(second),
            "KD.ENABLED": "False",
            "MODEL.WEIGHTS": str(first / "model_final.pth"),
        },
    ]
    assert results == {"accuracy": {"top1": 20.0}}
    assert (tmp_path / "out/model_final.pth").read_text() == str(second)


def test_a_run_interrupted_in_its_second_stage_continues_there(plan, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run_plan(Host(fail_at=2), plan, NEW)
    host = Host()
    run_plan(host, plan, Start(resume=True))
    assert [Path(run["OUTPUT_DIR"]).name for run in host.runs] == ["stage_2_task"]


def test_without_resume_the_host_is_asked_again_and_can_refuse(plan):
    run_plan(Host(), plan, NEW)
    host = Host()
    run_plan(host, plan, NEW)
    assert len(host.runs) == 2


def test_adaptors_are_carried_where_asked():
    stage = Stage("two", carry=("student", "distiller"))
    opts = stage.options(Path("one"))
    assert opts == ["MODEL.WEIGHTS", "one/model_final.pth", "KD.WEIGHTS", "one/model_final.pth"]
    assert Stage("two", carry=()).options(Path("one")) == []


def test_every_seed_gets_its_folder_and_the_spread_is_written(tmp_path):
    (tmp_path / "x.yaml").write_text("SEEDS: [3, 4]")
    output = tmp_path / "out"
    plan = read_plan(str(tmp_path / "x.yaml"), ["OUTPUT_DIR", str(output), "A", "1"])
    host = Host()
    summary = run_plan(host, plan, NEW)
    assert [(run["SEED"], run["A"]) for run in host.runs] == [("3", "1"), ("4", "1")]
    assert summary["accuracy"]["top1"] == {"mean": 15.0, "std": pytest.approx(50**0.5)}
    written = json.loads((output / "seeds.json").read_text())
    assert written["summary"] == summary
    assert written["seeds"]["4"] == {"accuracy": {"top1": 20.0}}
    assert {path.name for path in output.iterdir()} == {"seed_3", "seed_4", "seeds.json"}


def test_seeds_and_stages_combine(plan, tmp_path):
    host = Host()
    run_plan(host, replace(plan, seeds=(1, 2)), NEW)
    folders = [str(Path(run["OUTPUT_DIR"]).relative_to(plan.output)) for run in host.runs]
    assert folders == [f"seed_{s}/stage_{n}" for s in (1, 2) for n in ("1_flow", "2_task")]
    assert [run["SEED"] for run in host.runs] == ["1", "1", "2", "2"]


def test_evaluation_runs_the_host_once(plan, tmp_path):
    host = Host()
    folder = str(tmp_path / "x")
    plan = replace(plan, opts=("OUTPUT_DIR", folder))
    run_plan(host, plan, Start(eval_only=True))
    assert host.runs == [{"OUTPUT_DIR": folder, "STAGES": "[]"}]


def test_overrides_decide_over_the_file(tmp_path):
    (tmp_path / "x.yaml").write_text("SEEDS: [1]\nOUTPUT_DIR: a\n")
    plan = read_plan(str(tmp_path / "x.yaml"), ["SEEDS", "[2, 3]", "OUTPUT_DIR", "b"])
    assert (plan.seeds, plan.output) == ((2, 3), Path("b"))


def test_a_process_without_results_gives_no_summary():
    assert summarize({1: {}, 2: {}}) == {}


BAD = {
    "a name is missing": ("STAGES: [{TERMS: []}]", "mapping with a NAME"),
    "unknown key": ("STAGES: [{NAME: a, TERM: [x]}]", "did you mean 'TERMS'?"),
    "unknown part": ("STAGES: [{NAME: a, CARRY: [teacher]}]", "known: distiller, student"),
    "task that is no truth value": ("STAGES: [{NAME: a, TASK: 3}]", "TASK 3"),
    "same name twice": ("STAGES: [{NAME: a}, {NAME: a}]", "STAGES once; received a, a"),
    "same seed twice": ("SEEDS: [1, 1]", "SEEDS once"),
    "negative seed": ("SEEDS: [-1]", "whole numbers from 0; received -1"),
    "no list": ("SEEDS: 3", "SEEDS to be a list; received 3"),
}


@pytest.mark.parametrize(("text", "message"), BAD.values(), ids=BAD)
def test_a_bad_plan_is_refused(tmp_path, refuses, text, message):
    (tmp_path / "bad.yaml").write_text(text)
    with refuses(message):
        read_plan(str(tmp_path / "bad.yaml"))


def test_several_gpus_need_torchrun(plan, refuses):
    with refuses("torchrun", "--num-gpus 2"):
        run_plan(Host(), plan, Start(num_gpus=2))
