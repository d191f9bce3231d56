"""The pre-stage: trained on the teacher alone, saved, and refused by another teacher."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from kd_det import Distiller, FrozenTeacher
from kd_det.losses import MHGDLoss, TapSpec
from kd_det.procedures.pre_stage import (
    PreStageLoss,
    PreStageModel,
    load_pre_stage,
    pre_stage_losses,
    save_pre_stage,
    teacher_fingerprint,
)


class Summary(PreStageLoss):
    """Learns one direction of the teacher's rows and compares along it."""

    def __init__(self, channels, power=2):
        super().__init__(nn.Sequential(nn.Linear(channels, 1, bias=False), nn.BatchNorm1d(1)))
        self.channels, self.power = channels, power
        self.bridge = nn.Linear(channels, channels)  # for the student; no part of the pre-stage

    def pre_stage_loss(self, teacher):
        return (self.network(teacher[0]) - 3).square().mean()

    def fingerprint(self):
        return {"loss": "Summary", "power": self.power, "teacher_channels": [self.channels]}

    def forward(self, student, teacher, **context):
        return (self.network(self.bridge(student[0])) - self.network(teacher[0])).square().mean()


TEACHER = "a" * 64


@pytest.fixture
def rows(randn):
    return {"pooled": randn(8, 3, dtype=torch.float32)}


def trained(rows, **arguments):
    """One finished loss and its terms."""
    loss = Summary(3, **arguments)
    losses = {"one": (loss, ["pooled"])}
    model = PreStageModel(losses)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    for _ in range(5):
        optimizer.zero_grad()
        sum(model(rows).values()).backward()
        optimizer.step()
    model.finish()
    return loss, losses


def test_training_lowers_the_loss_and_changes_the_network_alone(rows):
    loss = Summary(3)
    before = copy.deepcopy(loss.state_dict())
    model = PreStageModel({"one": (loss, ["pooled"])})
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    values = []
    for _ in range(20):
        value = model(rows)["one"]
        values.append(value.item())
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    assert values[-1] < 0.5 * values[0]
    changed = {k for k, v in loss.state_dict().items() if not torch.equal(v, before[k])}
    assert changed
    assert all(key.startswith("network.") for key in changed)


def test_the_model_offers_its_optimiser_the_networks_alone(rows):
    loss = Summary(3)
    model = PreStageModel({"one": (loss, ["pooled"])})
    assert {id(p) for p in model.parameters()} == {id(p) for p in loss.network.parameters()}
    assert len(list(model.parameters())) == 3


@pytest.mark.parametrize("in_closure", [False, True])
def test_a_single_sample_moves_nothing_not_even_by_momentum_or_decay(randn, in_closure):
    taps = [TapSpec(4, size=(2, 2)), TapSpec(6, size=(2, 2))]
    mhgd = MHGDLoss(**MHGDLoss.tap_arguments(taps, taps, {}), heads=1)
    summary = Summary(3)
    model = PreStageModel({"graph": (mhgd, ["a", "b"]), "one": (summary, ["pooled"])})
    optimizer = model.optimizer(0.1, 0.9, True, 0.01)

    def train(samples):
        def closure():
            optimizer.zero_grad()
            shapes = {"a": (samples, 4, 2, 2), "b": (samples, 6, 2, 2)}
            teacher = {name: randn(*s, dtype=torch.float32) for name, s in shapes.items()}
            loss = sum(model({**teacher, "pooled": randn(5, 3, dtype=torch.float32)}).values())
            loss.backward()
            return loss

        if in_closure:
            assert optimizer.step(closure) > 0
        else:
            closure()
            optimizer.step()
        return [copy.deepcopy(m.state_dict()) for m in (mhgd.network, summary.network)]

    before, other = train(8)
    alone, moved = train(1)
    after, _ = train(8)
    assert all(torch.equal(alone[k], before[k]) for k in before)
    assert not torch.equal(moved["0.weight"], other["0.weight"])
    assert any(not torch.equal(after[k], alone[k]) for k in after)


def test_a_saved_network_gives_a_fresh_loss_the_same_values(rows, randn, tmp_path):
    loss, losses = trained(rows)
    save_pre_stage(tmp_path / "pre.pth", losses, TEACHER)
    fresh = Summary(3)
    load_pre_stage(tmp_path / "pre.pth", {"other name": (fresh, ["pooled"])}, TEACHER)
    fresh.bridge.load_state_dict(loss.bridge.state_dict())
    student = [randn(8, 3, dtype=torch.float32)]
    assert torch.equal(fresh(student, [rows["pooled"]]), loss(student, [rows["pooled"]]))
    assert [path.name for path in tmp_path.iterdir()] == ["pre.pth"]


