"""A module imports from floors below it: losses know no host, the core knows no framework."""

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
]

# What a module of the core may import besides the standard library, torch and the core itself.
EXTRA = {
    "class_names": {"fvcore"},
    "cli": {"fvcore"},
    "registry": {"fvcore"},
    "config": {"fvcore", "yaml"},
    "workbench": {"fvcore"},
    "checkpoint": {"safetensors"},
    "detection_kcd": {"fvcore"},
}

CORE = sorted(
    [*PACKAGE.glob("*.py"), *(p for d in ("losses", "balance") for p in (PACKAGE / d).glob("*.py"))]
)
HOSTS = sorted((PACKAGE / "hosts").rglob("*.py"))


def imports(path: Path) -> Iterator[str]:
    """Dotted names of everything a file imports, at any depth of its code."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    package = parts if path.name == "__init__.py" else parts[:-1]
    package = [part for part in package if part != "__init__"]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def is_below(name: str, *modules: str) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def ident(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", CORE, ids=ident)
def test_the_core_imports_torch_and_itself(path):
    allowed = {"torch", "kd_det", *sys.stdlib_module_names}
    if path.parent == PACKAGE:
        allowed |= EXTRA.get(path.stem, set())
    assert {name.partition(".")[0] for name in imports(path)} <= allowed


@pytest.mark.parametrize("path", CORE, ids=ident)
def test_the_core_imports_no_host_and_no_data(path):
    above = [n for n in imports(path) if is_below(n, "kd_det.hosts", "kd_det.data")]
    assert above == []


@pytest.mark.parametrize("path", [p for p in CORE if p.parent.name == "losses"], ids=ident)
def test_losses_import_nothing_above_them(path):
    modules = ("losses", "adaptors", "checks", "gather", "registry")
    below = tuple(f"kd_det.{module}" for module in modules)
    above = [n for n in imports(path) if is_below(n, "kd_det") and not is_below(n, *below)]
    assert above == []


@pytest.mark.parametrize("path", HOSTS, ids=ident)
def test_hosts_do_not_import_each_other(path):
    own = path.relative_to(PACKAGE / "hosts").parts[0].removesuffix(".py")
    others = [
        name
        for name in imports(path)
        if is_below(name, "kd_det.hosts") and not is_below(name, f"kd_det.hosts.{own}")
    ]
    assert others == []


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

import kd_det.checkpoint, kd_det.cli, kd_det.config, kd_det.distiller, kd_det.losses, kd_det.runs
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
