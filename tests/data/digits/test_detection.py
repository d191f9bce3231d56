"""The digits data: deterministic, honest about its splits, readable by every COCO reader."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from pycocotools.coco import COCO

from kd_det.core.errors import KDError
from kd_det.data.coco_json import check_coco_json
from kd_det.data.digits.contact_sheet import draw_contact_sheet
from kd_det.data.digits.detection import (
    SPLITS,
    DigitsSpec,
    digits_paths,
    render_image,
    source_digits,
    write_digits,
)
from kd_det.data.digits.scene import Scene

SMALL = DigitsSpec(train_images=6, val_images=4, seed=7)
REPOSITORY = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits") / "data"
    write_digits(folder, SMALL)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def annotations(root: Path, split: str) -> list[dict]:
    return json.loads(digits_paths(root)[f"digits_{split}"][0].read_text())["annotations"]


def test_the_same_seed_gives_the_same_bytes(root, tmp_path):
    write_digits(tmp_path / "again", SMALL)
    assert contents(root) == contents(tmp_path / "again")


def test_an_image_depends_on_its_index_only(root):
    image, _ = render_image(SMALL, "val", 3)
    stored = cv2.imread(str(root / "val" / "000003.png"))
    np.testing.assert_array_equal(cv2.cvtColor(stored, cv2.COLOR_BGR2RGB), image)


def test_a_longer_data_set_begins_with_the_shorter_one():
    longer = DigitsSpec(train_images=60, val_images=4, seed=7)
    for index in (0, 5):
        np.testing.assert_array_equal(
            render_image(longer, "train", index)[0], render_image(SMALL, "train", index)[0]
        )


def test_another_seed_split_or_index_gives_another_image():
    image, _ = render_image(SMALL, "train", 0)
    for other in (
        render_image(DigitsSpec(seed=8), "train", 0),
        render_image(SMALL, "val", 0),
        render_image(SMALL, "train", 1),
    ):
        assert (other[0] != image).any()


@pytest.mark.parametrize("seed", [0, 1])
def test_splits_share_no_source_digit(seed):
    spec = DigitsSpec(seed=seed)
    train, val = (set(source_digits(spec, split).tolist()) for split in SPLITS)
    assert not train & val
    assert train | val == set(range(1797))


def test_written_splits_use_the_source_digits_of_their_split_only(root):
    for split in SPLITS:
        used = {entry["source_digit"] for entry in annotations(root, split)}
        assert used <= set(source_digits(SMALL, split).tolist())


def test_labels_are_those_of_the_source_digits(root):
    from sklearn.datasets import load_digits

    classes = load_digits().target
    for split in SPLITS:
        for entry in annotations(root, split):
            assert entry["category_id"] - 1 == classes[entry["source_digit"]]


def test_every_image_has_the_wanted_number_of_digits():
    for index in range(20):
        image, instances = render_image(SMALL, "train", index)
        assert image.shape == (160, 160, 3)
        assert image.dtype == np.uint8
        assert SMALL.min_digits <= len(instances) <= SMALL.max_digits


def test_masks_do_not_overlap_because_only_visible_pixels_count():
    for index in range(10):
        _, instances = render_image(SMALL, "train", index)
        assert np.sum([instance.mask for instance in instances], axis=0).max() == 1


def test_every_digit_keeps_its_visible_share():
    digit = render_source()
    scene = Scene(np.random.default_rng(0), 160, min_visible=0.4)
    full_areas = []
    for _ in range(30):
        if scene.add_digit(digit, size=45.0):
            full_areas.append(scene.visible[-1].sum())
        scene.add_distractor(digit, size=45.0)
        scene.add_stroke()
    shares = np.array([mask.sum() for mask in scene.visible]) / full_areas
    assert shares.min() >= 0.4
    assert shares.min() < 0.8  # something was hidden, or the test shows nothing


def render_source() -> np.ndarray:
    digit = np.zeros((8, 8), np.float32)
    digit[1:7, 2:6] = 1
    return digit


@pytest.mark.parametrize("split", SPLITS)
def test_boxes_are_tight_around_the_masks_and_inside_the_canvas(root, split):
    for entry in annotations(root, split):
        _, instances = render_image(SMALL, split, entry["image_id"] - 1)
        mask = next(i.mask for i in instances if i.box == entry["bbox"])
        x, y, width, height = (int(value) for value in entry["bbox"])
        assert min(x, y) >= 0
        assert max(x + width, y + height) <= 160
        inside = mask[y : y + height, x : x + width]
        assert inside.sum() == mask.sum() == entry["area"]
        for edge in (inside[0], inside[-1], inside[:, 0], inside[:, -1]):
            assert edge.any()


@pytest.mark.parametrize("split", SPLITS)
def test_the_coco_api_reads_back_the_visible_pixels(root, split):
    coco = COCO(str(digits_paths(root)[f"digits_{split}"][0]))
    assert [entry["name"] for entry in coco.loadCats(coco.getCatIds())] == list("0123456789")
    for image_id in coco.getImgIds():
        _, instances = render_image(SMALL, split, image_id - 1)
        entries = coco.loadAnns(coco.getAnnIds(imgIds=image_id))
        assert len(entries) == len(instances)
        for entry, instance in zip(entries, instances, strict=True):
            np.testing.assert_array_equal(coco.annToMask(entry).astype(bool), instance.mask)


@pytest.mark.parametrize("split", SPLITS)
def test_the_data_set_passes_its_own_check(root, split):
    found = check_coco_json(f"digits_{split}", *digits_paths(root)[f"digits_{split}"])
    assert found["images"] == SMALL.images(split)
    assert found["categories"] == {label + 1: str(label) for label in range(10)}
    assert found["annotations_without_mask"] == 0


@pytest.mark.detectron2
@pytest.mark.parametrize("mask_format", ["polygon", "bitmask"])
def test_detectron2_reads_every_mask(root, mask_format):
    pytest.importorskip("detectron2")
    from detectron2.data import detection_utils, transforms
    from detectron2.data.datasets import load_coco_json

    json_file, image_root = digits_paths(root)["digits_train"]
    records = load_coco_json(str(json_file), str(image_root))
    assert sum(len(record["annotations"]) for record in records) == len(annotations(root, "train"))
    for index, record in enumerate(records):
        size = (record["height"], record["width"])
        entries = [
            detection_utils.transform_instance_annotations(
                entry, transforms.TransformList([transforms.NoOpTransform()]), size
            )
            for entry in record["annotations"]
        ]
        target = detection_utils.annotations_to_instances(entries, size, mask_format)
        areas = target.gt_masks.area() if mask_format == "polygon" else None
        _, instances = render_image(SMALL, "train", index)
        for at, instance in enumerate(instances):
            if mask_format == "bitmask":
                np.testing.assert_array_equal(target.gt_masks.tensor[at].numpy(), instance.mask)
            else:
                # Vertices lie a quarter pixel inside the outline.
                assert 0.5 * instance.area < areas[at] < 1.1 * instance.area


def test_the_same_settings_are_reused_without_rewriting(root):
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    calls = []
    paths = write_digits(root, SMALL, progress=lambda done, total: calls.append(done))
    assert paths == digits_paths(root)
    assert calls == []
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before


def test_progress_counts_every_image(tmp_path):
    calls = []
    spec = DigitsSpec(train_images=2, val_images=1)
    write_digits(tmp_path / "data", spec, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(1, 3), (2, 3), (3, 3)]


def test_other_settings_are_refused_and_nothing_changes(root):
    before = contents(root)
    with pytest.raises(KDError, match=r"with seed=8 at.*with seed=7,.*nothing was changed"):
        write_digits(root, DigitsSpec(train_images=6, val_images=4, seed=8))
    assert contents(root) == before


def test_a_folder_with_something_else_is_refused_and_nothing_changes(tmp_path):
    (tmp_path / "holiday.jpg").write_bytes(b"not mine")
    with pytest.raises(KDError, match=r"no spec\.json"):
        write_digits(tmp_path, SMALL)
    assert contents(tmp_path) == {"holiday.jpg": b"not mine"}


def test_a_damaged_data_set_is_refused_by_the_number_of_images(tmp_path):
    spec = DigitsSpec(train_images=2, val_images=1)
    write_digits(tmp_path / "data", spec)
    (tmp_path / "data" / "train" / "000001.png").unlink()
    with pytest.raises(KDError, match=r"2 images in .*train; received the json and 1 images"):
        write_digits(tmp_path / "data", spec)


def test_an_interrupted_write_leaves_nothing_behind(tmp_path):
    def interrupt(done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_digits(tmp_path / "data", SMALL, progress=interrupt)
    assert list(tmp_path.iterdir()) == []
    write_digits(tmp_path / "data", DigitsSpec(train_images=1, val_images=1))


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"canvas": 32}, "canvas"),
        ({"train_images": 0}, "train_images"),
        ({"val_images": -1}, "val_images"),
        ({"seed": -1}, "seed"),
        ({"min_digits": 9}, "min_digits=9, max_digits=8"),
        ({"max_size": 0.9}, "max_size"),
        ({"min_visible": 0.0}, "min_visible"),
        ({"val_share": 1.0}, "val_share"),
    ],
)
def test_impossible_settings_are_named(settings, named):
    with pytest.raises(KDError, match=named):
        DigitsSpec(**settings)


def test_settings_without_room_for_the_digits_end_in_an_error():
    crowded = DigitsSpec(min_digits=12, max_digits=12, min_size=0.5, max_size=0.5, min_visible=1.0)
    with pytest.raises(KDError, match="room for 12 digits"):
        render_image(crowded, "train", 0)


def test_an_unknown_split_is_named():
    with pytest.raises(KDError, match="'test'"):
        render_image(SMALL, "test", 0)


def test_the_contact_sheet_is_an_image(root, tmp_path):
    files = digits_paths(root)["digits_val"]
    path = draw_contact_sheet(*files, tmp_path / "sheets" / "val.png", count=3)
    assert cv2.imread(str(path)).ndim == 3


def test_the_tool_writes_data_sheet_and_config_lines(tmp_path):
    command = [sys.executable, str(REPOSITORY / "tools" / "make_digits.py")]
    options = ["--output", "data", "--train-images", "2", "--val-images", "1", "--canvas", "128"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}

    def run(*more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, *options, *more],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )

    first = run()
    assert first.returncode == 0, first.stderr
    assert "digits_train: [data/annotations/digits_train.json, data/train]" in first.stdout
    assert (tmp_path / "data" / "contact_sheet.png").is_file()
    assert run().returncode == 0
    refused = run("--seed", "5")
    assert refused.returncode == 1
    assert refused.stderr.startswith("error: expected")
    assert "Traceback" not in refused.stderr
