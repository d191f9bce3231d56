"""The teacher is really there, and sees the pixels it was trained on."""

from __future__ import annotations

import pickle

import pytest
import torch

pytest.importorskip("detectron2")

from detectron2 import model_zoo
from detectron2.config import CfgNode
from detectron2.utils.events import EventStorage

from kd_det.core.errors import KDError
from kd_det.hosts.detectron2 import Distillation, build_teacher
from kd_det.hosts.detectron2.teacher import find_config
from tests.hosts.detectron2.models import (
    all_terms,
    batch,
    build,
    distilled_cfg,
    tiny_cfg,
    write_teacher,
)

pytestmark = pytest.mark.detectron2


@pytest.fixture
def teacher(tmp_path):
    return write_teacher(tmp_path, "faster")


def plant(weights, change):
    state = torch.load(weights)["model"]
    change(state)
    torch.save({"model": state}, weights)


def drop_backbone(state):
    for key in [k for k in state if k.startswith("backbone.bottom_up.res3")]:
        del state[key]


def refused(teacher, terms=None, **opts):
    """The message with which building the distilled model is refused."""
    cfg = distilled_cfg("faster", teacher, terms or all_terms("faster", 1.0))
    for key, value in opts.items():
        cfg.KD.TEACHER[key] = value
    with pytest.raises(KDError) as error:
        build(cfg)
    message = str(error.value)
    assert message.startswith("expected ")
    assert "received" in message
    assert "remedy" in message
    return message


def test_an_empty_weights_key_is_refused(teacher):
    assert "KD.TEACHER.WEIGHTS" in refused(teacher, WEIGHTS="")


def test_an_untrained_teacher_needs_permission(teacher):
    cfg = distilled_cfg("faster", teacher, all_terms("faster", 1.0))
    cfg.KD.TEACHER.WEIGHTS = ""
    cfg.KD.TEACHER.ALLOW_RANDOM = True
    build(cfg)


def test_a_file_without_tensors_is_refused(teacher):
    torch.save({"model": {}}, teacher[1])
    assert "none" in refused(teacher)


def test_an_empty_file_is_refused(teacher):
    teacher[1].write_bytes(b"")
    assert str(teacher[1]) in refused(teacher)


def test_a_missing_file_is_refused(teacher):
    teacher[1].unlink()
    assert str(teacher[1]) in refused(teacher)


def test_a_partial_teacher_names_the_missing_keys(teacher):
    plant(teacher[1], drop_backbone)
    message = refused(teacher)
    assert "missing" in message
    assert "backbone.bottom_up.res3.0.conv1.weight" in message


def test_a_teacher_of_other_depth_names_the_unexpected_keys(tmp_path, teacher):
    deep = tmp_path / "deep"
    deep.mkdir()
    weights = write_teacher(deep, "faster", ["MODEL.BASIC_RESNET.BLOCKS", [2, 1, 1]])[1]
    message = refused((teacher[0], weights))
    assert "unexpected" in message
    assert "backbone.bottom_up.res2.1.conv1.weight" in message


def test_weights_of_another_class_count_name_the_mis_shaped_keys(tmp_path, teacher):
    other = tmp_path / "other"
    other.mkdir()
    weights = write_teacher(other, "faster", ["MODEL.ROI_HEADS.NUM_CLASSES", 7])[1]
    message = refused((teacher[0], weights))
    assert "mis-shaped" in message
    assert "roi_heads.box_predictor.cls_score.weight (file (8, 128), model (11, 128))" in message


def test_a_teacher_of_other_classes_cannot_teach_logits(tmp_path):
    other = write_teacher(tmp_path, "faster", ["MODEL.ROI_HEADS.NUM_CLASSES", 7])
    message = refused(other)
    assert "student 10 classes, teacher 7 classes" in message
    assert "KD.TEACHER.CLASS_NAMES" in message
    features_only = {k: v for k, v in all_terms("faster").items() if k != "logits"}
    build(distilled_cfg("faster", other, features_only))


