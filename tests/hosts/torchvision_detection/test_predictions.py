"""The file of detections holds exactly what was evaluated, in the data set's own ids and pixels."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

import pytest
import torch
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from kd_det.data.digits.detection import DigitsSpec, write_digits
from kd_det.hosts.torchvision_detection.data import CocoDataset
from kd_det.hosts.torchvision_detection.evaluation import (
    COCOMetric,
    DetectionFile,
    prepared,
)
from kd_det.hosts.torchvision_detection.lit import set_input_sizes
from kd_det.hosts.torchvision_detection.train import build_training_model, run
from kd_det.run.folder import DETECTIONS

NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl")


@pytest.fixture(scope="module")
def renumbered(tmp_path_factory):
    """Digits whose image and category ids are neither contiguous nor in order."""
    root = tmp_path_factory.mktemp("digits") / "digits"
    json_file, images = write_digits(root, DigitsSpec(canvas=96, train_images=2, val_images=12))[
        "digits_val"
    ]
    content = json.loads(json_file.read_text())
    for image in content["images"]:
        image["id"] = 1000 - 7 * image["id"]
    for category in content["categories"]:
        category["id"] = 3 * category["id"] + 5
    for annotation in content["annotations"]:
        annotation["image_id"] = 1000 - 7 * annotation["image_id"]
        annotation["category_id"] = 3 * annotation["category_id"] + 5
    content["annotations"][0]["iscrowd"] = 1
    path = root / "renumbered.json"
    path.write_text(json.dumps(content))
    return path, images


def coco_ap(json_file, results, kind):
    """pycocotools' six numbers in percent; masks are measured without their boxes."""
    if kind == "segm":
        results = [{k: v for k, v in entry.items() if k != "bbox"} for entry in results]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(json_file))
        evaluation = COCOeval(truth, truth.loadRes(results), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    values = [100 * float(v) for v in evaluation.stats[:6]]
    return dict(zip(NAMES, [v if v >= 0 else float("nan") for v in values], strict=True))


def imperfect(target, generator):
    """Detections near the truth: moved, some of another class, some twice."""
    boxes, count = target["boxes"], len(target["boxes"])
    moved = boxes + 4 * torch.randn(boxes.shape, generator=generator)
    moved = torch.cat([moved, boxes + torch.randn(boxes.shape, generator=generator)])
    moved[:, 2:] = torch.maximum(moved[:, 2:], moved[:, :2] + 1)
    labels = target["labels"].repeat(2)
    labels[: count // 3] = torch.randint(1, 11, (count // 3,), generator=generator)
    masks = target["masks"].repeat(2, 1, 1)[:, None].float()
    masks = masks.roll(1, dims=-1) * 0.9
    scores = torch.rand(2 * count, generator=generator)
    order = scores.argsort(descending=True)
    found = {"boxes": moved, "labels": labels, "scores": scores, "masks": masks}
    return {key: value[order] for key, value in found.items()}


@pytest.mark.parametrize("masks", [False, True], ids=["boxes", "boxes and masks"])
def test_pycocotools_finds_the_reported_ap_in_the_file(renumbered, tmp_path, generator, masks):
    data = CocoDataset(*renumbered, masks=True)
    metric = COCOMetric(masks)
    file = DetectionFile([image["id"] for image in data.images], data.category_ids)
    for start in (0, 5, 10):
        batch = range(start, min(start + 5, len(data)))
        targets = [data[i][1] for i in batch]
        found = [prepared(imperfect(target, generator)) for target in targets]
        if not masks:
            found = [{k: v for k, v in each.items() if k != "masks"} for each in found]
        metric.update(found, targets)
        file.update(found, batch)
    file.write(tmp_path)
    results = json.loads((tmp_path / DETECTIONS).read_text())
    assert ("segmentation" in results[0]) is masks
    reported = metric.compute()
    assert reported.keys() == ({"bbox", "segm"} if masks else {"bbox"})
    for kind, values in reported.items():
        assert 5 < values["AP"] < 95
        expected = coco_ap(renumbered[0], results, kind)
        assert values == pytest.approx(expected, rel=1e-6, nan_ok=True)


def test_entries_carry_the_ids_boxes_and_masks_of_the_data_set(tmp_path):
    mask = torch.zeros(1, 1, 6, 8)
    mask[..., 1:3, 2:5] = 0.75
    mask[..., 5, 5] = 0.5  # not above the threshold
    found = {
        "boxes": torch.tensor([[2.25, 1.0, 5.0, 3.125]]),
        "labels": torch.tensor([2]),
        "scores": torch.tensor([0.1], dtype=torch.float32),
        "masks": mask,
    }
    file = DetectionFile([40, 30], [7, 9])
    nothing = {k: v[:0] for k, v in found.items()}
    file.update([prepared(found), prepared(nothing)], [1, 0])
    file.write(tmp_path)
    (entry,) = json.loads((tmp_path / DETECTIONS).read_text())
    assert entry["image_id"] == 30
    assert entry["category_id"] == 9
    assert entry["bbox"] == [2.25, 1.0, 2.75, 2.125]
    assert torch.tensor(entry["score"], dtype=torch.float64) == found["scores"].double()
    assert (rle.decode(entry["segmentation"]) == (mask[0, 0] > 0.5).numpy()).all()


def test_a_run_writes_what_its_final_weights_detect_in_pixels_of_the_image(digits_config):
    cfg = digits_config(
        "baseline_mrcnn",
        "INPUT.MIN_SIZE_TEST",
        160,
        "INPUT.MAX_SIZE_TEST",
        160,
        "SOLVER.MAX_ITER",
        2,
    )
    run(cfg, progress=lambda *_: None)
    output = Path(cfg.OUTPUT_DIR)
    results = json.loads((output / DETECTIONS).read_text())
    json_file, images = cfg.DATASETS.COCO_JSON.small_val
    data = CocoDataset(json_file, images, masks=True)
    model = build_training_model(cfg, str(output / "model_final.pth"), distilled=False).eval()
    set_input_sizes(model, cfg, training=False)
    assert {entry["image_id"] for entry in results} == {image["id"] for image in data.images}
    for index, image in enumerate(data.images):
        with torch.no_grad():
            (found,) = model([data[index][0]])
        own = [entry for entry in results if entry["image_id"] == image["id"]]
        boxes = found["boxes"].clone()
        boxes[:, 2:] -= boxes[:, :2]
        written = torch.tensor([entry["bbox"] for entry in own])
        torch.testing.assert_close(written, boxes, atol=1e-3, rtol=0)
        assert boxes[:, 2:].max() <= 96
        assert [e["category_id"] for e in own] == [
            data.category_ids[label - 1] for label in found["labels"].tolist()
        ]
        assert own[0]["segmentation"]["size"] == [96, 96]
