"""``kd-det``: its commands are the tools, and a missing package is one sentence."""

from __future__ import annotations

import importlib
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from kd_det.app import main as console
from kd_det.app.main import COMMANDS, main, run_command

ROOT = Path(__file__).resolve().parents[2]
TOOLS = {
    "train": "train_net",
    "preflight": "preflight",
    "report": "report",
    "visualize": "visualize",
    "tune": "tune_terms",
    "export": "export_student",
    "quickstart": "quickstart",
}


def test_the_help_lists_every_command_without_loading_any():
    program = "import sys; sys.argv[1:] = ['--help']\nfrom kd_det.app.main import main\n"
    program += "try: main()\n"
    program += "finally: assert not {'lightning', 'torchvision', 'matplotlib'} & set(sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert all(f"\n  {name} " in done.stdout for name in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_usage_shows_how_it_was_called(command, capsys, monkeypatch):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: kd-det {command} ")
    assert "%(prog)s" not in shown
    tool = f"tools/{TOOLS[command]}.py"
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [tool, "--help"])
    with pytest.raises(SystemExit):
        runpy.run_path(tool, run_name="__main__")
    assert capsys.readouterr().out.startswith(f"usage: python {tool} ")


def test_arguments_reach_the_command(capsys):
    assert main(["train", "--config-file", "nowhere.yaml", "SOLVER.MAX_ITER", "1"]) == 2
    assert "'nowhere.yaml'" in capsys.readouterr().err


def test_an_unknown_command_is_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["distill"])
    assert "choose from" in capsys.readouterr().err


def without(package, monkeypatch):
    """As if it were not installed: for modules that are imported from now on."""
    for name in list(sys.modules):
        if name.partition(".")[0] in (package, "kd_det"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)


@pytest.mark.usefixtures("own_modules")
@pytest.mark.parametrize(
    ("command", "package", "extra"),
    [
        (["report", "run", "--baseline", "run"], "matplotlib", "report"),
        (["report", "run", "--baseline", "run"], "jinja2", "report"),
        (["tune", "--config-file", "x.yaml"], "optuna", "tune"),
        (["quickstart"], "cv2", "digits"),
        (
            ["train", "--config-file", "configs/digits_torchvision/teacher_frcnn.yaml"],
            "lightning",
            "torchvision",
        ),
        (
            ["train", "--config-file", "configs/classification/digits/teacher_resnet20.yaml"],
            "torchmetrics",
            "classification",
        ),
    ],
)
def test_a_missing_package_is_one_sentence_with_its_command(
    command, package, extra, monkeypatch, capsys
):
    monkeypatch.chdir(ROOT)
    without(package, monkeypatch)
    assert main(command) == 2
    error = capsys.readouterr().err
    assert f"expected the package '{package}" in error
    assert error.endswith(f"remedy: pip install 'kd_det[{extra}]'\n")


def test_a_package_that_another_project_misses_keeps_its_traceback(monkeypatch):
    def broken(name):
        return importlib.import_module("a_module_that_is_not_there")

    monkeypatch.setattr(console, "importlib", type("", (), {"import_module": staticmethod(broken)}))
    with pytest.raises(ModuleNotFoundError):
        run_command("report")
