"""The check of a GPU, on the CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kd_det import LOSSES

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))

from gpu_checks import losses, runs, supervisor  # noqa: E402
from gpu_checks.page import page  # noqa: E402
from gpu_checks.plan import all_checks  # noqa: E402

STATES = ["passed", "failed", "undecided", "skipped", "not run"]


def gpu_check(folder, *arguments, code=0):
    """The report and the page of a whole call, and what it printed."""
    files = ["--json", str(folder / "check.json"), "--page", str(folder / "page.md")]
    command = [sys.executable, "tools/gpu_check.py", "--device", "cpu", *files, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    report = json.loads((folder / "check.json").read_text())
    return report, (folder / "page.md").read_text(), done.stdout


def test_it_runs_on_a_cpu_and_skips_what_needs_cuda(tmp_path):
    parts = ["losses: KD", "losses: MHGD", "identity: torchvision_detection FasterRCNN"]
    parts += ["training: classification balance", "memory: classification", "loaders"]
    report, text, printed = gpu_check(tmp_path, "--only", *parts)
    assert list(report["counts"]) == STATES
    assert report["counts"] == dict(zip(STATES, [8, 0, 0, 4, 0], strict=True)), printed
    status = {check["name"]: check["status"] for check in report["checks"]}
    notes = {check["name"]: check["note"] for check in report["checks"]}
    assert status["memory: classification"] == "skipped"
    assert notes["memory: classification"] == "needs CUDA"
    assert "tensors identical" in notes["identity: torchvision_detection FasterRCNN"]
    assert "after resuming" in notes["training: classification balance, resumed"]
    assert "It has not been run on a GPU yet." in text
    # Progress, one line per check, also where the output is no terminal.
    assert all(f"[{k + 1}/12] " in line for k, line in enumerate(printed.splitlines()[:-1]))


def test_what_does_not_fit_into_the_budget_is_listed(tmp_path):
    report, text, _ = gpu_check(tmp_path, "--only", "losses: KD", "--budget", "0")
    assert report["counts"]["not run"] == len(report["checks"]) == 3
    assert "| KD float16 | not run | 0.0 | the budget of 0 s was over |" in text


def test_every_registered_loss_has_an_example():
    assert {name for name, _ in LOSSES} <= losses.EXAMPLES.keys()
    with pytest.raises(KeyError, match="EXAMPLES"):
        losses.check_loss("New", torch.float32, "cpu")


def test_a_wrong_value_and_a_wrong_gradient_are_found(monkeypatch):
    original = losses.loss_and_gradient
    for wrong, kind in ((0, "value"), (1, "gradient")):

        def off(distiller, sides, dtype, device, scale=1.0, wrong=wrong):
            found = list(original(distiller, sides, dtype, device, scale))
            if scale != 1.0:
                found[wrong] = found[wrong] * 1.1
            return found

        monkeypatch.setattr(losses, "loss_and_gradient", off)
        with pytest.raises(AssertionError, match=f"error of the {kind} 1.0e-01"):
            losses.check_loss("AT", torch.float32, "cpu")


def weights(*values):
    return [{"w": torch.tensor([value])} for value in values]


def test_a_difference_counts_only_where_the_reference_repeats_itself():
    def against(found, *reference):
        return runs.compare(weights(found)[0], iter(weights(*reference)).__next__)

    assert against(1.0, 1.0) == "1 tensors identical"
    assert "second of two" in against(1.0, 2.0, 1.0)
    assert against(1.0, 2.0, 3.0).startswith("undecided")
    with pytest.raises(AssertionError, match="1 of 1 tensors differ, first w"):
        against(1.0, 2.0, 2.0)
    assert runs.different({"a": torch.ones(1)}, {"b": torch.ones(1)}) == ["a", "b"]


def test_training_is_interrupted_in_the_update_that_is_named():
    parameter = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    parameter.grad = torch.ones(1)
    with runs.counted_updates(interrupt_at=2) as count:
        for _ in range(5):
            optimizer.step()
    assert count == [2]
    early = pytest.raises(AssertionError, match="after 1 updates")
    with early, runs.counted_updates(interrupt_at=2):
        optimizer.step()
    optimizer.step()
    assert parameter.item() == -3


CHILD = """
import json, os, sys, time
left = json.load(open("selected.json"))
with open("checks.jsonl", "a", buffering=1) as file:
    for name in left:
        file.write(json.dumps({"name": name}) + "\\n")
        if name == "crash":
            os._exit(9)
        if name == "hang":
            time.sleep(60)
        file.write(json.dumps({"name": name, "status": "passed", "note": ""}) + "\\n")
"""


def supervised(folder, monkeypatch, names, budget=60.0, code=CHILD):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(supervisor, "ALLOWED_SECONDS", 0.5)
    found = supervisor.Supervisor(folder, names, budget, [sys.executable, "-c", code]).run()
    assert [entry["name"] for entry in found] == names
    return [(entry["status"], entry["note"]) for entry in found]


def test_a_crash_and_a_hang_do_not_stop_the_rest(tmp_path, monkeypatch):
    first, crash, hang, last = supervised(tmp_path, monkeypatch, ["a", "crash", "hang", "b"])
    assert first == last == ("passed", "")
    assert crash == ("failed", "its process ended with status 9")
    assert hang == ("failed", "did not end within 0.5 s")


def test_a_process_that_cannot_start_ends_all_the_same(tmp_path, monkeypatch):
    found = supervised(tmp_path, monkeypatch, ["a", "b"], code="raise SystemExit(1)")
    assert found == [("failed", "not begun: its process ended with status 1")] * 2


def test_the_budget_ends_a_check_that_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(supervisor, "ALLOWED_SECONDS", 60.0)
    found = supervised(tmp_path, monkeypatch, ["a", "hang", "b"], budget=0.4)
    assert [status for status, _ in found[1:]] == ["not run", "not run"]


def test_the_page_lists_failures_first_and_names_the_gpu():
    check = {"name": "losses: KD float16", "status": "failed", "note": "a\nValueError: x | y"}
    report = {
        "machine": {"date": "2030-01-01", "device": "GPU 9000", "torch": "3", "cuda": "14"},
        "budget": 280.0,
        "seconds": 12.0,
        "counts": {"failed": 1},
        "checks": [{**check, "seconds": 0.1}],
    }
    text = page(report)
    assert "Run on 2030-01-01 on one GPU 9000 (torch 3, cuda 14), 12 s of 280: 1 failed." in text
    assert "not been run" not in text
    assert text.index("* losses: KD float16: `ValueError: x | y`") < text.index("## Losses")
    assert "| KD float16 | failed | 0.1 | ValueError: x \\| y |" in text


def test_names_are_unique_and_every_host_is_there(tmp_path):
    names = [check.name for check in all_checks(runs.Machine(tmp_path, "cpu"))]
    assert len(names) == len(set(names))
    for host in ("torchvision_detection", "detectron2", "classification"):
        for part in ("identity", "training", "loaders", "memory"):
            assert any(name.startswith(f"{part}: {host}") for name in names)