def test_a_finished_network_is_frozen_but_in_the_state(rows):
    loss, _ = trained(rows)
    loss.train()
    assert [n for n, p in loss.named_parameters() if p.requires_grad] == [
        "bridge.weight",
        "bridge.bias",
    ]
    assert not any(module.training for module in loss.network.modules())
    assert loss.bridge.training
    assert {"network.0.weight", "network.1.running_var", "ready"} <= set(loss.state_dict())


def test_an_untrained_or_learning_network_refuses_the_transfer(rows, refuses):
    loss = Summary(3)
    given = [rows["pooled"]], [rows["pooled"]]
    with refuses("Summary with a network that was trained on the teacher", "an untrained one"):
        loss(*given)
    model = PreStageModel({"one": (loss, ["pooled"])})
    with refuses("an untrained one"):
        loss(*given)
    model.finish()
    assert torch.isfinite(loss(*given))


def test_a_network_that_learns_again_is_not_ready(rows, refuses):
    loss, losses = trained(rows)
    state = loss.pre_stage_state()
    before = {key: value.clone() for key, value in state.items()}
    model = PreStageModel(losses)
    with refuses("an untrained one"):
        loss([rows["pooled"]], [rows["pooled"]])
    model(rows)["one"].backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    # What was taken from it does not follow.
    assert all(torch.equal(state[key], before[key]) for key in before)
    assert not torch.equal(loss.network[0].weight, before["0.weight"])


def test_a_resumed_checkpoint_knows_that_its_network_is_ready(rows, tmp_path):
    loss, _ = trained(rows)
    wrapped = nn.ModuleDict({"one": loss})
    torch.save(wrapped.state_dict(), tmp_path / "model.pth")
    resumed = nn.ModuleDict({"one": Summary(3)})
    assert not resumed["one"].is_ready
    resumed.load_state_dict(torch.load(tmp_path / "model.pth", weights_only=True))
    assert resumed["one"].is_ready
    given = [rows["pooled"]], [rows["pooled"]]
    assert torch.equal(resumed["one"](*given), loss(*given))


def test_a_deep_copy_trains_and_finishes_itself(rows):
    model = PreStageModel({"one": (Summary(3), ["pooled"])})
    twin = copy.deepcopy(model)
    twin(rows)["one"].backward()
    assert all(p.grad is not None for p in twin.parameters())
    assert all(p.grad is None for p in model.parameters())


def test_the_teacher_gets_no_gradient_and_lists_of_tensors_are_joined(randn):
    class Count(Summary):
        def pre_stage_loss(self, teacher):
            assert not any(t.requires_grad for t in teacher)
            return sum(self.network(t).sum() for t in teacher) * 0 + len(teacher)

    model = PreStageModel({"one": (Count(3), ["stages", "pooled"])})
    teacher = {
        "stages": [randn(4, 3, grad=True, dtype=torch.float32) for _ in range(2)],
        "pooled": randn(4, 3, dtype=torch.float32),
    }
    assert model(teacher)["one"].item() == 3


@pytest.mark.parametrize(
    ("teacher", "loss", "taps", "parts"),
    [
        ("b" * 64, Summary(3), ["pooled"], ["teacher bbbbbbbbbbbb", "teacher aaaaaaaaaaaa"]),
        (TEACHER, Summary(3), ["logits"], ["on logits", "on pooled"]),
        (TEACHER, Summary(4), ["pooled"], ["teacher_channels [4]", "teacher_channels [3]"]),
        (TEACHER, Summary(3, power=1), ["pooled"], ["power 1", "power 2"]),
    ],
    ids=["weights", "taps", "widths", "hyper-parameters"],
)
def test_a_file_of_another_teacher_is_refused_naming_both_sides(
    rows, tmp_path, refuses, teacher, loss, taps, parts
):
    _, losses = trained(rows)
    path = tmp_path / "pre.pth"
    save_pre_stage(path, losses, TEACHER)
    with refuses(str(path), *parts, "KD.PRE_STAGE.WEIGHTS"):
        load_pre_stage(path, {"one": (loss, taps)}, teacher)
    assert not loss.is_ready


