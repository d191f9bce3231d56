"""Config files that name others in ``_BASE_``: one or several, and what is refused."""

from __future__ import annotations

import pytest
import yaml
from fvcore.common.config import CfgNode

from kd_det.run.config import add_kd_config, merge_config
from kd_det.run.yaml_files import load_yaml, merge_file


@pytest.fixture
def write(tmp_path):
    def make(text, name="config.yaml"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        return str(path)

    return make


def test_of_several_bases_the_later_wins_and_the_file_over_all(write):
    write("A: {x: 1, y: 1, z: 1}\nL: [1, 2, 3]", "first.yaml")
    write("A: {y: 2, z: 2}\nL: [4]", "second.yaml")
    file = write("_BASE_: [first.yaml, second.yaml]\nA: {z: 3}")
    assert load_yaml(file) == {"A": {"x": 1, "y": 2, "z": 3}, "L": [4]}


def test_a_single_base_is_a_list_of_one(write):
    write("A: {x: 1, y: 1}", "first.yaml")
    one, many = "_BASE_: first.yaml\nA: {y: 2}", "_BASE_: [first.yaml]\nA: {y: 2}"
    assert load_yaml(write(one)) == load_yaml(write(many)) == {"A": {"x": 1, "y": 2}}


def test_paths_are_relative_to_the_file_that_names_them(write, tmp_path, monkeypatch):
    write("A: 1", "models/base.yaml")
    write("_BASE_: base.yaml\nB: 2", "models/pair.yaml")
    write("C: 3", "methods/kd.yaml")
    file = write("_BASE_: [models/pair.yaml, methods/kd.yaml]")
    monkeypatch.chdir(tmp_path / "methods")
    assert load_yaml(file) == {"A": 1, "B": 2, "C": 3}
    absolute = write(f"_BASE_: {tmp_path / 'models' / 'pair.yaml'}", "absolute.yaml")
    assert load_yaml(absolute) == {"A": 1, "B": 2}


def test_a_file_may_be_the_base_of_several(write):
    write("A: 1\nB: 1", "base.yaml")
    write("_BASE_: base.yaml\nB: 2", "pair.yaml")
    write("_BASE_: base.yaml\nC: 3", "method.yaml")
    # The method comes later, with everything that it is based on.
    assert load_yaml(write("_BASE_: [pair.yaml, method.yaml]")) == {"A": 1, "B": 1, "C": 3}


def test_terms_keep_the_order_of_their_files(write):
    write("KD: {TERMS: {review: {WEIGHT: 1.0}}}", "review.yaml")
    write("KD: {TERMS: {soft: {WEIGHT: 2.0}}}", "kd.yaml")
    for names in (["review", "kd"], ["kd", "review"]):
        content = load_yaml(write(f"_BASE_: [{names[0]}.yaml, {names[1]}.yaml]"))
        order = [{"review": "review", "kd": "soft"}[name] for name in names]
        assert list(content["KD"]["TERMS"]) == order


@pytest.mark.parametrize(
    ("files", "parts"),
    [
        (
            {"config.yaml": "_BASE_: [a.yaml, nowhere.yaml]", "a.yaml": "A: 1"},
            ["No such file", "nowhere.yaml", "or the _BASE_ of", "config.yaml"],
        ),
        (
            {"config.yaml": "_BASE_: a.yaml", "a.yaml": "_BASE_: [b.yaml]", "b.yaml": "- 1"},
            ["YAML mappings", "received list in", "b.yaml", "or the _BASE_ of", "a.yaml"],
        ),
        (
            {"config.yaml": "_BASE_: a.yaml", "a.yaml": "_BASE_: [config.yaml]"},
            ["no file in the _BASE_ of itself", "config.yaml -> ", "a.yaml -> ", "take "],
        ),
        ({"config.yaml": "_BASE_: config.yaml"}, ["no file in the _BASE_ of itself"]),
        ({"config.yaml": "_BASE_: {a: b}"}, ["to be a path or a list of paths", "{'a': 'b'}"]),
        ({"config.yaml": "_BASE_: [[a.yaml]]"}, ["to be a path or a list of paths"]),
        ({"config.yaml": "_BASE_:"}, ["to be a path or a list of paths", "None"]),
        (
            {"config.yaml": "_BASE_: a.yaml\nKD: {TERMS: {x: 1}}", "a.yaml": "KD: {TERMS: 3}"},
            ["value of KD.TERMS in", "config.yaml", "int", "received a mapping"],
        ),
        (
            {"config.yaml": "_BASE_: a.yaml", "a.yaml": "KD: {CLASS_MAP: {1: cat}}"},
            ["text as the keys of KD.CLASS_MAP", "put it in quotes: '1'"],
        ),
    ],
)
def test_what_cannot_be_composed_is_refused(write, refuses, files, parts):
    for name, text in files.items():
        write(text, name)
    with refuses(*parts):
        load_yaml(write(files["config.yaml"]))


def test_a_stock_config_merges_the_same_bases(write):
    """Other tools read these files with fvcore's own loader."""
    write("A: {x: 1, y: 1}", "first.yaml")
    write("A: {y: 2}", "second.yaml")
    file = write("_BASE_: [first.yaml, second.yaml]\nA: {x: 5}")
    assert CfgNode.load_yaml_with_base(file) == load_yaml(file)
    ours, stock = (CfgNode({"A": {"x": 0, "y": 0}}) for _ in range(2))
    merge_file(ours, file)
    stock.merge_from_file(file)
    assert ours == stock == {"A": {"x": 5, "y": 2}}


def test_a_dumped_config_stands_alone(write):
    write("OUTPUT_DIR: x", "first.yaml")
    cfg = CfgNode({"OUTPUT_DIR": "./output"})
    add_kd_config(cfg)
    merge_config(cfg, write("_BASE_: [first.yaml]"))
    assert "_BASE_" not in yaml.safe_load(cfg.dump())
    assert cfg.OUTPUT_DIR == "x"


@pytest.mark.detectron2
def test_model_zoo_configs_are_read_as_by_detectron2():
    zoo = pytest.importorskip("detectron2.model_zoo")
    from detectron2.config import get_cfg

    zoo_names = ("COCO-Detection/retinanet_R_101_FPN_3x.yaml", "Cityscapes/mask_rcnn_R_50_FPN.yaml")
    for name in zoo_names:
        file = zoo.get_config_file(name)
        ours, stock = get_cfg(), get_cfg()
        merge_file(ours, file)
        stock.merge_from_file(file)
        assert ours.dump() == stock.dump()


@pytest.mark.detectron2
def test_detectron2_translates_its_oldest_keys(write):
    config = pytest.importorskip("detectron2.config")
    cfg = config.get_cfg()
    merge_file(cfg, write("VERSION: 1\nMODEL: {RPN: {HEAD_NAME: OldHead}}"))
    assert cfg.MODEL.RPN.HEAD_NAME == "OldHead"
    assert cfg.VERSION == 2
