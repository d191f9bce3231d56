"""Terms: plain data, checked when it is read."""

from __future__ import annotations

import pytest

from kd_det.core.schedules import Constant, Delay
from kd_det.core.terms import check_heads, parse_terms

KD = {"LOSS": "KD", "TAPS": ["box_logits"]}


def parse(**node):
    (term,) = parse_terms({"x": node})
    return term


def test_a_complete_term_is_read():
    term = parse(
        LOSS="KD",
        WEIGHT=20,
        TAPS=["box_logits"],
        REDUCTION="mean",
        TEMPERATURE=2,
        SCHEDULE={"NAME": "delay", "ITERS": 400},
    )
    assert (term.name, term.loss, term.weight) == ("x", "KD", 20.0)
    assert isinstance(term.weight, float)
    assert term.taps == (("box_logits", "box_logits"),)
    assert term.arguments == {"reduction": "mean", "temperature": 2}
    assert term.schedule == Delay(400)


def test_weight_and_schedule_have_defaults():
    term = parse(**KD)
    assert (term.weight, term.schedule, term.arguments) == (1.0, Constant(), {})


@pytest.mark.parametrize(
    ("taps", "pairs"),
    [
        ("p2", (("p2", "p2"),)),
        (["p2", "p3"], (("p2", "p2"), ("p3", "p3"))),
        ([["layer2", "layer3.5"]], (("layer2", "layer3.5"),)),
        (("p2", ("c3", "c4")), (("p2", "p2"), ("c3", "c4"))),
    ],
    ids=str,
)
def test_taps_are_names_or_pairs(taps, pairs):
    assert parse(LOSS="ReviewKD", TAPS=taps).taps == pairs


@pytest.mark.parametrize("value", [None, 128])
def test_an_optional_argument_takes_none_and_its_type(value):
    assert parse(LOSS="ReviewKD", TAPS=["p2"], MID_CHANNELS=value).arguments == {
        "mid_channels": value
    }


def test_order_and_names_of_terms_are_kept():
    terms = parse_terms({"b": KD, "a": KD})
    assert [term.name for term in terms] == ["b", "a"]


BAD_TERMS = {
    "unknown loss": (
        {**KD, "LOSS": "ReviewDK"},
        "expected a known loss; received 'ReviewDK'; remedy: did you mean 'ReviewKD'? known: AT",
    ),
    "no loss": ({"TAPS": ["p2"]}, "expected term 'x' to have a LOSS; received keys TAPS; remedy"),
    "loss of another type": ({**KD, "LOSS": 3}, "to have a LOSS; received keys LOSS, TAPS"),
    "no keys": (
        {},
        "to have a LOSS; received keys (none); remedy: known: AT, FGFI",
    ),
    "no mapping": (
        0.5,
        "a mapping with a LOSS; received 0.5; remedy: to change a weight, set KD.TERMS.x.WEIGHT",
    ),
    "empty node": (None, "to be a mapping with a LOSS; received None; remedy"),
    "unknown argument": (
        {**KD, "TEMPERATUR": 4.0},
        "of loss KD of term 'x'; received 'temperatur'; remedy: did you mean 'temperature'?",
    ),
    "argument of another loss": (
        {**KD, "MID_CHANNELS": 256},
        "received 'mid_channels'; remedy: known: activation, reduction, temperature",
    ),
    "lower case": ({**KD, "weight": 1.0}, "in upper case; received 'weight'; remedy: write WEIGHT"),
    "weight of another type": (
        {**KD, "WEIGHT": "heavy"},
        "WEIGHT of term 'x' to be float; received 'heavy' (str); remedy",
    ),
    "boolean weight": ({**KD, "WEIGHT": True}, "to be float; received True (bool)"),
    "argument of another type": (
        {**KD, "TEMPERATURE": "4"},
        "TEMPERATURE of loss KD of term 'x' to be float; received '4' (str); remedy",
    ),
    "unknown choice": (
        {**KD, "REDUCTION": "avg"},
        "to be one of 'batchmean', 'mean', 'foreground'; received 'avg'",
    ),
    "number for a boolean": (
        {"LOSS": "FitNet", "TAPS": ["c3"], "RELU": 1},
        "RELU of loss FitNet of term 'x' to be bool; received 1 (int)",
    ),
    "fraction for an integer": (
        {"LOSS": "ReviewKD", "TAPS": ["p2"], "MID_CHANNELS": 25.6},
        "received 25.6 (float)",
    ),
    "size that is no pair": (
        {"LOSS": "FitNet", "TAPS": ["c3"], "STUDENT_SIZES": [[3]]},
        "tuple[int, int]] | None; received [[3]] (list)",
    ),
    "no taps": ({"LOSS": "KD"}, "expected term 'x' to have TAPS; received none; remedy: name what"),
    "empty taps": ({"LOSS": "KD", "TAPS": []}, "to have TAPS; received none"),
    "tap of another type": (
        {"LOSS": "KD", "TAPS": ["p2", 3]},
        "to list tap names, or [student, teacher] pairs; received 3; remedy: write for example",
    ),
    "three sides": ({"LOSS": "KD", "TAPS": [["a", "b", "c"]]}, "received ['a', 'b', 'c']"),
    "empty tap name": ({"LOSS": "KD", "TAPS": [""]}, "received ''"),
    "schedule without a name": (
        {**KD, "SCHEDULE": {"ITERS": 5}},
        "SCHEDULE of term 'x' to be a mapping with a NAME; received {'ITERS': 5}; remedy: write",
    ),
    "schedule that is no mapping": ({**KD, "SCHEDULE": "delay"}, "a NAME; received 'delay'"),
    "unknown schedule": (
        {**KD, "SCHEDULE": {"NAME": "warmup"}},
        "known schedule; received 'warmup'; remedy: did you mean 'linear_warmup'",
    ),
}


@pytest.mark.parametrize(("node", "message"), BAD_TERMS.values(), ids=BAD_TERMS.keys())
def test_a_bad_term_is_refused(refuses, node, message):
    with refuses(message):
        parse_terms({"good": KD, "x": node})


@pytest.mark.parametrize("name", ["a.b", "", "train", "keys", "training"])
def test_a_name_that_no_submodule_may_have_is_refused(refuses, name):
    with refuses("expected the name of a term", f"received '{name}'; remedy: write"):
        parse_terms({name: KD})


def test_softmax_on_a_head_of_independent_classes_is_refused(refuses):
    with refuses("expected ACTIVATION sigmoid for term 'x' on 'box_logits'", "received softmax;"):
        check_heads([parse(**KD)], {"box_logits"})


@pytest.mark.parametrize(
    "term",
    [
        {**KD, "ACTIVATION": "sigmoid"},
        {"LOSS": "KD", "TAPS": ["othe"]},
        {"LOSS": "FitNet", "TAPS": ["box_logits"]},
    ],
    ids=["sigmoid", "other tap", "no softmax"],
)
def test_other_terms_pass_the_check_of_heads(term):
    check_heads([parse(**term)], {"box_logits"})
