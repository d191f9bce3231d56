"""Taps: recording what a stock model computes."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from kd_det import FrozenTeacher, KDError, Tap, TapRecorder


class Pyramid(nn.Module):
    """Returns a dict of levels, like an FPN."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1)

    def forward(self, x):
        x = self.stem(x)
        return {"p2": x, "p3": x[:, :, ::2, ::2]}


class Model(nn.Module):
    """A module of every kind a tap may meet."""

    def __init__(self):
        super().__init__()
        self.backbone = Pyramid()
        self.shared = nn.Conv2d(4, 2, 1)
        self.norm = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.split = Split()

    def forward(self, x):
        levels = self.backbone(x)
        heads = [self.shared(level) for level in levels.values()]
        return self.split(self.relu(self.norm(levels["p2"])), heads[0])


class Split(nn.Module):
    def forward(self, features, heads):
        return features + 1, [heads, heads * 2]


@pytest.fixture
def model():
    return Model()


IMAGES = torch.arange(2 * 3 * 4 * 6, dtype=torch.float32).view(2, 3, 4, 6) / 100


def record(model, **taps):
    recorder = TapRecorder(model, taps)
    with recorder.recording():
        model(IMAGES)
    return recorder.read()


def test_a_level_of_a_dict_is_selected_by_name(model):
    read = record(model, deep=Tap("backbone", select="p3"))
    assert torch.equal(read["deep"], model.backbone(IMAGES)["p3"])


def test_an_item_of_a_tuple_is_selected_by_index(model):
    read = record(model, heads=Tap("split", select=1), features=Tap("split", select=0))
    expected = model.shared(model.backbone(IMAGES)["p2"])
    assert torch.equal(read["heads"][0], expected)
    assert torch.equal(read["heads"][1], expected * 2)
    assert read["features"].shape == (2, 4, 4, 6)


def test_without_a_selection_the_whole_output_is_kept(model):
    assert list(record(model, levels="backbone")["levels"]) == ["p2", "p3"]


def test_a_selection_that_is_not_there_names_what_is(model):
    with pytest.raises(KDError, match=r"'p7' in the output of 'backbone'; received p2, p3; remedy"):
        record(model, deep=Tap("backbone", select="p7"))
    with pytest.raises(KDError, match=r"'2' in the output of 'split'; received tuple of length 2"):
        record(model, deep=Tap("split", select=2))


def test_the_first_argument_is_the_input(model):
    assert record(model, images=Tap("backbone", at="input"))["images"] is IMAGES


def test_a_further_argument_is_selected_by_position(model):
    read = record(model, heads=Tap("split", at="input", select=1), out=Tap("split", select=1))
    assert torch.equal(read["heads"], read["out"][0])


def test_an_argument_that_is_not_there_is_refused(model):
    with pytest.raises(KDError, match="'3' in the input of 'split'; received tuple of length 2"):
        record(model, heads=Tap("split", at="input", select=3))


def test_several_calls_come_as_a_list_in_order(model):
    read = record(model, heads=Tap("shared", calls=2), levels="backbone")
    for head, level in zip(read["heads"], read["levels"].values(), strict=True):
        assert torch.equal(head, model.shared(level))


@pytest.mark.parametrize(("calls", "path", "runs"), [(1, "shared", 2), (3, "shared", 2)])
def test_another_number_of_calls_is_refused(model, calls, path, runs):
    message = rf"'shared' \(tap 'heads'\) to run {calls} time.*; received {runs} run.*; remedy"
    with pytest.raises(KDError, match=message):
        record(model, heads=Tap(path, calls=calls))


def test_a_module_that_did_not_run_is_refused(model):
    recorder = TapRecorder(model, {"heads": "shared"})
    with recorder.recording():
        pass
    with pytest.raises(KDError, match=r"to run 1 time\(s\) in one forward; received 0 run"):
        recorder.read()


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
def test_a_tensor_that_was_overwritten_in_place_is_refused(model, grad):
    with torch.set_grad_enabled(grad), pytest.raises(KDError, match="overwrote in place; remedy"):
        record(model, raw="norm")


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
def test_a_clone_survives_being_overwritten_in_place(model, grad):
    with torch.set_grad_enabled(grad):
        read = record(model, raw=Tap("norm", clone=True), relu="relu")
    assert read["raw"].min() < 0
    assert torch.equal(read["raw"].relu(), read["relu"])


def test_a_clone_keeps_the_graph(model):
    record(model, raw=Tap("norm", clone=True))["raw"].sum().backward()
    assert model.norm.bias.grad is not None


class Overwritten(nn.Module):
    """What comes out of ``backbone`` is overwritten, level by level."""

    def __init__(self):
        super().__init__()
        self.backbone = Pyramid()

    def forward(self, x):
        for level in self.backbone(x).values():
            level.zero_()


