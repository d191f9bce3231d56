"""The extra backbones of the Detectron2 host and the converter that fills them with weights."""

from __future__ import annotations

import importlib.util
import pickle
from pathlib import Path

import pytest

pytest.importorskip("detectron2")

import torch
import torchvision
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode, get_cfg
from detectron2.layers import FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling import build_backbone
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor

from kd_det.core.errors import KDError
from kd_det.hosts.detectron2.backbones import MobileNetV2, add_backbone_config

pytestmark = pytest.mark.detectron2

TOOL = Path(__file__).resolve().parents[3] / "tools" / "convert_torchvision_backbone.py"
FPN_LEVELS = ["p2", "p3", "p4", "p5", "p6"]


@pytest.fixture
def cfg() -> CfgNode:
    cfg = get_cfg()
    add_backbone_config(cfg)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    return cfg


@pytest.fixture
def mobilenet_cfg(cfg: CfgNode) -> CfgNode:
    cfg.MODEL.BACKBONE.NAME = "build_mobilenetv2_fpn_backbone"
    cfg.MODEL.FPN.IN_FEATURES = ["m2", "m3", "m4", "m5"]
    return cfg


@pytest.fixture
def basic_cfg(cfg: CfgNode) -> CfgNode:
    cfg.MODEL.BACKBONE.NAME = "build_basic_resnet_fpn_backbone"
    cfg.MODEL.BASIC_RESNET.WIDTH = 8
    cfg.MODEL.FPN.IN_FEATURES = ["res2", "res3", "res4"]
    cfg.MODEL.FPN.OUT_CHANNELS = 16
    return cfg


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location(TOOL.stem, TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def assert_levels_match_shapes(backbone: nn.Module, size: int = 64) -> dict[str, Tensor]:
    """Run one image and check every declared name, channel count and stride."""
    outputs = backbone(torch.rand(1, 3, size, size))
    declared = backbone.output_shape()
    assert list(outputs) == list(declared)
    for name, shape in declared.items():
        assert outputs[name].shape[1] == shape.channels, name
        assert outputs[name].shape[2] == max(1, size // shape.stride), name
    return outputs


def trainable_stages(bottom_up: nn.Module) -> list[str]:
    stages = bottom_up.named_children()
    return [name for name, stage in stages if any(p.requires_grad for p in stage.parameters())]


def randomise_norms(model: nn.Module) -> nn.Module:
    """Give every norm statistics and an affine that a wrong or forgotten mapping would expose."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.2, 0.2)
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model.eval()


class TestMobileNetV2:
    def test_outputs_have_the_published_widths_and_strides(self) -> None:
        model = MobileNetV2()
        assert_levels_match_shapes(model)
        channels = {name: shape.channels for name, shape in model.output_shape().items()}
        assert channels == {"m2": 24, "m3": 32, "m4": 96, "m5": 320}

    def test_width_multiplier_scales_every_level(self) -> None:
        model = MobileNetV2(width_mult=0.5)
        assert_levels_match_shapes(model)
        assert [s.channels for s in model.output_shape().values()] == [16, 16, 48, 160]

    def test_fpn_has_the_five_rcnn_levels(self, mobilenet_cfg: CfgNode) -> None:
        backbone = build_backbone(mobilenet_cfg)
        assert list(assert_levels_match_shapes(backbone)) == FPN_LEVELS
        assert backbone.size_divisibility == 32

    def test_retinanet_fpn_has_p3_to_p7(self, mobilenet_cfg: CfgNode) -> None:
        mobilenet_cfg.MODEL.BACKBONE.NAME = "build_retinanet_mobilenetv2_fpn_backbone"
        mobilenet_cfg.MODEL.FPN.IN_FEATURES = ["m3", "m4", "m5"]
        backbone = build_backbone(mobilenet_cfg)
        assert list(assert_levels_match_shapes(backbone, 128)) == ["p3", "p4", "p5", "p6", "p7"]

    def test_default_norm_is_frozen_everywhere(self, mobilenet_cfg: CfgNode) -> None:
        bottom_up = build_backbone(mobilenet_cfg).bottom_up
        norms = [m for m in bottom_up.modules() if isinstance(m, FrozenBatchNorm2d)]
        assert len(norms) == 51
        assert not any(isinstance(m, nn.BatchNorm2d) for m in bottom_up.modules())
        assert all(p.requires_grad for p in bottom_up.parameters())

    def test_bn_norm_stays_trainable(self, mobilenet_cfg: CfgNode) -> None:
        mobilenet_cfg.MODEL.MOBILENETV2.NORM = "BN"
        bottom_up = build_backbone(mobilenet_cfg).bottom_up
        norms = [m for m in bottom_up.modules() if isinstance(m, nn.BatchNorm2d)]
        assert len(norms) == 51
        assert all(norm.weight.requires_grad for norm in norms)

    def test_freeze_at_stops_the_first_stages_and_their_norms(self) -> None:
        model = MobileNetV2(norm="BN", freeze_at=2)
        assert trainable_stages(model) == ["m3", "m4", "m5"]
        assert not any(isinstance(m, nn.BatchNorm2d) for m in model.m2.modules())
        assert any(isinstance(m, nn.BatchNorm2d) for m in model.m3.modules())

    def test_every_parameter_gets_a_gradient(self) -> None:
        model = MobileNetV2(out_features=["m2", "m3"], norm="BN")
        sum(out.sum() for out in model(torch.rand(2, 3, 64, 64)).values()).backward()
        assert all(p.grad is not None for p in model.parameters())

    def test_unknown_level_is_refused_with_the_known_ones(self, mobilenet_cfg: CfgNode) -> None:
        mobilenet_cfg.MODEL.FPN.IN_FEATURES = ["res3"]
        with pytest.raises(KDError, match=r"IN_FEATURES.*'res3'.*m2, m3, m4, m5"):
            build_backbone(mobilenet_cfg)

    def test_grey_images_are_refused(self, mobilenet_cfg: CfgNode) -> None:
        with pytest.raises(KDError, match=r"3 input channels.*received 1"):
            build_backbone(mobilenet_cfg, ShapeSpec(channels=1))


class TestBasicResNet:
    @pytest.mark.parametrize(
        ("top_block", "levels"),
        [
            ("maxpool", ["p2", "p3", "p4", "p5"]),
            ("p6p7", ["p2", "p3", "p4", "p5", "p6"]),
            ("none", ["p2", "p3", "p4"]),
        ],
    )
    def test_top_block_follows_the_last_level(
        self, basic_cfg: CfgNode, top_block: str, levels: list[str]
    ) -> None:
        basic_cfg.MODEL.BASIC_RESNET.TOP_BLOCK = top_block
        backbone = build_backbone(basic_cfg)
        outputs = assert_levels_match_shapes(backbone)
        assert list(outputs) == levels
        assert {out.shape[1] for out in outputs.values()} == {16}

    def test_width_doubles_and_blocks_count_per_stage(self, basic_cfg: CfgNode) -> None:
        basic_cfg.MODEL.BASIC_RESNET.BLOCKS = [1, 2, 3, 1]
        basic_cfg.MODEL.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"]
        bottom_up = build_backbone(basic_cfg).bottom_up
        shapes = bottom_up.output_shape()
        assert [s.channels for s in shapes.values()] == [8, 16, 32, 64]
        assert [s.stride for s in shapes.values()] == [4, 8, 16, 32]
        assert [len(getattr(bottom_up, name)) for name in shapes] == [1, 2, 3, 1]

    def test_freeze_at_stops_the_first_stages(self, basic_cfg: CfgNode) -> None:
        basic_cfg.MODEL.BACKBONE.FREEZE_AT = 2
        assert trainable_stages(build_backbone(basic_cfg).bottom_up) == ["res3", "res4"]

    def test_norm_is_chosen_by_the_config(self, basic_cfg: CfgNode) -> None:
        basic_cfg.MODEL.BASIC_RESNET.NORM = "FrozenBN"
        modules = list(build_backbone(basic_cfg).modules())
        assert any(isinstance(m, FrozenBatchNorm2d) for m in modules)
        assert not any(isinstance(m, nn.BatchNorm2d) for m in modules)

    @pytest.mark.parametrize(
        ("overrides", "message"),
        [
            (["MODEL.BASIC_RESNET.TOP_BLOCK", "p8"], "TOP_BLOCK.*'p8'.*maxpool, none, p6p7"),
            (
                ["MODEL.BASIC_RESNET.BLOCKS", [1, 0]],
                r"BLOCKS.*at least one block each; received \[1, 0\]",
            ),
            (["MODEL.FPN.IN_FEATURES", ["res5"]], "IN_FEATURES.*'res5'.*res2, res3, res4"),
        ],
    )
    def test_bad_value_is_refused_with_the_known_ones(
        self, basic_cfg: CfgNode, overrides: list, message: str
    ) -> None:
        basic_cfg.merge_from_list(overrides)
        with pytest.raises(KDError, match=message):
            build_backbone(basic_cfg)


class Detector(nn.Module):
    """As much of a detector as the checkpointer's name matching looks at."""

    def __init__(self, cfg: CfgNode) -> None:
        super().__init__()
        self.backbone = build_backbone(cfg)


class TestConverter:
    def features_from(self, path: Path, cfg: CfgNode, images: Tensor) -> dict[str, Tensor]:
        """Load ``path`` as a user's training run would and return the bottom-up maps."""
        detector = Detector(cfg).eval()
        DetectionCheckpointer(detector).resume_or_load(str(path), resume=False)
        with torch.no_grad():
            return detector.backbone.bottom_up(images)

    def convert_file(self, tool, model: nn.Module, folder: Path) -> Path:
        torch.save(model.state_dict(), folder / "source.pth")
        assert tool.main([str(folder / "source.pth"), str(folder / "out" / "w.pkl")]) == 0
        return folder / "out" / "w.pkl"

    @pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
    def test_resnet_features_equal_torchvision(
        self, tool, cfg: CfgNode, tmp_path: Path, arch: str
    ) -> None:
        torch.manual_seed(0)
        model = randomise_norms(torchvision.models.get_model(arch, weights=None))
        path = self.convert_file(tool, model, tmp_path)
        stages = {f"layer{k - 1}": f"res{k}" for k in range(2, 6)}
        cfg.MODEL.BACKBONE.NAME = "build_resnet_fpn_backbone"
        cfg.MODEL.RESNETS.OUT_FEATURES = cfg.MODEL.FPN.IN_FEATURES = list(stages.values())
        settings = CfgNode.load_cfg(tool.settings(arch))
        cfg.merge_from_other_cfg(settings)

        images = torch.randn(2, 3, 64, 96)
        with torch.no_grad():
            expected = create_feature_extractor(model, stages)(images)
        got = self.features_from(path, cfg, images)
        assert list(got) == list(expected)
        for name in expected:
            torch.testing.assert_close(got[name], expected[name], msg=lambda m, n=name: f"{n} {m}")

    @pytest.mark.parametrize("norm", ["FrozenBN", "BN"])
    def test_mobilenetv2_features_equal_torchvision(
        self, tool, mobilenet_cfg: CfgNode, tmp_path: Path, norm: str
    ) -> None:
        torch.manual_seed(0)
        model = randomise_norms(torchvision.models.mobilenet_v2(weights=None))
        path = self.convert_file(tool, model, tmp_path)
        mobilenet_cfg.MODEL.MOBILENETV2.NORM = norm
        mobilenet_cfg.merge_from_other_cfg(CfgNode.load_cfg(tool.settings("mobilenet_v2")))

        images = torch.randn(2, 3, 64, 96)
        expected, x = {}, images
        with torch.no_grad():
            # The last block of each stride, counted from torchvision's own listing of the paper's
            # table: 1 + 2 + 3 + (4 + 3) + (3 + 1) blocks behind the stem convolution.
            for index, layer in enumerate(model.features):
                x = layer(x)
                if index in (3, 6, 13, 17):
                    expected[f"m{len(expected) + 2}"] = x
        got = self.features_from(path, mobilenet_cfg, images)
        assert list(got) == list(expected)
        for name in expected:
            torch.testing.assert_close(got[name], expected[name], msg=lambda m, n=name: f"{n} {m}")

    @pytest.mark.parametrize("arch", ["resnet18", "resnet34", "resnet50", "resnet101"])
    def test_every_resnet_key_has_a_place_in_the_stock_backbone(
        self, tool, cfg: CfgNode, arch: str
    ) -> None:
        with torch.device("meta"):
            source = torchvision.models.get_model(arch, weights=None).state_dict()
            cfg.MODEL.RESNETS.DEPTH = int(arch.removeprefix("resnet"))
            cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64 if cfg.MODEL.RESNETS.DEPTH < 50 else 256
            cfg.MODEL.RESNETS.OUT_FEATURES = ["res5"]
            cfg.MODEL.BACKBONE.NAME = "build_resnet_backbone"
            expected = build_backbone(cfg).state_dict()
        filled = {key: torch.empty(value.shape) for key, value in source.items()}
        found, checkpoint = tool.convert(filled)
        assert found == arch
        assert checkpoint["matching_heuristics"] is True
        got = {key: value.shape for key, value in checkpoint["model"].items()}
        assert got == {key: tuple(value.shape) for key, value in expected.items()}

    def test_mobilenetv2_keys_are_exactly_the_bottom_up_keys(
        self, tool, mobilenet_cfg: CfgNode
    ) -> None:
        _, checkpoint = tool.convert(torchvision.models.mobilenet_v2(weights=None).state_dict())
        keys = Detector(mobilenet_cfg).state_dict()
        expected = {key for key in keys if key.startswith("backbone.bottom_up.")}
        assert set(checkpoint["model"]) == expected

    def test_file_is_in_zoo_format(self, tool, tmp_path: Path) -> None:
        path = self.convert_file(tool, torchvision.models.resnet18(weights=None), tmp_path)
        checkpoint = pickle.loads(path.read_bytes())
        assert checkpoint["__author__"] == "torchvision"
        assert {type(value).__name__ for value in checkpoint["model"].values()} == {"ndarray"}

    def test_settings_name_the_pixel_statistics(self, tool, tmp_path: Path, capsys) -> None:
        self.convert_file(tool, torchvision.models.resnet18(weights=None), tmp_path)
        printed = capsys.readouterr().out
        assert "FORMAT: RGB" in printed
        assert "PIXEL_MEAN: [123.675, 116.280, 103.530]" in printed
        assert "PIXEL_STD: [58.395, 57.120, 57.375]" in printed

    def test_every_key_that_does_not_fit_is_listed(self, tool) -> None:
        weights = dict(torchvision.models.resnet18(weights=None).state_dict())
        weights["extra.weight"] = torch.zeros(1)
        weights["layer2.0.conv1.weight"] = torch.zeros(3)
        del weights["layer4.1.bn2.bias"]
        with pytest.raises(KDError) as error:
            tool.convert(weights)
        message = str(error.value)
        assert "3 that differ" in message
        assert "unexpected: extra.weight" in message
        assert "missing: layer4.1.bn2.bias" in message
        assert "shape: layer2.0.conv1.weight expected (128, 64, 3, 3), got (3,)" in message

    def test_unknown_architecture_is_refused(self, tool) -> None:
        with pytest.raises(KDError, match=r"resnet18.*mobilenet_v2.*conv\.weight"):
            tool.convert({"conv.weight": torch.zeros(1)})

    def test_existing_target_is_left_alone(self, tool, tmp_path: Path, capsys) -> None:
        target = tmp_path / "w.pkl"
        target.write_text("mine")
        with pytest.raises(SystemExit):
            tool.main([str(tmp_path / "s.pth"), str(target)])
        assert "exists already" in capsys.readouterr().err
        assert target.read_text() == "mine"
