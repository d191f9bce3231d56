"""What the documentation shows is true: names exist, configs are accepted, Python runs."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import re
import sys
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from kd_det import LOSSES
from kd_det.core.terms import parse_terms
from kd_det.hosts.classification import config as classification
from kd_det.hosts.torchvision_detection import config as torchvision_detection
from kd_det.run.config import literal, merge_config
from kd_det.run.plan import read_plan

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(page for page in (DOCS / "methods").glob("*.md") if page.stem != "index")
TEXTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
SECTIONS = [
    *("Formula", "Taps", "Arguments", "Config", "Python", "Cost", "Published numbers"),
    "Where we differ from reference code",
]


def load_extension():
    path = DOCS / "_ext" / "methods_index.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up.
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


methods_index = load_extension()
METHODS = {method.page: method for method in methods_index.losses()}
PROCEDURES = {method.page: method for method in methods_index.procedures()}


def blocks(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def section(text, title):
    return text.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def named(paths, language):
    """Every block of a language, as a test case with the name of its file."""
    return [
        pytest.param(block, id=f"{path.relative_to(ROOT)}-{k}")
        for path in paths
        for k, block in enumerate(blocks(path.read_text(), language))
    ]


def as_id(path):
    return path.stem


# Pages of methods


def test_every_method_has_a_page_and_every_page_a_method():
    assert [page.stem for page in PAGES] == sorted([*METHODS, *PROCEDURES])


@pytest.mark.parametrize("page", PAGES, ids=as_id)
def test_pages_have_the_same_sections_in_the_same_order(page):
    assert re.findall(r"^## (.*)$", page.read_text(), re.MULTILINE) == SECTIONS
    assert page.read_text().startswith("# ")


@pytest.mark.parametrize("method", METHODS.values(), ids=lambda method: method.page)
def test_the_page_shows_a_config_of_each_of_its_losses(method):
    configs = [yaml.safe_load(block) for block in blocks(method.text, "yaml")]
    terms = [term for config in configs for term in parse_terms(config["KD"]["TERMS"])]
    assert set(method.names) <= {term.loss for term in terms}


@pytest.mark.parametrize("page", PROCEDURES)
def test_the_page_of_a_procedure_switches_it_on(page):
    (name,) = PROCEDURES[page].names
    configs = [yaml.safe_load(block) for block in blocks(PROCEDURES[page].text, "yaml")]
    assert any(config["KD"].get(name, {}).get("ENABLED") for config in configs)


def arguments_table(text, name):
    """``{argument: default as it is written}`` of a page."""
    found = {}
    for row in re.findall(r"^\| (`.*)$", section(text, "Arguments"), re.MULTILINE):
        names, default = row.split(" | ")[:2]
        if known := re.findall(name, names):
            found |= dict.fromkeys(known, default.replace("`", "").strip())
    return found


def check_defaults(written, true):
    assert set(written) == set(true)
    for name, default in true.items():
        if isinstance(default, (bool, int, float, str)):
            shown = written[name].split()[0]
            assert shown == default or literal(shown) == default, name


@pytest.mark.parametrize("method", METHODS.values(), ids=lambda method: method.page)
def test_the_arguments_of_a_page_are_those_of_the_constructors(method):
    true = {}
    for name in method.names:
        parameters = inspect.signature(LOSSES.get(name)).parameters
        true |= {argument: parameter.default for argument, parameter in parameters.items()}
    check_defaults(arguments_table(method.text, r"`([a-z]\w*)`"), true)


@pytest.mark.parametrize("page", PROCEDURES)
def test_the_arguments_of_a_procedure_are_the_keys_of_its_node(page):
    (name,) = PROCEDURES[page].names
    node = dict(classification.get_cfg().KD[name])
    del node["ENABLED"]
    check_defaults(arguments_table(PROCEDURES[page].text, r"`([A-Z_]+)`"), node)


# Configs


@pytest.mark.parametrize("block", named(TEXTS, "yaml"))
def test_configs_are_accepted(block, tmp_path):
    content = yaml.safe_load(block)
    content.pop("_BASE_", None)
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(content))
    detector = content.get("HOST") == "torchvision_detection" or "COCO_JSON" in str(content)
    host = torchvision_detection if detector else classification
    cfg = merge_config(host.get_cfg(), str(path))
    for stage in read_plan(str(path)).stages:
        merge_config(cfg.clone(), str(path), stage.options(tmp_path))


# Python


@pytest.mark.parametrize("block", named(TEXTS, "python"))
def test_python_compiles_and_its_imports_exist(block):
    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.ImportFrom) and node.module.startswith("kd_det"):
            if node.module.startswith("kd_det.hosts.detectron2"):
                pytest.importorskip("detectron2")
            module = importlib.import_module(node.module)
            assert all(hasattr(module, alias.name) for alias in node.names), node.module
    compile(block, "documentation", "exec")


def inputs():
    """What the examples take as given: tensors of four images, or two with boxes."""
    torch.manual_seed(0)
    widths, sides = [16, 32, 64], [16, 8, 4]
    student = [torch.randn(4, c, n, n).requires_grad_() for c, n in zip(widths, sides, strict=True)]
    teacher = [torch.randn(4, c, n, n) for c, n in zip(widths, sides, strict=True)]
    logits = torch.randn(4, 10, requires_grad=True)
    return {
        "widths": widths,
        "student_maps": student,
        "teacher_maps": teacher,
        "student_map": torch.randn(4, 16, 8, 8, requires_grad=True),
        "teacher_map": torch.randn(4, 64, 8, 8),
        "student_logits": logits,
        "teacher_logits": torch.randn(4, 10),
        "light_logits": logits,
        "booster_logits": torch.randn(4, 10),
        "anchors": [anchors(64, side) for side in sides],
        "boxes": [torch.tensor([[8.0, 8.0, 40.0, 40.0]])] * 4,
        "s": [torch.randn(4, 16, 8, 8, requires_grad=True) for _ in range(3)],
        "t": [torch.randn(4, 24, 8, 8) for _ in range(3)],
        "teacher": nn.Linear(2, 2),
        "teacher_taps": {f"stage{k}": teacher[k - 1] for k in (1, 2, 3)},
        "images": torch.rand(4, 3, 8, 8),
        "targets": torch.tensor([0, 1, 2, 3]),
        "indices": torch.arange(4),
        "train": [(torch.rand(3, 8, 8), k) for k in range(4)],
        "augment": None,
    }


def anchors(image, side):
    """One anchor per cell, twice as large as the cell, ``[side * side, 4]``."""
    cell = image / side
    steps = (torch.arange(side) + 0.5) * cell
    centres = torch.cartesian_prod(steps, steps).flip(1)
    return torch.cat([centres - cell, centres + cell], dim=1)


@pytest.mark.parametrize("page", PAGES, ids=as_id)
def test_the_lines_of_a_page_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = inputs()
    for block in blocks(section(page.read_text(), "Python"), "python"):
        exec(compile(block, page.name, "exec"), namespace)
    if page.stem in METHODS:
        assert torch.isfinite(namespace["loss"])
        assert namespace["loss"].requires_grad


def test_every_loss_runs_in_the_lines_of_the_library_page():
    text = (DOCS / "library.md").read_text()
    (block,) = blocks(section(text, "Every loss in two lines"), "python")
    namespace = inputs()
    before = set(namespace)
    exec(compile(block, "library.md", "exec"), namespace)
    made = [v for k, v in namespace.items() if k not in before and isinstance(v, torch.Tensor)]
    # All but MHGD, which learns beforehand.
    assert len(made) == len([name for m in METHODS.values() for name in m.names]) - 1
    assert all(torch.isfinite(loss) and loss.requires_grad for loss in made)


# Names and links

_PATH = re.compile(r"(?<![\w/.-])(?:configs|tools|docs|tests|kd_det)/[\w./*-]*(?P<open>[<{$])?")


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_that_are_named_exist(path):
    for match in _PATH.finditer(path.read_text()):
        name = match[0].rstrip(".")
        assert match["open"] or list(ROOT.glob(name.rstrip("/"))), name


@pytest.mark.parametrize("path", TEXTS[:2], ids=as_id)
def test_links_of_the_front_pages_lead_somewhere(path):
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", path.read_text()):
        assert (ROOT / link).exists(), link


def test_the_readme_lists_every_method():
    text = section((ROOT / "README.md").read_text(), "The methods")
    for method in [*METHODS.values(), *PROCEDURES.values()]:
        (row,) = re.findall(rf"^\|.*\(docs/methods/{method.page}\.md\).*$", text, re.MULTILINE)
        assert all(f"`{name}`" in row for name in method.names)
        marks = [cell.strip() == "yes" for cell in row.split("|")[-3:-1]]
        assert tuple(marks) == methods_index.hosts(method.text)


def test_the_generated_index_has_a_row_per_method():
    index = ["before\n<!-- table of losses -->\n<!-- table of procedures -->\nafter"]
    methods_index._fill(None, methods_index.INDEX, index)
    rows = re.findall(r"^\| \[(.*?)\]\((\w+)\.md\)", index[0], re.MULTILINE)
    assert {page for _, page in rows} == {page.stem for page in PAGES}
    assert "table of" not in index[0]
    shown = (DOCS / "methods" / "index.md").read_text()
    assert shown.count("<!-- table of losses -->") == 1
    assert shown.count("<!-- table of procedures -->") == 1


def test_where_a_method_applies_is_read_from_its_table_of_taps():
    head = "\n## Taps\n| host | taps |\n| --- | --- |\n"
    image, box = "| classifier | `logits` |\n", "| R-CNN | `p2` |\n"
    assert methods_index.hosts(f"{head}{image}## Config") == (True, False)
    assert methods_index.hosts(f"{head}{box}") == (False, True)
    assert methods_index.hosts(f"{head}{image}{box}\nmore") == (True, True)
    assert methods_index.hosts(f"\n## Taps\n\n## Config\n{box}") == (False, False)
