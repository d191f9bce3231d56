"""Classifiers by name: sizes, shapes, starts, and names that cannot be built."""

import math
import sys

import pytest
import torch
import torchvision
from torch import nn

from kd_det.hosts.classification.models import CIFAR_NAMES, CifarNet, build_classifier

# Parameters with 100 and with 10 classes, as the networks of RepDistiller count them.
PARAMETERS = {
    "resnet8": (83_892, 78_042),
    "resnet14": (181_108, 175_258),
    "resnet20": (278_324, 272_474),
    "resnet32": (472_756, 466_906),
    "resnet44": (667_188, 661_338),
    "resnet56": (861_620, 855_770),
    "resnet110": (1_736_564, 1_730_714),
    "resnet8x4": (1_233_540, 1_210_410),
    "resnet32x4": (7_433_860, 7_410_730),
    "wrn_16_1": (180_916, 175_066),
    "wrn_16_2": (703_284, 691_674),
    "wrn_40_1": (569_780, 563_930),
    "wrn_40_2": (2_255_156, 2_243_546),
    "vgg8": (3_965_028, 3_918_858),
    "vgg11": (9_277_284, 9_231_114),
    "vgg13": (9_462_180, 9_416_010),
    "vgg16": (14_774_436, 14_728_266),
    "vgg19": (20_086_692, 20_040_522),
    "mobilenetv2_x0.5": (812_836, 697_546),
    "shufflenetv1": (949_258, 862_768),
    "shufflenetv2": (1_355_528, 1_263_278),
    "resnet50_cifar": (23_705_252, 23_520_842),
}
# Students of the IRG paper: no collection counts them, so from the layers' shapes, by hand.
SCALED = {"resnet20_x0.5": (8, 3), "resnet14_x0.5": (8, 2), "resnet20_x0.375": (6, 3)}

DEEPEST = ("resnet44", "resnet56", "resnet110", "wrn_40_1", "vgg19")  # only counted
TRAINABLE = [name for name in CIFAR_NAMES if name not in DEEPEST]
FAMILIES = (
    *("resnet14", "wrn_16_1", "vgg8", "mobilenetv2_x0.5"),
    *("shufflenetv1", "shufflenetv2", "resnet50_cifar"),
)


def count(name, num_classes):
    with torch.device("meta"):
        model = build_classifier(name, num_classes)
    return sum(p.numel() for p in model.parameters())


def residual_count(width, blocks, num_classes):
    """Parameters of a CIFAR ResNet, layer by layer."""
    total = 3 * width * 9 + 2 * width
    before = width
    for channels in (width, 2 * width, 4 * width):
        for _ in range(blocks):
            total += 9 * before * channels + 9 * channels**2 + 4 * channels
            if before != channels:
                total += before * channels + 2 * channels
            before = channels
    return total + num_classes * (before + 1)


@pytest.mark.parametrize("name", CIFAR_NAMES)
def test_parameter_count_is_the_public_one(name):
    if name in SCALED:
        expected = tuple(residual_count(*SCALED[name], k) for k in (100, 10))
    else:
        expected = PARAMETERS[name]
    assert (count(name, 100), count(name, 10)) == expected


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("resnet20", 0.27),  # He et al. 2016, table 6; shortcuts without parameters there
        ("resnet32", 0.46),
        ("resnet44", 0.66),
        ("resnet56", 0.85),
        ("resnet110", 1.73),
        ("wrn_40_1", 0.56),  # Zagoruyko and Komodakis 2016, tables 4 and 5
        ("wrn_40_2", 2.2),
        ("wrn_16_8", 11.0),
        ("wrn_28_10", 36.5),
    ],
)
def test_parameter_count_agrees_with_the_paper(name, millions):
    assert count(name, 10) / 1e6 == pytest.approx(millions, rel=0.03)


