"""The numbers of a run: JSON lines under their own names, curves under tags."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers.logger import Logger

from kd_det.hosts.lightning.hardware import quiet
from kd_det.hosts.lightning.metrics import DataClock, MetricsWriter
from kd_det.hosts.lightning.module import DistillationModule, check_finite
from kd_det.run.curves import CurveTag
from kd_det.run.devices import peak_memory


class Kept(Logger):
    """A logger that keeps what it is told."""

    def __init__(self):
        super().__init__()
        self.told = []

    name = version = "kept"

    def log_hyperparams(self, *args, **kwargs):
        pass

    def log_metrics(self, metrics, step=None):
        self.told.append((step, dict(metrics)))


class Student(torch.nn.Module):
    """A model with a distiller that measures shares in every third step."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)
        self.teacher = None
        self.steps = 0
        # Beside the module tree: only its metrics are looked at.
        self.__dict__["distiller"] = SimpleNamespace(metrics={}, report_silent=lambda: [])

    def forward(self, batch):
        self.steps += 1
        metrics = {"raw/review": torch.tensor(float(self.steps))}
        if self.steps % 3 == 1:
            metrics["share/review"] = torch.tensor(self.steps / 100)
        self.distiller.metrics = metrics
        loss = self.layer(batch).square().mean()
        return {"loss_cls": loss, "review": loss * 0.5}


class Lit(DistillationModule):
    def training_step(self, batch, _):
        losses = self.model(batch)
        total = sum(losses.values())
        self.log_losses(losses, total)
        return total

    def validation_step(self, batch, _):
        self.results = {"bbox": {"AP": 31.25}}

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.ones(48, 2), 2)

    val_dataloader = train_dataloader


def fit(folder, steps=24, period=10, loggers=()):
    quiet()
    clock = DataClock()
    path = folder / "metrics.json"
    writer = MetricsWriter(path, CurveTag(["review"]), clock, period)
    pl.Trainer(
        accelerator="cpu",
        max_steps=steps,
        max_epochs=-1,
        logger=list(loggers),
        callbacks=[writer],
        profiler=clock,
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=folder,
    ).fit(Lit(Student(), {}, 0))
    return path


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_line_has_the_losses_and_what_an_iteration_cost(tmp_path):
    found = lines(fit(tmp_path))
    assert [line["iteration"] for line in found] == [9, 19, 23, 23]
    costs = {"lr", "time", "data_time", "max_mem"}
    losses = {"total_loss", "loss_cls", "review"}
    assert found[0].keys() == {"iteration", *losses, *costs}
    for line in found[:3]:
        assert line["total_loss"] == pytest.approx(line["loss_cls"] + line["review"])
        assert line["lr"] == 0.01
        assert 0 < line["data_time"] < line["time"]
        assert line["max_mem"] > 1
    assert found[3] == {"iteration": 23, "bbox/AP": 31.25}


def test_shares_of_the_last_measurement_are_in_the_next_line(tmp_path, monkeypatch):
    monkeypatch.setattr("kd_det.hosts.lightning.module.LOG_PERIOD", 10)
    found = lines(fit(tmp_path))
    # Steps 1, 4, ..., 19, 22 measure; lines follow steps 10, 20 and the last, 24.
    assert [line["share/review"] for line in found[:3]] == pytest.approx([0.10, 0.19, 0.22])
    assert [line["raw/review"] for line in found[:3]] == [10, 20, 24]


def test_loggers_get_the_same_numbers_under_the_tags_of_curves(tmp_path):
    kept = Kept()
    found = lines(fit(tmp_path, loggers=[kept]))
    assert [step for step, _ in kept.told] == [line["iteration"] for line in found]
    _, curves = kept.told[0]
    assert {"loss/total", "loss/task/cls", "loss/kd/review", "lr", "time"} <= curves.keys()
    assert "review" not in curves
    assert curves["loss/kd/review"] == found[0]["review"]
    assert kept.told[-1][1] == {"bbox/AP": 31.25}


def test_after_a_cut_line_the_next_begins_anew(tmp_path):
    path = tmp_path / "metrics.json"
    path.write_text('{"iteration": 3}\n{"iteration": 7, "total_l')
    fit(tmp_path)
    first, cut, *rest = path.read_text().splitlines()
    assert (first, cut) == ('{"iteration": 3}', '{"iteration": 7, "total_l')
    assert [json.loads(line)["iteration"] for line in rest] == [9, 19, 23, 23]


def test_the_clock_counts_the_wait_for_batches_alone():
    clock = DataClock()
    for action in ("run_training_batch", "[_TrainingEpochLoop].train_dataloader_next"):
        with clock.profile(action):
            sum(range(1000))
        assert (clock.seconds > 0) is action.endswith("next")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_losses_that_are_not_finite_stop_a_training_and_are_listed(value):
    losses = {"loss_cls": torch.tensor(0.5), "review": torch.tensor(value)}
    with pytest.raises(FloatingPointError, match=rf"here: loss_cls 0.5, review {value}; less"):
        check_finite("here", losses, "less")


def test_memory_is_at_least_that_of_a_tensor_in_use():
    block = torch.ones(32 * 2**20, dtype=torch.uint8)
    assert peak_memory(block.device) > 32
