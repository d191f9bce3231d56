"""The tables of config keys hold every key, its default and a meaning."""

from __future__ import annotations

import ast
import importlib.util
import sys
from pathlib import Path

import pytest
from fvcore.common.config import CfgNode

from kd_det.hosts.classification import config as classification
from kd_det.hosts.torchvision_detection import config as torchvision_detection

ROOT = Path(__file__).resolve().parents[1]
EXTENSION = ROOT / "docs" / "_ext" / "config_table.py"


def load_extension():
    spec = importlib.util.spec_from_file_location(EXTENSION.stem, EXTENSION)
    module = importlib.util.module_from_spec(spec)
    sys.modules[EXTENSION.stem] = module
    spec.loader.exec_module(module)
    return module


config_table = load_extension()


def leaves(node, prefix=""):
    """``{key: default}``; a node without keys of its own is open to the user's."""
    found = {}
    for key, value in node.items():
        nested = isinstance(value, CfgNode) and len(value)
        found |= leaves(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return found


def tabled(*markers):
    keys = {key.name: key for marker in markers for key in config_table.config_keys(marker)}
    return {name: key.default for name, key in keys.items() if key.default}


def check(cfg, *markers):
    expected, found = leaves(cfg), tabled(*markers)
    assert set(expected) <= set(found)
    for name, value in expected.items():
        default = ast.literal_eval(found[name])
        assert default == (dict(value) if isinstance(value, CfgNode) else value), name
    return expected, found


@pytest.mark.parametrize("host", [torchvision_detection, classification])
def test_the_tables_have_every_key_with_its_default(host):
    expected, found = check(host.get_cfg(), "every host", host.__name__.split(".")[-2])
    own = tabled(host.__name__.split(".")[-2])
    assert set(own) <= set(expected)
    assert len(found) > 50


@pytest.mark.detectron2
def test_the_table_of_detectron2_has_what_detectron2_lacks():
    pytest.importorskip("detectron2")
    from detectron2.config import get_cfg as get_stock_cfg

    from kd_det.hosts.detectron2 import get_cfg

    stock, ours = leaves(get_stock_cfg()), get_cfg()
    expected = {k: v for k, v in leaves(ours).items() if k not in stock}
    found = tabled("every host", "detectron2")
    assert set(expected) <= set(found)
    assert all(
        ast.literal_eval(found[k]) == (dict(v) if isinstance(v, CfgNode) else v)
        for k, v in expected.items()
    )
    assert set(tabled("detectron2")) <= set(expected)
    # A key without a meaning of its own is one of Detectron2's.
    for marker in config_table.SOURCES:
        bare = [key.name for key in config_table.config_keys(marker) if not key.meaning]
        assert not set(bare) - set(stock), marker


def test_keys_are_read_with_the_comments_beside_them():
    source = '''
def _add(cfg):
    # Above
    # two lines.
    cfg.A = CfgNode()
    node = cfg.A
    node.ONE = 1  # behind
    # Above one.
    node.TWO = (1, "x")
    node.THREE = node({"ENABLED": False})
    cfg.OPEN = CfgNode(new_allowed=True)
    other.FOUR = 4


class Base:
    name: ClassVar[str]
    defaults = {"ENABLED": False}


class Halve:
    """Trains on half.

    More.
    """

    name: ClassVar[str] = "HALVE"
    defaults = {
        # Of the images.
        "SHARE": 0.5,
    }
'''
    keys = {k.name: (k.default, k.meaning) for k in config_table._Reader(source).read()}
    assert keys == {
        "A": ("", "Above two lines."),
        "A.ONE": ("1", "behind"),
        "A.TWO": ("(1, 'x')", "Above one."),
        "A.THREE.ENABLED": ("False", "whether it is on"),
        "OPEN": ("{}", ""),
        "KD.HALVE": ("", "Trains on half."),
        "KD.HALVE.SHARE": ("0.5", "Of the images."),
    }


def test_the_page_has_all_tables():
    source = [(ROOT / "docs" / "config.md").read_text()]
    assert source[0].count("<!-- keys of") == len(config_table.SOURCES)
    config_table._fill(None, "config", source)
    assert "<!--" not in source[0]
    assert "| `KD.TASK_WEIGHT` | `1.0` | Of the task losses" in source[0]
    assert '| `KD.WEIGHTS` | `""` |' in source[0]
    assert "| `DATASETS.TRAIN` | `(digit_images_train,)` |" in source[0]
