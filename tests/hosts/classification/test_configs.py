"""Every shipped recipe builds, trains a step, and exports the stock student."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from kd_det.hosts.classification import teacher
from kd_det.hosts.classification.build import build_training_model
from kd_det.hosts.classification.config import load_config
from kd_det.hosts.classification.lit import LitClassifier
from kd_det.hosts.classification.models import build_classifier
from kd_det.hosts.classification.teacher import num_classes
from kd_det.procedures.base import TrainingSet, build_procedures
from kd_det.procedures.pre_stage import pre_stage_losses
from kd_det.run.plan import read_plan

ROOT = Path(__file__).resolve().parents[3]
FOLDER = ROOT / "configs" / "classification"
SHARED = ("base", "teacher", "baseline")
# A method file is only a part of a config: it is read with the experiments that name it.
EVERY = sorted(p for p in FOLDER.rglob("*.yaml") if p.parent.name != "methods")
RECIPES = [p for p in EVERY if not p.stem.startswith(SHARED) and p.parent.name != "pairs"]


def ident(path):
    return str(path.relative_to(FOLDER).with_suffix(""))


def options(stage):
    opts = stage.options(None)
    return [*opts, "KD.TEACHER.WEIGHTS", "", "KD.TEACHER.ALLOW_RANDOM", "True"]


@pytest.fixture(autouse=True)
def _from_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("path", EVERY, ids=ident)
def test_a_config_is_read_and_says_what_it_is(path):
    load_config(str(path))
    assert path.read_text().startswith("# ")


def built(cfg):
    """The one procedure of a run."""
    (procedure,) = build_procedures(cfg, lambda: TrainingSet(600))
    return procedure


def test_unix_counts_from_the_nominal_batch_where_its_code_does():
    cfg = load_config(str(FOLDER / "cifar100" / "unix_vgg8_vgg13.yaml"))
    assert cfg.KD.UNIX.NOMINAL_BATCH == cfg.SOLVER.IMS_PER_BATCH == 64
    assert built(cfg).mixup.nominal == (48, 32, 64)
    cfg = load_config(str(FOLDER / "digits" / "unix_resnet14_x0.5_resnet20.yaml"))
    assert built(cfg).mixup.nominal is None


@pytest.mark.parametrize("path", RECIPES, ids=ident)
def test_a_recipe_is_named_by_loss_student_and_teacher(path):
    cfg = load_config(str(path))
    name = Path(cfg.KD.TEACHER.CONFIG_FILE).stem.removeprefix("teacher_").removeprefix("coarse_")
    if cfg.KD.JOINT.ENABLED:
        name = cfg.KD.JOINT.NAME if "digits" not in ident(path) else "resnet20"
    student = cfg.MODEL.NAME.rpartition("/")[2]
    loss, _, rest = path.stem.partition(f"_{student}_")
    assert loss
    assert rest == name
    assert cfg.OUTPUT_DIR.endswith(ident(path))


# One recipe of each loss and family of student is enough: the others differ in depth.
def representative():
    chosen = {}
    for path in RECIPES:
        cfg = load_config(str(path))
        family = (path.parent.name, path.stem.split("_")[0], cfg.MODEL.NAME.rstrip("0123456789"))
        chosen.setdefault(family, path)
    return list(chosen.values())


@pytest.mark.parametrize("path", representative(), ids=ident)
def test_a_recipe_trains_a_step_in_each_of_its_stages(path, monkeypatch):
    # Nothing is downloaded: torchvision's published weights are left out.
    monkeypatch.setattr(teacher, "build_classifier", lambda name, n, _: build_classifier(name, n))
    plan = read_plan(str(path))
    for opts in [options(stage) for stage in plan.stages] or [
        ["KD.TEACHER.WEIGHTS", "", "KD.TEACHER.ALLOW_RANDOM", "True"]
    ]:
        cfg = load_config(str(path), opts)
        model = build_training_model(cfg).train()
        if model.distiller is not None:
            for loss, _ in pre_stage_losses(model.distiller).values():
                loss.finish_pre_stage()
        images = torch.rand(4, 3, cfg.INPUT.SIZE, cfg.INPUT.SIZE)
        losses = model(images, torch.arange(4) % num_classes(cfg))
        total = torch.stack(list(losses.values())).sum()
        assert torch.isfinite(total)
        total.backward()
        assert any(
            p.grad is not None and p.grad.abs().sum() > 0 for p in model.student.parameters()
        )
        logits = LitClassifier.score(SimpleNamespace(model=model), images, training=False)
        assert logits.shape == (4, num_classes(cfg))


def test_every_kcd_recipe_has_the_published_cost():
    for path in RECIPES:
        cfg = load_config(str(path))
        if cfg.KD.KCD.ENABLED:
            formula, _ = built(cfg).cost(None)
            assert formula == pytest.approx(0.81635, abs=1e-5), path