@pytest.mark.parametrize(
    ("name", "megabytes"),
    [
        ("resnet20", 1.06),
        ("resnet20_x0.5", 0.28),
        ("resnet14_x0.5", 0.18),
        ("resnet20_x0.375", 0.16),
    ],
)
def test_sizes_in_the_irg_table_are_weight_files_of_these_networks(name, megabytes):
    # "ResNet20 (1.06M)": the released teacher has the widths 16, 32, 64 and a quarter of a
    # million parameters. Caffe also stores statistics, a bias per convolution, and layer texts.
    with torch.device("meta"):
        model = build_classifier(name, 10)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    floats = count(name, 10) + sum(3 * m.num_features + 1 for m in norms)
    layer_texts = 12_000
    assert (4 * floats + layer_texts) / 2**20 == pytest.approx(megabytes, abs=0.006)


@pytest.mark.parametrize("name", TRAINABLE)
def test_two_small_images_train_every_parameter(name, randn):
    model = build_classifier(name, 7)
    images = randn(2, 3, 16, 16, dtype=torch.float32)
    logits = model(images)
    assert logits.shape == (2, 7)
    logits.square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    model.eval()
    with torch.no_grad():
        assert model(images[:1]).isfinite().all()


@pytest.mark.parametrize("name", FAMILIES)
def test_rectangles_grey_and_large_images_work(name, randn):
    model = build_classifier(name, 5, in_channels=1).eval()
    for shape in ((17, 40), (64, 64)):
        assert model(randn(2, 1, *shape, dtype=torch.float32)).shape == (2, 5)


def test_vgg_pools_a_fourth_time_on_images_of_64_pixels(randn):
    model = build_classifier("vgg8", 5).eval()
    last_map = nn.Sequential(*list(model.children())[:-3])
    for size, cells in ((32, 4), (48, 6), (64, 4), (128, 8)):
        assert last_map(randn(1, 3, size, size, dtype=torch.float32)).shape[-1] == cells


@pytest.mark.parametrize("name", FAMILIES)
def test_network_is_the_chain_of_its_children(name, randn):
    model = build_classifier(name, 7).eval()
    x = images = randn(1, 3, 16, 16, dtype=torch.float32)
    for child in model.children():
        x = child(x)
    assert torch.equal(x, model(images))
    assert [n for n, _ in model.named_children()][-3:] == ["avgpool", "flatten", "fc"]


@pytest.mark.parametrize("name", FAMILIES)
def test_no_layer_of_a_cifar_network_works_in_place(name):
    with torch.device("meta"):
        model = build_classifier(name, 7)
    assert not any(getattr(module, "inplace", False) for module in model.modules())


@pytest.mark.parametrize("name", ["resnet8", "wrn_16_1", "vgg8", "mobilenetv2_x0.5"])
def test_convolutions_start_with_he_fan_out_variance(name):
    model = build_classifier(name, 10)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            area = module.kernel_size[0] * module.kernel_size[1]
            std = math.sqrt(2 / (area * module.out_channels))
            # Six standard errors of an estimated standard deviation.
            within = 6 / math.sqrt(2 * module.weight.numel())
            assert module.weight.std().item() == pytest.approx(std, rel=within)
            assert module.bias is None or not module.bias.any()
        elif isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all()
            assert not module.bias.any()
    assert not model.fc.bias.any()
    if name.startswith(("vgg", "mobile")):
        assert model.fc.weight.std().item() == pytest.approx(0.01, rel=0.1)


@pytest.mark.parametrize("name", ["resnet8_x0.5", "wrn_10_1", "vgg8", "timm/test_resnet"])
def test_start_follows_the_seed_alone(name):
    if name.startswith("timm"):
        pytest.importorskip("timm")

    def start(seed):
        torch.manual_seed(seed)
        return build_classifier(name, 10).state_dict()

    first, again, other = start(3), start(3), start(4)
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert any(not torch.equal(first[k], other[k]) for k in first)


