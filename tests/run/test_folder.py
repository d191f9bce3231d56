"""What is checked about a run before it starts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kd_det.hosts.torchvision_detection.config import get_cfg
from kd_det.run.devices import check_devices, under_torchrun
from kd_det.run.folder import check_output_dir, check_same_run, check_writable

TRACES = ["last_checkpoint", "last.ckpt", "model_final.pth", "metrics.json"]


@pytest.mark.parametrize("trace", TRACES)
def test_a_folder_of_another_run_needs_resume(tmp_path, refuses, trace):
    (tmp_path / trace).write_text("kept")
    with refuses(f"'{tmp_path}', which holds {trace} of another run", "add --resume"):
        check_output_dir(str(tmp_path), resume=False)
    check_output_dir(str(tmp_path), resume=True)
    assert [path.name for path in tmp_path.iterdir()] == [trace]
    assert (tmp_path / trace).read_text() == "kept"


@pytest.mark.parametrize("resume", [False, True])
def test_a_new_or_empty_folder_is_fine_and_not_touched(tmp_path, resume):
    check_output_dir(str(tmp_path), resume)
    check_output_dir(str(tmp_path / "new"), resume)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["notes.txt", "config.yaml"])
def test_files_without_progress_are_fine(tmp_path, name):
    (tmp_path / name).touch()
    check_output_dir(str(tmp_path), resume=False)


@pytest.mark.parametrize("below", ["", "deeper/still"])
def test_a_file_is_no_output_folder(tmp_path, refuses, below):
    file = tmp_path / "file"
    file.write_text("kept")
    with refuses(f"'{file}', which is a file", "choose another OUTPUT_DIR"):
        check_output_dir(str(file / below), resume=False)
    assert file.read_text() == "kept"


def test_a_folder_without_permission_is_refused(tmp_path, refuses, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != tmp_path)
    with refuses(f"'{tmp_path}', which is read-only"):
        check_writable(tmp_path / "runs" / "new")


def resumable(tmp_path, *options):
    """The config of a run with a checkpoint, whose file has these options."""
    cfg = get_cfg()
    terms = {"hint": {"LOSS": "FitNet", "TAPS": [("p3", "p4")], "WEIGHT": 1.0}}
    cfg.KD.TERMS = type(cfg)(terms)
    before = cfg.clone()
    before.merge_from_list(list(options))
    (tmp_path / "config.yaml").write_text(before.dump())
    return cfg


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("SOLVER.MAX_ITER", 7, "SOLVER.BASE_LR", 0.5, "MODEL.DEVICE", "cpu"),
        ("KD.TERMS.hint.WEIGHT", 0.5, "DATALOADER.NUM_WORKERS", 0),
        ("MODEL.WEIGHTS", "a.pth", "MODEL.BACKBONE.WEIGHTS", "", "OUTPUT_DIR", "moved"),
    ],
    ids=["nothing", "schedule", "weights of terms", "start"],
)
def test_what_a_checkpoint_does_not_depend_on_may_change_in_a_resumed_run(tmp_path, options):
    check_same_run(tmp_path, resumable(tmp_path, *options))


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (("MODEL.BACKBONE.NAME", "other"), ["MODEL.BACKBONE.NAME", 'then "other"']),
        (("KD.ENABLED", False), ["KD.ENABLED true, then false", "KD.TERMS.hint.LOSS"]),
        (("KD.TERMS.hint.LOSS", "AT"), ['KD.TERMS.hint.LOSS "FitNet", then "AT"']),
        (("KD.TERMS.hint.TAPS", ["p3"]), ["KD.TERMS.hint.TAPS"]),
    ],
    ids=["model", "baseline", "loss", "taps"],
)
def test_a_checkpoint_of_another_model_or_other_losses_is_refused(
    tmp_path, refuses, options, parts
):
    cfg = resumable(tmp_path, *options)
    with refuses(str(tmp_path / "config.yaml"), "choose another OUTPUT_DIR", *parts):
        check_same_run(tmp_path, cfg)


def test_a_folder_without_a_config_is_not_compared(tmp_path):
    check_same_run(tmp_path, get_cfg())


@pytest.fixture
def gpus(monkeypatch):
    def pretend(count):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)

    return pretend


@pytest.mark.parametrize(
    ("there", "device", "asked"),
    [(0, "cpu", 1), (0, "cpu", 0), (1, "cuda", 1), (4, "cuda:0", 4), (4, "cpu", 1)],
)
def test_devices_that_are_there_may_be_used(gpus, there, device, asked):
    gpus(there)
    check_devices(device, asked)


@pytest.mark.parametrize(
    ("there", "device", "asked", "part"),
    [
        (0, "cuda", 1, "a GPU for MODEL.DEVICE cuda; received none visible to torch; remedy: add"),
        (
            0,
            "cpu",
            2,
            "--num-gpus of at most 1 for MODEL.DEVICE cpu here; received --num-gpus 2; remedy",
        ),
        (
            2,
            "cuda",
            4,
            "--num-gpus of at most 2 for MODEL.DEVICE cuda here; received --num-gpus 4; remedy",
        ),
    ],
)
def test_devices_that_are_not_there_are_refused(gpus, refuses, there, device, asked, part):
    gpus(there)
    with refuses(part):
        check_devices(device, asked)


@pytest.mark.parametrize(
    ("environment", "launched"),
    [({}, False), ({"RANK": "1", "WORLD_SIZE": "2"}, True), ({"WORLD_SIZE": "2"}, False)],
    ids=str,
)
def test_a_process_of_torchrun_is_recognised(monkeypatch, environment, launched):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert under_torchrun() is launched
