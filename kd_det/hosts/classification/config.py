"""Config keys of the classification host: Detectron2's names for the same concepts.

Classifiers count their schedule in epochs, so the keys that do are named by it
(``SOLVER.MAX_EPOCH``, ``SOLVER.EPOCH_STEPS``); ``SOLVER.MAX_ITER`` only cuts a run short.
"""

from __future__ import annotations

from collections.abc import Sequence

from fvcore.common.config import CfgNode

from kd_det.core.errors import check_at_least, check_choice, fail
from kd_det.procedures.base import BOOSTER, LABELS, MIXED_BATCHES, check_procedures
from kd_det.run.config import add_kd_config, merge_config
from kd_det.run.yaml_files import ConfigFile

CROPS = ("pad", "resized", "none")
OFFERS = frozenset({LABELS, MIXED_BATCHES, BOOSTER})
"""What procedures find on this host."""


def get_cfg() -> CfgNode:
    """A config with every key of this host at its default."""
    cfg = CfgNode()
    cfg.VERSION = 2
    cfg.SEED = -1  # negative: another one in every run
    cfg.OUTPUT_DIR = "./output"
    _add_model(cfg)
    _add_input(cfg)
    _add_solver(cfg)
    add_kd_config(cfg, OFFERS)
    cfg.HOST = "classification"  # detectron2 where a file names none
    return cfg


def load_config(config: str | ConfigFile, opts: Sequence[str] = ()) -> CfgNode:
    """The defaults with a file and overrides merged in, checked and frozen."""
    cfg = merge_config(get_cfg(), config, opts)
    check_config(cfg)
    cfg.freeze()
    return cfg


def check_config(cfg: CfgNode) -> None:
    """Refuse values that only this host can judge."""
    check_choice("HOST", cfg.HOST, ("classification",))
    check_choice("INPUT.CROP.TYPE", cfg.INPUT.CROP.TYPE, CROPS)
    check_choice("INPUT.CROP.PADDING_MODE", cfg.INPUT.CROP.PADDING_MODE, ("constant", "reflect"))
    check_choice("INPUT.RANDOM_FLIP", cfg.INPUT.RANDOM_FLIP, ("none", "horizontal"))
    solver = cfg.SOLVER
    for key, least in (("MAX_EPOCH", 1), ("IMS_PER_BATCH", 1), ("MAX_ITER", 0)):
        remedy = "correct it; use --eval-only to train nothing"
        check_at_least(f"SOLVER.{key}", solver[key], least, remedy)
    if len(cfg.MODEL.PIXEL_MEAN) != len(cfg.MODEL.PIXEL_STD) or 0 in cfg.MODEL.PIXEL_STD:
        fail(
            expected="MODEL.PIXEL_MEAN and PIXEL_STD with one value per channel, none of them 0",
            received=f"{cfg.MODEL.PIXEL_MEAN} and {cfg.MODEL.PIXEL_STD}",
            remedy="give the statistics the model is trained with, of images in 0..1",
        )
    check_procedures(cfg, OFFERS)


def _add_model(cfg: CfgNode) -> None:
    cfg.MODEL = CfgNode()
    # A name of kd_det.hosts.classification.models, of torchvision, or timm/<name>.
    cfg.MODEL.NAME = "resnet8x4"
    cfg.MODEL.NUM_CLASSES = 0  # 0: the classes of the training data
    # The model's own start. For a torchvision model also the name of its weights
    # (IMAGENET1K_V1), which torchvision downloads.
    cfg.MODEL.WEIGHTS = ""
    cfg.MODEL.DEVICE = "cuda"
    # Of RGB images in 0..1.
    cfg.MODEL.PIXEL_MEAN = [0.5071, 0.4867, 0.4408]
    cfg.MODEL.PIXEL_STD = [0.2675, 0.2565, 0.2761]


def _add_input(cfg: CfgNode) -> None:
    cfg.INPUT = CfgNode()
    cfg.INPUT.SIZE = 32  # of what the model sees
    cfg.INPUT.CROP = CfgNode()
    # pad: crop INPUT.SIZE out of the image padded by PADDING; resized: torchvision's
    # RandomResizedCrop; none: the image itself.
    cfg.INPUT.CROP.TYPE = "pad"
    cfg.INPUT.CROP.PADDING = 4  # pixels on each side, of pad
    cfg.INPUT.CROP.PADDING_MODE = "constant"  # or reflect
    cfg.INPUT.RANDOM_FLIP = "horizontal"
    # Shorter side before the centre crop in a test; 0: resize to INPUT.SIZE and crop nothing.
    cfg.INPUT.MIN_SIZE_TEST = 0

    cfg.DATASETS = CfgNode()
    cfg.DATASETS.TRAIN = ("digit_images_train",)
    cfg.DATASETS.TEST = ("digit_images_test",)
    # Images per class to train on, the first ones; 0: all. A harder task from the same data.
    cfg.DATASETS.TRAIN_PER_CLASS = 0

    cfg.DATALOADER = CfgNode()
    cfg.DATALOADER.NUM_WORKERS = 4


def _add_solver(cfg: CfgNode) -> None:
    cfg.SOLVER = CfgNode()
    solver = cfg.SOLVER
    # The defaults of the optimiser and its schedule are the CIFAR recipe of RepDistiller.
    solver.MAX_EPOCH = 240
    solver.MAX_ITER = 0  # above 0: stop after so many iterations
    solver.IMS_PER_BATCH = 64  # over all processes
    solver.BASE_LR = 0.05
    solver.MOMENTUM = 0.9
    solver.NESTEROV = False
    solver.WEIGHT_DECAY = 0.0005
    solver.WEIGHT_DECAY_NORM = 0.0005
    solver.GAMMA = 0.1
    solver.EPOCH_STEPS = (150, 180, 210)  # epochs after which the learning rate drops by GAMMA
    # Iterations between two checkpoints of a pre-stage; a run itself is saved after every epoch.
    solver.CHECKPOINT_PERIOD = 5000
    solver.AMP = CfgNode({"ENABLED": False})
    solver.CLIP_GRADIENTS = CfgNode({"ENABLED": False, "CLIP_TYPE": "value", "CLIP_VALUE": 1.0})

    cfg.TEST = CfgNode()
    cfg.TEST.EVAL_PERIOD = 1  # epochs
