"""The contract of a host, and the host of a config."""

from __future__ import annotations

import sys
from dataclasses import fields

import pytest

from kd_det.hosts import base
from kd_det.hosts.base import HOSTS, INSTALL_GUIDE, get_host, load_config, read_host


@pytest.fixture
def write(tmp_path):
    def make(text, name="config.yaml"):
        path = tmp_path / name
        path.write_text(text)
        return str(path)

    return make


@pytest.fixture
def without(own_modules, monkeypatch):
    """``without(package)``: as if it were not installed, and no host were imported yet."""

    def block(package):
        for name in list(sys.modules):
            if name.partition(".")[0] == package:
                monkeypatch.setitem(sys.modules, name, None)
            elif name.startswith("kd_det.hosts.") and name.count(".") > 1 and "base" not in name:
                monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, package, None)

    return block


def test_every_folder_with_a_host_file_is_a_host():
    assert HOSTS == ("classification", "detectron2", "torchvision_detection")


@pytest.mark.parametrize("name", HOSTS)
def test_every_host_has_the_whole_contract(name):
    if name == "detectron2":
        pytest.importorskip("detectron2")
    host = get_host(name)
    assert host.name == name == host.get_cfg().HOST
    parts = [getattr(host, field.name) for field in fields(host) if field.name != "name"]
    assert all(callable(part) for part in parts)


def test_an_unknown_host_is_refused(refuses):
    with refuses("known HOST", "did you mean 'detectron2'"):
        get_host("detectron")


@pytest.mark.parametrize(
    ("name", "package", "remedy"),
    [
        ("detectron2", "detectron2", INSTALL_GUIDE),
        ("torchvision_detection", "lightning", "pip install 'kd_det[torchvision]'"),
        ("classification", "torchmetrics", "pip install 'kd_det[classification]'"),
    ],
)
def test_a_missing_package_is_one_sentence(without, refuses, name, package, remedy):
    without(package)
    with refuses(f"the package '{package}', which HOST {name} needs", "no installed", remedy):
        get_host(name)


def test_a_mistake_inside_a_host_is_not_taken_for_a_missing_package(monkeypatch):
    def broken(name):
        raise ModuleNotFoundError("no module", name="kd_det.hosts.nowhere")

    monkeypatch.setattr(base.importlib, "import_module", broken)
    with pytest.raises(ModuleNotFoundError):
        get_host("classification")


def test_the_config_that_is_named_in_place_of_detectron2_exists(without, refuses):
    without("detectron2")
    with refuses(path := "configs/digits_torchvision/reviewkd_frcnn.yaml"):
        get_host("detectron2")
    assert read_host(path) == "torchvision_detection"


@pytest.mark.parametrize(
    ("text", "host"),
    [
        ("SOLVER: {BASE_LR: 0.1}", "detectron2"),
        ("HOST: torchvision_detection", "torchvision_detection"),
        ("_BASE_: base.yaml\nOUTPUT_DIR: x", "torchvision_detection"),
        ("_BASE_: base.yaml\nHOST: detectron2", "detectron2"),
    ],
)
def test_the_host_is_read_from_the_file_or_its_base(write, text, host):
    write("HOST: torchvision_detection", "base.yaml")
    assert read_host(write(text)) == host


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "to be YAML mappings of config keys; received nothing"),
        ("- a\n- b", "to be YAML mappings of config keys; received list"),
        ("SOLVER: [", "received while parsing a flow node"),
        ("_BASE_: nowhere.yaml", "nowhere.yaml"),
        ("HOST: detectron", "known HOST; received 'detectron'; remedy: did you mean 'detectron2'?"),
        (
            "HOST: 3",
            "known HOST; received '3'; remedy: known: classification, detectron2",
        ),
    ],
)
def test_a_file_without_a_readable_host_is_refused(write, refuses, text, part):
    with refuses(part):
        read_host(write(text))


def test_a_missing_file_is_refused(tmp_path, refuses):
    with refuses("expected --config-file to name a file", "nowhere.yaml", "give a path such as"):
        read_host(str(tmp_path / "nowhere.yaml"))


@pytest.mark.parametrize("name", ["classification", "torchvision_detection"])
def test_a_config_is_loaded_by_its_host_and_frozen(write, name):
    cfg = load_config(write(f"HOST: {name}"), ["SEED", "3"])
    assert (cfg.HOST, cfg.SEED, cfg.is_frozen()) == (name, 3, True)
