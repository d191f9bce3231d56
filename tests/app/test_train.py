"""The one command line."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from kd_det import preflight
from kd_det.app.train import argument_parser, main
from kd_det.core.errors import fail
from kd_det.hosts.torchvision_detection import host as module
from kd_det.run.plan import Start

ON_CPU = "HOST: torchvision_detection\nMODEL: {DEVICE: cpu}"


@pytest.fixture
def write(tmp_path):
    def make(text):
        path = tmp_path / "config.yaml"
        path.write_text(text)
        return str(path)

    return make


@pytest.fixture
def host(monkeypatch):
    """Puts a function in the place of a host's ``run``; returns the calls: config and start."""

    def replace_run(action=lambda cfg: None):
        calls = []

        def run(cfg, start, *, pictures):
            calls.append((cfg, start))
            action(cfg)

        monkeypatch.setattr(module, "HOST", replace(module.HOST, run=run))
        return calls

    return replace_run


def one_error(capsys):
    """The only line on standard error; nothing is on standard output."""
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert re.fullmatch(r"error: expected .+; received .+; remedy: .+", line)
    return line


def test_the_host_of_the_config_is_run_with_all_arguments(write, host):
    calls = host()
    config = write("HOST: torchvision_detection")
    argv = [
        "--config-file",
        config,
        "--num-gpus",
        "4",
        "--num-machines",
        "2",
        "--machine-rank",
        "1",
    ]
    argv += ["--dist-url", "tcp://a:1", "--resume", "--eval-only", "SOLVER.BASE_LR", "0.1"]
    assert main(argv) == 0
    ((cfg, start),) = calls
    assert start == Start(True, True, 4, 2, 1, "tcp://a:1")
    assert cfg.SOLVER.BASE_LR == 0.1


def test_arguments_have_detectron2s_defaults():
    args = argument_parser().parse_args(["--config-file", "x.yaml"])
    assert (args.num_gpus, args.num_machines, args.machine_rank) == (1, 1, 0)
    assert not args.resume
    assert not args.eval_only
    assert args.opts == []
    assert re.fullmatch(r"tcp://127\.0\.0\.1:\d{4,5}", args.dist_url)
    assert 1024 < int(args.dist_url.rpartition(":")[2]) < 2**16


def test_a_mistake_found_by_the_host_is_one_sentence_and_status_2(write, host, capsys):
    host(lambda cfg: fail(expected="a teacher", received="none", remedy="name one"))
    assert main(["--config-file", write("HOST: torchvision_detection")]) == 2
    assert one_error(capsys) == "error: expected a teacher; received none; remedy: name one"


def test_a_failure_that_is_no_mistake_of_the_user_is_not_hidden(write, host):
    host(lambda cfg: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["--config-file", write("HOST: torchvision_detection")])


def test_a_missing_config_is_one_sentence_and_status_2(tmp_path, capsys):
    assert main(["--config-file", str(tmp_path / "nowhere.yaml")]) == 2
    assert "nowhere.yaml" in one_error(capsys)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("HOST: torchvision", "'torchvision'; remedy: did you mean 'torchvision_detection'?"),
        ("", "YAML mappings of config keys"),
        ("SOLVER: [", "YAML mappings of config keys"),
    ],
)
def test_a_bad_config_is_one_sentence_and_status_2(write, capsys, text, part):
    assert main(["--config-file", write(text)]) == 2
    assert part in one_error(capsys)


def test_without_a_config_the_usage_is_shown(capsys):
    with pytest.raises(SystemExit) as error:
        main([])
    assert error.value.code == 2
    assert "--config-file" in capsys.readouterr().err


def test_preflight_goes_before_a_new_run_only_and_stops_what_it_refuses(
    write, host, tmp_path, monkeypatch, capsys
):
    looked_at = []

    def require(cfg):
        looked_at.append(cfg.OUTPUT_DIR)
        if cfg.SOLVER.MAX_ITER == 7:
            fail(expected="a sound run", received="this", remedy="another")

    monkeypatch.setattr(preflight, "require", require)
    calls = host()
    output = str(tmp_path / "run")
    config = write(f"{ON_CPU}\nPREFLIGHT: True\nOUTPUT_DIR: {output}")
    assert main(["--config-file", config]) == 0
    assert (len(calls), looked_at) == (1, [output])
    for flag in ("--resume", "--eval-only"):
        assert main(["--config-file", config, flag]) == 0
    assert main(["--config-file", config, "PREFLIGHT", "False"]) == 0
    assert (len(calls), looked_at) == (4, [output])
    assert main(["--config-file", config, "SOLVER.MAX_ITER", "7"]) == 2
    assert (len(calls), len(looked_at)) == (4, 2)
    assert "expected a sound run" in one_error(capsys)


@pytest.fixture
def looked_at(monkeypatch):
    """The configs that reach preflight, which finds nothing wrong."""
    configs = []
    monkeypatch.setattr(preflight, "require", configs.append)
    return configs


@pytest.mark.parametrize("rank", ["RANK", "LOCAL_RANK", "NODE_RANK"])
def test_of_several_processes_the_first_alone_looks(
    write, host, looked_at, tmp_path, monkeypatch, rank
):
    """Those that torchrun starts have all three; Lightning's own have the last two."""
    calls = host()
    text = f"{ON_CPU}\nPREFLIGHT: True\nOUTPUT_DIR: {tmp_path / 'run'}"
    for number, looks in (("1", 0), ("0", 1)):
        monkeypatch.setenv(rank, number)
        assert main(["--config-file", write(text)]) == 0
        assert len(looked_at) == looks
    assert main(["--config-file", write(text), "--machine-rank", "1"]) == 0
    assert (len(looked_at), len(calls)) == (1, 3)


def test_every_stage_is_looked_at_as_it_will_be_trained(write, host, looked_at, tmp_path):
    host()
    stages = "STAGES: [{NAME: hint, TASK: False}, {NAME: plain, TERMS: []}]"
    text = f"{ON_CPU}\nPREFLIGHT: True\nOUTPUT_DIR: {tmp_path}\n{stages}"
    assert main(["--config-file", write(text)]) == 0
    found = [
        (Path(cfg.OUTPUT_DIR).name, cfg.KD.TASK_WEIGHT, cfg.MODEL.WEIGHTS) for cfg in looked_at
    ]
    start = str(tmp_path / "stage_1_hint" / "model_final.pth")
    assert found == [("stage_1_hint", 0, ""), ("stage_2_plain", 1, start)]