def test_a_missing_config_is_refused_and_a_zoo_name_suggested():
    with pytest.raises(
        KDError, match=r"did you mean 'COCO-Detection/faster_rcnn_R_101_FPN_3x.yaml'"
    ):
        find_config("COCO-Detection/faster_rcnn_R101_FPN_3x.yaml")
    with pytest.raises(KDError, match=r"KD.TEACHER.CONFIG_FILE"):
        find_config("")


def test_a_zoo_name_finds_the_zoos_config():
    name = "COCO-Detection/faster_rcnn_R_101_FPN_3x.yaml"
    assert str(find_config(name)) == model_zoo.get_config_file(name)


def test_the_zoo_format_loads(teacher):
    state = {k: v.numpy() for k, v in torch.load(teacher[1])["model"].items()}
    # Older zoo files hold buffers that newer models do not store.
    state["proposal_generator.anchor_generator.cell_anchors.0"] = state[
        "roi_heads.box_predictor.cls_score.bias"
    ]
    path = teacher[1].with_suffix(".pkl")
    path.write_bytes(pickle.dumps({"model": state, "__author__": "Detectron2 Model Zoo"}))
    cfg = distilled_cfg("faster", (teacher[0], path), all_terms("faster", 1.0))
    loaded = build_teacher(cfg).frozen.model.state_dict()
    for key, value in torch.load(teacher[1])["model"].items():
        assert torch.equal(loaded[key], value), key


def test_a_distilled_student_may_teach_in_turn(tmp_path, teacher):
    cfg = distilled_cfg("faster", teacher, all_terms("faster", 1.0))
    model = build(cfg)
    config, weights = tmp_path / "student.yaml", tmp_path / "student.pth"
    config.write_text(cfg.dump())
    torch.save({"model": model.state_dict()}, weights)
    build(distilled_cfg("faster", (config, weights), all_terms("faster", 1.0)))


def test_softmax_has_no_meaning_on_a_sigmoid_head(tmp_path):
    sigmoid = ["MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE", True]
    files = write_teacher(tmp_path, "faster", sigmoid)
    with pytest.raises(KDError, match="ACTIVATION sigmoid"):
        build(distilled_cfg("faster", files, all_terms("faster", 1.0), sigmoid))


def test_a_student_without_the_tapped_module_is_refused(teacher):
    terms = {"hint": {"LOSS": "FitNet", "TAPS": ["backbone.bottom_up.res6"]}}
    assert "res" in refused(teacher, terms)
    assert "c3" in refused(teacher, {"hint": {"LOSS": "FitNet", "TAPS": ["c9"]}})
    masks = {"masks": {"LOSS": "KD", "TAPS": ["mask_logits"], "ACTIVATION": "sigmoid"}}
    assert "mask_logits" in refused(teacher, masks)


def test_strides_that_cannot_be_aligned_are_refused(teacher):
    message = refused(teacher, {"hint": {"LOSS": "FitNet", "TAPS": [["c2", "c3"]]}})
    assert "student stride 4, teacher stride 8" in message


def test_module_paths_are_taps(teacher):
    terms = {"hint": {"LOSS": "FitNet", "TAPS": ["backbone.bottom_up.res3.0"]}}
    model = build(distilled_cfg("faster", teacher, terms))
    with EventStorage():
        assert model(batch())["hint"] > 0


def test_a_term_may_not_take_the_name_of_a_task_loss(teacher):
    model = build(
        distilled_cfg("faster", teacher, {"loss_cls": {"LOSS": "KD", "TAPS": ["box_logits"]}})
    )
    with EventStorage(), pytest.raises(KDError, match="loss_cls"):
        model(batch())


