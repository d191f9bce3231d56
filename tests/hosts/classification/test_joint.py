"""Rocket: two nets that share their lower layers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional as F

from kd_det.hosts.classification.model import Distillation, DistilledClassifier, Statistics
from kd_det.hosts.classification.models import build_classifier
from kd_det.procedures.joint import Booster

SHARED = ["conv1", "bn1", "relu", "layer1.0"]
HINT = {"hint": {"LOSS": "Rocket", "WEIGHT": 0.03, "TAPS": ["logits"]}}
PLAIN = Statistics([0.0, 0.0, 0.0], [1.0, 1.0, 1.0])


@pytest.fixture
def nets():
    return build_classifier("resnet8_x0.25", 10), build_classifier("resnet14_x0.25", 10)


@pytest.fixture
def batch(generator):
    return torch.rand(4, 3, 16, 16, generator=generator), torch.tensor([0, 1, 2, 3])


def joint(light, heavy, separate_norm=False, terms=HINT):
    booster = Booster(heavy, light, SHARED, separate_norm)
    return DistilledClassifier(light, PLAIN, 16, Distillation(terms, booster=booster))


def test_losses_are_those_of_two_nets_with_the_same_lower_layers(nets, batch):
    light, heavy = nets
    twin_light, twin_heavy = copy.deepcopy(light), copy.deepcopy(heavy)
    for name in SHARED:
        twin_heavy.get_submodule(name).load_state_dict(light.get_submodule(name).state_dict())
    losses = joint(light, heavy).train()(*batch)
    y, z = twin_light.train()(batch[0]), twin_heavy.train()(batch[0])
    expected = {
        "loss_cls": F.cross_entropy(y, batch[1]),
        "loss_booster": F.cross_entropy(z, batch[1]),
        "hint": 0.03 * (y - z.detach()).square().sum() / 4,
    }
    assert losses.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(losses[name], value)


def test_shared_layers_run_once_and_learn_from_both_nets(nets, batch):
    light, heavy = nets
    model = joint(light, heavy).train()
    runs = []
    light.conv1.register_forward_hook(lambda *_: runs.append(1))
    losses = model(*batch)
    assert len(runs) == 1
    grads = [
        torch.autograd.grad(losses[name], light.conv1.weight, retain_graph=True)[0]
        for name in losses
    ]
    assert all(grad.abs().sum() > 0 for grad in grads)


def test_the_hint_does_not_reach_the_booster(nets, batch):
    light, heavy = nets
    losses = joint(light, heavy).train()(*batch)
    (grad,) = torch.autograd.grad(losses["hint"], heavy.fc.weight, allow_unused=True)
    assert grad is None


def test_shared_weights_belong_to_the_student_and_are_counted_once(nets):
    light, heavy = nets
    own = {k: v.shape for k, v in light.state_dict().items()}
    before = sum(p.numel() for p in heavy.parameters())
    shared = sum(p.numel() for name in SHARED for p in light.get_submodule(name).parameters())
    model = joint(light, heavy)
    state = model.state_dict()
    assert {k: v.shape for k, v in state.items() if not k.startswith("distiller.")} == own
    counted = sum(p.numel() for p in model.parameters())
    assert counted == sum(p.numel() for p in light.parameters()) + before - shared


def test_separate_norms_share_convolutions_only(nets, batch):
    light, heavy = nets
    model = joint(light, heavy, separate_norm=True).train()
    assert heavy.conv1.weight is light.conv1.weight
    assert heavy.layer1[0].conv1.weight is light.layer1[0].conv1.weight
    assert heavy.bn1.weight is not light.bn1.weight
    runs = []
    for net in nets:
        net.bn1.register_forward_hook(lambda *_: runs.append(1))
    model(*batch)
    assert len(runs) == 2


def test_evaluation_uses_the_light_net_alone(nets, batch):
    light, heavy = nets
    model = joint(light, heavy).eval()
    heavy.forward = None
    assert torch.equal(model(batch[0]), light(batch[0]))


def test_a_deep_copy_trains_with_a_booster_of_its_own(nets, batch):
    model = joint(*nets).train()
    twin = copy.deepcopy(model)
    torch.testing.assert_close(twin(*batch), model(*batch))
    assert twin.distiller.booster is not model.distiller.booster


def test_a_gap_in_what_is_shared_is_refused(nets, refuses):
    light, heavy = nets
    booster = Booster(heavy, light, ["conv1", "layer1.0"])
    with refuses("'layer1.0'", "a layer before it is not shared"):
        DistilledClassifier(light, PLAIN, 16, Distillation(HINT, booster=booster))


def test_layers_of_another_shape_are_refused(refuses):
    light, heavy = build_classifier("resnet8_x0.25", 10), build_classifier("resnet8", 10)
    with refuses("'conv1'", "(4, 3, 3, 3)", "(16, 3, 3, 3)"):
        Booster(heavy, light, ["conv1"])


def test_an_unknown_layer_is_refused(nets, refuses):
    light, heavy = nets
    with refuses("received 'conv'", "did you mean 'conv1'?"):
        Booster(heavy, light, ["conv"])
