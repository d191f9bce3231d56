"""What holds for every config that is shipped, whatever its host."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import json
from pathlib import Path

import pytest

import kd_det.losses  # noqa: F401  registers them
from kd_det.core.registry import LOSSES
from kd_det.hosts.base import HOSTS, read_host
from kd_det.run.config import merge_config
from kd_det.run.yaml_files import load_yaml

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "configs"
# What divides the sum of a loss, by the name of the argument.
REDUCTIONS = {"reduction", "mode", "normalizer"}
# Of every config at commit c399870, before configs were composed of pairs and methods: a hash of
# what it changes in the defaults of its host.
RESOLVED = json.loads((Path(__file__).parent / "resolved_configs.json").read_text())
# Path at that commit -> path today.
RENAMED = {
    "configs/classification/digits/student.yaml": (
        "configs/classification/digits/pairs/resnet14_x0.5_resnet20.yaml"
    ),
    "configs/digits/student_frcnn.yaml": "configs/digits/pairs/frcnn.yaml",
    "configs/digits/student_mrcnn.yaml": "configs/digits/pairs/mrcnn.yaml",
}


def arguments(name):
    return inspect.signature(LOSSES.get(name).__init__).parameters.keys()


def test_every_loss_names_its_reduction():
    assert [name for name, _ in LOSSES if not REDUCTIONS & arguments(name)] == []


@pytest.mark.parametrize("path", sorted(FOLDER.rglob("*.yaml")), ids=lambda path: path.stem)
def test_a_weight_stands_beside_its_reduction(path):
    """Published weights mean nothing without it."""
    terms = load_yaml(str(path)).get("KD", {}).get("TERMS", {})
    for name, term in terms.items():
        if "LOSS" in term:
            named = REDUCTIONS & arguments(term["LOSS"])
            assert [key for key in named if key.upper() not in term] == [], name


def flat(node, prefix=""):
    for key, value in node.items():
        if isinstance(value, dict) and value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def fingerprint(cfg, defaults):
    """Of the keys that differ from the defaults, and of the order of the terms."""
    teacher = cfg.KD.TEACHER
    names = {today: then for then, today in RENAMED.items()}
    teacher.CONFIG_FILE = names.get(teacher.CONFIG_FILE, teacher.CONFIG_FILE)
    known = dict(flat(defaults))
    changed = {k: v for k, v in flat(cfg) if k not in known or known[k] != v}
    text = json.dumps([changed, list(cfg.KD.TERMS)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@pytest.mark.parametrize(
    "host",
    [pytest.param(h, marks=pytest.mark.detectron2 if h == "detectron2" else ()) for h in HOSTS],
)
def test_every_config_resolves_as_before_the_composition(host, monkeypatch):
    if host == "detectron2" and importlib.util.find_spec("detectron2") is None:
        pytest.skip("Detectron2 is not installed")
    monkeypatch.chdir(ROOT)
    defaults = importlib.import_module(f"kd_det.hosts.{host}.config").get_cfg()
    paths = {then: RENAMED.get(then, then) for then in RESOLVED}
    own = {then: today for then, today in paths.items() if read_host(today) == host}
    assert own
    differing = [
        today
        for then, today in own.items()
        if fingerprint(merge_config(defaults.clone(), today), defaults) != RESOLVED[then]
    ]
    assert differing == []