def test_pixels_are_reordered_before_the_teacher_normalises(tmp_path):
    """The spec's example: RGB 100, 150, 200 becomes BGR 96.47, 33.72, -23.675."""
    mean = ["MODEL.PIXEL_MEAN", [103.53, 116.28, 123.675], "MODEL.PIXEL_STD", [1.0, 1.0, 1.0]]
    model = build(
        distilled_cfg(
            "faster",
            write_teacher(tmp_path, "faster", [*mean, "INPUT.FORMAT", "BGR"]),
            all_terms("faster", 1.0),
            ["INPUT.FORMAT", "RGB"],
        )
    )
    seen = []
    teacher = model.teacher.frozen.model
    teacher.backbone.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    inputs = batch(sizes=((64, 96),))
    inputs[0]["image"] = torch.tensor([100, 150, 200], dtype=torch.uint8)[:, None, None].expand(
        3, 64, 96
    )
    with EventStorage():
        model(inputs)
    expected = torch.tensor([200 - 103.53, 150 - 116.28, 100 - 123.675])
    torch.testing.assert_close(seen[0][0, :, 0, 0], expected)


def test_channel_orders_that_cannot_be_converted_are_refused(refuses):
    cfg = CfgNode({"INPUT": CfgNode({"FORMAT": "YUV-BT.601"})})
    Distillation(None, [], input_format="YUV-BT.601", teacher_cfg=cfg)
    with refuses("student RGB, teacher YUV"):
        Distillation(None, [], input_format="RGB", teacher_cfg=cfg)


def test_a_larger_padding_divisor_of_the_teacher_shifts_nothing(tmp_path):
    """A teacher with a fourth level pads to 32, the student to 16; cells still correspond."""
    deeper = [
        "MODEL.BASIC_RESNET.BLOCKS", [1, 1, 1, 1],
        "MODEL.FPN.IN_FEATURES", ["res2", "res3", "res4", "res5"],
    ]  # fmt: skip
    model = build(
        distilled_cfg("faster", write_teacher(tmp_path, "faster", deeper), all_terms("faster", 1.0))
    )
    seen, images = {}, []
    model.distiller.register_forward_pre_hook(
        lambda module, args: seen.update(zip("st", args, strict=False))
    )
    teacher = model.teacher.frozen.model
    teacher.backbone.register_forward_pre_hook(lambda module, args: images.append(args[0]))
    inputs = batch(sizes=((72, 100),))
    with EventStorage():
        model(inputs)
    assert images[0].shape[-2:] == (96, 128)
    for level in ("p2", "p3", "p4"):
        assert seen["s"][level].shape[-2:] == seen["t"][level].shape[-2:]
    with torch.no_grad():
        alone = teacher.backbone(teacher.preprocess_image(inputs).tensor)
    height, width = seen["s"]["p2"].shape[-2:]
    assert torch.equal(seen["t"]["p2"], alone["p2"][..., :height, :width])


def test_a_larger_padding_divisor_of_the_student_shifts_nothing(tmp_path):
    deeper = [
        "MODEL.BASIC_RESNET.BLOCKS", [1, 1, 1, 1],
        "MODEL.FPN.IN_FEATURES", ["res2", "res3", "res4", "res5"],
    ]  # fmt: skip
    model = build(
        distilled_cfg("faster", write_teacher(tmp_path, "faster"), all_terms("faster", 1.0), deeper)
    )
    seen = {}
    model.distiller.register_forward_pre_hook(
        lambda module, args: seen.update(zip("st", args, strict=False))
    )
    with EventStorage():
        model(batch(sizes=((72, 100),)))
    for level in ("p2", "p3", "p4"):
        assert seen["s"][level].shape[-2:] == seen["t"][level].shape[-2:]


def test_disabled_distillation_builds_no_teacher(teacher):
    cfg = distilled_cfg("faster", teacher, all_terms("faster", 1.0))
    cfg.KD.ENABLED = False
    teacher[1].unlink()
    model = build(cfg)
    assert model.distiller is None
    assert model.state_dict().keys() == build(tiny_cfg("faster")).state_dict().keys()


def test_enabled_distillation_needs_terms(teacher):
    cfg = distilled_cfg("faster", teacher, {})
    cfg.KD.TERMS = CfgNode(new_allowed=True)
    with pytest.raises(KDError, match=r"KD.TERMS"):
        build(cfg)
