"""Every config file and key that a message, a page or a comment names is there."""

from __future__ import annotations

import importlib
import itertools
import re
from pathlib import Path

import pytest

from kd_det.hosts.base import HOSTS
from kd_det.run.config import _keys

ROOT = Path(__file__).resolve().parents[1]
FILES = ("*.md", "Makefile", "docs/**/*.md", "kd_det/**/*.py", "tools/*.py", "configs/**/*.yaml")
TEXTS = {
    path.relative_to(ROOT).as_posix(): path.read_text()
    for pattern in FILES
    for path in ROOT.glob(pattern)
    if "_build" not in path.parts and path.name != "CHANGELOG.md"
}
_PATH = re.compile(r"(?<![\w/])configs/[\w./{},<>*-]*")
_KEY = re.compile(r"(?<![\w./-])(?:KD|[A-Z]{4,})(?:\.[A-Z][A-Z0-9_]+)+(?![\w-])(?!\.[a-z])")
# Names below these are a user's own.
_OPEN = ("KD.TERMS", "KD.CLASS_MAP", "KD.BALANCE.SHARES", "DATASETS.COCO_JSON")
# A procedure that pages and docstrings take as an example of a new one.
_EXAMPLES = ("KD.HALVE",)


def paths_in(text):
    """Globs of all files that a text names; ``{a,b}`` and ``<a>`` are written out or widened."""
    for match in _PATH.finditer(text):
        name = re.sub(r"<[^>]*>", "*", match.group())
        name = name.split(",")[0] if "{" not in name else name
        parts = re.split(r"\{([^}]*)\}", name)
        choices = [
            # One name in braces is a field of an f-string.
            ([part] if i % 2 == 0 else part.split(",") if "," in part else ["*"])
            for i, part in enumerate(parts)
        ]
        for choice in itertools.product(*choices):
            yield "".join(choice).rstrip(".,/")


def keys_in(text):
    yield from (match.group() for match in _KEY.finditer(text))


def missing_paths(text):
    return [p for p in paths_in(text) if not any(ROOT.glob(p))]


def test_every_config_that_is_named_exists():
    missing = {name: missing_paths(text) for name, text in TEXTS.items()}
    assert {name: paths for name, paths in missing.items() if paths} == {}


@pytest.mark.parametrize(
    ("text", "missing"),
    [
        ("give configs/nowhere.yaml, or", ["configs/nowhere.yaml"]),
        ("see `configs/digits/kd_frcnn.yaml`.", []),
        ("configs/{digits,nowhere}/kd_frcnn.yaml", ["configs/nowhere/kd_frcnn.yaml"]),
        ("configs/{folder}/teacher_frcnn.yaml", []),
        ("configs/digits/<method>_frcnn.yaml", []),
        ("configs/digits*/no_*.yaml", ["configs/digits*/no_*.yaml"]),
    ],
)
def test_a_config_that_is_not_there_is_found(text, missing):
    assert missing_paths(text) == missing


@pytest.fixture(scope="module")
def known():
    pytest.importorskip("detectron2")
    configs = [importlib.import_module(f"kd_det.hosts.{host}.config").get_cfg() for host in HOSTS]
    return {key for cfg in configs for key in _keys(cfg)}


def unknown_keys(text, known):
    return sorted(
        {k for k in keys_in(text) if k not in known and not k.startswith((*_OPEN, *_EXAMPLES))}
    )


@pytest.mark.detectron2
def test_every_key_that_is_named_exists(known):
    unknown = {name: unknown_keys(text, known) for name, text in TEXTS.items()}
    assert {name: keys for name, keys in unknown.items() if keys} == {}


@pytest.mark.detectron2
def test_a_key_that_is_not_there_is_found(known):
    text = "set KD.TEACHER.WEIGHT, KD.ENABLED, SOLVER.EPOCHS or KD.TERMS.review.WEIGHT in README.md"
    assert unknown_keys(text, known) == ["KD.TEACHER.WEIGHT", "SOLVER.EPOCHS"]
