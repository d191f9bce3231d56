"""MHGD's pre-stage on Detectron2: on the teacher alone, saved, reused, refused where it is not its
own."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("detectron2")

from detectron2.engine.hooks import HookBase
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from kd_det.data.digits.detection import DigitsSpec, write_digits
from kd_det.hosts.detectron2 import build_teacher
from kd_det.hosts.detectron2.pre_stage import TeacherCaptures
from tests.hosts.detectron2 import runs
from tests.hosts.detectron2.models import batch, distilled_cfg, tiny_cfg, write_teacher
from tests.hosts.detectron2.runs import Stop, small_cfg

pytestmark = pytest.mark.detectron2

BOX = ["box_pooled", "box_features"]
GRAPH = {
    "graph": {"LOSS": "MHGD", "TAPS": BOX, "REDUCTION": "mean", "HEADS": 2, "MAX_NODES": 8},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pre_stage")
    images = write_digits(folder / "mini", DigitsSpec(train_images=4, val_images=1, canvas=96))
    return images, write_teacher(folder, "faster")


@pytest.fixture
def make_cfg(data, tmp_path):
    images, files = data

    def make(folder, *opts, teacher=files, terms=GRAPH):
        own = ["SOLVER.MAX_ITER", 2, "KD.PRE_STAGE.MAX_ITER", 3, *opts]
        return small_cfg(images, teacher, terms, tmp_path / folder, *own)

    return make


def train(cfg, *hooks, resume=False):
    runs.train(cfg, *hooks, resume=resume)
    return torch.load(f"{cfg.OUTPUT_DIR}/model_final.pth", weights_only=True)["model"]


class AtStart(HookBase):
    """Call a function with the trainer before its first iteration."""

    def __init__(self, function):
        self.function = function

    def before_train(self):
        self.function(self.trainer)


def test_it_is_trained_first_saved_and_reused_with_the_same_outcome(make_cfg, tmp_path):
    found = {}

    def look(trainer):
        loss = trainer.distiller.terms["graph"]
        held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
        found["ready"] = loss.is_ready
        found["learns"] = [p for p in loss.network.parameters() if p.requires_grad]
        found["held"] = held & {id(p) for p in loss.network.parameters()}
        found["network"] = loss.pre_stage_state()

    ours = train(make_cfg("first"), AtStart(look))
    assert found["ready"]
    assert not found["learns"]
    assert not found["held"]
    file = tmp_path / "first" / "pre_stage.pth"
    assert (tmp_path / "first" / "pre_stage" / "metrics.json").is_file()
    # The run itself leaves the network as it is.
    for key, value in found["network"].items():
        assert torch.equal(ours[f"distiller.terms.graph.network.{key}"], value), key
    reused = train(make_cfg("second", "KD.PRE_STAGE.WEIGHTS", str(file)))
    assert not (tmp_path / "second" / "pre_stage").exists()
    assert ours.keys() == reused.keys()
    for key, value in ours.items():
        assert torch.equal(reused[key], value), key


def test_an_interrupted_run_takes_the_finished_pre_stage(make_cfg, tmp_path, refuses):
    def stop(trainer):
        raise Stop

    cfg = make_cfg("out")
    with pytest.raises(Stop):
        train(cfg, AtStart(stop))
    written = (tmp_path / "out" / "pre_stage.pth").read_bytes()
    with refuses("pre_stage.pth", "--resume"):
        train(cfg)
    (tmp_path / "out" / "pre_stage" / "metrics.json").unlink()
    train(cfg, resume=True)
    assert (tmp_path / "out" / "pre_stage.pth").read_bytes() == written
    assert not (tmp_path / "out" / "pre_stage" / "metrics.json").exists()


def test_a_pre_stage_that_was_interrupted_itself_is_continued(make_cfg, monkeypatch):
    calls = []
    stock = TeacherCaptures.__call__

    def break_down(self, inputs):
        calls.append(len(inputs))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return stock(self, inputs)

    monkeypatch.setattr(TeacherCaptures, "__call__", break_down)
    cfg = make_cfg("out")
    with pytest.raises(KeyboardInterrupt):
        train(cfg)
    train(cfg, resume=True)
    # Two iterations, saved; the one that broke; and only the one that was left.
    assert len(calls) == 4


def test_the_pre_stage_of_another_teacher_is_refused(make_cfg, tmp_path, refuses):
    train(make_cfg("own"))
    other = tmp_path / "other"
    other.mkdir()
    config, weights = write_teacher(other, "faster")
    state = torch.load(weights)["model"]
    state["roi_heads.box_head.fc1.bias"] += 1
    torch.save({"model": state}, weights)
    given = ("KD.PRE_STAGE.WEIGHTS", str(tmp_path / "own" / "pre_stage.pth"))
    with refuses("to hold a pre-stage of this run: teacher ", "received teacher "):
        train(make_cfg("next", *given, teacher=(config, weights)))
    assert not (tmp_path / "next" / "model_final.pth").exists()
    terms = {"graph": {**GRAPH["graph"], "HEADS": 4}}
    with refuses("heads 4", "heads 2"):
        train(make_cfg("heads", *given, terms=terms))


def test_a_pre_stage_for_terms_without_one_is_refused(make_cfg, tmp_path, refuses):
    terms = {"look": {"LOSS": "AT", "TAPS": ["p2"]}}
    with refuses("KD.PRE_STAGE.WEIGHTS", "terms look"):
        train(make_cfg("out", "KD.PRE_STAGE.WEIGHTS", "x.pth", terms=terms))


def test_no_iterations_are_refused(make_cfg, refuses):
    with refuses("at least one iteration"):
        train(make_cfg("out", "KD.PRE_STAGE.MAX_ITER", 0, "KD.PRE_STAGE.EPOCHS", 0))


def stock_teacher(name, weights):
    model = build_model(
        tiny_cfg(name, ["MODEL.BASIC_RESNET.WIDTH", 8, "MODEL.FPN.OUT_CHANNELS", 16])
    )
    model.load_state_dict(torch.load(weights)["model"])
    return model.eval()


@pytest.mark.parametrize("name", ["faster", "cascade"])
def test_boxes_are_sampled_from_the_teachers_proposals_and_the_ground_truth(name, tmp_path):
    files = write_teacher(tmp_path, name)
    teacher = build_teacher(distilled_cfg(name, files, GRAPH))
    captures, inputs = TeacherCaptures(teacher, ["p3", *BOX], "BGR"), batch()
    heads, sampled = teacher.frozen.model.roi_heads, []
    sample = heads.label_and_sample_proposals

    def listen(proposals, targets):
        sampled.extend(sample(proposals, targets))
        return sampled

    heads.label_and_sample_proposals = listen
    with EventStorage():
        values = captures(inputs)
    stock = stock_teacher(name, files[1])
    boxes = [instances.proposal_boxes for instances in sampled]
    for own, image in zip(boxes, inputs, strict=True):
        truth = image["instances"].gt_boxes.tensor
        assert all((own.tensor == box).all(dim=1).any() for box in truth)
    with torch.no_grad():
        features = stock.backbone(stock.preprocess_image(inputs).tensor)
        pooled = stock.roi_heads.box_pooler([features[f] for f in ("p2", "p3", "p4")], boxes)
        head = stock.roi_heads.box_head[0] if name == "cascade" else stock.roi_heads.box_head
        vectors = head(pooled)
    assert torch.equal(values["p3"], features["p3"])
    assert torch.equal(values["box_pooled"], pooled)
    assert torch.equal(values["box_features"], vectors)
    assert not values["box_features"].requires_grad


@pytest.mark.parametrize("name", ["faster", "retinanet"])
def test_maps_of_the_backbone_need_no_boxes(name, tmp_path):
    files = write_teacher(tmp_path, name, ["INPUT.FORMAT", "BGR"])
    teacher = build_teacher(distilled_cfg(name, files, {"g": {"LOSS": "MHGD", "TAPS": ["p2"]}}))
    inputs = batch()
    # Images in the student's order, RGB, arrive in the teacher's.
    values = TeacherCaptures(teacher, ["p2", "c3"], "RGB")(inputs)
    flipped = [{"image": x["image"].flip(0)} for x in inputs]
    stock = stock_teacher(name, files[1])
    with torch.no_grad():
        features = stock.backbone(stock.preprocess_image(flipped).tensor)
    assert torch.equal(values["p2"], features["p2"])
    assert values["c3"].shape[2:] == features["p3"].shape[2:]


def test_taps_that_need_a_student_are_refused(tmp_path, refuses):
    teacher = build_teacher(distilled_cfg("mask", write_teacher(tmp_path, "mask"), GRAPH))
    with refuses("mask_logits", "box_features"):
        TeacherCaptures(teacher, ["mask_logits"], "BGR")
