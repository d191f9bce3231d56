"""The workbench of the Detectron2 host looks at a run as it is, and changes nothing."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("detectron2")

from detectron2.config import CfgNode
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from PIL import Image
from torch import nn
from torchvision.transforms.v2.functional import pil_to_tensor

from kd_det.bench.workbench import Detections
from kd_det.data.digits.detection import DigitsSpec, write_digits
from kd_det.hosts.base import open_bench
from kd_det.hosts.detectron2.config import load_config
from kd_det.visualize.watch import watching
from tests.hosts import workbench_contract as contract
from tests.hosts.detectron2.models import ARCHITECTURES, all_terms, write_teacher

pytestmark = pytest.mark.detectron2

SMALL = ["MODEL.BASIC_RESNET.WIDTH", "4", "MODEL.FPN.OUT_CHANNELS", "8"]
SMALL += ["SOLVER.IMS_PER_BATCH", "2", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0"]


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    root = tmp_path_factory.mktemp("bench_digits") / "digits"
    return write_digits(root, DigitsSpec(canvas=96, train_images=6, val_images=3))


@pytest.fixture
def config(digits, tmp_path):
    """``config(KEY, value, ..., arch="faster")``: a distilled architecture made small."""

    def load(*opts, arch="faster", terms=None, teacher=()):
        _, name, own = ARCHITECTURES[arch]
        teacher_config, weights = write_teacher(tmp_path, arch, list(teacher))
        options = [*SMALL, "MODEL.META_ARCHITECTURE", name, *own]
        options += ["KD.TEACHER.CONFIG_FILE", teacher_config, "KD.TEACHER.WEIGHTS", weights]
        options += ["OUTPUT_DIR", tmp_path / "run"]
        for split, (json_file, images) in digits.items():
            options += [f"DATASETS.COCO_JSON.bench_{split}", [str(json_file), str(images)]]
            options += [f"DATASETS.{'TEST' if 'val' in split else 'TRAIN'}", (f"bench_{split}",)]
        options += opts
        cfg = load_config("configs/digits/reviewkd_kd_frcnn.yaml", list(map(str, options)))
        if terms is not None:
            cfg.defrost()
            cfg.KD.TERMS = CfgNode(terms, new_allowed=True)
            cfg.freeze()
        return cfg

    return load


class Oracle(nn.Module):
    """Answers with what is annotated, in another order of classes."""

    def __init__(self, records, order):
        super().__init__()
        self.truth = {r["image_id"]: r["annotations"] for r in records}
        self.order, self.seen = torch.tensor(order), 0

    def forward(self, inputs):
        found = []
        for x in inputs:
            self.seen += 1
            truth = self.truth[x["image_id"]]
            instances = Instances((x["height"], x["width"]))
            boxes = torch.tensor([a["bbox"] for a in truth])  # x, y, width, height
            instances.pred_boxes = Boxes(torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1))
            instances.pred_classes = self.order[[a["category_id"] for a in truth]]
            instances.scores = torch.ones(len(truth))
            found.append({"instances": instances})
        return found


@pytest.mark.parametrize("arch", ["faster", "mask", "cascade", "retinanet", "fcos"])
def test_a_look_changes_nothing(config, arch):
    bench = open_bench(config(arch=arch, terms=all_terms(arch, 1.0)))
    contract.check_a_look_changes_nothing(bench)
    contract.check_nothing_is_written(bench)


def test_batches_repeat(config):
    options = ("INPUT.RANDOM_FLIP", "horizontal", "INPUT.MIN_SIZE_TRAIN", (80, 96, 112))
    contract.check_batches_repeat(open_bench(config(*options)))


def test_what_a_checkpoint_could_not_give_is_said(config):
    contract.check_planted_faults_of_an_export(open_bench(config()))


def test_losses_are_those_of_the_first_iteration_of_the_run(config):
    bench = open_bench(config("VIS_PERIOD", 1))
    assert bench.student.vis_period == 0  # Detectron2 would draw into a storage nobody sees
    batch = next(bench.batches())
    torch.manual_seed(4)
    found = bench.losses(batch)
    torch.manual_seed(4)
    with EventStorage():
        expected = bench.model.train()(batch)
    assert {k: v.item() for k, v in found.items()} == {k: v.item() for k, v in expected.items()}
    assert {"review", "roi_logits"} < set(found)


def test_pictures_are_rgb_and_truth_is_in_their_pixels(config, digits):
    bench = open_bench(config())
    assert bench.cfg.INPUT.FORMAT == "BGR"
    _, root = digits["digits_val"]
    for picture, path in zip(bench.validation_pictures(9), sorted(root.iterdir()), strict=True):
        assert torch.equal(picture, pil_to_tensor(Image.open(path).convert("RGB")))
    batch = next(bench.batches())
    for picture, truth, x in zip(
        bench.pictures(batch), bench.ground_truth(batch), batch, strict=True
    ):
        assert torch.equal(picture, x["image"].flip(0))
        assert truth.boxes.max() <= max(picture.shape)
        assert truth.classes.max() < 10


def test_a_teacher_is_judged_by_the_students_classes_on_the_images_it_saw(config):
    names = list("9876543210")
    bench = open_bench(config("KD.TEACHER.CLASS_NAMES", names))
    assert bench.class_names("teacher") == names
    records = bench._validation
    bench.teacher.model = Oracle(records, list(range(9, -1, -1)))
    assert bench.evaluate("teacher", 2)["bbox"]["AP"] == pytest.approx(100)
    assert bench.teacher.model.seen == 2
    # A name that the student lacks: its detections do not count, all others still do.
    shown = records[0]["annotations"][0]["category_id"]
    bench._translation[9 - shown] = -1
    assert 0 < bench.evaluate("teacher", 2)["bbox"]["AP"] < 100


def test_names_that_are_not_as_many_as_the_teachers_classes_are_left_out(config):
    options = ("KD.TEACHER.CLASS_NAMES", ["a", "b"], "KD.ACTIVE_TERMS", ["review"])
    contract.check_names_that_do_not_fit_are_none(open_bench(config(*options)))


def test_each_side_has_its_own_pixels_and_test_size(config):
    teacher = ["INPUT.FORMAT", "RGB", "MODEL.PIXEL_MEAN", [1.0, 2.0, 3.0]]
    teacher += ["INPUT.MIN_SIZE_TEST", 64]
    bench = open_bench(config("INPUT.MIN_SIZE_TEST", 128, teacher=teacher))
    own, other = bench.pixel_input("student"), bench.pixel_input("teacher")
    assert (own.order, own.mean, own.std, own.scale) == ("BGR", (127.5,) * 3, (63.75,) * 3, 255)
    assert (other.order, other.mean) == ("RGB", (1.0, 2.0, 3.0))
    assert own.divisor == bench.student.backbone.size_divisibility
    images = [bench.example(side)[0][0]["image"] for side in ("student", "teacher")]
    assert [min(image.shape[1:]) for image in images] == [128, 64]
    red = torch.zeros(3, 64, 64, dtype=torch.uint8)
    red[0] = 200
    found = [bench._input(side, red)["image"][:, 0, 0].tolist() for side in ("student", "teacher")]
    assert found == [[0, 0, 200], [200, 0, 0]]


@pytest.mark.parametrize("arch", ["faster", "cascade", "retinanet"])
def test_the_box_tap_delivers_the_sampled_boxes(config, arch):
    bench = open_bench(config(arch=arch, terms=all_terms(arch, 1.0)))
    if arch == "retinanet":
        assert bench.box_tap is None
        return
    batch = next(bench.batches())
    with watching(bench, 1) as recordings:
        bench.losses(batch)
    boxes = recordings[0].boxes[0]  # of the first cascade stage
    assert [x.shape[1] for x in boxes] == [4] * len(batch)
    assert sum(map(len, boxes)) == bench.cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE * len(batch)


def test_a_prediction_is_in_the_pixels_and_classes_of_the_picture(config):
    bench = open_bench(config())
    picture = torch.randint(0, 256, (3, 60, 96), dtype=torch.uint8)
    for side in ("student", "teacher"):
        found = bench.predict(side, picture)
        assert isinstance(found, Detections)
        assert found.boxes[:, [0, 2]].max() <= 96
        assert found.boxes[:, [1, 3]].max() <= 60
        assert found.classes.max() < 10


def test_a_finished_run_opens_without_its_teacher_and_with_what_it_learnt(config, tmp_path, caplog):
    bench = open_bench(config())
    path = tmp_path / "model_final.pth"
    torch.save({"model": bench.model.state_dict()}, path)
    plain = open_bench(config("SEED", 7), str(path), distilled=False)
    assert (plain.teacher, plain.distiller) == (None, None)
    picture = plain.validation_pictures(1)[0]
    assert torch.equal(
        plain.predict("student", picture).scores, bench.predict("student", picture).scores
    )
    whole = open_bench(config("SEED", 7), str(path))
    assert "has nothing for" not in caplog.text
    for key, value in bench.model.state_dict().items():
        assert torch.equal(whole.model.state_dict()[key], value), key


def test_a_start_is_the_students_only(config, tmp_path):
    bench = open_bench(config("SEED", 1))
    path = tmp_path / "start.pth"
    torch.save({"model": bench.model.state_dict()}, path)
    other = open_bench(config("SEED", 2, "MODEL.WEIGHTS", path))
    for key, value in bench.model.state_dict().items():
        equal = torch.equal(other.model.state_dict()[key], value)
        assert equal or key.startswith("distiller."), key
    pairs = zip(bench.distiller.parameters(), other.distiller.parameters(), strict=True)
    assert not all(torch.equal(a, b) for a, b in pairs)


def test_what_the_host_refuses_is_refused_as_it_says(config, refuses):
    for option, part in (
        (("KD.TEACHER.WEIGHTS", "gone.pth"), "gone.pth"),
        (("KD.TEACHER.CONFIG_FILE", "gone.yaml"), "gone.yaml"),
        (("KD.TERMS.review.TAPS", ["p9"]), "p9"),
        (("MODEL.WEIGHTS", "gone.pth"), "expected MODEL.WEIGHTS to be a file"),
    ):
        with refuses(part):
            open_bench(config(*option))
    bench = open_bench(config("DATASETS.TEST", ()))
    assert bench.validation_pictures(1) == []
    assert bench.example("student")[0][0]["image"].shape[0] == 3
    with refuses("DATASETS.TEST"):
        bench.evaluate("student", 1)


def test_a_term_with_a_pre_stage_runs_before_it_and_is_named(config):
    terms = {"graph": {"LOSS": "MHGD", "TAPS": ["p2", "p3"]}}
    bench = open_bench(config(terms=terms))
    assert bench.pre_stage == ["graph"]
    assert "graph" in bench.losses(next(bench.batches()))
