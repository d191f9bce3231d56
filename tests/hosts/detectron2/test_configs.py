"""Every shipped config: the published numbers, one training iteration, and a stock checkpoint.

The COCO experiments are five losses (one of them none) times seven published pairs, and the methods
that were published for classifiers on one of them. They are built in full size with random weights;
teachers are shared between the configs that name them.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("detectron2")

import torch
from detectron2 import model_zoo
from detectron2.config import CfgNode
from detectron2.config import get_cfg as get_stock_cfg
from detectron2.modeling import build_model
from detectron2.solver import build_optimizer
from detectron2.structures import Boxes, Instances, PolygonMasks
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from kd_det.core.checkpoint import strip_distiller
from kd_det.hosts.detectron2 import build_teacher, get_cfg, meta_arch
from kd_det.hosts.detectron2.export import stock_config
from kd_det.hosts.detectron2.procedures import check_run_procedures
from kd_det.procedures.kcd.selection import kcd_cost
from kd_det.procedures.pre_stage import pre_stage_losses
from kd_det.run.config import merge_config
from kd_det.run.plan import read_plan

pytestmark = pytest.mark.detectron2

ROOT = Path(__file__).resolve().parents[3]
STOCK = {"DistilledRCNN": "GeneralizedRCNN", "DistilledRetinaNet": "RetinaNet"}
BGR_MEAN = [103.53, 116.28, 123.675]

# Pair -> model-zoo config of the teacher, ReviewKD's weight in the authors' released configs.
# Pairs that share a teacher follow each other, so that one teacher at a time is kept.
PAIRS = {
    "frcnn_r50_r101": ("COCO-Detection/faster_rcnn_R_101_FPN_3x.yaml", 1.0),
    "frcnn_r18_r101": ("COCO-Detection/faster_rcnn_R_101_FPN_3x.yaml", 1.2),
    "frcnn_mv2_r50": ("COCO-Detection/faster_rcnn_R_50_FPN_3x.yaml", 2.0),
    "mrcnn_r50_r101": ("COCO-InstanceSegmentation/mask_rcnn_R_101_FPN_3x.yaml", 0.8),
    "mrcnn_r18_r101": ("COCO-InstanceSegmentation/mask_rcnn_R_101_FPN_3x.yaml", 1.5),
    "mrcnn_mv2_r50": ("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x.yaml", 1.0),
    "retinanet_r50_r101": ("COCO-Detection/retinanet_R_101_FPN_3x.yaml", 1.0),
}
LOSSES = ("baseline", "kd", "fitnet", "fgfi", "reviewkd")
# Methods of classifiers: feature levels or sampled boxes stand in for what they compare there.
FROM_CLASSIFIERS = ("at", "fsp", "irg", "mhgd", "kcd")
EXPERIMENTS = [
    (loss, pair)
    for pair in PAIRS
    for loss in LOSSES + (FROM_CLASSIFIERS if pair == "frcnn_r50_r101" else ())
]
DIGITS = sorted(
    path.stem
    for path in (ROOT / "configs" / "digits").glob("*_?rcnn.yaml")
    if not path.stem.startswith(("base_", "student_"))
)

experiments = pytest.mark.parametrize(
    ("loss", "pair"), EXPERIMENTS, ids=[f"{loss}_{pair}" for loss, pair in EXPERIMENTS]
)
pairs = pytest.mark.parametrize("pair", PAIRS)


def load(name: str, *opts: str) -> CfgNode:
    return merge_config(get_cfg(), str(ROOT / "configs" / f"{name}.yaml"), opts)


def expected_terms(loss: str, pair: str) -> dict[str, dict[str, Any]]:
    """What the methods' specification asks of each experiment, independent of the files."""
    dense = pair.startswith("retinanet")
    levels = ["p3", "p4", "p5", "p6", "p7"] if dense else ["p2", "p3", "p4", "p5", "p6"]
    roi_kd = {
        "LOSS": "KD",
        "WEIGHT": 20.0,
        "TAPS": ["box_logits"],
        "REDUCTION": "mean",
        "TEMPERATURE": 1.0,
    }
    dense_kd = {
        "LOSS": "KD",
        "WEIGHT": 1.0,
        "TAPS": ["cls_logits"],
        "ACTIVATION": "sigmoid",
        "REDUCTION": "foreground",
    }
    imitation = {
        "LOSS": "FGFI",
        "WEIGHT": 0.01,
        "TAPS": levels,
        "ASSIGN": "roi",
        "NORMALIZER": "global",
        "THRESHOLD": 0.5,
        "SCHEDULE": {"NAME": "delay", "ITERS": 400},
    }
    review = {"LOSS": "ReviewKD", "REDUCTION": "mean", "WEIGHT": PAIRS[pair][1]}
    review |= {"TAPS": levels, "MID_CHANNELS": 256}
    hint = {"LOSS": "FitNet", "REDUCTION": "mean", "WEIGHT": 0.1, "TAPS": ["c3"], "RELU": True}
    terms: dict[str, dict[str, Any]] = {
        "baseline": {},
        "kd": {"dense_logits": dense_kd} if dense else {"roi_logits": roi_kd},
        "fitnet": {"hint": hint},
        "fgfi": {"imitation": imitation},
        "reviewkd": {"review": review},
        "at": {
            "attention": {
                "LOSS": "AT",
                "WEIGHT": 0.5,
                "MODE": "paper",
                "TAPS": ["p2", "p3", "p4", "p5"],
            }
        },
        "fsp": {
            "flow": {
                "LOSS": "FSP",
                "WEIGHT": 1.0,
                "REDUCTION": "mean",
                "PAIRS": "chain",
                "TAPS": ["p2", "p3", "p4"],
            }
        },
        "irg": {
            "relations": {
                "LOSS": "IRG",
                "WEIGHT": 1.0,
                "TAPS": ["box_logits", "box_features"],
                "REDUCTION": "mean",
                "LAMBDA1": 0.1,
                "LAMBDA2": 5.0,
                "MAX_NODES": 512,
            }
        },
        "mhgd": {
            "graph": {
                "LOSS": "MHGD",
                "WEIGHT": 1.0,
                "REDUCTION": "mean",
                "TAPS": ["box_pooled", "box_features"],
                "HEADS": 8,
                "MAX_NODES": 256,
            }
        },
        "kcd": {"roi_logits": roi_kd},
    }
    return terms[loss]


