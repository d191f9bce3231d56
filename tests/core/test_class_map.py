"""Classes are matched by name, and mapped logits mean what they say."""

from __future__ import annotations

import math

import pytest
import torch

from kd_det.core.class_map import (
    ClassMap,
    map_labels,
    map_logits,
    mapped_specs,
    match_classes,
    translated,
    translation,
)
from kd_det.losses import TapSpec

TEACHER = [str(k) for k in (7, 2, 0, 9, 4, 1, 8, 3, 6, 5)]
STUDENT = ["3", "7", "1", "9"]


def four_of_ten() -> ClassMap:
    return match_classes(STUDENT, TEACHER)


# Matching


def test_a_teacher_with_more_classes_in_another_order_is_matched_by_name():
    found = four_of_ten()
    assert found.indices == (7, 0, 5, 3)
    assert (found.student_classes, found.teacher_classes) == (4, 10)
    assert [TEACHER[k] for k in found.unmapped] == ["2", "0", "4", "8", "6", "5"]
    assert not found.is_identity


def test_the_same_names_in_order_are_the_identity_and_a_prefix_is_not():
    assert match_classes(TEACHER, TEACHER).is_identity
    assert not match_classes(TEACHER[:4], TEACHER).is_identity
    assert not match_classes(TEACHER[::-1], TEACHER).is_identity


def test_a_class_map_renames_classes():
    found = match_classes(["auto", "cat"], ["cat", "car", "bus"], {"auto": "car"})
    assert found.indices == (1, 0)
    assert found.pairs() == [("auto", "car", 1), ("cat", "cat", 0)]
    # Names that differ do not make the order differ.
    assert match_classes(["auto"], ["car"], {"auto": "car"}).is_identity


def test_two_classes_may_trade_names():
    assert match_classes(["a", "b"], ["a", "b"], {"a": "b", "b": "a"}).indices == (1, 0)


def test_the_description_tells_where_each_class_comes_from_and_what_is_left():
    text = match_classes(["auto", "cat"], ["cat", "car", "bus"], {"auto": "car"}).describe()
    assert "2 classes of the student from 3 of the teacher" in text
    assert "auto <- car (1), cat (0)" in text
    assert "unknown to the student: bus" in text
    many = [f"class{k}" for k in range(80)]
    assert "(80 in all)" in match_classes(many, many).describe()


BAD = {
    "missing": (["catt", "unicorn"], ["cat", "dog"], {}, "2 of 2", "'catt' (nearest: 'cat')"),
    "all of them": (["catt", "x"], ["cat", "dog"], {}, "'x'", "KD.CLASS_MAP"),
    "student repeats": (["a", "b", "a"], ["a", "b"], {}, "class of the student", "'a' (2 times)"),
    "teacher repeats": (["a"], ["b", "b", "a"], {}, "class of the teacher", "CLASS_NAMES"),
    "unknown key": (["car"], ["car"], {"cra": "car"}, "of the student", "did you mean 'car'"),
    "unknown value": (["car"], ["car"], {"car": "cra"}, "of the teacher", "did you mean 'car'"),
    "shared": (["car", "van"], ["car"], {"van": "car"}, "'car' for car, van", "apart"),
    "no name": (["a"], ["a"], {"a": False}, "False (bool)", "quotes"),
}


@pytest.mark.parametrize(("student", "teacher", "given", "one", "two"), BAD.values(), ids=BAD)
def test_classes_that_do_not_correspond_are_refused(refuses, student, teacher, given, one, two):
    with refuses(one, two):
        match_classes(student, teacher, given)


def test_numbers_of_a_config_are_names():
    assert match_classes(["3", "7"], ["7", "8"], {3: 8}).indices == (1, 0)


# Logits


def reference(logits, found, background, exclusive):
    """Row by row, class by class, in probabilities."""
    rows = []
    first = 1 if background == "first" else 0
    for row in logits.double().tolist():
        own = [row[k + first] for k in found.indices]
        if background is None:
            rows.append(own)
            continue
        ground = row[0] if first else row[-1]
        if exclusive:
            rest = sum(math.exp(row[k + first]) for k in found.unmapped)
            ground = math.log(math.exp(ground) + rest)
        rows.append([ground, *own] if first else [*own, ground])
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("exclusive", [True, False])
@pytest.mark.parametrize("background", ["first", "last", None])
def test_mapped_logits_equal_a_slow_loop(generator, background, exclusive):
    found = four_of_ten()
    columns = 10 + (background is not None)
    logits = torch.randn(6, columns, generator=generator, dtype=torch.float64)
    mapped = map_logits(logits, found, background, exclusive)
    expected = reference(logits, found, background, exclusive)
    torch.testing.assert_close(mapped, expected, atol=1e-12, rtol=0)
    maps = map_logits(logits.view(2, 3, columns), found, background, exclusive)
    assert torch.equal(maps.view(6, -1), mapped)


