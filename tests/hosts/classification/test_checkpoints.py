"""Public checkpoints: every key finds its parameter, and what does not is an error."""

import math
import re

import pytest
import torch
import torchvision
from torch import nn

from kd_det.core.checkpoint import read_weights
from kd_det.hosts.classification.checkpoints import load_public
from kd_det.hosts.classification.models import build_classifier

# Our keys to those of the public collections, and keys that RepDistiller's networks are known to
# have, with the number of all their keys.
PUBLIC = {
    "resnet8": ((), ("layer2.0.downsample.0.weight", "layer3.0.bn2.running_var", "fc.bias"), 56),
    "resnet14": ((), ("layer1.1.bn1.weight", "layer2.1.conv2.weight"), 92),
    "resnet8x4": ((), ("layer1.0.downsample.1.bias", "layer3.0.conv2.weight"), 62),
    "wrn_16_1": (
        ((r"^layer(\d)\.", r"block\1.layer."), (r"\.shortcut\.", ".convShortcut.")),
        ("block1.layer.1.conv2.weight", "block2.layer.0.convShortcut.weight", "bn1.running_mean"),
        82,
    ),
    "wrn_16_2": (
        ((r"^layer(\d)\.", r"block\1.layer."), (r"\.shortcut\.", ".convShortcut.")),
        ("block1.layer.0.convShortcut.weight", "block3.layer.1.bn2.weight", "fc.weight"),
        83,
    ),
    "vgg8": (((r"^fc\.", "classifier."),), ("block0.0.bias", "block4.1.bias"), 37),
    "vgg11": (((r"^fc\.", "classifier."),), ("block3.4.running_var", "classifier.bias"), 58),
    "mobilenetv2_x0.5": (
        ((r"^fc\.", "classifier.0."),),
        ("conv1.0.weight", "blocks.3.2.conv.7.running_var", "conv2.1.bias", "classifier.0.weight"),
        320,
    ),
    "shufflenetv1": (
        ((r"^fc\.", "linear."),),
        ("layer1.0.conv3.weight", "layer2.7.bn3.weight", "linear.weight"),
        296,
    ),
    "shufflenetv2": (
        ((r"^fc\.", "linear."),),
        ("layer1.0.conv5.weight", "layer2.7.bn3.bias", "conv2.weight", "linear.bias"),
        338,
    ),
    "resnet50_cifar": (
        ((r"^fc\.", "linear."), (r"\.downsample\.", ".shortcut.")),
        ("layer1.0.shortcut.0.weight", "layer4.2.conv3.weight", "linear.weight"),
        320,
    ),
}  # fmt: skip


def public_key(name, key):
    for pattern, replacement in PUBLIC[name][0]:
        key = re.sub(pattern, replacement, key)
    return key


def randomised(name, num_classes=7):
    """A network none of whose tensors is at its start."""
    model = build_classifier(name, num_classes)
    with torch.no_grad():
        for key, value in model.state_dict().items():
            if value.is_floating_point():
                value.uniform_(0.5, 1.5) if "running_var" in key else value.normal_(0, 0.2)
            else:
                value.fill_(240)
    return model


def public_state(name, model=None):
    state = (model or randomised(name)).state_dict()
    return {public_key(name, key): value for key, value in state.items()}


def repdistiller_file(path, state):
    """As ``train_teacher.py`` of RepDistiller writes it, with its optimiser."""
    some = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([some], lr=0.05, momentum=0.9, weight_decay=5e-4)
    some.sum().backward()
    optimizer.step()
    torch.save(
        {
            "epoch": 240,
            "model": state,
            "accuracy": torch.tensor([72.34]),
            "optimizer": optimizer.state_dict(),
        },
        path,
        _use_new_zipfile_serialization=False,
    )
    return str(path)


@pytest.mark.parametrize("name", PUBLIC)
def test_public_layout_is_the_one_of_the_collections(name):
    _, known, count = PUBLIC[name]
    keys = public_state(name)
    assert set(known) <= set(keys)
    assert len(keys) == count