class TestPublishedValues:
    def test_there_is_one_file_per_loss_and_pair(self) -> None:
        files = {path.stem for path in (ROOT / "configs").glob("*.yaml")}
        assert {f"{loss}_{pair}" for loss, pair in EXPERIMENTS} <= files

    @experiments
    def test_terms_are_the_specified_ones(self, loss: str, pair: str) -> None:
        cfg = load(f"{loss}_{pair}")
        terms, folder = cfg.KD.TERMS, cfg.OUTPUT_DIR
        assert terms == expected_terms(loss, pair)
        assert cfg.KD.ENABLED is (loss != "baseline")
        assert folder == f"outputs/{loss}_{pair}"

    @pairs
    def test_schedule_is_the_published_one(self, pair: str) -> None:
        cfg = load(f"baseline_{pair}")
        solver = cfg.SOLVER
        assert (solver.IMS_PER_BATCH, solver.MAX_ITER) == (8, 180_000)
        assert solver.STEPS == (120_000, 160_000)
        assert pytest.approx(0.005 if pair.startswith("retinanet") else 0.01) == solver.BASE_LR
        assert (solver.WARMUP_ITERS, solver.WARMUP_FACTOR) == (1000, 0.001)
        assert cfg.INPUT.MIN_SIZE_TRAIN == (640, 672, 704, 736, 768, 800)
        assert cfg.INPUT.MAX_SIZE_TRAIN == 1333
        assert cfg.DATASETS.TRAIN == ("coco_2017_train",)

    @pairs
    def test_teacher_is_a_zoo_model_with_its_own_weights(self, pair: str) -> None:
        cfg = load(f"kd_{pair}")
        teacher, zoo_name = cfg.KD.TEACHER, PAIRS[pair][0]
        config_file, weights = teacher.CONFIG_FILE, teacher.WEIGHTS
        assert config_file == zoo_name
        # What Detectron2 resolves the prefix to.
        url = weights.replace("detectron2://", "https://dl.fbaipublicfiles.com/detectron2/")
        assert url == model_zoo.get_checkpoint_url(zoo_name)
        assert not teacher.ALLOW_RANDOM

    @pairs
    def test_pixel_statistics_belong_to_the_weights(self, pair: str) -> None:
        cfg = load(f"baseline_{pair}")
        weights, order = cfg.MODEL.WEIGHTS, cfg.INPUT.FORMAT
        mean, std = cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD
        if "_r50_" in pair:
            assert weights == "detectron2://ImageNetPretrained/MSRA/R-50.pkl"
            assert (order, mean, std) == ("BGR", BGR_MEAN, [1.0, 1.0, 1.0])
        else:
            assert weights.startswith("weights/")
            assert (order, mean, std) == ("RGB", BGR_MEAN[::-1], [58.395, 57.12, 57.375])

    @pytest.mark.parametrize("pair", [pair for pair in PAIRS if "_r50_r101" in pair])
    def test_r50_student_is_the_zoo_model(self, pair: str) -> None:
        cfg = load(f"baseline_{pair}")
        zoo = get_cfg()
        zoo.merge_from_file(model_zoo.get_config_file(PAIRS[pair][0].replace("R_101", "R_50")))
        assert STOCK[cfg.MODEL.META_ARCHITECTURE] == zoo.MODEL.META_ARCHITECTURE
        cfg.MODEL.META_ARCHITECTURE = zoo.MODEL.META_ARCHITECTURE
        assert cfg.MODEL == zoo.MODEL

    @pytest.mark.parametrize("name", ["fsp_frcnn_r50_r101", "digits/fsp_frcnn"])
    def test_fsp_is_the_flow_alone_and_then_the_task_alone(self, name: str) -> None:
        first, second = read_plan(str(ROOT / "configs" / f"{name}.yaml")).stages
        assert (first.terms, first.task) == (("flow",), False)
        assert (second.terms, second.task, second.carry) == ((), True, ("student",))
        # The overrides of the first stage are keys and values that this host takes.
        opts = [part for pair in first.overrides.items() for part in map(str, pair)]
        cfg = load(name, *opts)
        assert cfg.SOLVER.MAX_ITER < load(name).SOLVER.MAX_ITER
        assert cfg.SOLVER.STEPS == cfg.DATASETS.TEST == ()

    def test_kcd_costs_what_the_paper_says(self) -> None:
        cfg = load("kcd_frcnn_r50_r101")
        check_run_procedures(cfg)
        node = cfg.KD.KCD
        assert (node.ENABLED, node.RHO, node.ALPHA, node.EPSILON) == (True, 0.7, 0.03, 0.3)
        cost = kcd_cost(node.RHO, cfg.SOLVER.MAX_ITER, node.PERIOD)
        assert cost == pytest.approx(0.816, abs=5e-4)
        # Every image of the digits is seen before the first condensation.
        digits = load("digits/kcd_frcnn")
        check_run_procedures(digits)
        assert digits.KD.KCD.PERIOD * digits.SOLVER.IMS_PER_BATCH >= 1500

    def test_mhgd_learns_from_as_many_batches_as_published(self) -> None:
        pre_stage = load("mhgd_frcnn_r50_r101").KD.PRE_STAGE
        assert 20 * 50_000 // 128 == pytest.approx(pre_stage.MAX_ITER, rel=0.01)
        assert (pre_stage.BASE_LR, pre_stage.WEIGHT_DECAY) == (0.1, 0.001)

    def test_mobilenet_trains_everything_but_its_norms(self) -> None:
        cfg = load("baseline_frcnn_mv2_r50")
        assert cfg.MODEL.BACKBONE.FREEZE_AT == 0
        assert cfg.MODEL.MOBILENETV2.NORM == "FrozenBN"


