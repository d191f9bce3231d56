"""From a config to the module that trains: student, teacher or booster, terms and procedures."""

from __future__ import annotations

import logging

import torch
from fvcore.common.config import CfgNode
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from kd_det.balance import build_balance
from kd_det.bench.looks import evaluating
from kd_det.core.checkpoint import SUFFIXES, load_distiller, load_student
from kd_det.hosts.classification.checkpoints import own_names
from kd_det.hosts.classification.classes import build_class_map
from kd_det.hosts.classification.data import ClassificationData
from kd_det.hosts.classification.model import Distillation, DistilledClassifier, Statistics
from kd_det.hosts.classification.models import build_classifier
from kd_det.hosts.classification.teacher import build_teacher, num_classes
from kd_det.procedures.base import Procedures, TrainingSet, build_procedures, on_losses_built
from kd_det.procedures.joint import Booster
from kd_det.run.config import read_terms

logger = logging.getLogger(__name__)


def build_student(cfg: CfgNode, weights: str, complete: bool) -> nn.Module:
    """The stock classifier that ``cfg.MODEL`` describes.

    ``weights`` is a file, or a name of torchvision's weights; empty for a random start. With
    ``complete`` every key must be in the file, as evaluation needs.
    """
    from_file = weights.endswith(SUFFIXES)
    model = build_classifier(cfg.MODEL.NAME, num_classes(cfg), "" if from_file else weights)
    if from_file:
        # A teacher's public checkpoint may be evaluated, too.
        load_student(model, weights, complete, lambda state: own_names(model, state, weights))
    return model


def build_training_model(
    cfg: CfgNode, weights: str = "", distilled: bool = True
) -> DistilledClassifier:
    """The student, started from ``weights``, and around it what ``cfg.KD`` describes.

    ``distilled`` False leaves teacher and terms out whatever the config has, as evaluation does.
    """
    student = build_student(cfg, weights, complete=not distilled)
    statistics = Statistics(cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD)
    plan = _distillation(cfg, student) if distilled and cfg.KD.ENABLED else None
    model = DistilledClassifier(student, statistics, cfg.INPUT.SIZE, plan)
    if model.distiller is not None and cfg.KD.WEIGHTS:
        load_distiller(model.distiller, cfg.KD.WEIGHTS)
    if plan is not None:
        on_losses_built(cfg, model.distiller, model.teacher)
    return model


def _distillation(cfg: CfgNode, student: nn.Module) -> Distillation:
    terms = read_terms(cfg)
    balance = build_balance(cfg, terms)
    common = (cfg.KD.TASK_WEIGHT, cfg.KD.REPORT_PERIOD)
    if cfg.KD.JOINT.ENABLED:
        return Distillation(terms, None, None, _booster(cfg, student), *common, balance=balance)
    class_map = build_class_map(cfg)
    teacher = build_teacher(cfg)
    statistics = Statistics(teacher.cfg.MODEL.PIXEL_MEAN, teacher.cfg.MODEL.PIXEL_STD)
    return Distillation(terms, teacher.frozen, statistics, None, *common, class_map, balance)


def _booster(cfg: CfgNode, student: nn.Module) -> Booster:
    node = cfg.KD.JOINT
    # The student's random stream must not depend on the booster.
    with torch.random.fork_rng(devices=[]):
        net = build_classifier(node.NAME, num_classes(cfg))
    return Booster(net, student, node.SHARED, node.SEPARATE_NORM)


def training_procedures(
    cfg: CfgNode, data: ClassificationData, seed: int = 0, rank: int = 0
) -> Procedures:
    """The procedures of a run on a training set; see :class:`TrainingSet`."""
    return build_procedures(cfg, lambda: TrainingSet(len(data), seed, rank, data.targets))


def flops_ratio(model: DistilledClassifier, size: int) -> float:
    """R: operations of the teacher's forward over the student's, as torch counts them."""
    assert model.teacher is not None
    example = torch.zeros(1, len(model.statistics.mean), size, size)
    example = example.to(next(model.parameters()).device)
    model.teacher.follow(example)
    counts = []
    for net in (model.teacher.model, model.student):
        with evaluating(net), FlopCounterMode(display=False) as counter:
            net(example)
        counts.append(counter.get_total_flops())
    return counts[0] / counts[1]
