"""The examples of docs/extend.md run as they stand there."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch
import yaml

from kd_det import LOSSES, Distiller, FrozenTeacher, TapRecorder, hosts, tap_specs
from kd_det.app.export import main as export
from kd_det.app.train import main
from kd_det.hosts import base
from kd_det.hosts.classification.models import FAMILIES, build_classifier
from kd_det.hosts.classification.taps import tap_table
from kd_det.hosts.torchvision_detection.family import FAMILY
from kd_det.procedures import PROCEDURES
from tests.hosts.torchvision_detection import models as torchvision_models

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "extend.md").read_text()


def blocks(title, language="python"):
    """The code of a section, in order."""
    section = PAGE.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    return re.findall(rf"^```{language}\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)


def run(code, **namespace):
    """What a block defines."""
    exec(compile(code, "docs/extend.md", "exec"), namespace)
    return namespace


@pytest.fixture(autouse=True)
def _losses_as_before():
    before = dict(LOSSES)
    yield
    for name in [name for name, _ in LOSSES if name not in before]:
        LOSSES._obj_map.pop(name)


def test_a_loss():
    example, use = blocks("A loss")
    found = run(use, **run(example))
    assert found["losses"]["near"].item() == 2.0
    found["losses"]["near"].backward()
    assert (found["student"].grad < 0).all()
    assert found["L1Loss"].__module__ != "kd_det"
    empty = found["l1_loss"](torch.zeros(0, 3, requires_grad=True), torch.zeros(0, 3))
    assert empty == 0
    assert empty.requires_grad


def test_a_head(monkeypatch):
    monkeypatch.setattr(FAMILY, "heads", list(FAMILY.heads))
    with pytest.raises(ValueError, match="objectness"):
        objects(weight=1.0)
    run(*blocks("A head"))
    model = objects(weight=1.0)
    seen = {}
    model.distiller.register_forward_pre_hook(
        lambda _, args: seen.update(zip("st", args, strict=False))
    )
    images, targets = torchvision_models.batch()
    losses = model(images, targets)
    assert losses["objects"] > 0
    rows = seen["s"]["objectness"]
    assert rows.shape == seen["t"]["objectness"].shape
    # Two images of 96 x 96 pixels, three levels, two anchors in each cell.
    assert rows.shape == (2 * (24**2 + 12**2 + 6**2), 2)
    losses["objects"].backward()
    assert model.student.rpn.head.cls_logits.weight.grad.any()
    assert all(p.grad is None for p in model.student.roi_heads.parameters())


def objects(weight):
    (block,) = blocks("A head", "yaml")
    terms = yaml.safe_load(block)["KD"]["TERMS"]
    terms["objects"]["WEIGHT"] = weight
    return torchvision_models.distilled("FasterRCNN", terms=terms)


def test_a_head_of_weight_zero_leaves_the_stock_losses_bit_identical(monkeypatch):
    monkeypatch.setattr(FAMILY, "heads", list(FAMILY.heads))
    run(*blocks("A head"))
    ours, stock = objects(weight=0.0), torchvision_models.student_model("FasterRCNN")
    losses = []
    for model in (ours.train(), stock.train()):
        torch.manual_seed(1)
        losses.append(model(*torchvision_models.batch()))
    ours, stock = losses
    assert {k: v for k, v in ours.items() if k != "objects"} == stock
    assert ours["objects"] == 0


def test_a_family_of_classifiers(monkeypatch):
    monkeypatch.setattr(f"{build_classifier.__module__}.FAMILIES", families := dict(FAMILIES))
    run(blocks("A model family")[0].replace("FAMILIES[", "families["), families=families)
    student, teacher = build_classifier("two8", 10), FrozenTeacher(build_classifier("two16", 10))
    recorders = [TapRecorder(m, tap_table(m)) for m in (student, teacher.model)]
    with recorders[0].recording(), recorders[1].recording():
        student(torch.zeros(2, 3, 32, 32)), teacher(torch.zeros(2, 3, 32, 32))
    captures = [recorder.read() for recorder in recorders]
    terms = {"hint": {"LOSS": "FitNet", "TAPS": ["stage2"]}}
    distiller = Distiller(terms, *map(tap_specs, captures))
    assert distiller(*captures)["hint"] > 0


@pytest.mark.detectron2
def test_a_meta_architecture(tmp_path):
    pytest.importorskip("detectron2")
    from detectron2.modeling import META_ARCH_REGISTRY
    from detectron2.utils.events import EventStorage

    from tests.hosts.detectron2 import models

    run(blocks("A model family")[1])
    try:
        terms = models.all_terms("retinanet", 1.0)
        cfg = models.distilled_cfg(
            "retinanet",
            models.write_teacher(tmp_path, "retinanet"),
            terms,
            ["MODEL.META_ARCHITECTURE", "DistilledMyRetinaNet"],
        )
        with EventStorage():
            losses = models.build(cfg)(models.batch())
        assert set(terms) < set(losses)
    finally:
        META_ARCH_REGISTRY._obj_map.pop("DistilledMyRetinaNet")


CONFIG = """
HOST: classification
SEED: 1
MODEL: {NAME: resnet8_x0.25, DEVICE: cpu}
INPUT: {SIZE: 16, CROP: {PADDING: 2}, RANDOM_FLIP: none}
DATASETS: {TRAIN_PER_CLASS: 4}
DATALOADER: {NUM_WORKERS: 0}
SOLVER: {MAX_EPOCH: 1, IMS_PER_BATCH: 16, EPOCH_STEPS: []}
KD:
  TEACHER: {CONFIG_FILE: %s, ALLOW_RANDOM: True}
  TERMS: {soft: {LOSS: KD, TAPS: [logits]}}
  HALVE: {ENABLED: True, STEP: %d}