def synthetic_batch(masks: bool, sizes: tuple[tuple[int, int], ...]) -> list[dict[str, Any]]:
    """Images ``[3, H, W]`` of noise with one and two boxes."""
    generator = torch.Generator().manual_seed(0)
    batch = []
    for count, (height, width) in enumerate(sizes, start=1):
        boxes = torch.tensor([[4.0, 6.0, 40.0, 36.0], [16.0, 10.0, 36.0, 46.0]])[:count]
        instances = Instances((height, width))
        instances.gt_boxes = Boxes(boxes)
        instances.gt_classes = torch.tensor([3, 7])[:count]
        if masks:
            corners = boxes[:, [0, 1, 2, 1, 2, 3, 0, 3]].double().numpy()
            instances.gt_masks = PolygonMasks([[np.ascontiguousarray(c)] for c in corners])
        image = torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)
        batch.append({"image": image, "instances": instances})
    return batch


def train_one_iteration(model: nn.Module, cfg: CfgNode, size: tuple[int, int]) -> dict[str, Tensor]:
    """Forward, backward and optimiser step as Detectron2's trainer does them."""
    optimizer = build_optimizer(cfg, model)
    model.train()
    with EventStorage():
        smaller = (size[0] - 16, size[1] - 16)
        losses = model(synthetic_batch(cfg.MODEL.MASK_ON, (smaller, size)))
    optimizer.zero_grad()
    sum(losses.values()).backward()
    # A parameter without a gradient would make DDP wait for ever.
    trainable = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    assert not [name for name, parameter in trainable if parameter.grad is None]
    optimizer.step()
    return losses


def jump_to(model: nn.Module, step: int) -> None:
    """Let the distiller continue at ``step``, as after resuming: past every schedule's start."""
    distiller = model.distiller
    distiller.load_state_dict(distiller.state_dict() | {"step": torch.tensor(step)})


class LastOnly:
    """Remembers what was built last: full-size models are slow to build and large to keep."""

    def __init__(self) -> None:
        self.key: object = None
        self.value: Any = None

    def get(self, key: object, build: Any) -> Any:
        if key != self.key:
            self.key, self.value = None, None
            self.key, self.value = key, build()
        return self.value


