"""Any torchvision classifier whose children run in sequence can carry the pyramid."""

from __future__ import annotations

import pytest
import torch
from torchvision.models.detection import fasterrcnn_resnet50_fpn, maskrcnn_resnet50_fpn

from kd_det.hosts.torchvision_detection.config import get_cfg
from kd_det.hosts.torchvision_detection.family import FAMILY
from kd_det.hosts.torchvision_detection.models import build_backbone, build_model, last_children
from tests.hosts.torchvision_detection.models import student_model, tiny_cfg


def cfg_with(name, levels):
    cfg = tiny_cfg("FasterRCNN", ["MODEL.BACKBONE.NAME", name, "MODEL.FPN.LEVELS", levels])
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[16]]
    return cfg


@pytest.mark.parametrize(
    ("name", "channels"),
    [
        ("resnet18", [64, 128, 256, 512]),
        ("mobilenet_v2", [24, 32, 96, 1280]),
        ("mobilenet_v3_small", [16, 24, 48, 576]),
        ("shufflenet_v2_x0_5", [24, 48, 96, 1024]),
        ("regnet_y_400mf", [48, 104, 208, 440]),
        ("efficientnet_b0", [24, 40, 112, 1280]),
        ("vgg11_bn", [256, 512, 512, 512]),
        ("basic_resnet", [4, 8, 16, 32]),
    ],
)
def test_the_pyramid_stands_on_the_last_layer_of_each_stride(name, channels):
    cfg = cfg_with(name, [2, 3, 4, 5])
    cfg.MODEL.BACKBONE.BLOCKS = [1, 1, 1, 1]
    backbone = build_backbone(cfg)
    found = last_children(backbone.body)
    assert [found[level][1] for level in (2, 3, 4, 5)] == channels
    levels = backbone.eval()(torch.zeros(1, 3, 64, 96))
    assert {k: tuple(v.shape) for k, v in levels.items()} == {
        str(i): (1, 8, 16 >> i, 24 >> i) for i in range(4)
    }


@pytest.mark.parametrize(
    ("levels", "keys"),
    [
        ([2, 3, 4], "012"),
        ([2, 3, 4, 5], ["0", "1", "2", "pool"]),
        ([3, 4, 5, 6], ["0", "1", "p6", "p7"]),
    ],
)
def test_levels_above_the_backbone_are_torchvisions(levels, keys):
    model = build_model(cfg_with("basic_resnet", levels))
    table = FAMILY.tap_table(model)
    selected = {name: table.taps[name].select for name in table.levels}
    assert selected == {f"p{k}": key for k, key in zip(levels, keys, strict=True)}
    assert [table.specs[f"p{k}"].stride for k in levels] == [2**k for k in levels]


@pytest.mark.parametrize(
    ("arch", "build"),
    [("FasterRCNN", fasterrcnn_resnet50_fpn), ("MaskRCNN", maskrcnn_resnet50_fpn)],
)
def test_the_default_config_has_the_keys_of_torchvisions_builder(arch, build):
    cfg = get_cfg()
    cfg.MODEL.META_ARCHITECTURE = arch
    ours = build_model(cfg).state_dict()
    stock = build(weights=None, weights_backbone=None, num_classes=81)
    theirs = stock.state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}
    assert FAMILY.tap_table(stock).specs == FAMILY.tap_table(build_model(cfg)).specs


def test_freezing_stops_where_it_says():
    cfg = cfg_with("basic_resnet", [2, 3, 4])
    cfg.MODEL.BACKBONE.FREEZE_AT, cfg.MODEL.BACKBONE.NORM = 2, "FrozenBN"
    frozen = {k for k, p in build_backbone(cfg).named_parameters() if not p.requires_grad}
    assert {k.split(".")[1] for k in frozen} == {"conv1", "layer1"}


@pytest.mark.parametrize("name", ["FasterRCNN", "RetinaNet"])
def test_a_dry_run_leaves_no_trace(name):
    model = student_model(name).train()
    model.backbone.body.layer2.eval()
    modes = [m.training for m in model.modules()]
    state = {k: v.clone() for k, v in model.state_dict().items()}
    rng = torch.get_rng_state()
    table = FAMILY.tap_table(model, ["backbone.body.layer2"])
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert torch.equal(rng, torch.get_rng_state())
    assert table.specs["backbone.body.layer2"] == table.specs["c3"]
