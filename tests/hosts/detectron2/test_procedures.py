"""KCD on Detectron2: which images, in which order, blended how, and again after an interruption."""

from __future__ import annotations

import json
from itertools import islice

import numpy as np
import pytest
import torch

pytest.importorskip("detectron2")

from detectron2.data import DatasetMapper
from detectron2.data.detection_utils import read_image
from detectron2.engine.hooks import HookBase

from kd_det.data.digits.detection import DigitsSpec, write_digits
from kd_det.hosts.detectron2 import get_cfg
from kd_det.hosts.detectron2.procedures import (
    ChangingMapper,
    ProcedureLoader,
    TrainingData,
    check_run_procedures,
)
from kd_det.hosts.detectron2.trainer import Trainer
from kd_det.procedures import PROCEDURES
from kd_det.procedures.kcd.condensation import Condensation
from kd_det.procedures.kcd.sampler import GroupedSampler, InfiniteSubsetSampler
from tests.hosts.detectron2.models import write_teacher
from tests.hosts.detectron2.runs import Interrupt, Stop, small_cfg, train
from tests.procedures.toy import Halve

pytestmark = pytest.mark.detectron2

IMAGES, BATCH, PERIOD, TOTAL = 8, 2, 4, 12
LOOK = {"look": {"LOSS": "AT", "MODE": "paper", "TAPS": ["p2", "p3"]}}


def places(batch):
    return [image["kd_index"] for image in batch]


