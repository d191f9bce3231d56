"""Sphinx extension: the tables of config keys, read from the code that sets their defaults.

A key is an assignment such as ``cfg.KD.TASK_WEIGHT = 1.0`` in a function that fills a config, or an
entry of a procedure's ``defaults``. Its meaning is the comment above it or behind it. Keys without
one are those that Detectron2 has as well.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parents[2] / "kd_det"
PAGE = "config"
#: marker on the page -> files, as patterns below the package
SOURCES = {
    "every host": ("run/config.py", "procedures/**/*.py"),
    "torchvision_detection": ("hosts/torchvision_detection/config.py",),
    "classification": ("hosts/classification/config.py",),
    "detectron2": ("hosts/detectron2/config.py", "hosts/detectron2/backbones.py"),
}


_COMMON = {"ENABLED": "whether it is on"}


@dataclass(frozen=True)
class Key:
    """One row.

    Attributes:
        name: with the nodes it is in, such as ``KD.TASK_WEIGHT``.
        default: as Python source; empty for a node.
        meaning: plain text.
    """

    name: str
    default: str
    meaning: str


def config_keys(marker: str) -> list[Key]:
    """The keys of one table, in the order of the code; the last default of a key counts."""
    keys: dict[str, Key] = {}
    for pattern in SOURCES[marker]:
        for path in sorted(PACKAGE.glob(pattern)):
            for key in _Reader(path.read_text()).read():
                known = keys.get(key.name)
                meaning = key.meaning or (known.meaning if known else "")
                keys[key.name] = Key(key.name, key.default, meaning)
    return [key for key in keys.values() if key.default or key.meaning]


class _Reader:
    """Reads the keys of one file."""

    def __init__(self, source: str) -> None:
        self.tree = ast.parse(source)
        self.lines = source.splitlines()
        self.comments: dict[int, str] = {}
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            if token.type == tokenize.COMMENT:
                self.comments[token.start[0]] = token.string.lstrip("# ")

    def read(self) -> Iterator[Key]:
        for node in ast.walk(self.tree):
            if isinstance(node, ast.FunctionDef):
                yield from self._function(node)
            elif isinstance(node, ast.ClassDef):
                yield from self._procedure(node)

    def _function(self, function: ast.FunctionDef) -> Iterator[Key]:
        nodes = {"cfg": ""} if any(a.arg == "cfg" for a in function.args.args) else {}
        for statement in ast.walk(function):
            if not isinstance(statement, ast.Assign) or len(statement.targets) != 1:
                continue
            target, value = statement.targets[0], statement.value
            if _is_call_of(value, "CfgNode") and isinstance(target, ast.Name):
                nodes[target.id] = ""
            elif isinstance(target, ast.Name) and (path := _path(value, nodes)):
                nodes[target.id] = path
            elif isinstance(target, ast.Attribute) and (path := _path(target, nodes)):
                yield from self._key(path, value, statement)

    def _procedure(self, body: ast.ClassDef) -> Iterator[Key]:
        fields: dict[str, ast.expr] = {}
        for statement in body.body:
            if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
                fields[statement.targets[0].id] = statement.value
            elif isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                fields[statement.target.id] = statement.value or ast.Constant(None)
        name, defaults = fields.get("name"), fields.get("defaults")
        named = isinstance(name, ast.Constant) and isinstance(name.value, str)
        if named and isinstance(defaults, ast.Dict):
            meaning = (ast.get_docstring(body) or "").split("\n\n")[0].replace("\n", " ")
            yield Key(f"KD.{name.value}", "", meaning)
            for key, value in zip(defaults.keys, defaults.values, strict=True):
                if isinstance(key, ast.Constant):
                    yield from self._key(f"KD.{name.value}.{key.value}", value, key)

    def _key(self, path: str, value: ast.expr, place: Any) -> Iterator[Key]:
        meaning = self._meaning(path, place.lineno, value.end_lineno or place.lineno)
        if isinstance(value, ast.Call):
            arguments = value.args
            if arguments and isinstance(arguments[0], ast.Dict):
                for key, each in zip(arguments[0].keys, arguments[0].values, strict=True):
                    if isinstance(key, ast.Constant):
                        entry = f"{path}.{key.value}"
                        common = _COMMON.get(str(key.value), "")
                        yield Key(entry, ast.unparse(each), meaning or common)
            else:
                # A node, or one whose keys are the user's.
                yield Key(path, "{}" if value.keywords else "", meaning)
        else:
            yield Key(path, ast.unparse(value), meaning)

    def _meaning(self, path: str, first: int, last: int) -> str:
        above, line = [], first - 1
        while self.lines[line - 1].strip().startswith("#"):
            above.insert(0, self.comments[line])
            line -= 1
        text = " ".join([*above, self.comments.get(last, "")]).strip()
        return text or _COMMON.get(path.rpartition(".")[2], "")


def _is_call_of(value: ast.expr, name: str) -> bool:
    return (
        isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id == name
    )


def _path(value: ast.expr, nodes: dict[str, str]) -> str:
    """``KD.TEACHER`` for ``cfg.KD.TEACHER``; empty where it is no part of a config."""
    names = []
    while isinstance(value, ast.Attribute):
        names.insert(0, value.attr)
        value = value.value
    if not names or not isinstance(value, ast.Name) or value.id not in nodes:
        return ""
    path = [nodes[value.id], *names] if nodes[value.id] else names
    return ".".join(path) if all(name.isupper() for name in names) else ""


def table(marker: str) -> str:
    """A Markdown table of the keys of a marker."""
    rows = ["| key | default | meaning |", "| --- | --- | --- |"]
    for key in config_keys(marker):
        default = f"`{_shown(key.default)}`" if key.default else ""
        meaning = key.meaning or "as in Detectron2"
        meaning = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", meaning)
        meaning = re.sub(r"([|<*])", r"\\\1", meaning)
        rows.append(f"| `{key.name}` | {default} | {meaning} |")
    return "\n".join(rows)


def _shown(source: str) -> str:
    """A default as a config file has it."""
    if source.startswith("'"):
        return source[1:-1] or '""'
    return source.replace("'", "")


def setup(app: Any) -> dict[str, bool]:
    app.connect("source-read", _fill)
    # Built anew every time: what it depends on is no document.
    app.connect("env-get-outdated", lambda *_: [PAGE])
    return {"parallel_read_safe": True}


def _fill(app: Any, name: str, source: list[str]) -> None:
    if name == PAGE:
        for marker in SOURCES:
            source[0] = source[0].replace(f"<!-- keys of {marker} -->", table(marker))