@pytest.mark.parametrize("name", PUBLIC)
def test_public_file_gives_the_same_network(name, tmp_path, randn):
    source = randomised(name).eval()
    path = repdistiller_file(tmp_path / "ckpt_epoch_240.pth", public_state(name, source))
    loaded = build_classifier(name, 7, pretrained_weights=path).eval()
    state = source.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in loaded.state_dict().items())
    images = randn(2, 3, 16, 16, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(loaded(images), source(images))


# Logits of RepDistiller's own networks (commit b84f547), holding `waves` in their own keys.
REFERENCE = {
    "resnet14": (13.8218031, 12.17769197, -23.27900994),
    "resnet8x4": (13.67242723, 19.231605, -17.1595649),
    "wrn_16_1": (0.6736252035, -1.890972125, 1.215231645),
    "wrn_16_2": (-0.3420426672, 2.597257249, -2.439300203),
    "vgg8": (-6.895920261, 3.22498126, -0.8830348913),
    "vgg11": (-6.930675721, 3.258087397, -0.9134357242),
    "mobilenetv2_x0.5": (-79.2184296, 297.3046529, -177.9460179),
    "shufflenetv1": (22070.91103, -6989.582954, -21269.19622),
    "shufflenetv2": (-147.0526301, -148.9038847, -132.1923416),
    "resnet50_cifar": (1247.416351, 1365.073099, 813.2547334),
}


def waves(state):
    """Weights that follow from nothing but keys and shapes, of a size that keeps maps alive."""
    filled = {}
    for key, value in state.items():
        wave = torch.sin(1.7 * torch.arange(value.numel(), dtype=torch.float64) + len(key))
        wave = wave.view(value.shape)
        if value.dim() > 1:
            wave = wave * 2 / math.sqrt(value[0].numel())
        elif key.endswith(("weight", "running_var")):
            wave = 1 + wave / 2
        filled[key] = wave if value.is_floating_point() else value
    return filled


@pytest.mark.parametrize("name", REFERENCE)
def test_public_weights_give_the_logits_of_the_public_network(name):
    model = build_classifier(name, 3).double().eval()
    load_public(model, waves(public_state(name, model)))
    images = torch.cos(0.37 * torch.arange(3 * 32 * 32, dtype=torch.float64)).view(1, 3, 32, 32)
    with torch.no_grad():
        logits = model(images)
    expected = torch.tensor([REFERENCE[name]], dtype=torch.float64)
    torch.testing.assert_close(logits, expected, rtol=1e-8, atol=0)


@pytest.mark.parametrize("name", PUBLIC)
def test_own_names_load_too(name):
    source, model = randomised(name), build_classifier(name, 7)
    load_public(model, source.state_dict())
    state = source.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_file_of_parallel_training_loads(tmp_path):
    state = {f"module.{key}": value for key, value in public_state("wrn_16_1").items()}
    torch.save({"epoch": 1, "model": state, "best_acc": 71.2}, tmp_path / "student.pth")
    load_public(build_classifier("wrn_16_1", 7), read_weights(tmp_path / "student.pth"))


def test_file_older_than_the_batch_counter_loads():
    state = public_state("vgg8")
    old = {key: value for key, value in state.items() if "num_batches" not in key}
    model = randomised("vgg8")
    load_public(model, old)
    assert model.block0[1].num_batches_tracked == 0
    assert torch.equal(model.block0[1].running_var, state["block0.1.running_var"])


@pytest.mark.parametrize("name", PUBLIC)
def test_one_key_less_more_or_of_another_shape_is_refused(name, refuses):
    model = randomised(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = public_state(name)
    weight = next(
        key for key in reversed(state) if key.endswith(".weight") and state[key].dim() > 1
    )
    own = next(key for key in before if public_key(name, key) == weight)

    with refuses("a.pth", "1 missing", own):
        load_public(model, {k: v for k, v in state.items() if k != weight}, "a.pth")
    with refuses("1 unexpected", "regress.weight"):
        load_public(model, {**state, "regress.weight": torch.ones(2)})
    with refuses("1 mis-shaped", own):
        load_public(model, {**state, weight: state[weight][:-1]})
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_statistics_without_their_norm_are_missed(refuses):
    state = public_state("resnet8")
    without = {key: value for key, value in state.items() if not key.startswith("bn1.")}
    with refuses("5 missing", "bn1.weight", "bn1.running_mean", "bn1.num_batches_tracked"):
        load_public(build_classifier("resnet8", 7), without)


def test_other_class_count_is_refused_with_both(refuses):
    with refuses("mis-shaped", "fc.weight (file (7, 512), model (10, 512))"):
        load_public(build_classifier("vgg8", 10), public_state("vgg8"))


@pytest.mark.parametrize(("name", "other"), [("resnet8", "wrn_16_1"), ("vgg11", "vgg8")])
def test_another_network_is_refused(name, other, refuses):
    with refuses("missing", "keys in the checkpoint"):
        load_public(build_classifier(name, 7), public_state(other))


def test_two_layouts_in_one_file_are_refused(refuses):
    state = public_state("vgg8")
    with refuses("fc.weight", "CifarVGG", "one layout"):
        load_public(build_classifier("vgg8", 7), {**state, "fc.weight": state["classifier.weight"]})


def test_torchvision_file_loads_by_path(tmp_path):
    source = torchvision.models.resnet18(num_classes=7)
    path = tmp_path / "resnet18-f37072fd.pth"
    torch.save(source.state_dict(), path)
    loaded = build_classifier("resnet18", 7, pretrained_weights=str(path))
    assert torch.equal(loaded.fc.weight, source.fc.weight)


def test_densenet_file_of_the_old_layout_loads():
    model = build_classifier("densenet121", 7)
    state = {
        re.sub(r"(denselayer\d+\.)(norm|conv)([12])", r"\1\2.\3", key): torch.ones_like(value)
        for key, value in model.state_dict().items()
    }
    assert "features.denseblock1.denselayer1.norm.1.weight" in state
    load_public(model, state)
    assert all((value == 1).all() for value in model.state_dict().values())


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_auxiliary_heads_in_a_file_are_left_out(name):
    with torch.device("meta"):
        state = torchvision.models.get_model(name, init_weights=False, num_classes=7).state_dict()
        assert any(key.lower().startswith("aux") for key in state)
    load_public(build_classifier(name, 7), {key: torch.zeros(v.shape) for key, v in state.items()})
