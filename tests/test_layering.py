"""Imports point down: the floors of the package as data, and every way a module can be imported."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "kd_det"

# From the lowest to the highest. A room imports from rooms below its floor and from itself.
FLOORS = (
    ("core",),
    ("losses", "balance"),
    ("procedures", "data"),
    ("run", "bench"),
    ("hosts", "document"),
    ("preflight", "report", "visualize", "tuning"),
    ("app",),
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}

# A host imports from these beside itself, and they from each other in this order only.
SHARED_BY_HOSTS = ("base", "detection", "lightning")

# Modules that import a name which is data: a host by the name in a config, a command by its own.
IMPORT_BY_NAME = {"kd_det/hosts/base.py", "kd_det/app/main.py"}

# What the lowest floors may import besides the standard library and torch.
THIRD_PARTY = {
    "core": {"fvcore"},
    "losses": set(),
    "balance": set(),
    "procedures": {"fvcore"},
}
# What a module of them may import when it is needed, that is, inside a function.
IMPORTED_LATE = {"kd_det/core/checkpoint.py": {"safetensors"}}

HOST_LIBRARIES = [
    "detectron2",
    "lightning",
    "pytorch_lightning",
    "torchvision",
    "torchmetrics",
    "cv2",
    "pycocotools",
    "sklearn",
    "matplotlib",
    "rich",
    "yacs",
    "yaml",
    "jinja2",
]

MODULES = sorted(PACKAGE.rglob("*.py"))
_IMPORTERS = {"import_module", "__import__"}


def imports(tree: ast.AST, package: list[str]) -> Iterator[str | None]:
    """Dotted names of everything a module imports, at any depth of its code.

    Calls of ``import_module`` and ``__import__`` count; None stands for a name that is computed.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and _called(node.func) in _IMPORTERS:
            yield from _literal(node)


def _called(function: ast.expr) -> str:
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def _literal(call: ast.Call) -> Iterator[str | None]:
    name = call.args[0] if call.args else None
    if isinstance(name, ast.Constant) and isinstance(name.value, str):
        yield name.value
    elif isinstance(name, ast.JoinedStr) and isinstance(name.values[0], ast.Constant):
        # The beginning of an f-string already tells the room.
        yield str(name.values[0].value).rstrip(".")
        yield None
    else:
        yield None


def of(path: Path) -> list[str | None]:
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    package = parts[:-1]
    return list(imports(ast.parse(path.read_text()), package))