"""


def test_a_procedure(tmp_path, monkeypatch, capsys):
    before = dict(PROCEDURES)
    try:
        run(*blocks("A procedure"))
        for step, code in ((4, 0), (0, 2)):
            file = tmp_path / f"{step}.yaml"
            file.write_text(CONFIG % (file, step) + f"OUTPUT_DIR: {tmp_path / str(step)}\n")
            assert main(["--config-file", str(file)]) == code
        assert "KD.HALVE.STEP of at least 1; received 0" in capsys.readouterr().err
        cost = json.loads((tmp_path / "4" / "results.json").read_text())["cost"]
        # Batches of 16, 16 and 8.
        assert cost == {"formula": 25.0, "measured": pytest.approx(100 * (4 + 4 + 2) / 40)}
        state = torch.load(tmp_path / "4" / "last.ckpt", weights_only=False)["procedures"]
        assert state["HALVE"] == {"loaded": 40, "trained": 10}
    finally:
        for name in PROCEDURES.keys() - before:
            del PROCEDURES[name]


VECTORS = """
HOST: vectors
MODEL: {WIDTH: %d}
KD:
  ENABLED: %s
  TEACHER: {CONFIG_FILE: %s, WEIGHTS: %s}
  TERMS: {soft: {LOSS: KD, TAPS: [logits], WEIGHT: %g}}
OUTPUT_DIR: %s
"""


@pytest.fixture
def vectors(tmp_path, monkeypatch):
    """The host of the page in a folder of its own; ``vectors(name, ...)`` trains with it."""
    folder = tmp_path / "hosts" / "vectors"
    folder.mkdir(parents=True)
    (folder / "host.py").write_text(blocks("A host")[0])
    monkeypatch.setattr(hosts, "__path__", [*hosts.__path__, str(folder.parent)])
    monkeypatch.setattr(base, "HOSTS", (*base.HOSTS, "vectors"))

    def train(name, width=4, distil=True, weight=1.0):
        teacher = tmp_path / "teacher" / "model_final.pth"
        config = VECTORS % (width, distil, tmp_path / "teacher.yaml", teacher, weight, "%s")
        (tmp_path / f"{name}.yaml").write_text(config % (tmp_path / name))
        assert main(["--config-file", str(tmp_path / f"{name}.yaml")]) == 0
        return torch.load(tmp_path / name / "model_final.pth")["model"]

    yield train
    sys.modules.pop("kd_det.hosts.vectors.host", None)
    sys.modules.pop("kd_det.hosts.vectors", None)


def test_a_host(vectors, tmp_path):
    vectors("teacher", width=32, distil=False)
    plain, zero = vectors("plain", distil=False), vectors("zero", weight=0.0)
    student = vectors("student")
    assert zero.pop("distiller.step") == student["distiller.step"] == 100
    assert all(torch.equal(plain[key], zero[key]) for key in plain)
    assert not torch.equal(plain["0.weight"], student["0.weight"])
    results = json.loads((tmp_path / "student" / "results.json").read_text())
    assert results["accuracy"]["top1"] > 80
    exported = ["--config-file", str(tmp_path / "student.yaml"), "--output", str(tmp_path / "out")]
    assert export([*exported, "--weights", str(tmp_path / "student" / "model_final.pth")]) == 0
    assert torch.load(tmp_path / "out" / "model.pth").keys() == plain.keys()
