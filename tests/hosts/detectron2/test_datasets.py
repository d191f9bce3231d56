"""Data sets by name, in Detectron2's own catalog."""

from __future__ import annotations

import pytest

pytest.importorskip("detectron2")

from detectron2.data import DatasetCatalog, MetadataCatalog

from kd_det.core.errors import KDError
from kd_det.data.digits.detection import DigitsSpec, write_digits
from kd_det.hosts.detectron2 import get_cfg
from kd_det.hosts.detectron2.datasets import prepare_datasets, register_datasets

pytestmark = pytest.mark.detectron2


@pytest.fixture
def mini(tmp_path):
    """A config with a small data set by name, registered."""
    cfg = get_cfg()
    data = write_digits(tmp_path / "mini", DigitsSpec(train_images=3, val_images=1))
    name = f"mini_{tmp_path.name}"
    cfg.DATASETS.COCO_JSON[name] = [str(path) for path in data["digits_train"]]
    register_datasets(cfg)
    yield cfg, name
    DatasetCatalog.remove(name)


def test_a_coco_json_in_the_config_is_a_data_set(mini):
    cfg, name = mini
    prepare_datasets(cfg, [name])
    assert len(DatasetCatalog.get(name)) == 3
    assert MetadataCatalog.get(name).evaluator_type == "coco"
    assert MetadataCatalog.get(name).thing_classes == list("0123456789")


def test_registering_again_changes_nothing_and_another_file_is_refused(mini):
    cfg, name = mini
    register_datasets(cfg)
    cfg.DATASETS.COCO_JSON[name] = ["elsewhere.json", "."]
    with pytest.raises(KDError, match=r"not taken"):
        register_datasets(cfg)


def test_an_entry_that_is_no_pair_is_refused():
    cfg = get_cfg()
    cfg.DATASETS.COCO_JSON.half = ["only.json"]
    with pytest.raises(KDError, match=r"DATASETS.COCO_JSON.half"):
        register_datasets(cfg)


def test_the_digits_follow_the_data_root(tmp_path, monkeypatch):
    for folder in ("first", "second"):
        monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / folder))
        register_datasets(get_cfg())
        assert folder in MetadataCatalog.get("digits_train").json_file


def test_missing_coco_names_the_layout_and_the_variable(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    with pytest.raises(KDError) as error:
        prepare_datasets(get_cfg(), ["coco_2017_train"])
    for part in ("coco/annotations/instances_{train,val}2017.json", "DETECTRON2_DATASETS"):
        assert part in str(error.value)