class Watch(HookBase):
    """What was trained on, iteration by iteration."""

    def __init__(self):
        self.seen = []

    def after_step(self):
        self.seen.append(tuple(places(self.trainer.data_loader.batch)))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Eight images of digits and a random teacher from a real file."""
    folder = tmp_path_factory.mktemp("condensed")
    images = write_digits(folder / "mini", DigitsSpec(train_images=IMAGES, val_images=1, canvas=96))
    return images, write_teacher(folder, "faster")


@pytest.fixture
def make_cfg(data, tmp_path):
    """``make_cfg(folder, *opts)``: a run of seconds with KCD."""
    images, teacher = data

    def make(folder="out", *opts):
        own = [
            *("INPUT.RANDOM_FLIP", "horizontal", "SOLVER.MAX_ITER", TOTAL),
            *("SOLVER.STEPS", (6, 11), "SOLVER.WARMUP_ITERS", 2, "SOLVER.CHECKPOINT_PERIOD", 3),
            *("KD.KCD.ENABLED", True, "KD.KCD.PERIOD", PERIOD, "KD.KCD.RHO", 0.5),
        ]
        return small_cfg(images, teacher, LOOK, tmp_path / folder, *own, *opts)

    return make


def condensation(data):
    (kcd,) = data.procedures
    return kcd.condensation


def final(cfg):
    return torch.load(f"{cfg.OUTPUT_DIR}/model_final.pth", weights_only=True)


def assert_same(one, other, where=""):
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_same(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    else:
        assert one == other, where


def test_an_interrupted_and_resumed_run_ends_as_the_uninterrupted_one(make_cfg, tmp_path):
    whole, parts = make_cfg("whole"), make_cfg("parts")
    watch = Watch()
    train(whole, watch)
    # In the middle of the second stage, two iterations after a checkpoint.
    first, second = Watch(), Watch()
    with pytest.raises(Stop):
        train(parts, first, Interrupt(after=5))
    train(parts, second, resume=True)
    assert first.seen[:3] + second.seen == watch.seen
    ours, theirs = final(parts), final(whole)
    assert_same(ours["model"], theirs["model"])
    assert_same(
        ours["trainer"]["hooks"]["ProcedureHook"], theirs["trainer"]["hooks"]["ProcedureHook"]
    )
    state = ours["trainer"]["hooks"]["ProcedureHook"]["procedures"]["KCD"]
    assert state["current_period"] == 2
    assert len(state["active"]) == state["counts"][2] < IMAGES
    assert (state["partners"] >= 0).any()
    metrics = map(json.loads, (tmp_path / "parts/metrics.json").read_text().splitlines())
    last = {key: value for line in metrics for key, value in line.items()}
    # rho 0.5 in three stages: 8, 6 and 5 images (and 4 that no stage trains on).
    assert state["counts"] == [8, 6, 5, 4]
    lengths = [4, 3, 2]  # 4 * 5/8 = 2.5 rounds to even
    assert state["lengths"] == lengths
    assert len(watch.seen) == sum(lengths)
    assert last["cost/measured"] == pytest.approx(100 * sum(lengths) / TOTAL)
    expected = 100 * (0.5 ** (1 / 3) + 0.5 ** (2 / 3) + 0.5) / 3
    assert last["cost/formula"] == pytest.approx(expected)


def test_learning_rate_steps_move_with_the_run(make_cfg):
    cfg = make_cfg("plan")
    solver = TrainingData(cfg).cfg.SOLVER
    # Step 6 is the middle of the second stage, which takes 3 iterations instead of 4; 11 would be
    # the very last one of the third.
    assert (solver.MAX_ITER, solver.STEPS, solver.WARMUP_ITERS) == (9, (6,), 2)
    assert cfg.SOLVER.MAX_ITER == TOTAL


def test_without_kd_there_is_no_kcd(make_cfg):
    cfg = make_cfg("plain", "KD.ENABLED", False)
    trainer = Trainer(cfg)
    assert trainer.max_iter == TOTAL
    assert not isinstance(trainer.data_loader, ProcedureLoader)


def test_resuming_with_another_plan_is_refused(make_cfg, refuses):
    with pytest.raises(Stop):
        train(make_cfg("parts"), Interrupt(after=3))
    with refuses("period counts", "remedy: resume with the same rho"):
        train(make_cfg("parts", "KD.KCD.RHO", 0.9), resume=True)


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_processes_change_neither_order_nor_stage(make_cfg, workers):
    data = TrainingData(make_cfg("loader"))
    loader = data.build_loader(make_cfg("loader", "DATALOADER.NUM_WORKERS", workers))
    state, seen = condensation(data), []
    for batch in islice(loader, 6):
        assert batch is loader.batch
        seen += (indices := places(batch))
        state.update(torch.tensor(indices), torch.tensor(indices).double())
        state.step()
    assert state.current_period == 1
    # The first pass visits every image once; then only those of the new period are seen.
    assert sorted(seen[:IMAGES]) == list(range(IMAGES))
    assert set(seen[IMAGES:]) <= set(state.active.tolist())
    again = TrainingData(make_cfg("loader"))
    sampler = InfiniteSubsetSampler(condensation(again), data.seed)
    assert seen[:IMAGES] == list(islice(sampler, IMAGES))


class TestGroupedSampler:
    WIDE = torch.tensor([True, False, True, True, False, True, True, False, True, False])

    def batches(self, position, rank=0, world=1, count=8):
        state = Condensation(10, rho=0.5, period=40, total=80, batch=2 * world)
        state.position = position
        sampler = GroupedSampler(state, 3, self.WIDE, rank, world)
        stream = islice(sampler, 2 * count)
        return list(zip(stream, stream, strict=True))

    def test_batches_are_of_one_orientation_and_leave_nothing_out(self):
        batches = self.batches(0, count=20)
        assert all(self.WIDE[i] == self.WIDE[j] for i, j in batches)
        visits = np.bincount(np.array(batches).ravel(), minlength=10)
        assert visits.min() >= 3
        assert visits.max() <= 4

    def test_a_resumed_run_continues_with_the_very_next_batch(self):
        whole = self.batches(0, count=16)
        for position in range(8):
            assert self.batches(position, count=8) == whole[position : position + 8]

    def test_ranks_share_the_stream(self):
        shared = [self.batches(0, rank, 2, count=10) for rank in (0, 1)]
        visits = np.bincount(np.array(shared).ravel(), minlength=10)
        assert visits.min() >= 3
        assert visits.max() <= 5


class TestBlends:
    @pytest.fixture
    def blended(self, make_cfg):
        """A mapper without augmentation whose image 0 is blended with a part of image 1."""
        cfg = make_cfg("blend", "INPUT.RANDOM_FLIP", "none")
        data = TrainingData(cfg)
        state = condensation(data)
        state.partners[0], state.epsilons[0] = 1, 0.2

        def make(mode="convex"):
            state.blend = mode
            mapper = DatasetMapper(cfg, True)
            change = data.procedures.chooser.image_change()
            return ChangingMapper(mapper, data.dataset, change), data.dataset

        return make, cfg

    @pytest.mark.parametrize(("mode", "share"), [("convex", 0.8), ("add", 1.0)])
    def test_pixels_are_mixed_and_boxes_stay(self, blended, mode, share):
        make, cfg = blended
        mapper, dataset = make(mode)
        stock = DatasetMapper(cfg, True)(dataset[0])
        image, partner = (
            read_image(dataset[i]["file_name"], cfg.INPUT.FORMAT).astype(np.float64) for i in (0, 1)
        )
        expected = np.clip(np.rint(share * image + 0.2 * partner), 0, 255).transpose(2, 0, 1)
        mapped = mapper(dataset[0])
        assert mapped["image"].dtype == torch.uint8
        difference = mapped["image"].double().numpy() - expected
        assert np.abs(difference).max() <= 1  # float32 against float64 at .5
        assert (difference != 0).mean() < 1e-3
        assert torch.equal(mapped["instances"].gt_boxes.tensor, stock["instances"].gt_boxes.tensor)
        assert mapped["kd_index"] == 0

    def test_other_images_are_the_stock_mappers(self, blended):
        make, cfg = blended
        mapper, dataset = make()
        mapper(dataset[0])
        stock = DatasetMapper(cfg, True)(dataset[1])
        assert torch.equal(mapper(dataset[1])["image"], stock["image"])

    def test_a_partner_of_another_size_is_resized_to_the_canvas(self, blended, tmp_path):
        make, _ = blended
        mapper, dataset = make()
        import cv2

        path = tmp_path / "grey.png"
        cv2.imwrite(str(path), np.full((20, 50, 3), 100, dtype=np.uint8))
        mapper.dataset = [dataset[0], {"file_name": str(path)}]
        image = read_image(dataset[0]["file_name"], "BGR").astype(np.float64)
        expected = np.rint(0.8 * image + 20).transpose(2, 0, 1)
        assert np.abs(mapper(dataset[0])["image"].numpy() - expected).max() <= 1

    def test_recipes_are_read_anew_for_every_image(self, blended):
        make, _ = blended
        mapper, dataset = make()
        before = mapper(dataset[0])["image"].clone()
        mapper.change.partners[0] = -1
        assert not torch.equal(mapper(dataset[0])["image"], before)


@pytest.mark.parametrize(
    ("opts", "named"),
    [
        (["KD.KCD.EPSILON", 0.5], "at most 0.3"),
        (["KD.KCD.MIN_PER_CLASS", 2], "KD.KCD.MIN_PER_CLASS"),
        (["KD.KCD.RHO", 0.0], "(0, 1]"),
        (["KD.KCD.RHO", 1.5], "(0, 1]"),
        (["KD.KCD.PERIOD", 0], "KCD's period of at least 1; received 0"),
        (["KD.KCD.SCHEDULE", "exponential"], "'exp'"),
        (["DATALOADER.SAMPLER_TRAIN", "RepeatFactorTrainingSampler"], "TrainingSampler"),
        (["MODEL.META_ARCHITECTURE", "GeneralizedRCNN"], "DistilledRCNN"),
    ],
)
def test_what_kcd_cannot_do_here_is_refused_before_anything_is_read(opts, named, refuses):
    cfg = get_cfg()
    cfg.merge_from_list(["MODEL.META_ARCHITECTURE", "DistilledRCNN", "KD.KCD.ENABLED", True, *opts])
    with refuses(named):
        check_run_procedures(cfg)


def test_a_data_set_of_another_length_is_refused(make_cfg, refuses):
    state = condensation(TrainingData(make_cfg("short")))
    other = Condensation(IMAGES + 1, rho=0.5, period=PERIOD, total=TOTAL, batch=BATCH)
    with refuses(f"a ledger of {IMAGES} points", f"{IMAGES + 1} points"):
        state.load_state_dict(other.state_dict())


def test_a_new_procedure_takes_one_object_and_one_config(data, tmp_path, monkeypatch):
    monkeypatch.setitem(PROCEDURES, "HALVE", Halve)
    images, teacher = data

    def cfg(folder):
        return small_cfg(images, teacher, LOOK, tmp_path / folder, "KD.HALVE.ENABLED", True)

    watch = Watch()
    results = train(cfg("whole"), watch)
    assert results == {"cost": {"formula": 50.0, "measured": 50.0}}
    assert [len(batch) for batch in watch.seen] == [1] * 4
    lines = (tmp_path / "whole" / "metrics.json").read_text().splitlines()
    metrics = {name: value for line in lines for name, value in json.loads(line).items()}
    assert metrics["cost/formula"] == metrics["cost/measured"] == 50.0
    assert metrics["halve/trained"] == 4
    with pytest.raises(Stop):
        train(cfg("parts"), Interrupt(after=3))
    train(cfg("parts"), resume=True)
    state = final(cfg("parts"))["trainer"]["hooks"]["ProcedureHook"]["procedures"]
    assert state == {"HALVE": {"loaded": 8, "trained": 4, "steps": 4}}


def test_a_checkpoint_of_a_former_version_is_resumed(make_cfg, tmp_path):
    cfg = make_cfg("old")
    with pytest.raises(Stop):
        train(cfg, Interrupt(after=5))
    path = tmp_path / "old" / (tmp_path / "old" / "last_checkpoint").read_text()
    checkpoint = torch.load(path, weights_only=False)
    hooks = checkpoint["trainer"]["hooks"]
    hook = hooks.pop("ProcedureHook")
    state = hook.pop("procedures")["KCD"]
    state["stage"] = state.pop("current_period")
    hooks["Condense"] = {"condensation": state, "seed": hook["seed"]}
    torch.save(checkpoint, path)
    train(cfg, resume=True)
    whole = make_cfg("whole")
    train(whole)
    assert_same(final(cfg)["model"], final(whole)["model"])
