"""Config keys of the torchvision host: Detectron2's names for the same concepts.

Where torchvision has no such concept the key does not exist. Concepts that Detectron2 lacks have a
comment.
"""

from __future__ import annotations

from collections.abc import Sequence

from fvcore.common.config import CfgNode

from kd_det.core.errors import check_at_least, check_choice, fail
from kd_det.procedures.base import check_procedures
from kd_det.run.config import add_kd_config, merge_config
from kd_det.run.yaml_files import ConfigFile

OFFERS: frozenset[str] = frozenset()
"""What procedures find on this host beside a training loop."""

META_ARCHITECTURES = ("FasterRCNN", "MaskRCNN", "RetinaNet", "FCOS")


def get_cfg() -> CfgNode:
    """A config with every key of this host at its default."""
    cfg = CfgNode()
    cfg.VERSION = 2
    cfg.SEED = -1  # negative: another one in every run
    cfg.OUTPUT_DIR = "./output"
    _add_model(cfg)
    _add_input(cfg)
    _add_solver(cfg)
    add_kd_config(cfg)
    cfg.HOST = "torchvision_detection"  # detectron2 where a file names none
    return cfg


def load_config(config: str | ConfigFile, opts: Sequence[str] = ()) -> CfgNode:
    """The defaults with a file and overrides merged in, checked and frozen.

    Raises:
        KDError: see :func:`kd_det.run.config.merge_config` and :func:`check_config`.
    """
    cfg = merge_config(get_cfg(), config, opts)
    check_config(cfg)
    cfg.freeze()
    return cfg


def check_config(cfg: CfgNode) -> None:
    """Refuse values that only this host can judge.

    Raises:
        KDError: another host's config, an unknown meta-architecture, levels, anchors or batch
            sizes that do not fit each other, or what a procedure cannot do on detectors.
    """
    model, solver = cfg.MODEL, cfg.SOLVER
    check_choice("HOST", cfg.HOST, ("torchvision_detection",))
    check_choice("MODEL.META_ARCHITECTURE", model.META_ARCHITECTURE, META_ARCHITECTURES)
    check_choice("MODEL.BACKBONE.NORM", model.BACKBONE.NORM, ("BN", "FrozenBN"))
    check_choice("INPUT.RANDOM_FLIP", cfg.INPUT.RANDOM_FLIP, ("none", "horizontal"))
    clip = solver.CLIP_GRADIENTS.CLIP_TYPE
    check_choice("SOLVER.CLIP_GRADIENTS.CLIP_TYPE", clip, ("value", "norm"))
    check_at_least("SOLVER.MAX_ITER", solver.MAX_ITER, 1, "use --eval-only to train nothing")
    check_at_least("SOLVER.IMS_PER_BATCH", solver.IMS_PER_BATCH, 1)
    levels = list(model.FPN.LEVELS)
    if len(levels) < 1 or levels != list(range(levels[0], levels[0] + len(levels))):
        fail(
            expected="MODEL.FPN.LEVELS to be consecutive levels, shallow to deep",
            received=str(levels),
            remedy="write for example [2, 3, 4] for strides 4, 8 and 16",
        )
    for key in ("SIZES", "ASPECT_RATIOS"):
        value = model.ANCHOR_GENERATOR[key]
        if len(value) not in (1, len(levels)) and model.META_ARCHITECTURE != "FCOS":
            fail(
                expected=f"MODEL.ANCHOR_GENERATOR.{key} to list one entry per level or one in all",
                received=f"{len(value)} entries for {len(levels)} levels",
                remedy="give as many entries as MODEL.FPN.LEVELS",
            )
    check_procedures(cfg, OFFERS)


