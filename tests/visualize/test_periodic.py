"""Pictures in a run: there when they are due, and the run is the same as without them."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from kd_det.app.train import make_pictures
from kd_det.hosts.torchvision_detection.config import load_config
from kd_det.hosts.torchvision_detection.train import run
from kd_det.visualize import periodic
from kd_det.visualize.periodic import PeriodicPictures
from tests.visualize.test_draw import Classifier


def images_of(folder):
    """Tag to the steps of its images."""
    events = EventAccumulator(str(folder)).Reload()
    return {tag: [e.step for e in events.Images(tag)] for tag in events.Tags()["images"]}


def weights(folder):
    return torch.load(Path(folder) / "model_final.pth", weights_only=True)["model"]


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def test_a_detector_trains_bit_identically_with_pictures(options, tmp_path):
    for name, period in (("plain", 0), ("drawn", 2)):
        own = ["OUTPUT_DIR", str(tmp_path / name), "VIS_PERIOD", str(period)]
        cfg = load_config("configs/digits_torchvision/kd_frcnn.yaml", [*options, *own])
        run(cfg, progress=lambda *_: None, pictures=make_pictures)
    assert same(weights(tmp_path / "plain"), weights(tmp_path / "drawn"))
    assert images_of(tmp_path / "plain" / "tensorboard") == {}
    assert images_of(tmp_path / "drawn" / "tensorboard") == {"distilled/rois": [0, 2]}


@pytest.fixture
def soft():
    return Classifier({"soft": {"LOSS": "KD", "TAPS": ["logits"]}})


def step(pictures, model, iteration):
    pictures.begin(iteration)
    hooks = sum(len(m._forward_pre_hooks) for m in model.modules())
    model(torch.rand(2, 3, 4, 4), torch.tensor([0, 1]))
    return hooks, pictures.end()


def test_iterations_without_pictures_have_no_hooks(soft):
    pictures = PeriodicPictures(soft.bench, period=3)
    found = [step(pictures, soft, iteration) for iteration in range(5)]
    assert [hooks for hooks, _ in found] == [2, 0, 0, 2, 0]
    assert [set(drawn) for _, drawn in found] == [
        {"distilled/logits"} if k % 3 == 0 else set() for k in range(5)
    ]
    image = found[0][1]["distilled/logits"]
    assert image.dtype == torch.uint8
    assert image.shape[0] == 3
    assert not any(m._forward_pre_hooks for m in soft.modules())


def test_a_picture_that_fails_is_reported_and_the_run_goes_on(soft, monkeypatch, caplog):
    def broken(bench, recording):
        raise RuntimeError("no ink")

    monkeypatch.setattr(periodic, "draw", broken)
    with caplog.at_level(logging.ERROR):
        assert step(PeriodicPictures(soft.bench, period=1), soft, 0)[1] == {}
    assert "no ink" in caplog.text


def test_a_forward_that_fails_leaves_no_hooks(soft):
    pictures = PeriodicPictures(soft.bench, period=1)
    pictures.begin(0)
    pictures.stop()
    assert not any(m._forward_pre_hooks for m in soft.modules())
    assert pictures.end() == {}