def ident(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def room(name: str) -> str:
    """The room of a dotted name inside the package; empty for the package itself."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 and parts[0] == "kd_det" and parts[1] in FLOOR else ""


def violations(path: Path, names: list[str | None]) -> list[str]:
    """Imports that do not point down."""
    own = path.relative_to(PACKAGE).parts[0]
    found = []
    for name in names:
        if name is None:
            if ident(path) not in IMPORT_BY_NAME:
                found.append("a computed name")
        elif (other := room(name)) and other != own and FLOOR[other] >= FLOOR[own]:
            found.append(name)
    return found


@pytest.mark.parametrize("path", [p for p in MODULES if p.parent != PACKAGE], ids=ident)
def test_imports_point_down(path):
    assert violations(path, of(path)) == []


def test_every_room_has_its_floor():
    rooms = {path.name for path in PACKAGE.iterdir() if any(path.glob("*.py"))}
    assert rooms == set(FLOOR)
    assert [p.name for p in PACKAGE.glob("*.py")] == ["__init__.py"]
    assert len(rooms) <= 14


@pytest.mark.parametrize(
    "planted",
    [
        "from kd_det.hosts import base",
        "import kd_det.app.train",
        "def late():\n    from kd_det.run.config import read_host",
        "import importlib\nimportlib.import_module('kd_det.bench.workbench')",
        "from importlib import import_module\nimport_module(f'kd_det.hosts.{name}.train')",
        "__import__('kd_det.report')",
        "import importlib\nimportlib.import_module(somewhere)",
    ],
)
def test_a_planted_upward_import_is_found(planted):
    names = list(imports(ast.parse(planted), ["kd_det", "core"]))
    assert violations(PACKAGE / "core" / "taps.py", names)


def _host(path: Path) -> str:
    return path.relative_to(PACKAGE / "hosts").parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", sorted((PACKAGE / "hosts").rglob("*.py")), ids=ident)
def test_a_host_imports_sideways_only_what_hosts_share(path):
    own = _host(path)
    allowed = {own, *SHARED_BY_HOSTS}
    if own in SHARED_BY_HOSTS:
        allowed = {own, *SHARED_BY_HOSTS[: SHARED_BY_HOSTS.index(own)]}
    others = [
        name
        for name in of(path)
        if name is not None
        and name.startswith("kd_det.hosts.")
        and name.split(".")[2] not in allowed
        and ident(path) not in IMPORT_BY_NAME
    ]
    assert others == []


@pytest.mark.parametrize(
    "path", [p for p in MODULES if p.relative_to(PACKAGE).parts[0] in THIRD_PARTY], ids=ident
)
def test_the_lowest_floors_import_torch_and_themselves(path):
    allowed = {"torch", "kd_det", *sys.stdlib_module_names}
    allowed |= THIRD_PARTY[path.relative_to(PACKAGE).parts[0]]
    late = IMPORTED_LATE.get(ident(path), set())
    assert {name.partition(".")[0] for name in of(path) if name} <= allowed | late
    first = ast.Module(
        [
            node
            for node in ast.parse(path.read_text()).body
            if not isinstance(node, ast.FunctionDef)
        ],
        type_ignores=[],
    )
    assert {str(name).partition(".")[0] for name in imports(first, [])} <= allowed


def test_no_module_imports_itself_through_others():
    names = {
        ident(p).removesuffix(".py").removesuffix("/__init__").replace("/", "."): p for p in MODULES
    }
    edges = {}
    for name, path in names.items():
        targets = set()
        for imported in of(path):
            # "from package import name" may mean a module or something a module defines.
            for candidate in (imported, (imported or "").rpartition(".")[0]):
                if candidate in names and candidate not in (name, "kd_det"):
                    targets.add(candidate)
                    break
        edges[name] = targets
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            for target in sorted(edges[name]):
                visit(target, (*path, name))
            done.add(name)

    for name in sorted(edges):
        visit(name, ())


STEP = """
import sys

for name in sys.argv[1:]:
    sys.modules[name] = None  # makes any import of it an ImportError

try:
    import torchvision
except ImportError:
    pass
else:
    sys.exit("torchvision is not blocked")

import torch
from torch import nn

import kd_det, kd_det.losses, kd_det.balance, kd_det.procedures.kcd.condensation
from kd_det import Distiller, FrozenTeacher, TapRecorder, tap_specs

student, teacher = (
    nn.Sequential(nn.Conv2d(3, c, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * c, 5)) for c in (2, 4)
)
teacher = FrozenTeacher(teacher)
taps = {"map": "1", "logits": "3"}
student_taps, teacher_taps = TapRecorder(student, taps), TapRecorder(teacher, taps)
images = torch.randn(2, 3, 6, 6)
with student_taps.recording(), teacher_taps.recording():
    student(images), teacher(images)
s, t = student_taps.read(), teacher_taps.read()
terms = {
    "hint": {"LOSS": "FitNet", "TAPS": ["map"]},
    "review": {"LOSS": "ReviewKD", "TAPS": ["map"]},
    "soft": {"LOSS": "KD", "TAPS": ["logits"]},
}
distiller = Distiller(terms, tap_specs(s), tap_specs(t))
sum(distiller(s, t).values()).backward()
assert all(p.grad is not None for p in student.parameters())
assert all(p.grad is None for p in teacher.model.parameters())
"""


def test_a_distillation_step_runs_with_every_host_library_blocked(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", STEP, *HOST_LIBRARIES],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
