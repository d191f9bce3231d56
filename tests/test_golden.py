"""The golden checker, and the golden files themselves where they are at hand."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from tests import golden

ROOT = Path(__file__).resolve().parents[1]


def golden_folder() -> Path | None:
    """``$KD_DET_GOLDEN``, or ``shared/golden`` in the checkout or a folder above it."""
    if os.environ.get("KD_DET_GOLDEN"):
        return Path(os.environ["KD_DET_GOLDEN"])
    candidates = [folder / "shared" / "golden" for folder in (ROOT, *ROOT.parents)]
    return next((folder for folder in candidates if folder.is_dir()), None)


def golden_files() -> list:
    folder = golden_folder()
    if folder is None:
        reason = "no golden files: set KD_DET_GOLDEN to the folder that holds them"
        return [pytest.param(None, marks=pytest.mark.skip(reason=reason), id="none")]
    files = sorted(folder.glob("*.npz"))
    assert files, f"{folder} (KD_DET_GOLDEN) holds no golden files"
    return [pytest.param(path, id=path.stem) for path in files]


@pytest.mark.parametrize("path", golden_files())
def test_golden_file_passes(path, capsys):
    status = golden.main([str(path)])
    assert status == 0, capsys.readouterr().out


def softmax(logits):
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    return exponentials / exponentials.sum(axis=1, keepdims=True)


@pytest.fixture
def numbers():
    """A KD file computed by numpy alone."""
    rng = np.random.default_rng(0)
    temperature, rows, classes = 4.0, 6, 5
    student, teacher = rng.normal(0, 3, (2, rows, classes))
    target = rng.integers(classes, size=rows)
    q, p = softmax(student / temperature), softmax(teacher / temperature)
    kd = temperature**2 * (p * (np.log(p) - np.log(q))).sum() / rows
    ce = -np.log(softmax(student)[np.arange(rows), target]).mean()
    return {
        "in_logits_s": student,
        "in_logits_t": teacher,
        "in_target": target,
        "out_loss_kd": np.array(kd),
        "out_loss_kd_elementmean": np.array(kd / classes),
        "out_loss_ce": np.array(ce),
        "out_loss_total": np.array(0.1 * ce + 0.9 * kd),
        "grad_logits_s": temperature * (q - p) / rows,
        "info_anything": np.array(123.0),
    }


@pytest.fixture
def write(tmp_path, numbers):
    """Writes the file with some arrays replaced and returns its path."""

    def make(method="KD", **changed):
        hyper = {"T": 4.0, "ce_weight": 0.1, "kd_weight": 0.9}
        path = tmp_path / "kd_own.npz"
        meta = json.dumps({"method": method, "hyper": hyper})
        np.savez(path, meta=np.array(meta), **{**numbers, **changed})
        return str(path)

    return make


def test_right_numbers_pass_in_both_precisions(write, capsys):
    assert golden.main([write()]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "all passed"
    keys = [line.split()[3].rstrip(":") for line in lines[:-1]]
    assert sorted(set(keys)) == [
        "grad_logits_s",
        "out_loss_ce",
        "out_loss_kd",
        "out_loss_kd_elementmean",
        "out_loss_total",
    ]
    assert len(keys) == 10


@pytest.mark.parametrize("key", ["out_loss_kd", "out_loss_total", "grad_logits_s"])
@pytest.mark.parametrize("factor", [1 + 1e-4, -1.0, float("nan")])
def test_a_wrong_number_fails(write, numbers, capsys, key, factor):
    assert golden.main([write(**{key: numbers[key] * factor})]) == 1
    output = capsys.readouterr().out
    assert f"FAIL kd_own.npz float64 {key}" in output
    assert "2 failed" in output


def test_a_number_that_only_float64_can_tell_apart_fails_there(write, numbers, capsys):
    assert golden.main([write(out_loss_kd=numbers["out_loss_kd"] * (1 + 1e-7))]) == 1
    output = capsys.readouterr().out
    assert "FAIL kd_own.npz float64 out_loss_kd:" in output
    assert "ok   kd_own.npz float32 out_loss_kd:" in output


def test_a_key_that_nothing_computes_fails(write, capsys):
    assert golden.main([write(out_loss_forgotten=np.array(0.0))]) == 1
    assert "FAIL kd_own.npz float64 out_loss_forgotten: inf" in capsys.readouterr().out


def test_an_array_of_another_shape_fails(write, numbers):
    assert golden.main([write(grad_logits_s=numbers["grad_logits_s"][:1])]) == 1


def test_an_unknown_method_fails_by_name(write, capsys):
    assert golden.main([write(method="Telepathy")]) == 1
    assert "no check for method 'Telepathy'" in capsys.readouterr().out


def test_one_bad_file_among_good_ones_fails(write, tmp_path):
    good = Path(write()).rename(tmp_path / "good.npz")
    assert golden.main([str(good), write(method="Telepathy")]) == 1
