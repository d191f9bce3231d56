"""Reading weights: every format, and nothing but data."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from kd_det.core.checkpoint import read_weights, strip_distiller

WEIGHTS = {
    "backbone.weight": torch.arange(6, dtype=torch.float32).view(2, 3),
    "backbone.steps": torch.tensor(7),
}
ADAPTOR = {"distiller.terms.x.weight": torch.ones(2), "distiller.step": torch.tensor(3)}


def zoo(protocol):
    def save(path, weights):
        arrays = {k: v.numpy() for k, v in weights.items()}
        content = {"model": arrays, "__author__": "zoo", "matching_heuristics": True}
        path.write_bytes(pickle.dumps(content, protocol=protocol))

    return save


def under(*keys, **extra):
    def save(path, weights):
        for key in keys:
            weights = {key: weights}
        torch.save(dict(weights) | extra, path)

    return save


WRITERS = {
    "zoo.pkl": zoo(4),
    "old_zoo.pkl": zoo(2),
    "plain.pth": under(),
    "plain.pt": under(),
    "model.pth": under("model", iteration=5, optimizer={"state": {}}),
    "lightning.ckpt": under("state_dict", epoch=3),
    "model.safetensors": lambda path, weights: save_file(weights, path),
}


def assert_read(path):
    read = read_weights(path)
    assert read.keys() == WEIGHTS.keys()
    for key, value in WEIGHTS.items():
        assert torch.equal(read[key], value)
        assert read[key].dtype == value.dtype


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_tensors(tmp_path, name):
    WRITERS[name](tmp_path / name, WEIGHTS)
    assert_read(tmp_path / name)
    assert_read(str(tmp_path / name))


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("name", WRITERS)
def test_adaptors_and_the_prefix_of_ddp_are_dropped(tmp_path, name, prefix):
    WRITERS[name](tmp_path / name, {prefix + k: v for k, v in (WEIGHTS | ADAPTOR).items()})
    assert_read(tmp_path / name)


def test_scalars_of_a_zoo_file_become_tensors(tmp_path):
    content = {"model": {"step": np.int64(7), "momentum": np.float32(0.5)}}
    (tmp_path / "zoo.pkl").write_bytes(pickle.dumps(content))
    read = read_weights(tmp_path / "zoo.pkl")
    assert (read["step"].item(), read["momentum"].item()) == (7, 0.5)


def test_a_pickle_of_python_2_is_read(tmp_path):
    array = b"cnumpy.core.multiarray\n_reconstruct\n"  # how zoo files of that age name it
    content = pickle.dumps({"model": {"w": np.arange(3.0)}}, protocol=2)
    content = content.replace(b"cnumpy._core.multiarray\n_reconstruct\n", array)
    assert array in content
    (tmp_path / "zoo.pkl").write_bytes(content)
    assert read_weights(tmp_path / "zoo.pkl")["w"].tolist() == [0.0, 1.0, 2.0]


def test_only_adaptors_are_stripped():
    keys = {"distiller.x": torch.ones(1), "backbone.distiller.x": torch.ones(1)}
    assert list(strip_distiller(keys)) == ["backbone.distiller.x"]


class Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


class BuiltinTrap(Trap):
    def __reduce__(self):
        return (eval, (f"open({str(self.path)!r}, 'w')",))


@pytest.mark.parametrize("suffix", [".pkl", ".pth", ".ckpt"])
@pytest.mark.parametrize("trap", [Trap, BuiltinTrap])
def test_a_file_that_would_run_code_is_refused(tmp_path, refuses, trap, suffix):
    path, mark = tmp_path / f"weights{suffix}", tmp_path / "ran"
    content = {"model": {"w": trap(mark)}}
    if suffix == ".pkl":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path)
    with refuses(f"to be a readable {suffix} file of tensors; received UnpicklingError"):
        read_weights(path)
    assert not mark.exists()


def test_numpy_itself_offers_no_way_around(tmp_path, refuses):
    path = tmp_path / "weights.pkl"
    path.write_bytes(b"cnumpy.testing._private.utils\nruncstring\n.")
    with refuses("UnpicklingError: numpy.testing._private.utils.runcstring is not data"):
        read_weights(path)


def test_a_missing_file_is_refused(tmp_path, refuses):
    with refuses("expected a weights file", "nowhere.pkl', which does not exist"):
        read_weights(tmp_path / "nowhere.pkl")


def test_a_folder_is_not_a_file(tmp_path, refuses):
    with refuses("expected a weights file"):
        read_weights(tmp_path)


def test_an_unknown_format_is_refused_with_the_known_ones(tmp_path, refuses):
    (tmp_path / "weights.onnx").write_bytes(b"x")
    with refuses("weights as .pkl, .pth, .pt, .ckpt, .safetensors", "weights.onnx"):
        read_weights(tmp_path / "weights.onnx")


@pytest.mark.parametrize("suffix", [".pkl", ".pth", ".ckpt", ".safetensors"])
@pytest.mark.parametrize(
    "content", [b"", b"hello world", b"\x80\x02half", b".", b"PK\x03\x04zip"], ids=repr
)
def test_a_damaged_file_is_refused(tmp_path, refuses, suffix, content):
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(content)
    with refuses(f"'{path}' to be a readable {suffix} file of tensors", "remedy: download or save"):
        read_weights(path)


@pytest.mark.parametrize("name", ["plain.pth", "model.pth", "zoo.pkl", "model.safetensors"])
@pytest.mark.parametrize("weights", [{}, ADAPTOR], ids=["empty", "adaptors only"])
def test_a_file_without_a_model_is_refused(tmp_path, refuses, name, weights):
    WRITERS[name](tmp_path / name, weights)
    with refuses(f"expected tensors in '{tmp_path / name}'; received none; remedy"):
        read_weights(tmp_path / name)


@pytest.mark.parametrize("content", [[torch.ones(1)], {"lr": 0.1}, {"model": {}}], ids=str)
def test_a_file_of_something_else_is_refused(tmp_path, refuses, content):
    torch.save(content, tmp_path / "x.pth")
    with refuses("expected tensors in", "received none"):
        read_weights(tmp_path / "x.pth")
