"""One bar says how long a run still takes and what its losses are."""

from __future__ import annotations

import io
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from rich.console import Console

from kd_det.hosts.lightning.hardware import quiet
from kd_det.hosts.lightning.loss_table import compact, loss_table
from kd_det.hosts.lightning.progress import ReportProgress, RunProgressBar
from kd_det.run.curves import CurveTag

TAG = CurveTag(["review", "roi_logits", "fgfi"])
LOSSES = {
    "total_loss": 4.1271,
    "loss_classifier": 2.2124,
    "loss_box_reg": 0.1772,
    "loss_mask": 0.7769,
    "loss_objectness": 0.6911,
    "loss_rpn_box_reg": 0.05182,
    "review": 0.1295,
    "roi_logits": 0.00000124,
    "fgfi": 123.456,
    "raw/review": 9.0,
    "lr": 0.1,
}


def drawn(renderable, width):
    console = Console(width=width, file=io.StringIO(), force_terminal=False)
    console.print(renderable)
    return console.file.getvalue().splitlines()


@pytest.mark.parametrize("width", [60, 80, 100])
def test_every_loss_is_shown_with_its_number_in_one_piece(width):
    table = loss_table({TAG(name): value for name, value in LOSSES.items()})
    lines = drawn(table, width)
    text = "\n".join(lines)
    assert max(map(len, lines)) <= width
    for pair in ("classifier 2.212", "rpn_box_reg 0.052", "review 0.130", "roi_logits 1.2e-06"):
        assert pair in text
    assert "9.0" not in text
    assert "lr" not in text
    if width == 100:
        assert len(lines) == 3  # total, task, kd


def test_groups_have_a_line_each_in_a_fixed_order():
    values = {"eval/bbox AP": 31.2, "loss/kd/a": 1.0, "loss/task/cls": 2.0, "loss/total": 3.0}
    firsts = [line.split()[0] for line in drawn(loss_table(values), 100)]
    assert firsts == ["total", "task", "kd", "eval"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0.000"),
        (0.41234, "0.412"),
        (9.9994, "9.999"),
        (17.123, "17.1"),
        (-0.5, "-0.500"),
        (1.2e-5, "1.2e-05"),
        (123456.0, "1.2e+05"),
        (float("nan"), "nan"),
    ],
)
def test_numbers_take_seven_characters_at_most(value, text):
    assert compact(value) == text
    assert len(text) <= 7


def trainer(**values):
    plain = {"global_step": 0, "max_steps": -1, "max_epochs": -1, "current_epoch": 0}
    return SimpleNamespace(**(plain | {"num_training_batches": 10} | values))


@pytest.mark.parametrize(
    ("state", "done", "left"),
    [
        # Two seconds per iteration.
        ({"max_steps": 50, "global_step": 20}, 20, 60.0),
        ({"max_epochs": 5, "current_epoch": 2, "global_step": 20}, 4, 2.0 * 26),
        ({"max_epochs": 5, "current_epoch": 2, "global_step": 20, "max_steps": 22}, 4, 4.0),
        ({"max_steps": 50, "global_step": 0}, 0, None),
    ],
    ids=["iterations", "epochs", "whichever is first", "nothing known yet"],
)
def test_time_left_is_that_of_the_whole_run(monkeypatch, state, done, left):
    bar = RunProgressBar(TAG)
    bar._trainer = trainer(**state)
    bar._began = (0, 100.0)
    elapsed = 2.0 * state["global_step"]
    monkeypatch.setattr("kd_det.hosts.lightning.progress.time.monotonic", lambda: 100.0 + elapsed)
    assert bar.seconds_left(done) == left


def test_a_resumed_run_counts_its_own_iterations_only(monkeypatch):
    bar = RunProgressBar(TAG)
    bar._trainer = trainer(max_steps=50, global_step=30)
    bar._began = (20, 0.0)
    monkeypatch.setattr("kd_det.hosts.lightning.progress.time.monotonic", lambda: 10.0)
    assert bar.seconds_left(30) == 20 * 1.0


class Toy(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)
        self.results = {}

    def training_step(self, batch, _):
        loss = self.layer(batch).square().mean()
        self.log_dict({"total_loss": loss, "loss_cls": loss, "review": loss}, logger=False)
        return loss

    def validation_step(self, batch, _):
        self.results = {"bbox": {"AP": 31.25, "AP50": 50.0}}

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.0)

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.ones(6, 2), 2)

    val_dataloader = train_dataloader


def fit(folder, callback, **arguments):
    quiet()
    pl.Trainer(
        accelerator="cpu",
        logger=False,
        callbacks=[callback],
        enable_checkpointing=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=folder,
        **arguments,
    ).fit(Toy())


@pytest.mark.parametrize(
    ("title", "name"), [("", "Epoch 2/2"), ("Pre-stage", "Pre-stage")], ids=["epochs", "title"]
)
def test_a_training_ends_with_its_bar_and_its_losses_on_a_narrow_screen(tmp_path, title, name):
    screen = io.StringIO()
    bar = RunProgressBar(TAG, title)
    bar._console_kwargs = {"file": screen, "width": 100, "force_terminal": False}
    fit(tmp_path, bar, max_epochs=2)
    lines = [line.rstrip() for line in screen.getvalue().splitlines() if line.strip()]
    assert lines[0].startswith(name)
    assert lines[0].endswith("3/3 0:00:00 left")
    assert [line.split()[:2] for line in lines[1:4]] == [
        ["total", lines[1].split()[1]],
        ["task", "cls"],
        ["kd", "review"],
    ]
    assert lines[4].split() == ["eval", "bbox", "AP", "31.2"]


def test_a_function_can_be_told_instead(tmp_path):
    told = []
    report = ReportProgress(lambda *step: told.append(step))
    fit(tmp_path, report, max_steps=3, max_epochs=-1, enable_progress_bar=False)
    assert told == [("train", k, 3) for k in range(4)] + [("evaluate", k, 3) for k in (1, 2, 3)]
