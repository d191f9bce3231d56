"""The workbench of the torchvision host looks at a run as it is, and changes nothing."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.transforms.v2.functional import pil_to_tensor

from kd_det.bench.workbench import Detections
from kd_det.core.errors import KDError
from kd_det.hosts.base import open_bench
from kd_det.hosts.torchvision_detection.train import run
from kd_det.run.plan import Start
from kd_det.visualize.watch import watching
from tests.hosts import workbench_contract as contract


@pytest.fixture
def bench(digits_config):
    return open_bench(digits_config("reviewkd_kd_frcnn"))


class Oracle(nn.Module):
    """Answers with what is annotated, in another order of classes."""

    def __init__(self, annotations, order):
        super().__init__()
        self.annotations, self.order, self.seen = annotations, torch.tensor(order), 0

    def forward(self, images):
        found = []
        for _ in images:
            truth = self.annotations[self.seen]
            self.seen += 1
            boxes = torch.tensor([a["box"] for a in truth]).float()
            labels = torch.tensor([a["label"] - 1 for a in truth])
            answer = {"boxes": boxes, "labels": 1 + self.order[labels]}
            found.append({**answer, "scores": torch.ones(len(boxes))})
        return found


def test_a_look_changes_nothing(bench):
    contract.check_a_look_changes_nothing(bench)
    contract.check_nothing_is_written(bench)


def test_batches_repeat(digits_config):
    contract.check_batches_repeat(
        open_bench(digits_config("reviewkd_kd_frcnn", "INPUT.RANDOM_FLIP", "horizontal"))
    )


def test_what_a_checkpoint_could_not_give_is_said(bench):
    contract.check_planted_faults_of_an_export(bench)


def test_losses_are_those_of_the_first_iteration_of_the_run(bench):
    batch = next(bench.batches())
    torch.manual_seed(4)
    found = bench.losses(batch)
    torch.manual_seed(4)
    expected = bench.model.train()(*batch)
    assert {k: v.item() for k, v in found.items()} == {k: v.item() for k, v in expected.items()}
    assert {"review", "roi_logits"} < set(found)


def test_pictures_are_the_files_and_truth_is_in_their_pixels(bench, digits):
    _, root = digits["digits_val"]
    files = sorted(root.iterdir())
    for picture, path in zip(bench.validation_pictures(9), files, strict=True):
        assert torch.equal(picture, pil_to_tensor(Image.open(path).convert("RGB")))
    assert [len(bench.validation_pictures(n)) for n in (0, 2)] == [0, 2]
    batch = next(bench.batches())
    for picture, truth in zip(bench.pictures(batch), bench.ground_truth(batch), strict=True):
        assert truth.boxes.max() <= max(picture.shape)
        assert 0 <= truth.classes.min()
        assert truth.classes.max() < 10


def test_an_evaluation_on_all_images_is_the_hosts_own(bench, digits_config, tmp_path):
    path = tmp_path / "student.pth"
    torch.save(bench.student.state_dict(), path)
    cfg = digits_config("baseline_frcnn", "MODEL.WEIGHTS", path, output="evaluated")
    found, expected = bench.evaluate("student", 99), run(cfg, Start(eval_only=True))
    assert found.keys() == expected.keys() == {"bbox"}
    assert found["bbox"] == pytest.approx(expected["bbox"], nan_ok=True)


def test_a_teacher_is_judged_by_the_students_classes(bench, digits_config):
    names = list("9876543210")
    cfg = digits_config("reviewkd_kd_frcnn", "KD.TEACHER.CLASS_NAMES", names)
    other = open_bench(cfg)
    assert other.class_names("teacher") == names
    annotations = sorted_annotations(other)
    other.teacher.model = Oracle(annotations, list(range(9, -1, -1)))
    # Fewer than a batch has.
    assert other.evaluate("teacher", 1)["bbox"]["AP"] == pytest.approx(100)
    assert other.teacher.model.seen == 1
    # Names that the student lacks: their detections do not count, all others still do.
    shown = annotations[0][0]["label"] - 1
    other.teacher.model = Oracle(annotations, list(range(9, -1, -1)))
    other._translation[9 - shown] = -1
    assert 0 < other.evaluate("teacher", 2)["bbox"]["AP"] < 100


def sorted_annotations(bench):
    from kd_det.hosts.torchvision_detection.data import evaluation_loader

    return evaluation_loader(bench.cfg).dataset.annotations


def test_each_side_has_its_own_pixels_and_test_size(digits_config, tmp_path):
    config = tmp_path / "teacher.yaml"
    teacher = digits_config("teacher_frcnn", "MODEL.PIXEL_MEAN", [0.4, 0.5, 0.6])
    teacher.defrost()
    teacher.INPUT.MIN_SIZE_TEST = 96
    teacher.MODEL.FPN.SIZE_DIVISIBILITY = 64
    config.write_text(teacher.dump())
    cfg = digits_config(
        "reviewkd_kd_frcnn", "KD.TEACHER.CONFIG_FILE", config, "INPUT.MIN_SIZE_TEST", 128
    )
    bench = open_bench(cfg)
    own, other = bench.pixel_input("student"), bench.pixel_input("teacher")
    assert (own.order, own.mean, own.scale, own.divisor) == ("RGB", (0.5,) * 3, 1, 32)
    assert (other.mean, other.divisor) == ((0.4, 0.5, 0.6), 64)
    assert [bench.example(side)[0][0].shape[-1] for side in ("student", "teacher")] == [128, 96]
    assert bench.teacher_cfg.MODEL.BACKBONE.WIDTH == teacher.MODEL.BACKBONE.WIDTH


def test_the_box_tap_delivers_the_sampled_boxes(bench):
    batch = next(bench.batches())
    with watching(bench, 1) as recordings:
        bench.losses(batch)
    (boxes,) = recordings[0].boxes
    assert [x.shape[1] for x in boxes] == [4] * len(batch[0])
    assert sum(map(len, boxes)) == bench.cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE * len(batch[0])


def test_a_prediction_is_in_the_pixels_and_classes_of_the_picture(bench):
    picture = torch.randint(0, 256, (3, 60, 96), dtype=torch.uint8)
    for side in ("student", "teacher"):
        found = bench.predict(side, picture)
        assert isinstance(found, Detections)
        assert found.boxes[:, [0, 2]].max() < 96.01  # rounding of the way back from the test size
        assert found.boxes[:, [1, 3]].max() < 60.01
        assert found.classes.min() >= 0
        assert found.classes.max() < 10


def test_a_finished_run_opens_without_its_teacher_and_with_what_it_learnt(
    bench, digits_config, tmp_path
):
    path = tmp_path / "model_final.pth"
    torch.save({"model": bench.model.state_dict()}, path)
    cfg = digits_config("reviewkd_kd_frcnn", "SEED", 7, "KD.TEACHER.CONFIG_FILE", "gone.yaml")
    plain = open_bench(cfg, str(path), distilled=False)
    assert (plain.teacher, plain.distiller, plain.model) == (None, None, plain.student)
    picture = plain.validation_pictures(1)[0]
    assert torch.equal(
        plain.predict("student", picture).scores, bench.predict("student", picture).scores
    )
    whole = open_bench(digits_config("reviewkd_kd_frcnn", "SEED", 7), str(path))
    for key, value in bench.model.state_dict().items():
        assert torch.equal(whole.model.state_dict()[key], value), key


def test_what_the_host_refuses_is_refused_as_it_says(digits_config, refuses):
    for option, part in (
        (("KD.TEACHER.ALLOW_RANDOM", False), "KD.TEACHER.WEIGHTS"),
        (("KD.TEACHER.WEIGHTS", "gone.pth"), "gone.pth"),
        (("KD.TERMS.review.TAPS", ["p9"]), "p9"),
    ):
        with refuses(part):
            open_bench(digits_config("reviewkd_kd_frcnn", *option))


def test_a_term_with_a_pre_stage_runs_before_it_and_is_named(digits_config):
    bench = open_bench(digits_config("mhgd_frcnn"))
    assert bench.pre_stage == list(bench.distiller.terms)
    assert bench.losses(next(bench.batches())).keys() > set(bench.pre_stage)


def test_a_run_that_condenses_its_data_is_shorter(digits_config):
    kcd = digits_config("kcd_frcnn", "KD.KCD.PERIOD", 2, "KD.KCD.RHO", 0.5, "SOLVER.MAX_ITER", 8)
    # Six images and two per batch: KCD keeps 6 * 0.5 ** (t / 4) of them in stage t.
    expected = sum(round(2 * round(6 * 0.5 ** (t / 4)) / 6) for t in range(4))
    assert open_bench(kcd).iterations() == expected < 8
    assert open_bench(digits_config("baseline_frcnn")).iterations() == 4


def test_data_that_does_not_fit_is_refused_when_it_is_looked_at(digits_config, tmp_path, digits):
    json_file, root = digits["digits_val"]
    content = json.loads(json_file.read_text())
    content["categories"].append({"id": 99, "name": "ten"})
    other = tmp_path / "eleven.json"
    other.write_text(json.dumps(content))
    entry = repr([str(other), str(root)])
    bench = open_bench(digits_config("baseline_frcnn", "DATASETS.COCO_JSON.small_val", entry))
    with pytest.raises(KDError, match="11"):
        bench.evaluate("student", 1)


def test_names_that_are_not_as_many_as_the_teachers_classes_are_left_out(digits_config):
    options = ("KD.TEACHER.CLASS_NAMES", ["a", "b"], "KD.ACTIVE_TERMS", ["review"])
    bench = open_bench(digits_config("reviewkd_kd_frcnn", *options))
    contract.check_names_that_do_not_fit_are_none(bench)
