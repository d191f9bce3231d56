"""Taps by name: their shapes, and that listening changes nothing."""

import pytest
import torch
from torch import nn

from kd_det.core.taps import TapRecorder
from kd_det.hosts.classification.models import build_classifier
from kd_det.hosts.classification.taps import resolve_taps, tap_table

# name: (stem, stages) as (channels, size on a 32x32 image), then the length of the pooled vector
# and, where the first block of a stage has another width than its end, that width.
SHAPES = {
    "resnet8": ((16, 32), [(16, 32), (32, 16), (64, 8)], 64, {}),
    "resnet14_x0.5": ((8, 32), [(8, 32), (16, 16), (32, 8)], 32, {}),
    "resnet8x4": ((32, 32), [(64, 32), (128, 16), (256, 8)], 256, {}),
    "wrn_16_2": ((16, 32), [(32, 32), (64, 16), (128, 8)], 128, {}),
    "vgg8": ((64, 32), [(128, 16), (256, 8), (512, 4), (512, 4)], 512, {}),
    "vgg13": ((64, 32), [(128, 16), (256, 8), (512, 4), (512, 4)], 512, {}),
    "mobilenetv2_x0.5": (
        (16, 16),
        [(12, 16), (16, 8), (48, 4), (160, 2)],
        1280,
        {1: 8, 3: 32, 4: 80},
    ),
    "shufflenetv1": ((24, 32), [(240, 16), (480, 8), (960, 4)], 960, {}),
    "shufflenetv2": ((24, 32), [(116, 16), (232, 8), (464, 4)], 1024, {}),
    "resnet50_cifar": ((64, 32), [(256, 32), (512, 16), (1024, 8), (2048, 4)], 2048, {}),
}
WITHOUT_PRE = ("mobilenetv2_x0.5",)
ENDS_IN_RELU = ("resnet14_x0.5", "resnet8x4", "vgg8", "vgg13", "shufflenetv1", "resnet50_cifar")


def record(model, images):
    recorder = TapRecorder(model, tap_table(model))
    with recorder.recording():
        output = model(images)
    return output, recorder.read()


def images(randn, size, count=2):
    return randn(count, 3, size, size, dtype=torch.float32)


@pytest.mark.parametrize("size", [16, 32])
@pytest.mark.parametrize("name", SHAPES)
def test_every_tap_has_its_shape(name, size, randn):
    stem, stages, pooled, first = SHAPES[name]
    _, found = record(build_classifier(name, 7), images(randn, size))

    def shape(channels, at_32):
        side = at_32 * size // 32
        return (2, channels, side, side)

    expected = {"stem": shape(*stem), "pooled": (2, pooled), "logits": (2, 7)}
    for k, (channels, side) in enumerate(stages, 1):
        expected[f"stage{k}"] = shape(channels, side)
        expected[f"stage{k}_first"] = shape(first.get(k, channels), side)
        if name not in WITHOUT_PRE:
            expected[f"stage{k}_pre"] = shape(channels, side)
        if name.startswith("wrn"):
            expected[f"stage{k}_post"] = shape(channels, side)
    assert {tap: tuple(value.shape) for tap, value in found.items()} == expected


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", SHAPES)
def test_listening_leaves_logits_bit_identical(name, training, randn):
    model = build_classifier(name, 7).train(training)
    x = images(randn, 16)
    with torch.no_grad():
        expected = model(x)
        output, found = record(model, x)
    assert torch.equal(output, expected)
    assert torch.equal(found["logits"], expected)
    assert torch.equal(model.fc(found["pooled"]), expected)


@pytest.mark.parametrize("name", SHAPES)
def test_stage_ends_are_where_the_chain_is_cut(name, randn):
    """From each stage's end, the children behind it give the logits."""
    model = build_classifier(name, 7).eval()
    output, found = record(model, images(randn, 32))
    children = list(model.named_children())
    if name.startswith("mobile"):
        groups = [(f"blocks.{i}", group) for i, group in enumerate(model.blocks)]
        children = [children[0], *groups, *children[2:]]
    names = [child for child, _ in children]
    table = tap_table(model)
    stages = ["stem", *(f"stage{k}" for k in range(1, len(SHAPES[name][1]) + 1))]
    for stage in stages:
        x = found[stage]
        for _, child in children[names.index(table[stage].path) + 1 :]:
            x = child(x)
        assert torch.equal(x, output), stage


@pytest.mark.parametrize("name", ENDS_IN_RELU)
def test_relu_of_the_preactivation_is_the_stage_end(name, randn):
    _, found = record(build_classifier(name, 7).eval(), images(randn, 16))
    for k in range(1, len(SHAPES[name][1]) + 1):
        before = found[f"stage{k}_pre"]
        assert (before < 0).any()
        assert torch.equal(before.relu(), found[f"stage{k}"])


def test_preactivation_of_shufflenet_v2_is_the_stage_end_before_its_shuffle(randn):
    _, found = record(build_classifier("shufflenetv2", 7).eval(), images(randn, 16))
    for k in (1, 2, 3):
        before, after = found[f"stage{k}_pre"], found[f"stage{k}"]
        half = before.shape[1] // 2
        assert (before < 0).any()
        assert torch.equal(before[:, :half], after[:, 0::2])
        assert torch.equal(before[:, half:].relu(), after[:, 1::2])


def test_wide_resnet_offers_the_raw_sum_its_norm_and_its_relu(randn):
    model = build_classifier("wrn_16_1", 7).eval()
    _, found = record(model, images(randn, 16))
    norms = (model.layer2[0].bn1, model.layer3[0].bn1, model.bn1)
    for k, norm in enumerate(norms, 1):
        assert (found[f"stage{k}"] < 0).any()
        assert torch.equal(norm(found[f"stage{k}"]), found[f"stage{k}_pre"])
        assert torch.equal(found[f"stage{k}_pre"].relu(), found[f"stage{k}_post"])