def test_one_unmatched_term_leaves_all_as_they_were(rows, tmp_path, refuses):
    _, losses = trained(rows)
    save_pre_stage(tmp_path / "pre.pth", losses, TEACHER)
    matching, other = Summary(3), Summary(3)
    with refuses("on pooled; loss Summary", "on logits"):
        load_pre_stage(
            tmp_path / "pre.pth",
            {"one": (matching, ["pooled"]), "two": (other, ["logits"])},
            TEACHER,
        )
    assert not matching.is_ready


def test_files_that_are_no_pre_stage_are_refused(tmp_path, refuses):
    losses = {"one": (Summary(3), ["pooled"])}
    with refuses("a pre-stage file", "which does not exist"):
        load_pre_stage(tmp_path / "none.pth", losses, TEACHER)
    torch.save({"model": {}}, tmp_path / "other.pth")
    with refuses("a pre-stage that save_pre_stage wrote", "another kind of file"):
        load_pre_stage(tmp_path / "other.pth", losses, TEACHER)
    (tmp_path / "damaged.pth").write_bytes(b"not a file of torch")
    with refuses("a pre-stage that save_pre_stage wrote", "UnpicklingError"):
        load_pre_stage(tmp_path / "damaged.pth", losses, TEACHER)


def test_an_unfinished_pre_stage_is_not_saved(tmp_path, refuses):
    losses = {"one": (Summary(3), ["pooled"])}
    PreStageModel(losses)
    with refuses("the pre-stage of term 'one' to be finished", "PreStageModel.finish()"):
        save_pre_stage(tmp_path / "pre.pth", losses, TEACHER)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_the_old_file(rows, tmp_path, monkeypatch):
    _, losses = trained(rows)
    path = tmp_path / "pre.pth"
    save_pre_stage(path, losses, TEACHER)
    before = path.read_bytes()

    def fail(content, file):
        file.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        save_pre_stage(path, losses, "b" * 64)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_the_terms_that_need_a_pre_stage_are_listed_with_their_teacher_taps():
    specs = {"c2": TapSpec(3), "c3": TapSpec(4), "t2": TapSpec(3), "t3": TapSpec(5)}
    terms = {
        "soft": {"LOSS": "KD", "TAPS": ["c2"]},
        "graph": {"LOSS": "MHGD", "TAPS": [["c2", "t2"], ["c3", "t3"]], "HEADS": 2},
    }
    distiller = Distiller(terms, specs, specs)
    assert pre_stage_losses(distiller) == {"graph": (distiller.terms["graph"], ["t2", "t3"])}


def test_a_distiller_is_saved_and_loaded_as_its_losses_are(randn, tmp_path):
    specs = {"c2": TapSpec(3), "c3": TapSpec(4)}
    narrow = {"c2": TapSpec(2), "c3": TapSpec(4)}
    terms = {"graph": {"LOSS": "MHGD", "TAPS": ["c2", "c3"], "HEADS": 2}}
    first, second = Distiller(terms, specs, specs), Distiller(terms, narrow, specs)
    model = PreStageModel(pre_stage_losses(first))
    maps = {"c2": randn(4, 3, 2, 2).float(), "c3": randn(4, 4, 2, 2).float()}
    model(maps)["graph"].backward()
    model.finish()
    save_pre_stage(tmp_path / "pre.pth", first, TEACHER)
    load_pre_stage(tmp_path / "pre.pth", second, TEACHER)  # another student, the same teacher
    states = [distiller.terms["graph"].network.state_dict() for distiller in (first, second)]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert second.terms["graph"].is_ready


def test_mhgd_names_its_heads_and_widths():
    assert MHGDLoss([2, 3], [4, 5]).fingerprint() == {
        "loss": "MHGD",
        "heads": 8,
        "teacher_channels": [4, 5],
    }


def small_teacher():
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2))


def test_equal_weights_have_equal_fingerprints():
    one, two = small_teacher(), FrozenTeacher(small_teacher())
    assert teacher_fingerprint(one) == teacher_fingerprint(two)
    assert len(teacher_fingerprint(one)) == 64


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m[0].weight.data[0, 0].add_(1e-6),
        lambda m: m[1].running_var.mul_(1.001),
        lambda m: m[1].num_batches_tracked.add_(1),
        lambda m: m.double(),
        lambda m: m.append(nn.Linear(1, 1)),
        lambda m: setattr(m[0], "weight", nn.Parameter(m[0].weight.reshape(3, 2, 1, 1))),
    ],
    ids=["weight", "statistics", "count", "dtype", "keys", "shape"],
)
def test_any_change_of_the_teacher_changes_its_fingerprint(change):
    model = small_teacher()
    before = teacher_fingerprint(model)
    change(model)
    assert teacher_fingerprint(model) != before
