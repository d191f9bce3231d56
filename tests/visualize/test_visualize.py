"""``tools/visualize.py``: from a config to PNG files, and what it refuses."""

from __future__ import annotations

import runpy
import sys

import pytest
from PIL import Image

from kd_det.app.visualize import main
from kd_det.visualize.run import visualize
from tests.hosts.classification.conftest import TEACHER

CONFIG = "configs/digits_torchvision/{}_frcnn.yaml"


def draw(name, options, *arguments):
    return main(["--config-file", CONFIG.format(name), *map(str, arguments), *options])


def names(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.png"))


def test_batches_have_folders_of_readable_pictures(options, tmp_path, capsys):
    out = tmp_path / "out"
    assert draw("kd", options, "--batches", 2, "--rows", 1, "--output", out) == 0
    assert names(out) == ["batch_1/rois.png", "batch_2/rois.png"]
    assert capsys.readouterr().out.split() == [str(out / name) for name in names(out)]
    for name in names(out):
        with Image.open(out / name) as image:
            assert min(image.size) > 200
            assert len(image.getcolors(10**6)) > 100
    assert not (tmp_path / "run").exists()


def test_images_of_nobodys_annotation_are_drawn(options, tmp_path, capsys):
    files = []
    for k, size in enumerate([(96, 96), (60, 90), (96, 80)]):
        files.append(tmp_path / f"{k}.png")
        Image.effect_noise(size, 60).convert("RGB").save(files[-1])
    output = ["OUTPUT_DIR", str(tmp_path / "run")]
    assert draw("fgfi", [*options, *output], "--images", *files, "--rows", 1) == 0
    assert names(tmp_path / "run" / "visualize") == [f"features_p{k}.png" for k in (2, 3, 4)]


def test_a_classifiers_images_have_no_true_class(tmp_path):
    teacher = tmp_path / "teacher.yaml"
    teacher.write_text(TEACHER)
    Image.effect_noise((30, 20), 60).save(tmp_path / "grey.png")
    options = ["MODEL.NAME", "resnet8_x0.25", "INPUT.SIZE", "16", "KD.TEACHER.WEIGHTS", ""]
    options += ["KD.TEACHER.ALLOW_RANDOM", "True", "KD.TEACHER.CONFIG_FILE", str(teacher)]
    files = visualize(
        "configs/classification/digits/irg_resnet14_x0.5_resnet20.yaml",
        options,
        images=[tmp_path / "grey.png"] * 3,
        output=tmp_path / "out",
    )
    expected = ["features_stage2_stage3", "features_stage3", "irg", "logits"]
    assert sorted(file.stem for file in files) == expected


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--batches", "0"], ["--batches"]),
        (["--rows", "-1"], ["--rows"]),
        (["--images", "nothing.png"], ["nothing.png", "decode"]),
        (["--weights", "nothing.pth"], ["nothing.pth"]),
        (["KD.ENABLED", "False"], ["KD.ENABLED"]),
    ],
    ids=lambda value: "-".join(value) if value[0][0] in "-K" else "",
)
def test_mistakes_are_named_before_anything_is_written(options, tmp_path, capsys, arguments, parts):
    flags, own = ([], arguments) if arguments[0][0] == "K" else (arguments, [])
    out = tmp_path / "out"
    assert draw("kd", [*options, *own], *flags, "--output", out) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: expected")
    assert all(part in error for part in parts)
    assert names(tmp_path) == []


def test_what_lies_in_the_output_folder_stays(options, tmp_path, capsys):
    (tmp_path / "rois.png").write_text("mine")
    assert draw("kd", options, "--output", tmp_path) == 2
    assert "new or empty" in capsys.readouterr().err
    assert (tmp_path / "rois.png").read_text() == "mine"
    assert draw("kd", options, "--output", tmp_path / "rois.png" / "below") == 2
    assert "can be written" in capsys.readouterr().err


def test_a_config_without_anything_to_draw_says_what_it_has(options, tmp_path, capsys):
    options = [*options, "KD.TERMS.hint.TAPS", "['box_pooled']"]
    assert draw("fitnet", options, "--output", tmp_path / "out") == 2
    assert "hint (FitNet)" in capsys.readouterr().err
    assert names(tmp_path) == []


def test_the_script_is_the_command_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["visualize.py", "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path("tools/visualize.py", run_name="__main__")
    assert ended.value.code == 0
    assert "--images" in capsys.readouterr().out