def test_width_suffix_scales_every_width():
    whole, half = build_classifier("resnet8", 10), build_classifier("resnet8_x0.5", 10)
    for a, b in zip(whole.modules(), half.modules(), strict=True):
        if isinstance(a, nn.Conv2d):
            assert (2 * b.out_channels, b.kernel_size) == (a.out_channels, a.kernel_size)
    assert isinstance(build_classifier("resnet26_x2", 10), CifarNet)
    widths = [m.out_channels for m in build_classifier("resnet8_x0.375", 10).layer3[0].children()
              if isinstance(m, nn.Conv2d)]  # fmt: skip
    assert widths == [24, 24]


def test_plain_names_of_imagenet_depths_are_torchvisions():
    for name in ("resnet50", "resnet152", "mobilenet_v2"):
        with torch.device("meta"):
            assert not isinstance(build_classifier(name, 10), CifarNet)
    assert isinstance(build_classifier("vgg11", 10), CifarNet)
    with torch.device("meta"):
        assert isinstance(build_classifier("torchvision/vgg11", 10), torchvision.models.VGG)


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_networks_with_auxiliary_heads_are_built_without(name):
    with torch.device("meta"):
        model = build_classifier(name, 10)
        assert model.train()(torch.zeros(2, 3, 96, 96)).shape == (2, 10)


def test_timm_networks_take_class_count_and_input_channels(randn):
    pytest.importorskip("timm")
    model = build_classifier("timm/test_resnet", 7, in_channels=1)
    assert model(randn(2, 1, 32, 32, dtype=torch.float32)).shape == (2, 7)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("resnet_20", ("'resnet_20'", "did you mean 'resnet20'?", "timm/<name>")),
        ("mobilenet_v9", ("did you mean 'mobilenet_v2'?",)),
        ("torchvision/resnet19", ("did you mean 'resnet18'?",)),
        ("caffe/resnet20", ("'caffe/resnet20'", "torchvision/<name>")),
        ("resnet21_x0.5", ("6n + 2", "21")),
        ("wrn_17_2", ("6n + 4", "depth 17")),
        ("wrn_16_0", ("factor at least 1", "factor 0")),
        ("shufflenetv2_x0.4", ("'x0.4'", "x0.5, x1, x1.5, x2")),
    ],
)
def test_unknown_name_is_refused_with_the_nearest(name, parts, refuses):
    with refuses(*parts):
        build_classifier(name, 10)


def test_unknown_timm_name_is_refused_with_the_nearest(refuses):
    pytest.importorskip("timm")
    with refuses("a classifier of timm", "did you mean 'resnet18'?"):
        build_classifier("timm/resnet181", 10)


def test_missing_timm_is_named(monkeypatch, refuses):
    monkeypatch.setitem(sys.modules, "timm", None)
    with refuses("timm/resnet18", "not installed", "pip install timm"):
        build_classifier("timm/resnet18", 10)


@pytest.mark.parametrize(
    ("name", "weights", "classes", "parts"),
    [
        ("resnet18", "IMAGENET1K_V9", 1000, ("'IMAGENET1K_V9'", "IMAGENET1K_V1")),
        ("resnet18", "IMAGENET1K_V1", 10, ("10 and 1000", "set 1000 classes")),
        ("resnet20", "IMAGENET1K_V1", 10, ("weights of resnet20 as a file", ".pth")),
    ],
)
def test_weights_that_cannot_fit_are_refused(name, weights, classes, parts, refuses):
    with refuses(*parts):
        build_classifier(name, classes, weights)


def test_named_weights_of_timm_are_checked(refuses):
    pytest.importorskip("timm")
    with refuses("'IMAGENET1K_V1'", "DEFAULT"):
        build_classifier("timm/resnet18", 1000, "IMAGENET1K_V1")
    with refuses("7 and 1000"):
        build_classifier("timm/resnet18", 7, "DEFAULT")


def test_grey_images_are_refused_by_torchvision(refuses):
    with refuses("3 input channels", "repeat grey images"):
        build_classifier("resnet18", 10, in_channels=1)