@pytest.fixture(scope="module")
def teachers() -> LastOnly:
    return LastOnly()


@pytest.fixture(scope="module")
def stock_models() -> LastOnly:
    return LastOnly()


@pytest.fixture(autouse=True)
def repository_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """Teacher configs of the digits are named by their path in the repository."""
    monkeypatch.chdir(ROOT)
    torch.manual_seed(0)


@pytest.fixture
def shared_teacher(teachers: LastOnly, monkeypatch: pytest.MonkeyPatch) -> None:
    """Build each teacher once; the configs that name it next get the same, frozen one."""

    def build(cfg: CfgNode) -> Any:
        assert cfg.KD.TEACHER.ALLOW_RANDOM
        return teachers.get(cfg.KD.TEACHER.CONFIG_FILE, lambda: build_teacher(cfg))

    monkeypatch.setattr(meta_arch, "build_teacher", build)


RANDOM_WEIGHTS = (
    *("MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", ""),
    *("KD.TEACHER.WEIGHTS", "", "KD.TEACHER.ALLOW_RANDOM", "True"),
)


def assert_trains_and_exports(
    cfg: CfgNode, size: tuple[int, int], stock_models: LastOnly, key: str
) -> None:
    model = build_model(cfg)
    terms = list(cfg.KD.TERMS) if cfg.KD.ENABLED else []
    if terms:
        jump_to(model, 400)
        for pre_stage, _ in pre_stage_losses(model.distiller).values():
            pre_stage.finish_pre_stage()
    losses = train_one_iteration(model, cfg, size)
    values = {name: loss.item() for name, loss in losses.items()}
    assert all(map(math.isfinite, values.values())), values
    assert all(values[name] > 0 for name in terms), values
    assert any(name.startswith("loss_") for name in values)
    if cfg.KD.ENABLED and cfg.KD.KCD.ENABLED:
        assert model.image_values.shape == (2,)

    stock_cfg = cfg.clone()
    stock_cfg.MODEL.META_ARCHITECTURE = STOCK[cfg.MODEL.META_ARCHITECTURE]
    stock = stock_models.get(key, lambda: build_model(stock_cfg))
    assert type(stock).__name__ == STOCK[cfg.MODEL.META_ARCHITECTURE]
    exported = strip_distiller(model.state_dict())
    stock.load_state_dict(exported, strict=True)
    for name, value in stock.state_dict().items():
        assert torch.equal(value, exported[name]), name


class TestOneIteration:
    @experiments
    def test_config_trains_and_its_checkpoint_is_a_stock_student(
        self, loss: str, pair: str, shared_teacher: None, stock_models: LastOnly
    ) -> None:
        # Few boxes and small images save minutes; the architecture is the same.
        few_boxes = ("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "32")
        cfg = load(f"{loss}_{pair}", *RANDOM_WEIGHTS, *few_boxes)
        assert_trains_and_exports(cfg, (64, 64), stock_models, pair)

    @pytest.mark.parametrize("name", [name for name in DIGITS if not name.startswith("teacher_")])
    def test_digits_config_trains_and_its_checkpoint_is_a_stock_student(
        self, name: str, shared_teacher: None, stock_models: LastOnly
    ) -> None:
        cfg = load(f"digits/{name}", *RANDOM_WEIGHTS)
        assert_trains_and_exports(cfg, (160, 160), stock_models, name)

    @pytest.mark.parametrize("name", [name for name in DIGITS if name.startswith("teacher_")])
    def test_digits_teacher_trains_as_a_stock_model(self, name: str) -> None:
        cfg = load(f"digits/{name}", "MODEL.DEVICE", "cpu")
        model = build_model(cfg)
        assert type(model).__name__ == "GeneralizedRCNN"
        losses = train_one_iteration(model, cfg, (160, 160))
        assert all(map(math.isfinite, (loss.item() for loss in losses.values())))


@pytest.mark.parametrize("name", ["fsp_frcnn_r50_r101", "kcd_frcnn_r50_r101"])
def test_an_exported_config_is_one_that_detectron2_alone_reads(name: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(stock_config(load(name)).dump())
    cfg = get_stock_cfg()
    cfg.merge_from_file(str(path))
    assert cfg.MODEL.META_ARCHITECTURE == "GeneralizedRCNN"


def test_digits_have_every_loss_for_both_architectures() -> None:
    names = ("teacher", "baseline", "kd", "fitnet", "fgfi", "reviewkd", "reviewkd_kd")
    assert {f"{name}_{arch}" for name in names for arch in ("frcnn", "mrcnn")} <= set(DIGITS)
    assert {f"{name}_frcnn" for name in FROM_CLASSIFIERS} <= set(DIGITS)
