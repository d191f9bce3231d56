"""Times of an iteration, from measured steps that a test makes up."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
from fvcore.common.config import CfgNode

from kd_det.preflight import cost
from kd_det.preflight.cost import inspect_cost, iteration_seconds
from kd_det.preflight.findings import Section
from kd_det.preflight.steps import Step, Steps, _first

SECONDS = {"data": 0.8, "student": 0.1, "teacher": 0.2, "losses": 0.05, "backward": 0.15}


@pytest.fixture
def look(monkeypatch):
    """``look(workers)``: the section for steps of 2 of 8 images that took SECONDS."""
    monkeypatch.setattr(cost, "_models", lambda section, context: None)
    monkeypatch.setattr(cost, "_half_precision", lambda context: (0.5, "float16"))

    def make(workers):
        section = Section("Cost")
        cfg = CfgNode(
            {
                "SOLVER": {"IMS_PER_BATCH": 8, "AMP": {"ENABLED": False}},
                "DATALOADER": {"NUM_WORKERS": workers},
            }
        )
        bench = SimpleNamespace(cfg=cfg, iterations=lambda: 3600, teacher=object())
        steps = Steps(2, [Step({}, 0.0, {}, SECONDS)])
        inspect_cost(section, SimpleNamespace(cfg=cfg, bench=bench, steps=steps, device="cpu"))
        return section

    return make


def test_whole_batches_are_loaded_and_all_else_grows_with_the_images(look):
    found = look(0).data
    assert found["seconds"] == pytest.approx(
        {"data": 0.8, "student": 0.4, "teacher": 0.8, "losses": 0.2, "backward": 0.6}
    )
    assert found["iteration"] == pytest.approx(2.8)
    assert found["hours"] == pytest.approx(2.8)


@pytest.mark.parametrize(
    ("workers", "iteration", "alone", "saved"),
    [
        (0, 2.8, 1.8, 0.4),  # one after the other
        (4, 2.0, 1.0, 0.4),  # as fast as the model
    ],
)
def test_what_distillation_costs_beside_the_loader(look, workers, iteration, alone, saved):
    section = look(workers)
    said = f"would take {alone:.3f} instead of {iteration:.3f} seconds"
    assert any(said in f.message for f in section.findings)
    assert any(f"would save {saved:.3f} seconds" in f.message for f in section.findings)
    assert section.data["without_distillation"] == pytest.approx(alone)


def test_where_the_loader_is_waited_for_less_computing_saves_nothing(look, monkeypatch):
    monkeypatch.setitem(SECONDS, "data", 6.0)
    (text,) = (f.message for f in look(2).findings if "without teacher" in f.message)
    assert re.search(r"take 3\.000 instead of 3\.000 seconds \(0% less\)", text)
    assert iteration_seconds(SECONDS, 2) == 3.0


def test_the_first_images_of_a_batch_of_any_host():
    samples, parts = [{"image": k} for k in range(4)], (list("abcd"), list(range(4)))
    assert _first(samples, 2) == samples[:2]
    assert _first(parts, 2) == (["a", "b"], [0, 1])
    # A loader that puts tuples together returns a list of parts.
    assert _first([*parts, [7, 8, 9, 6]], 2) == [["a", "b"], [0, 1], [7, 8]]