@pytest.mark.parametrize(("name", "same"), [("resnet8", True), ("resnet14", False)])
def test_first_block_is_the_stage_end_only_where_it_is_the_only_block(name, same, randn):
    _, found = record(build_classifier(name, 7).eval(), images(randn, 16))
    for k in (1, 2, 3):
        assert torch.equal(found[f"stage{k}_first"], found[f"stage{k}"]) == same


@pytest.mark.parametrize("name", SHAPES)
def test_gradients_flow_through_every_tap(name, randn):
    model = build_classifier(name, 7)
    _, found = record(model, images(randn, 16))
    sum(value.square().mean() for value in found.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


# name: channels and strides of stem and stages, length of the pooled vector, which extra taps.
LIBRARY = {
    "resnet18": ([64, 64, 128, 256, 512], [4, 4, 8, 16, 32], 512, {"first"}),
    "torchvision/vgg11_bn": ([64, 128, 256, 512, 512], [1, 2, 4, 8, 16], 16, {"first", "pre"}),
    "mobilenet_v2": ([32, 24, 32, 96, 320], [2, 4, 8, 16, 32], 1280, {"first"}),
    "mobilenet_v3_small": ([16, 16, 24, 48, 96], [2, 4, 8, 16, 32], 1024, {"first"}),
    "mobilenet_v3_large": ([16, 24, 40, 112, 160], [2, 4, 8, 16, 32], 1280, {"first"}),
    "shufflenet_v2_x0_5": ([24, 48, 96, 192], [4, 8, 16, 32], 1024, {"first"}),
    "timm/resnet10t": ([64, 64, 128, 256, 512], [2, 4, 8, 16, 32], 512, set()),
    "timm/mobilenetv2_050": ([8, 16, 16, 48, 160], [2, 4, 8, 16, 32], 1280, set()),
}


def small_vgg():
    """Torchvision's VGG-11 without the hundred million weights of its linear layers."""
    with torch.device("meta"):
        model = build_classifier("torchvision/vgg11_bn", 7)
    linear = model.classifier
    model.classifier = nn.Sequential(nn.Linear(25_088, 16), *linear[1:3], nn.Linear(16, 7))
    model.features.to_empty(device="cpu")
    for module in model.features.modules():
        if isinstance(module, nn.Conv2d | nn.BatchNorm2d):
            module.reset_parameters()
    return model


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", LIBRARY)
def test_stock_networks_have_the_same_names_and_run_unchanged(name, training, randn):
    if name.startswith("timm"):
        pytest.importorskip("timm")
    channels, strides, pooled, extra = LIBRARY[name]
    model = (small_vgg() if "vgg" in name else build_classifier(name, 7)).train(training)
    x = images(randn, 64)
    with torch.no_grad():
        torch.manual_seed(1)  # dropout
        expected = model(x)
        torch.manual_seed(1)
        output, found = record(model, x)
    assert torch.equal(output, expected)
    assert torch.equal(found["logits"], expected)
    assert found["pooled"].shape == (2, pooled)
    names = ["stem", *(f"stage{k}" for k in range(1, len(channels)))]
    for tap, width, stride in zip(names, channels, strides, strict=True):
        assert found[tap].shape == (2, width, 64 // stride, 64 // stride), tap
    suffixed = {f"{stage}_{end}" for stage in names[1:] for end in extra}
    assert set(found) == {*names, *suffixed, "pooled", "logits"}
    for stage in names[1:]:
        if "first" in extra:
            assert found[f"{stage}_first"].shape[2:] == found[stage].shape[2:]
        if "pre" in extra:
            assert (found[f"{stage}_pre"] < 0).any()
            assert torch.equal(found[f"{stage}_pre"].relu(), found[stage])


def test_transformer_of_timm_has_a_stage_per_block(randn):
    pytest.importorskip("timm")
    model = build_classifier("timm/test_vit", 7).eval()
    with torch.no_grad():
        output, found = record(model, randn(1, 3, 160, 160, dtype=torch.float32))
    assert torch.equal(found["logits"], output)
    assert "stem" not in found
    assert found["stage1"].shape == found["stage6"].shape == (1, 101, 64)
    assert found["pooled"].shape == (1, 64)


def test_network_without_known_stages_has_pooled_and_logits(randn):
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 5), nn.ReLU(), nn.Linear(5, 3))
    output, found = record(model, images(randn, 4))
    assert torch.equal(found["logits"], output)
    assert torch.equal(model[3](found["pooled"]), output)
    assert set(found) == {"pooled", "logits"}


def test_names_and_module_paths_resolve(randn):
    model = build_classifier("resnet14", 7).eval()
    taps = resolve_taps(model, ["stage2", "layer2.0.conv1", "logits"])
    recorder = TapRecorder(model, taps)
    with recorder.recording():
        model(images(randn, 16))
    found = recorder.read()
    assert list(found) == ["stage2", "layer2.0.conv1", "logits"]
    assert found["layer2.0.conv1"].shape == (2, 32, 8, 8)


@pytest.mark.parametrize("name", ["stage_2", "layer2.9", ""])
def test_unknown_tap_is_refused_with_the_known_ones(name, refuses):
    with refuses(f"'{name}'", "CifarResNet", "stage2_first", "pooled"):
        resolve_taps(build_classifier("resnet8", 7), ["stage1", name])
