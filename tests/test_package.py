"""What is installed: the wheel holds the configs, and each part names the packages it imports."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from kd_det.app.main import COMMANDS, EXTRAS
from kd_det.run import yaml_files
from kd_det.run.yaml_files import config_path, load_yaml
from tests.test_layering import imports

tomllib = pytest.importorskip("tomllib")  # Python 3.11

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SHIPPED = ("kd_det", "configs")
# What an import statement calls a distribution of another name.
DISTRIBUTIONS = {
    "cv2": "opencv-python-headless",
    "PIL": "pillow",
    "sklearn": "scikit-learn",
    "yaml": "fvcore",  # which depends on PyYAML
    "iopath": "fvcore",
    "mlflow": "mlflow-skinny",
}
# Imported where a user asks for it by a key or a file, and refused by a sentence of its own.
ON_REQUEST = {"timm", "wandb", "mlflow-skinny", "safetensors"}
# Needed by what is imported, which does not depend on it.
INDIRECT = {"torchvision": {"tensorboard"}, "classification": {"tensorboard"}} | {
    "detectron2": {"tensorboard", "setuptools", "opencv-python-headless"}
}


def names(requirements):
    """Distributions that a list of requirements names, without versions and extras."""
    cut = (r.split(">")[0].split("<")[0].split("[")[0].split("-cpu")[0] for r in requirements)
    return {name.strip().lower() for name in cut}


BASE = names(PROJECT["dependencies"])
OPTIONAL = {extra: names(r) for extra, r in PROJECT["optional-dependencies"].items()}


def third_party(package):
    """Distributions that the modules of a package import, at any depth of their code."""
    path = ROOT / package.replace(".", "/")
    found = set()
    for file in path.rglob("*.py") if path.is_dir() else [path.with_suffix(".py")]:
        parts = file.relative_to(ROOT).parts[:-1]
        for name in imports(ast.parse(file.read_text()), list(parts)):
            top = (name or "kd_det").partition(".")[0]
            if top not in {"kd_det", "__future__", *sys.stdlib_module_names}:
                found.add(DISTRIBUTIONS.get(top, top))
    return found - ON_REQUEST


def parts_of(extra):
    return [package for package, own in EXTRAS.items() if own == extra]


@pytest.mark.parametrize("extra", sorted(set(EXTRAS.values()) - {"all"}))
def test_an_extra_holds_what_its_packages_import(extra):
    imported = set().union(*map(third_party, parts_of(extra)))
    imported |= third_party("kd_det.hosts.lightning") if "lightning" in OPTIONAL[extra] else set()
    allowed = INDIRECT.get(extra, set())
    if extra == "report":  # for runs on these hosts, which bring them
        imported -= {"lightning", "detectron2"}
    assert imported - BASE == OPTIONAL[extra] - allowed


def test_without_an_extra_only_the_base_is_imported():
    rooms = {p.name for p in (ROOT / "kd_det").iterdir() if p.is_dir() and any(p.glob("*.py"))}
    optional = {package.split(".")[1] for package in EXTRAS}
    for room in sorted(rooms - optional):
        assert third_party(f"kd_det.{room}") <= BASE, room


def test_all_is_every_extra_that_the_index_has():
    (everything,) = PROJECT["optional-dependencies"]["all"]
    listed = set(everything.removeprefix("kd_det[").removesuffix("]").split(","))
    assert listed == set(EXTRAS.values()) - {"all", "detectron2"} | {"safetensors"}


def test_the_console_command_is_there():
    assert PROJECT["scripts"] == {"kd-det": "kd_det.app.main:main"}
    assert set(COMMANDS) >= {"train", "preflight", "report", "visualize", "tune", "export"}


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    source = tmp_path_factory.mktemp("source")
    for folder in SHIPPED:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / folder, source / folder, ignore=ignored)
    for file in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps"]
    command += ["--no-build-isolation", "--wheel-dir", str(source / "dist"), str(source)]
    subprocess.run(command, check=True, timeout=300, capture_output=True)
    (built,) = (source / "dist").glob("kd_det-*.whl")
    return built


def test_the_wheel_holds_every_module_page_and_config(wheel):
    with zipfile.ZipFile(wheel) as file:
        inside = {name for name in file.namelist() if ".dist-info/" not in name}
    package = {
        p.relative_to(ROOT).as_posix()
        for p in (ROOT / "kd_det").rglob("*")
        if p.is_file() and "__pycache__" not in p.parts
    }
    configs = {f"kd_det/{p.relative_to(ROOT).as_posix()}" for p in ROOT.glob("configs/**/*.yaml")}
    assert inside == package | configs


def test_configs_are_found_in_a_folder_without_any(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as file:
        file.extractall(tmp_path / "site")
    (tmp_path / "empty").mkdir()
    program = (
        f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r})\n"
        "import kd_det, kd_det.run.config\n"
        "from kd_det.hosts.base import load_config\n"
        "from kd_det.hosts.torchvision_detection.teacher import teacher_config\n"
        "cfg = load_config('configs/digits_torchvision/reviewkd_kd_frcnn.yaml')\n"
        "print(kd_det.__file__, *cfg.KD.TERMS, teacher_config(cfg).OUTPUT_DIR)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path / "empty",
        env={"PATH": ""},
        check=True,
        capture_output=True,
        text=True,
    )
    file, *rest = done.stdout.split()
    assert file.startswith(str(tmp_path / "site"))
    assert rest == ["review", "roi_logits", "outputs/digits_torchvision/teacher_frcnn"]


class TestConfigPath:
    """``configs/...`` is a file of the working directory, or else one of the package."""

    NAME = "configs/digits_torchvision/teacher_frcnn.yaml"

    def test_a_shipped_file_is_found_from_anywhere(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        assert Path(config_path(self.NAME)) == ROOT / self.NAME

    def test_a_file_of_the_working_directory_comes_first(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        own = Path(self.NAME)
        own.parent.mkdir(parents=True)
        own.write_text("SEED: 7")
        assert config_path(self.NAME) == self.NAME
        assert load_yaml(self.NAME) == {"SEED": 7}

    @pytest.mark.parametrize("name", ["", "configs", "configs/nowhere.yaml", "digits/at.yaml"])
    def test_other_paths_stay_as_they_are(self, name, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        assert config_path(name) == name

    def test_a_base_may_be_a_shipped_file(self, tmp_path):
        own = tmp_path / "own.yaml"
        own.write_text(f"_BASE_: {self.NAME}\nSEED: 7")
        content = load_yaml(str(own))
        assert content["SEED"] == 7
        assert content["HOST"] == "torchvision_detection"

    def test_an_installed_package_holds_them_itself(self):
        assert yaml_files.SHIPPED == ROOT / "configs"  # in a checkout they stand beside it
