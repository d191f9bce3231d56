"""The one command line."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from kd_det.app.train import argument_parser, main
from kd_det.core.errors import fail
from kd_det.hosts.base import INSTALL_GUIDE
from kd_det.run.config import read_host

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def write(tmp_path):
    def make(text):
        path = tmp_path / "config.yaml"
        path.write_text(text)
        return str(path)

    return make


@pytest.fixture
def host(monkeypatch):
    """Puts a training entry point in the place of a host's and returns what it is called with."""

    def replace(action=lambda args: None):
        calls = []
        module = ModuleType("train")
        module.main = lambda args: (calls.append(args), action(args))
        monkeypatch.setitem(sys.modules, "kd_det.hosts.torchvision_detection.train", module)
        return calls

    return replace


@pytest.fixture
def without_detectron2(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "detectron2" else find(name)
    )


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
    assert vars(calls[0]) == {
        "config_file": config,
        "num_gpus": 4,
        "num_machines": 2,
        "machine_rank": 1,
        "dist_url": "tcp://a:1",
        "resume": True,
        "eval_only": True,
        "opts": ["SOLVER.BASE_LR", "0.1"],
    }


def test_arguments_have_detectron2s_defaults():
    args = argument_parser().parse_args(["--config-file", "x.yaml"])
    assert (args.num_gpus, args.num_machines, args.machine_rank) == (1, 1, 0)
    assert not args.resume
    assert not args.eval_only
    assert args.opts == []
    assert re.fullmatch(r"tcp://127\.0\.0\.1:\d{4,5}", args.dist_url)
    assert 1024 < int(args.dist_url.rpartition(":")[2]) < 2**16


def test_a_mistake_found_by_the_host_is_one_sentence_and_status_2(write, host, capsys):
    host(lambda args: fail(expected="a teacher", received="none", remedy="name one"))
    assert main(["--config-file", write("HOST: torchvision_detection")]) == 2
    assert one_error(capsys) == "error: expected a teacher; received none; remedy: name one"


def test_a_failure_that_is_no_mistake_of_the_user_is_not_hidden(write, host):
    host(lambda args: 1 / 0)
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


@pytest.mark.usefixtures("without_detectron2")
@pytest.mark.parametrize("text", ["HOST: detectron2", "SOLVER: {BASE_LR: 0.1}"])
def test_without_detectron2_its_configs_end_in_one_sentence(write, capsys, text):
    assert main(["--config-file", write(text)]) == 2
    line = one_error(capsys)
    assert "expected Detectron2, which this config runs on; received no installed package" in line
    assert INSTALL_GUIDE in line
    assert INSTALL_GUIDE.startswith("https://detectron2.readthedocs.io/")


@pytest.mark.usefixtures("without_detectron2")
def test_without_detectron2_the_config_that_is_named_instead_exists(write, capsys):
    main(["--config-file", write("HOST: detectron2")])
    (named,) = re.findall(r"configs/\S+?\.yaml", one_error(capsys))
    assert read_host(str(ROOT / named)) == "torchvision_detection"


@pytest.mark.usefixtures("without_detectron2")
def test_without_detectron2_the_other_hosts_run(write, host):
    calls = host()
    assert main(["--config-file", write("HOST: torchvision_detection")]) == 0
    assert len(calls) == 1


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

    module = ModuleType("kd_det.preflight")
    module.require = require
    monkeypatch.setitem(sys.modules, "kd_det.preflight", module)
    calls = host()
    output = str(tmp_path / "run")
    config = write(f"HOST: torchvision_detection\nPREFLIGHT: True\nOUTPUT_DIR: {output}")
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
    module = ModuleType("kd_det.preflight")
    module.require = configs.append
    monkeypatch.setitem(sys.modules, "kd_det.preflight", module)
    return configs


@pytest.mark.parametrize("rank", ["RANK", "LOCAL_RANK", "NODE_RANK"])
def test_of_several_processes_the_first_alone_looks(
    write, host, looked_at, tmp_path, monkeypatch, rank
):
    """Those that torchrun starts have all three; Lightning's own have the last two."""
    calls = host()
    text = f"HOST: torchvision_detection\nPREFLIGHT: True\nOUTPUT_DIR: {tmp_path / 'run'}"
    for number, looks in (("1", 0), ("0", 1)):
        monkeypatch.setenv(rank, number)
        assert main(["--config-file", write(text)]) == 0
        assert len(looked_at) == looks
    assert main(["--config-file", write(text), "--machine-rank", "1"]) == 0
    assert (len(looked_at), len(calls)) == (1, 3)


def test_every_stage_is_looked_at_as_it_will_be_trained(write, host, looked_at, tmp_path):
    host()
    stages = "STAGES: [{NAME: hint, TASK: False}, {NAME: plain, TERMS: []}]"
    text = f"HOST: torchvision_detection\nPREFLIGHT: True\nOUTPUT_DIR: {tmp_path}\n{stages}"
    assert main(["--config-file", write(text)]) == 0
    found = [
        (Path(cfg.OUTPUT_DIR).name, cfg.KD.TASK_WEIGHT, cfg.MODEL.WEIGHTS) for cfg in looked_at
    ]
    start = str(tmp_path / "stage_1_hint" / "model_final.pth")
    assert found == [("stage_1_hint", 0, ""), ("stage_2_plain", 1, start)]
