"""What is recorded in a forward, and which pictures its terms give."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from kd_det import Distiller
from kd_det.bench.workbench import PixelInput
from kd_det.core.loss import TapSpec
from kd_det.core.taps import Tap
from kd_det.visualize.draw import draw
from kd_det.visualize.watch import watching
from tests.hosts.torchvision_detection.models import LEVELS, batch, distilled

PIXELS = PixelInput("RGB", (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), scale=1, divisor=32)
BOXES = Tap("roi_heads.box_roi_pool", at="input", select=1)


def bench_of(student, distiller, entrance="backbone", box_tap=None, names=None, background="last"):
    """What pictures read from a workbench."""
    return SimpleNamespace(
        student=student,
        distiller=distiller,
        entrance=entrance,
        box_tap=box_tap,
        background=background,
        pixel_input=lambda side: PIXELS,
        class_names=lambda side: names,
    )


def detector_bench(model):
    box_tap = BOXES if hasattr(model.student, "roi_heads") else None
    names = [str(k) for k in range(10)]
    return bench_of(
        model.student, model.distiller, box_tap=box_tap, names=names, background="first"
    )


def record(model, images=2, seed=0, empty=False):
    bench = detector_bench(model)
    with watching(bench, images) as recordings:
        losses = model.train()(*batch(seed, empty))
    (recording,) = recordings
    return bench, recording, losses


class Classifier(nn.Module):
    """A map and logits of ``[N, 3, 4, 4]`` images, with what a run would have around them."""

    def __init__(self, terms):
        super().__init__()
        maps = {"map": TapSpec(4, size=(4, 4)), "logits": TapSpec(5)}
        self.student = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(64, 5))
        self.distiller = Distiller(terms, maps, maps, context=("targets",))

    @property
    def bench(self):
        return bench_of(self.student, self.distiller, "")

    def forward(self, images, targets):
        taps = {}
        for _ in range(2):  # as where a first pass chooses the images of the second
            taps["map"] = self.student[0](images)
            taps["logits"] = self.student(images)
        teacher = {name: value.detach() + 0.1 for name, value in taps.items()}
        return self.distiller(taps, teacher, {"targets": targets})


def test_every_term_of_a_detector_has_its_pictures():
    bench, recording, _ = record(distilled("FasterRCNN"))
    maps = {f"features_{tap}" for tap in ("c3", "backbone.body.layer2", *LEVELS)}
    attention = {f"attention_{tap}" for tap in LEVELS}
    # "relations" compares the logits too, but after "logits" has drawn them.
    others = {"fgfi_mask", "rois", "rois_relations", "irg"}
    assert set(draw(bench, recording)) == maps | attention | others


def test_attention_of_rois_is_not_laid_over_images():
    terms = {"look": {"LOSS": "AT", "MODE": "paper", "TAPS": ["p2", "box_pooled"]}}
    bench, recording, losses = record(distilled("FasterRCNN", terms=terms))
    assert "look" in losses
    assert set(draw(bench, recording)) == {"features_p2", "attention_p2"}


def test_dense_detectors_have_no_rois():
    bench, recording, _ = record(distilled("RetinaNet"))
    figures = draw(bench, recording)
    assert recording.boxes == []
    assert not any(key.startswith("rois") for key in figures)
    assert {"features_p2", "attention_p2", "fgfi_mask"} < set(figures)


def test_without_ground_truth_there_are_no_masks_but_all_else():
    terms = {
        "imitation": {"LOSS": "FGFI", "TAPS": ["p3"]},
        "soft": {"LOSS": "KD", "TAPS": ["box_logits"]},
    }
    bench, recording, _ = record(distilled("FasterRCNN", terms=terms), empty=True)
    assert set(draw(bench, recording)) == {"features_p3", "rois"}


def test_a_recording_holds_what_the_distiller_was_given():
    model = distilled("FasterRCNN")
    given = []
    hook = model.distiller.register_forward_pre_hook(lambda module, args: given.append(args))
    _, recording, losses = record(model)
    hook.remove()
    student, teacher, context = given[0][:3]
    assert all(torch.equal(recording.student[k], student[k]) for k in student)
    assert all(torch.equal(recording.teacher[k], teacher[k]) for k in teacher)
    assert recording.context is context
    assert not any(x.requires_grad for x in recording.student.values())
    assert [len(b) for b in recording.boxes[0]] == [64, 64]
    assert len(recording.student["box_logits"]) == 128
    # The images of `batch`, within what the student resized them to.
    assert [p.shape[0] for p in recording.pictures.images] == [3, 3]
    assert sum(losses.values()).requires_grad


def test_hooks_live_inside_the_block_only():
    model = distilled("FasterRCNN")
    record(model)
    hooks = [(m._forward_hooks, m._forward_pre_hooks) for m in model.modules()]
    assert not any(own for pair in hooks for own in pair)


def test_the_last_run_of_a_student_that_runs_twice_counts():
    model = Classifier({"soft": {"LOSS": "KD", "TAPS": ["logits"]}})
    images = torch.rand(3, 3, 4, 4)
    with watching(model.bench, 2) as recordings:
        model(images, torch.tensor([0, 1, 2]))
        model(images.flip(0), torch.tensor([2, 1, 0]))
    assert len(recordings) == 2
    expected = ((images.flip(0) * 0.25 + 0.5) * 255).round().to(torch.uint8)[:2]
    assert torch.equal(torch.stack(list(recordings[1].pictures.images)), expected)


def test_a_classifier_has_logits_and_graphs_and_a_taken_name_gets_the_terms():
    terms = {
        "soft": {"LOSS": "KD", "TAPS": ["logits"], "TEMPERATURE": 4.0},
        "sharp": {"LOSS": "KD", "TAPS": ["logits"]},
        "edges": {"LOSS": "IRG", "TAPS": ["logits", "map"]},
        "moves": {"LOSS": "IRG-t", "TAPS": ["map", "map"]},
    }
    model = Classifier(terms)
    with watching(model.bench, 2) as recordings:
        model(torch.rand(6, 3, 4, 4), torch.tensor([0, 1, 2, 2, 1, 0]))
    figures = draw(model.bench, recordings[0])
    assert set(figures) == {"logits", "logits_sharp", "logits_edges", "features_map", "irg"}
    assert "temperature 4" in figures["logits"].get_suptitle()


def test_one_image_has_no_graph():
    model = Classifier({"edges": {"LOSS": "IRG", "TAPS": ["map"], "VERTICES": False}})
    with watching(model.bench, 2) as recordings:
        model(torch.rand(1, 3, 4, 4), torch.tensor([0]))
    assert set(draw(model.bench, recordings[0])) == {"features_map"}


@pytest.fixture
def heads():
    """MHGD between two maps, whose adaptors have a BatchNorm in training."""
    terms = {"graph": {"LOSS": "MHGD", "TAPS": ["a", "b"], "HEADS": 2, "MAX_NODES": 4}}
    student = {"a": TapSpec(3), "b": TapSpec(4)}
    teacher = {"a": TapSpec(5), "b": TapSpec(6)}
    distiller = Distiller(terms, student, teacher).train()
    distiller.terms["graph"].finish_pre_stage()
    sides = [
        {name: torch.randn(7, spec.channels, 3, 3) for name, spec in side.items()}
        for side in (student, teacher)
    ]
    return distiller, sides


def test_the_drawn_graphs_of_heads_give_the_loss(heads):
    distiller, (student, teacher) = heads
    loss = distiller.terms["graph"]
    expected = copy.deepcopy(loss)(list(student.values()), list(teacher.values()))
    own, other = copy.deepcopy(loss).graphs(list(student.values()), list(teacher.values()))
    assert own[0].shape == (2, 4, 4)
    total = sum(
        p * (p / q).log()
        for s, t in zip(own, other, strict=True)
        for p, q in zip(s.flatten(), t.flatten(), strict=True)
    )
    torch.testing.assert_close(total, expected)


def test_drawing_leaves_the_distiller_as_it_was(heads):
    distiller, (student, teacher) = heads
    model = nn.Sequential(nn.Identity())
    bench = bench_of(model, distiller, "0")
    with watching(bench, 2) as recordings:
        model(torch.rand(7, 3, 6, 6))
        distiller(student, teacher)
    before = copy.deepcopy(distiller.state_dict())
    random = torch.get_rng_state()
    assert set(draw(bench, recordings[0])) == {"features_a", "features_b", "mhgd"}
    after = distiller.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in after)
    assert torch.equal(random, torch.get_rng_state())


def test_every_stage_of_a_cascade_has_its_rois():
    terms = {"soft": {"LOSS": "KD", "TAPS": ["box_logits"]}}
    spec = {"box_logits": [TapSpec(3), TapSpec(3)]}
    distiller = Distiller(terms, spec, spec)
    model = nn.ModuleDict({"backbone": nn.Identity(), "pooler": Pooler()})
    tap = Tap("pooler", at="input", select=1, calls=2)
    bench = bench_of(model, distiller, box_tap=tap, names=["a", "b"])
    stages = [[torch.rand(n, 4).cumsum(1) for n in (3, 2)] for _ in range(2)]
    logits = [torch.randn(5, 3) for _ in range(2)]
    with watching(bench, 2) as recordings:
        for seen in ([stages[1][::-1]] * 2, stages):  # a first run that does not count
            model["backbone"](torch.rand(2, 3, 8, 8))
            for boxes in seen:
                model["pooler"]([], boxes)
        distiller({"box_logits": logits}, {"box_logits": [x + 1 for x in logits]})
    for seen, boxes in zip(recordings[0].boxes, stages, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(seen, boxes, strict=True))
    assert set(draw(bench, recordings[0])) == {"rois_stage_1", "rois_stage_2"}


class Pooler(nn.Module):
    """Takes maps and boxes, as the poolers of detectors do."""

    def forward(self, maps, boxes):
        return boxes
