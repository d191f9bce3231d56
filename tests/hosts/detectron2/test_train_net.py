"""The command line, end to end: train, evaluate, resume, several processes, bad input."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("detectron2")

from kd_det.app import train as cli
from kd_det.core.checkpoint import read_weights
from kd_det.data.digits.detection import DigitsSpec, write_digits
from kd_det.hosts.detectron2.config import load_config
from kd_det.hosts.detectron2.train import check_run
from kd_det.run.plan import Start
from tests.hosts.detectron2.models import write_teacher

pytestmark = pytest.mark.detectron2

CONFIG = Path("configs/digits/reviewkd_frcnn.yaml").resolve()
SMALL = ["MODEL.BASIC_RESNET.WIDTH", "4", "MODEL.FPN.OUT_CHANNELS", "8"]


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    """Overrides for a run of seconds: 12 images, a random teacher from a real file."""
    folder = tmp_path_factory.mktemp("run")
    data = write_digits(folder / "mini", DigitsSpec(train_images=8, val_images=4))
    config, weights = write_teacher(folder, "faster")
    opts = [*SMALL, "KD.TEACHER.CONFIG_FILE", str(config), "KD.TEACHER.WEIGHTS", str(weights)]
    for name, (json_file, images) in data.items():
        opts += [f"DATASETS.COCO_JSON.mini_{name}", repr([str(json_file), str(images)])]
        opts += [f"DATASETS.{'TEST' if 'val' in name else 'TRAIN'}", f"('mini_{name}',)"]
    return [
        *opts,
        "SOLVER.IMS_PER_BATCH", "2", "SOLVER.MAX_ITER", "4", "SOLVER.STEPS", "()",
        "SOLVER.CHECKPOINT_PERIOD", "2", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0",
    ]  # fmt: skip


def train_net(*arguments: str, launcher: tuple[str, ...] = (), code: int = 0) -> str:
    """Run the tool as a user does and return what it printed."""
    command = [sys.executable, *launcher, "tools/train_net.py", *arguments]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
    done = subprocess.run(
        command, capture_output=True, text=True, env=env, check=False, timeout=300
    )
    output = done.stdout + done.stderr
    assert done.returncode == code, output
    return output


def last_ap(folder: Path) -> float:
    lines = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    return [line["bbox/AP"] for line in lines if "bbox/AP" in line][-1]


def test_a_run_trains_resumes_and_evaluates_to_the_same_ap(options, tmp_path):
    output = tmp_path / "out"
    arguments = ["--config-file", str(CONFIG)]
    first = train_net(*arguments, *options, "OUTPUT_DIR", str(output), "SOLVER.MAX_ITER", "2")
    assert "review" in (output / "metrics.json").read_text() or "review" in first
    before = (output / "model_final.pth").read_bytes()
    refused = train_net(*arguments, *options, "OUTPUT_DIR", str(output), code=2)
    assert "--resume" in refused
    assert (output / "model_final.pth").read_bytes() == before
    train_net(*arguments, "--resume", *options, "OUTPUT_DIR", str(output))
    checkpoint = torch.load(output / "model_final.pth", weights_only=False)
    assert checkpoint["iteration"] == 3
    assert checkpoint["model"]["distiller.step"] == 4
    evaluated = train_net(
        *arguments, "--eval-only", *options, "OUTPUT_DIR", str(tmp_path / "eval"),
        "MODEL.WEIGHTS", str(output / "model_final.pth"),
    )  # fmt: skip
    rows = [line for line in evaluated.splitlines() if "copypaste: " in line]
    assert float(rows[-1].split("copypaste: ")[1].split(",")[0]) == pytest.approx(
        last_ap(output), abs=1e-4
    )


def curves(folder: Path) -> dict[str, list[float]]:
    lines = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    return {key: [x[key] for x in lines if key in x] for key in {k for x in lines for k in x}}


@pytest.mark.usefixtures("own_loggers")
def test_fsp_trains_the_flow_and_then_the_task_and_resumes_in_its_second_stage(
    options, tmp_path, capfd, opened
):
    config, output = CONFIG.with_name("fsp_frcnn.yaml"), tmp_path / "out"
    flow = {"NAME": "flow", "TERMS": ["flow"], "TASK": False}
    flow["OVERRIDES"] = {"SOLVER.MAX_ITER": 2, "DATASETS.TEST": ()}
    stages = repr([flow, {"NAME": "task", "TERMS": []}])
    command = ["--config-file", str(config), *options, "STAGES", stages, "OUTPUT_DIR", str(output)]
    assert cli.main(command) == 0
    assert opened.count(str(config)) == 1
    first, second = output / "stage_1_flow", output / "stage_2_task"
    assert curves(first)["flow"][-1] > 0
    assert set(curves(first)["loss_cls"]) == {0}
    assert "flow" not in curves(second)
    assert curves(second)["loss_cls"][-1] > 0
    assert last_ap(second) == pytest.approx(
        json.loads((output / "results.json").read_text())["bbox"]["AP"], nan_ok=True
    )
    text = (second / "config.yaml").read_text()
    assert f"WEIGHTS: {first / 'model_final.pth'}" in text
    # One line of a run is one line on the screen.
    printed = capfd.readouterr().out
    assert printed.count("Starting training from iteration") == 2
    # Killed in the second stage, after its first checkpoint.
    done = torch.load(second / "model_final.pth", weights_only=False)
    began = (first / "model_final.pth").stat().st_mtime_ns
    for path in (output / "model_final.pth", second / "model_final.pth"):
        path.unlink()
    (second / "last_checkpoint").write_text("model_0000001.pth")
    assert cli.main([command[0], command[1], "--resume", *command[2:]]) == 0
    assert (first / "model_final.pth").stat().st_mtime_ns == began
    assert "Starting training from iteration 2" in capfd.readouterr().out
    resumed = torch.load(output / "model_final.pth", weights_only=False)
    assert resumed["iteration"] == done["iteration"] == 3
    assert resumed["model"].keys() == done["model"].keys()


def test_two_cpu_processes_end_with_equal_weights(options, tmp_path):
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    hook = tmp_path / "hook.py"
    # Each rank writes the weights it holds at the end of training.
    hook.write_text(
        "import sys, torch\n"
        "from detectron2.utils import comm\n"
        "from kd_det.hosts.detectron2 import train\n"
        "after = train.Trainer.after_train\n"
        "def save(self):\n"
        "    after(self)\n"
        f"    path = '{tmp_path}/rank%d.pth' % comm.get_rank()\n"
        "    torch.save(self.model.module.state_dict(), path)\n"
        "train.Trainer.after_train = save\n"
        "from kd_det.app import train as cli\n"
        "sys.exit(cli.main())\n"
    )
    command = [sys.executable, *launcher, str(hook), "--config-file", str(CONFIG)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
    done = subprocess.run(
        [*command, *options, "OUTPUT_DIR", str(tmp_path / "out")],
        capture_output=True, text=True, env=env, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    first, second = (torch.load(tmp_path / f"rank{rank}.pth") for rank in (0, 1))
    assert any(k.startswith("distiller.") for k in first)
    assert any("running_mean" in k for k in first)  # shared before the evaluation
    for key in first:
        assert torch.equal(first[key], second[key]), key
    assert read_weights(tmp_path / "out" / "model_final.pth")


def test_two_cpu_processes_keep_one_ledger(options, tmp_path):
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    output = tmp_path / "out"
    train_net(
        "--config-file", str(CONFIG.with_name("kcd_frcnn.yaml")), *options,
        "KD.KCD.PERIOD", "2", "DATASETS.TEST", "()", "OUTPUT_DIR", str(output),
        launcher=launcher,
    )  # fmt: skip
    # Eight images, two periods of two iterations of two images, one of each process.
    last = {key: values[-1] for key, values in curves(output).items()}
    assert last["cost/measured"] == 100
    hook = torch.load(output / "model_final.pth", weights_only=True)["trainer"]["hooks"][
        "ProcedureHook"
    ]
    state = hook["procedures"]["KCD"]
    assert int(state["ledger"]["count"].sum()) == 8
    assert state["current_period"] == 1
    assert len(state["active"]) == state["counts"][1] == 7


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["KD.TEACHER.WEIGHTS", "nowhere.pth"], "nowhere.pth"),
        (["KD.TEACHER.CONFIG_FILE", "nowhere.yaml"], "nowhere.yaml"),
        (["MODEL.WEIGHTS", "nowhere.pth"], "expected MODEL.WEIGHTS to be a file"),
        (["KD.TERMS.review.LOSS", "ReviewDK"], "did you mean 'ReviewKD'"),
        (["KD.TERMS.review.MID_CHANEL", "8"], "did you mean 'mid_channels'"),
        (["KD.TERMS.review.TAPS", "['p2','p9']"], "p9"),
        (["KD.TECHER.WEIGHTS", "x"], "did you mean"),
        (["SOLVER.BASE_RL", "0.1"], "did you mean 'SOLVER.BASE_LR'"),
        (["KD.TERMS.review.CLIP", "task_norm"], "set CLIP: none"),
        (["KD.KCD.ENABLED", "True", "KD.KCD.RHO", "1.5"], "in (0, 1]; received 1.5"),
        (["MODEL.DEVICE", "cuda"], "MODEL.DEVICE cpu"),
        (["DATASETS.TRAIN", "('digit_train',)"], "did you mean 'digits_train'"),
        (["DATASETS.TRAIN", "('coco_2017_train',)"], "DETECTRON2_DATASETS"),
        (["DATASETS.COCO_JSON.mini", "['missing.json', '.']", "DATASETS.TRAIN", "('mini',)"],
         "missing.json"),
    ],
)  # fmt: skip
def test_bad_input_is_one_sentence_before_anything_is_written(
    overrides, named, options, tmp_path, capfd
):
    if overrides[1] == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    output = tmp_path / "out"
    code = cli.main(["--config-file", str(CONFIG), *options, "OUTPUT_DIR", str(output), *overrides])
    message = capfd.readouterr().err.splitlines()[-1]
    assert code == 2
    assert message.startswith("error: expected ")
    assert "; received " in message
    assert "; remedy: " in message
    assert named in message
    assert not output.exists() or not any(output.rglob("*.pth"))


def test_more_gpus_than_there_are_is_refused(options, tmp_path, capfd):
    arguments = ["--config-file", str(CONFIG), "--num-gpus", "99", *options]
    assert cli.main([*arguments, "OUTPUT_DIR", str(tmp_path)]) == 2
    assert "--num-gpus 99" in capfd.readouterr().err


def test_missing_weights_are_refused_unless_a_checkpoint_is_resumed(options, tmp_path, refuses):
    opts = [*options, "MODEL.WEIGHTS", "nowhere.pth", "OUTPUT_DIR", str(tmp_path)]
    cfg = load_config(str(CONFIG), opts)
    for start in (Start(), Start(resume=True), Start(eval_only=True)):
        with refuses("MODEL.WEIGHTS", "'nowhere.pth', where no file is"):
            check_run(cfg, start)
    (tmp_path / "last_checkpoint").write_text("model_0000001.pth")
    check_run(cfg, Start(resume=True))


def test_what_a_run_hands_to_new_processes_can_be_pickled(options):
    cfg = load_config(str(CONFIG), options)
    copies = pickle.loads(pickle.dumps((cfg, Start(num_gpus=2), cli.make_pictures)))
    assert copies == (cfg, Start(num_gpus=2), cli.make_pictures)
    assert copies[0].is_frozen()


def test_an_override_may_set_an_argument_the_file_leaves_out(options):
    cfg = load_config(
        str(CONFIG), [*options, "KD.TERMS.review.WEIGHT", "2", "KD.TERMS.review.MID_CHANNELS", "4"]
    )
    assert cfg.KD.TERMS.review.WEIGHT == 2
    assert cfg.KD.TERMS.review.MID_CHANNELS == 4


def test_a_term_that_is_always_zero_is_reported_by_name_at_the_end(options, tmp_path):
    printed = train_net(
        "--config-file", str(CONFIG), *options, "OUTPUT_DIR", str(tmp_path / "out"),
        "KD.TERMS.review.WEIGHT", "0", "SOLVER.MAX_ITER", "2",
    )  # fmt: skip
    assert "term 'review' was exactly zero in all of the last 2 steps" in printed