def _add_model(cfg: CfgNode) -> None:
    cfg.MODEL = CfgNode()
    model = cfg.MODEL
    model.META_ARCHITECTURE = "FasterRCNN"
    model.WEIGHTS = ""  # the student's own start; empty: from scratch
    model.DEVICE = "cuda"
    # Of RGB images in 0..1, torchvision's convention.
    model.PIXEL_MEAN = [0.485, 0.456, 0.406]
    model.PIXEL_STD = [0.229, 0.224, 0.225]

    model.BACKBONE = CfgNode()
    # Any torchvision classification model by its name, or basic_resnet.
    model.BACKBONE.NAME = "resnet50"
    # Weights of the backbone alone by torchvision's name for them (IMAGENET1K_V1, DEFAULT),
    # downloaded by torchvision. Not in Detectron2.
    model.BACKBONE.WEIGHTS = ""
    model.BACKBONE.NORM = "BN"  # or FrozenBN
    # 1 freezes all up to stride 2, 2 up to c2, ...; 0 freezes nothing.
    model.BACKBONE.FREEZE_AT = 0
    # Of basic_resnet: backbone stage k (c2 is k = 0) has WIDTH * 2^k channels.
    model.BACKBONE.WIDTH = 16
    model.BACKBONE.BLOCKS = [1, 1, 1]  # of basic_resnet: basic blocks of each backbone stage

    model.FPN = CfgNode()
    model.FPN.OUT_CHANNELS = 256
    # Level k has stride 2^k. Levels that the backbone lacks are put on top: one by subsampling,
    # two by convolutions, as torchvision's own builders do.
    model.FPN.LEVELS = [2, 3, 4, 5, 6]
    # Images are padded to a multiple of it. In Detectron2 the backbone decides.
    model.FPN.SIZE_DIVISIBILITY = 32

    model.ANCHOR_GENERATOR = CfgNode()
    model.ANCHOR_GENERATOR.SIZES = [[32], [64], [128], [256], [512]]
    model.ANCHOR_GENERATOR.ASPECT_RATIOS = [[0.5, 1.0, 2.0]]  # height by width

    model.RPN = CfgNode()
    model.RPN.PRE_NMS_TOPK_TRAIN = 2000
    model.RPN.PRE_NMS_TOPK_TEST = 1000
    model.RPN.POST_NMS_TOPK_TRAIN = 1000
    model.RPN.POST_NMS_TOPK_TEST = 1000
    model.RPN.NMS_THRESH = 0.7
    model.RPN.IOU_THRESHOLDS = [0.3, 0.7]
    model.RPN.BATCH_SIZE_PER_IMAGE = 256
    model.RPN.POSITIVE_FRACTION = 0.5

    model.ROI_HEADS = CfgNode()
    # Foreground classes. torchvision's background, index 0, is added inside.
    model.ROI_HEADS.NUM_CLASSES = 80
    model.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 512
    model.ROI_HEADS.POSITIVE_FRACTION = 0.25
    model.ROI_HEADS.IOU_THRESHOLDS = [0.5]
    model.ROI_HEADS.SCORE_THRESH_TEST = 0.05
    model.ROI_HEADS.NMS_THRESH_TEST = 0.5

    model.ROI_BOX_HEAD = CfgNode()
    model.ROI_BOX_HEAD.NUM_CONV = 0
    model.ROI_BOX_HEAD.CONV_DIM = 256
    model.ROI_BOX_HEAD.NUM_FC = 2
    model.ROI_BOX_HEAD.FC_DIM = 1024
    model.ROI_BOX_HEAD.POOLER_RESOLUTION = 7
    model.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO = 2  # at least 1; Detectron2's 0 adapts to the box

    model.ROI_MASK_HEAD = CfgNode()
    model.ROI_MASK_HEAD.NUM_CONV = 4
    model.ROI_MASK_HEAD.CONV_DIM = 256
    model.ROI_MASK_HEAD.POOLER_RESOLUTION = 14
    model.ROI_MASK_HEAD.POOLER_SAMPLING_RATIO = 2

    # Both dense detectors, RetinaNet and FCOS.
    model.RETINANET = CfgNode()
    model.RETINANET.NUM_CLASSES = 80
    model.RETINANET.IOU_THRESHOLDS = [0.4, 0.5]
    model.RETINANET.SCORE_THRESH_TEST = 0.05
    model.RETINANET.NMS_THRESH_TEST = 0.5
    model.RETINANET.TOPK_CANDIDATES_TEST = 1000


def _add_input(cfg: CfgNode) -> None:
    cfg.INPUT = CfgNode()
    cfg.INPUT.MIN_SIZE_TRAIN = (800,)  # one of them is drawn for every image
    cfg.INPUT.MAX_SIZE_TRAIN = 1333
    cfg.INPUT.MIN_SIZE_TEST = 800
    cfg.INPUT.MAX_SIZE_TEST = 1333
    cfg.INPUT.RANDOM_FLIP = "horizontal"

    cfg.DATASETS = CfgNode()
    cfg.DATASETS.TRAIN = ()
    cfg.DATASETS.TEST = ()

    cfg.DATALOADER = CfgNode()
    cfg.DATALOADER.NUM_WORKERS = 4
    cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = True


def _add_solver(cfg: CfgNode) -> None:
    cfg.SOLVER = CfgNode()
    solver = cfg.SOLVER
    solver.MAX_ITER = 40000
    solver.IMS_PER_BATCH = 16  # over all processes
    solver.BASE_LR = 0.001
    solver.MOMENTUM = 0.9
    solver.WEIGHT_DECAY = 0.0001
    solver.WEIGHT_DECAY_NORM = 0.0
    solver.GAMMA = 0.1
    solver.STEPS = (30000,)
    solver.WARMUP_FACTOR = 0.001
    solver.WARMUP_ITERS = 1000
    solver.CHECKPOINT_PERIOD = 5000
    solver.AMP = CfgNode({"ENABLED": False})
    solver.CLIP_GRADIENTS = CfgNode({"ENABLED": False, "CLIP_TYPE": "value", "CLIP_VALUE": 1.0})

    cfg.TEST = CfgNode()
    cfg.TEST.EVAL_PERIOD = 0  # 0: at the end only
    cfg.TEST.DETECTIONS_PER_IMAGE = 100
