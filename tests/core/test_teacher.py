"""The frozen teacher: four duties and strict loading."""

from __future__ import annotations

import copy
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from kd_det import FrozenTeacher, KDError
from kd_det.core.teacher import load_strict


def network():
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))


class Student(nn.Module):
    """Owns a teacher as a plain attribute."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.teacher = FrozenTeacher(network())


@pytest.fixture
def student():
    return Student()


@pytest.fixture
def x(randn):
    return randn(5, 3, dtype=torch.float32)


def test_eval_mode_survives_the_train_call_of_the_owner(student, x):
    student.train()
    assert not any(module.training for module in student.teacher.model.modules())
    statistics = student.teacher.model[1].running_mean.clone()
    assert torch.equal(student.teacher(x), student.teacher(x))  # no dropout
    assert torch.equal(student.teacher.model[1].running_mean, statistics)


def test_a_teacher_switched_to_training_is_switched_back_before_use(student, x):
    expected = student.teacher(x)
    student.teacher.model.train()
    assert torch.equal(student.teacher(x), expected)
    student.teacher.model[1].train()
    with student.teacher.inference() as model:
        assert torch.equal(model(x), expected)


def test_no_parameter_requires_a_gradient(student):
    student.requires_grad_(True)
    assert not any(p.requires_grad for p in student.teacher.model.parameters())


def test_results_carry_no_graph(student, x):
    x.requires_grad_()
    assert not student.teacher(x).requires_grad
    with student.teacher.inference() as model:
        assert not model(x).requires_grad
        assert not model(x).is_inference()


def test_gradients_are_on_again_after_the_teacher_ran(student, x):
    student.teacher(x)
    assert student.layer(x).requires_grad


def test_an_observer_surrounds_every_forward_and_goes_even_after_a_failure(student, x):
    seen = []

    @contextmanager
    def around():
        seen.append("in")
        yield
        seen.append("out")

    def observe():
        with student.teacher.observed(around):
            student.teacher(x)
            with student.teacher.inference() as model:
                seen.append("between")
                assert not model(x).requires_grad
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        observe()
    student.teacher(x)
    assert seen == ["in", "out", "in", "between", "out"]


def test_the_owner_does_not_list_the_teacher(student):
    assert {name for name, _ in student.named_modules()} == {"", "layer"}
    assert {name for name, _ in student.named_parameters()} == {"layer.weight", "layer.bias"}
    assert set(student.state_dict()) == {"layer.weight", "layer.bias"}


def test_a_deep_copy_shares_the_teacher(student):
    assert copy.deepcopy(student).teacher is student.teacher


def test_the_owner_does_not_move_the_teacher_but_follow_does(student, x):
    student.double()
    assert student.teacher.model[0].weight.dtype == torch.float32
    assert student.teacher.follow(x.double()) is student.teacher
    assert {p.dtype for p in student.teacher.model.parameters()} == {torch.float64}
    assert student.teacher.model[1].running_mean.dtype == torch.float64
    assert student.teacher(x.double()).dtype == torch.float64


def test_follow_moves_nothing_where_all_fits(student, x):
    before = [p.data_ptr() for p in student.teacher.model.parameters()]
    student.teacher.follow(x)
    assert [p.data_ptr() for p in student.teacher.model.parameters()] == before


def test_follow_moves_to_the_device_of_the_tensor(student, x):
    student.teacher.follow(x.to("meta"))
    assert {p.device.type for p in student.teacher.model.parameters()} == {"meta"}


def test_follow_of_a_teacher_without_parameters_does_nothing(x):
    teacher = FrozenTeacher(nn.ReLU())
    assert torch.equal(teacher.follow(x.double())(x), x.relu())


def test_matching_weights_are_loaded():
    source, target = network(), network()
    load_strict(target, source.state_dict(), "teacher.pth")
    for key, value in source.state_dict().items():
        assert torch.equal(target.state_dict()[key], value)


def faulty(fault):
    weights = dict(network().state_dict())
    if fault == "missing":
        del weights["3.bias"]
    elif fault == "unexpected":
        weights["4.bias"] = torch.zeros(2)
    elif fault == "mis-shaped":
        weights["3.weight"] = torch.zeros(81, 4)
    elif fault == "empty":
        weights = {}
    return weights


@pytest.mark.parametrize(
    ("fault", "received"),
    [
        ("missing", "1 missing: 3.bias"),
        ("unexpected", "1 unexpected: 4.bias"),
        ("mis-shaped", "1 mis-shaped: 3.weight (file (81, 4), model (2, 4))"),
        ("empty", "9 missing: 0.weight, 0.bias, "),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_key_and_leave_the_model_alone(fault, received):
    model = network()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(KDError) as error:
        load_strict(model, faulty(fault), "r101.pkl")
    message = str(error.value)
    assert message.startswith("expected every one of the teacher's 9 keys in r101.pkl; received ")
    assert f"received {received}" in message
    assert "; remedy: give the weights that were trained with exactly this" in message
    for key, value in before.items():
        assert torch.equal(model.state_dict()[key], value)


def test_every_kind_of_fault_is_listed_at_once():
    weights = faulty("missing") | {"extra": torch.zeros(1), "0.bias": torch.zeros(9)}
    with pytest.raises(KDError) as error:
        load_strict(network(), weights, "r101.pkl")
    for kind in ("1 missing: 3.bias", "1 unexpected: extra", "1 mis-shaped: 0.bias (file (9,)"):
        assert kind in str(error.value)


def test_long_lists_of_keys_are_cut_and_counted():
    weights = {f"layer{i}.weight": torch.zeros(1) for i in range(20)} | network().state_dict()
    with pytest.raises(KDError, match=r"20 unexpected: layer0.weight, .*, \.\.\. \(20 in all\)"):
        load_strict(network(), weights, "r101.pkl")


@pytest.mark.parametrize("change", ["absent in the file", "absent in the model"])
def test_optional_keys_may_be_absent_on_either_side(change):
    class WithAnchors(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 2)
            if change == "absent in the file":
                self.register_buffer("cell_anchors", torch.zeros(3))

    weights = dict(nn.ModuleDict({"layer": nn.Linear(2, 2)}).state_dict())
    if change == "absent in the model":
        weights["cell_anchors"] = torch.zeros(3)
    model = WithAnchors()
    load_strict(model, weights, "old.pkl", optional_parts=("cell_anchors",))
    assert torch.equal(model.layer.weight, weights["layer.weight"])
    with pytest.raises(KDError, match="cell_anchors"):
        load_strict(model, weights, "old.pkl")
