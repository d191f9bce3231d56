"""The workbench of the classification host looks at a run as it is, and changes nothing."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kd_det.hosts.base import open_bench
from kd_det.hosts.classification.data import ClassificationData
from kd_det.hosts.classification.train import run
from kd_det.preflight.steps import take_steps
from kd_det.run.plan import Start
from tests.hosts import workbench_contract as contract

TERMS = {
    "soft": {"LOSS": "KD", "TAPS": ["logits"]},
    "hint": {"LOSS": "FitNet", "TAPS": ["layer2"]},
    "review": {"LOSS": "ReviewKD", "TAPS": ["layer1", "layer2", "layer3"]},
}


@pytest.fixture
def bench(config):
    return open_bench(config(KD={"TERMS": TERMS}))


class Oracle(nn.Module):
    """Answers with the class of each image in turn, in another order of classes."""

    def __init__(self, targets, order):
        super().__init__()
        self.targets, self.order, self.seen = targets, torch.tensor(order), 0

    def forward(self, images):
        shown = self.targets[self.seen : self.seen + len(images)]
        self.seen += len(images)
        return 10.0 * nn.functional.one_hot(self.order[shown], len(self.order))


@pytest.mark.parametrize("unix", [False, True])
def test_a_look_changes_nothing(config, unix):
    mixing = {"ENABLED": unix, "SCORE_MODE": "train"}
    bench = open_bench(config(KD={"TERMS": TERMS, "UNIX": mixing}))
    contract.check_a_look_changes_nothing(bench)
    contract.check_nothing_is_written(bench)


def test_batches_repeat(config):
    cfg = config(KD={"TERMS": TERMS}, INPUT={"RANDOM_FLIP": "horizontal"})
    contract.check_batches_repeat(open_bench(cfg))


def test_what_a_checkpoint_could_not_give_is_said(bench):
    contract.check_planted_faults_of_an_export(bench)


def test_losses_are_those_of_the_first_iteration_of_the_run(bench):
    images, targets, indices = next(bench.batches())
    found = bench.losses((images, targets, indices))
    expected = bench.model.train()(images, targets)
    assert {k: v.item() for k, v in found.items()} == {k: v.item() for k, v in expected.items()}
    assert set(found) == {"loss_cls", *TERMS}


def test_unix_trains_on_part_of_a_batch_and_a_look_repeats(config):
    bench = open_bench(config(KD={"TERMS": TERMS, "UNIX": {"ENABLED": True, "K_FRAC": 0.5}}))
    sizes = []
    bench.student.register_forward_hook(lambda module, args, out: sizes.append(len(out)))
    batch = next(bench.batches())
    first, second = bench.losses(batch), bench.losses(batch)
    assert sizes == [16, 8, 16, 8]
    assert {k: v.item() for k, v in first.items()} == {k: v.item() for k, v in second.items()}


def test_epochs_follow_each_other(bench):
    stream = bench.batches()
    per_epoch = -(-40 // 16)
    epochs = [torch.cat([next(stream)[2] for _ in range(per_epoch)]) for _ in range(2)]
    assert sorted(epochs[0].tolist()) == sorted(epochs[1].tolist()) == list(range(40))
    assert epochs[0].tolist() != epochs[1].tolist()
    assert bench.iterations() == 2 * per_epoch


def test_iterations_are_those_of_the_run(config):
    kcd = {"ENABLED": True, "PERIOD": 1, "RHO": 0.25, "EPSILON": 0.0}
    cfg = config(KD={"TERMS": TERMS, "KCD": kcd}, SOLVER={"IMS_PER_BATCH": 8})
    # 40 images, then 40 * 0.25 ** (1 / 2).
    assert open_bench(cfg).iterations() == 5 + 3
    cfg.SOLVER.MAX_ITER = 6
    assert open_bench(cfg).iterations() == 6


def test_pictures_are_the_data_as_it_is(bench):
    data = ClassificationData(bench.cfg, training=False)
    for index, picture in enumerate(bench.validation_pictures(3)):
        assert torch.equal(picture, data.source[index][0].expand(3, -1, -1))
    images, targets, _ = batch = next(bench.batches())
    for image, picture in zip(images, bench.pictures(batch), strict=True):
        assert torch.allclose(picture / 255, image, atol=0.5 / 255 + 1e-6)
    assert torch.equal(bench.ground_truth(batch), targets)


def test_an_evaluation_on_all_images_is_the_hosts_own(bench, config, tmp_path):
    path = tmp_path / "student.pth"
    torch.save(bench.student.state_dict(), path)
    expected = run(config("evaluated", MODEL={"WEIGHTS": str(path)}), Start(eval_only=True))
    found = bench.evaluate("student", 10_000)
    assert found["accuracy"] == {k: expected["accuracy"][k] for k in ("top1", "top5")}


def test_a_teacher_is_judged_by_the_students_classes_on_the_images_it_saw(config):
    names = [*"9876543210", "ten"]
    cfg = config(KD={"TERMS": {"hint": TERMS["hint"]}})
    cfg.KD.TEACHER.CLASS_NAMES = names
    bench = open_bench(cfg)
    bench.teacher_cfg.defrost()
    bench.teacher_cfg.MODEL.NUM_CLASSES = len(names)
    targets = ClassificationData(cfg, training=False).targets
    order = [*range(9, -1, -1)]
    bench.teacher.model = Oracle(targets, [*order, 10])
    assert bench.evaluate("teacher", 30)["accuracy"]["top1"] == 100
    assert bench.teacher.model.seen == 30
    shown = int(targets[0])
    bench.teacher.model = Oracle(targets, [*order, 10])
    bench._translation[9 - shown] = -1
    expected = 100 * (targets[:30] != shown).float().mean().item()
    assert bench.evaluate("teacher", 30)["accuracy"]["top1"] == pytest.approx(expected)


def test_each_side_has_its_own_pixels(bench):
    own, other = bench.pixel_input("student"), bench.pixel_input("teacher")
    assert own.mean == tuple(bench.cfg.MODEL.PIXEL_MEAN)
    assert other.std == tuple(bench.teacher_cfg.MODEL.PIXEL_STD)
    assert (own.order, own.scale, own.divisor) == ("RGB", 1, 1)


def test_a_prediction_is_a_distribution_over_the_sides_classes(bench):
    picture = torch.randint(0, 256, (3, 20, 30), dtype=torch.uint8)
    for side in ("student", "teacher"):
        found = bench.predict(side, picture)
        assert found.shape == (10,)
        assert found.sum().item() == pytest.approx(1, abs=1e-6)


def test_a_finished_run_opens_without_its_teacher_and_with_what_it_learnt(bench, config, tmp_path):
    path = tmp_path / "model_final.pth"
    torch.save({"model": bench.model.state_dict()}, path)
    cfg = config(KD={"TERMS": TERMS}, SEED=7)
    plain = open_bench(cfg, str(path), distilled=False)
    assert (plain.teacher, plain.distiller) == (None, None)
    picture = plain.validation_pictures(1)[0]
    assert torch.equal(plain.predict("student", picture), bench.predict("student", picture))
    whole = open_bench(cfg, str(path))
    for key, value in bench.model.state_dict().items():
        assert torch.equal(whole.model.state_dict()[key], value), key


def test_a_booster_is_no_teacher_and_can_be_looked_at(config, refuses):
    joint = {"ENABLED": True, "NAME": "resnet8_x0.5"}
    bench = open_bench(config(KD={"TERMS": {"soft": TERMS["soft"]}, "JOINT": joint}))
    assert bench.teacher is None
    assert bench.teacher_cfg is None
    assert bench.class_names("teacher") is None
    assert {"loss_cls", "loss_booster", "soft"} == set(bench.losses(next(bench.batches())))
    assert bench.check_export() == []
    with refuses("frozen teacher"):
        bench.evaluate("teacher", 1)


def test_what_the_host_refuses_is_refused_as_it_says(config, refuses):
    for node, part in (
        ({"TEACHER": {"WEIGHTS": "gone.pth"}}, "gone.pth"),
        ({"TEACHER": {"CONFIG_FILE": "gone.yaml"}}, "gone.yaml"),
        ({"TERMS": {"hint": {"LOSS": "FitNet", "TAPS": ["layer9"]}}}, "layer9"),
    ):
        with refuses(part):
            open_bench(config(KD={"TERMS": TERMS, **node}))


def test_names_that_are_not_as_many_as_the_teachers_classes_are_left_out(config):
    cfg = config(KD={"TERMS": {"hint": TERMS["hint"]}})
    cfg.KD.TEACHER.CLASS_NAMES = ["a", "b"]
    contract.check_names_that_do_not_fit_are_none(open_bench(cfg))


def test_a_stage_without_a_task_is_measured_on_part_of_a_batch(config):
    terms = {name: TERMS[name] for name in ("soft", "hint")}
    bench = open_bench(config(KD={"TERMS": terms, "TASK_WEIGHT": 0.0}))
    steps = take_steps(bench, batches=1, images=6, seconds=600)
    assert steps.entered[0] == 6  # of the 16 that the loader gives
    (step,) = steps.steps
    assert (step.task, step.task_norm) == ({}, 0.0)
    assert all(step.terms[name].norm > 0 for name in terms)