def test_nested_outputs_are_checked_and_cloned():
    model = Overwritten()
    with torch.no_grad():
        with pytest.raises(KDError, match="overwrote in place"):
            record(model, levels="backbone")
        levels = record(model, levels=Tap("backbone", clone=True))["levels"]
    assert all(level.any() for level in levels.values())


def test_inference_tensors_have_no_version_and_are_not_checked(model):
    with torch.inference_mode():
        assert record(model, levels="backbone")["levels"]["p2"].is_inference()


def test_an_overwritten_view_is_refused():
    class Viewed(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = Pyramid()

        def forward(self, x):
            self.backbone(x)["p2"].zero_()

    with torch.no_grad(), pytest.raises(KDError, match="overwrote in place"):
        record(Viewed(), deep=Tap("backbone", select="p3"))


def hooks(model):
    return [
        hook
        for module in model.modules()
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    ]


EVERYTHING = {"levels": "backbone", "images": Tap("backbone", at="input")}


def test_hooks_exist_only_while_recording(model):
    recorder = TapRecorder(model, EVERYTHING)
    assert not hooks(model)
    with recorder.recording():
        assert len(hooks(model)) == 2
    assert not hooks(model)


def test_no_hook_is_left_after_an_exception(model):
    recorder = TapRecorder(model, EVERYTHING)
    with pytest.raises(RuntimeError), recorder.recording():
        model(torch.zeros(1, 99, 4, 4))
    assert not hooks(model)


def test_a_failing_hook_leaves_no_hook(model):
    with pytest.raises(KDError):
        record(model, deep=Tap("backbone", select="p7"), **EVERYTHING)
    assert not hooks(model)


def test_each_recording_starts_empty(model):
    recorder = TapRecorder(model, {"levels": "backbone"})
    for scale in (1.0, 2.0):
        with recorder.recording():
            model(IMAGES * scale)
        expected = model.backbone(IMAGES * scale)["p2"]
        assert torch.equal(recorder.read()["levels"]["p2"], expected)


def test_released_captures_are_gone(model):
    recorder = TapRecorder(model, {"levels": "backbone"})
    with recorder.recording():
        model(IMAGES)
    recorder.release()
    with pytest.raises(KDError, match="received 0 run"):
        recorder.read()


def test_recording_changes_no_output_and_no_gradient(model):
    def run():
        model.zero_grad()
        torch.manual_seed(0)
        features, heads = model(IMAGES)
        (features.sum() + heads[1].sum()).backward()
        return [features, *heads, *(p.grad.clone() for p in model.parameters())]

    plain = run()
    with TapRecorder(model, EVERYTHING).recording():
        recorded = run()
    for a, b in zip(plain, recorded, strict=True):
        assert torch.equal(a, b)


class Owner(nn.Module):
    """A student that owns its recorder, and looks at a teacher."""

    def __init__(self, teacher):
        super().__init__()
        self.student = Model()
        self.taps = TapRecorder(self.student, {"levels": "backbone"})
        self.teacher_taps = TapRecorder(teacher, {"levels": "backbone"})


def test_a_deep_copy_records_the_copy_and_shares_the_teacher():
    teacher = FrozenTeacher(Model())
    owner = Owner(teacher)
    twin = copy.deepcopy(owner)
    assert twin.taps.model is twin.student
    assert twin.taps.model is not owner.student
    assert twin.teacher_taps.model is teacher.model
    with owner.taps.recording(), twin.taps.recording():
        twin.student(IMAGES)
    assert torch.equal(twin.taps.read()["levels"]["p2"], twin.student.backbone(IMAGES)["p2"])
    with pytest.raises(KDError, match="received 0 run"):
        owner.taps.read()


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))],
    ids=["deepcopy", "pickle"],
)
def test_a_copy_taken_between_forward_and_release_has_no_captures(duplicate):
    owner = Owner(Model())
    with owner.taps.recording():
        owner.student(IMAGES)
    with pytest.raises(KDError, match="received 0 run"):
        duplicate(owner).taps.read()
    assert "levels" in owner.taps.read()


@pytest.mark.parametrize(
    ("path", "nearest"),
    [("backbon", "backbone"), ("backbone.stm", "backbone.stem"), ("Norm", "norm")],
)
def test_an_unknown_path_suggests_the_nearest(model, path, nearest):
    with pytest.raises(KDError) as error:
        TapRecorder(model, {"tap": path})
    assert f"received '{path}'; remedy: did you mean '{nearest}'?" in str(error.value)


def test_an_unknown_path_lists_only_its_siblings(model):
    with pytest.raises(KDError) as error:
        TapRecorder(model, {"tap": "backbone.xyz"})
    assert str(error.value).endswith("known: backbone.stem")