def test_a_hand_computed_case():
    # Of background, cat, dog and car with probabilities 0.1, 0.2, 0.3 and 0.4, a student of car
    # and cat sees 0.4, 0.2, and 0.1 + 0.3 of background.
    found = match_classes(["car", "cat"], ["cat", "dog", "car"])
    logits = torch.tensor([[0.1, 0.2, 0.3, 0.4]]).log() + 5
    seen = map_logits(logits, found, "first").softmax(dim=-1)
    torch.testing.assert_close(seen, torch.tensor([[0.4, 0.4, 0.2]]))
    last = map_logits(logits[:, [1, 2, 3, 0]], found, "last").softmax(dim=-1)
    torch.testing.assert_close(last, torch.tensor([[0.4, 0.2, 0.4]]))


def test_mapped_probabilities_are_the_marginals_of_the_teacher(generator):
    found = four_of_ten()
    logits = 5 * torch.randn(7, 11, generator=generator)
    before, after = logits.softmax(-1), map_logits(logits, found, "last").softmax(-1)
    torch.testing.assert_close(after[:, :4], before[:, list(found.indices)])
    torch.testing.assert_close(after[:, 4], before[:, [*found.unmapped, 10]].sum(dim=-1))


def test_a_classifier_is_conditioned_on_the_classes_of_the_student(generator):
    found = four_of_ten()
    logits = torch.randn(7, 10, generator=generator)
    seen = logits.softmax(-1)[:, list(found.indices)]
    torch.testing.assert_close(
        map_logits(logits, found).softmax(-1), seen / seen.sum(dim=-1, keepdim=True)
    )


def test_log_probabilities_stay_log_probabilities(generator):
    log_p = torch.randn(5, 11, generator=generator).log_softmax(dim=-1)
    mapped = map_logits(log_p, four_of_ten(), "last")
    torch.testing.assert_close(mapped.exp().sum(dim=-1), torch.ones(5))


def test_the_identity_hands_back_the_tensor_itself():
    logits = torch.randn(3, 11)
    assert map_logits(logits, None, "last") is logits
    assert map_logits(logits, match_classes(TEACHER, TEACHER), "last") is logits


def test_a_permutation_changes_no_bit(generator):
    found = match_classes(TEACHER[::-1], TEACHER)
    logits = torch.randn(3, 11, generator=generator)
    assert torch.equal(map_logits(logits, found, "last")[:, :10], logits[:, :10].flip(1))
    assert torch.equal(map_logits(logits, found, "last")[:, 10], logits[:, 10])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_adds_up_in_float32(dtype):
    logits = torch.full((2, 11), 8.0, dtype=dtype)
    mapped = map_logits(logits, four_of_ten(), "last")
    assert mapped.dtype == torch.float32
    torch.testing.assert_close(mapped[:, 4], torch.full((2,), 8 + math.log(7)))
    assert map_logits(logits[:, :10], four_of_ten()).dtype == dtype


@pytest.mark.parametrize("background", ["first", "last", None])
def test_no_rows_are_no_rows(background):
    columns = 10 + (background is not None)
    assert map_logits(torch.zeros(0, columns), four_of_ten(), background).shape == (0, columns - 6)


def test_logits_of_another_teacher_are_refused(refuses):
    with refuses("11 logits of the teacher", "(2, 8)"):
        map_logits(torch.zeros(2, 8), four_of_ten(), "last")


def test_labels_are_the_channels_of_the_same_name(generator):
    found = four_of_ten()
    labels = torch.randint(0, 4, (20,), generator=generator)
    for first in (0, 1):
        channels = map_labels(labels + first, found, first) - first
        assert [TEACHER[k] for k in channels] == [STUDENT[k] for k in labels]
    assert map_labels(labels, None) is labels
    assert map_labels(labels[:0], found).shape == (0,)


def test_specs_have_the_channels_of_the_student(refuses):
    specs = {"p2": TapSpec(32, 4), "box_logits": [TapSpec(11)] * 2, "mask_logits": TapSpec(10)}
    backgrounds = {"box_logits": 1, "mask_logits": 0, "cls_logits": 0}
    mapped = mapped_specs(specs, four_of_ten(), backgrounds)
    assert mapped["p2"] == TapSpec(32, 4)
    assert [spec.channels for spec in mapped["box_logits"]] == [5, 5]
    assert mapped["mask_logits"].channels == 4
    assert mapped_specs(specs, None, backgrounds) == specs
    with refuses("the teacher's 7 classes", "one for 10"):
        mapped_specs({"box_logits": TapSpec(8)}, four_of_ten(), backgrounds)


def test_the_teachers_classes_find_the_students_by_name():
    table = translation(["cat", "dog", "2"], ["dog", "bird", "feline", "2"], {"cat": "feline"})
    assert table == [1, -1, 0, 2]
    assert translated(torch.tensor([[3, 1], [2, 0]]), table, 3).tolist() == [[2, -1], [0, 1]]


@pytest.mark.parametrize(
    ("student", "teacher"), [(None, ["a", "b", "c"]), (["a", "b"], None), (None, None)]
)
def test_classes_without_names_stay_as_they_are_as_far_as_the_student_has_them(student, teacher):
    table = translation(student, teacher, {})
    assert table is None
    assert translated(torch.tensor([0, 1, 2]), table, 2).tolist() == [0, 1, -1]


def test_names_that_have_nothing_in_common_are_known_to_differ():
    table = translation(["a", "b"], ["x", "y", "z"], {})
    assert table == [-1, -1, -1]
    assert translated(torch.tensor([0, 1, 2]), table, 2).tolist() == [-1, -1, -1]
