"""Classifiers: accuracy by class, and images on which two of them differ."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch

from kd_det.document.blocks import Gallery, Table
from kd_det.report.classified import Answer, accuracy, answer_blocks, differing, read_answers
from tests.report.made_up import config, html_tables, report, write_run


def answers(share, seed, images=60):
    draw = random.Random(seed)
    entries = []
    for index in range(images):
        target = index % 3
        right = draw.random() < share
        entries.append(
            {
                "index": index,
                "target": target,
                "prediction": target if right else (target + 1) % 3,
                "confidence": draw.random(),
            }
        )
    return entries


def read(entries, folder):
    path = folder / "predictions.json"
    path.write_text(json.dumps(entries))
    return read_answers(path)


def test_accuracy_is_the_share_of_right_answers_in_all_and_by_class(tmp_path):
    entries = answers(0.6, 1)
    found = accuracy(read(entries, tmp_path))
    for name, chosen in {
        "top1": entries,
        **{f"top1-{k}": [e for e in entries if e["target"] == k] for k in range(3)},
    }.items():
        right = sum(entry["target"] == entry["prediction"] for entry in chosen)
        assert found[f"accuracy/{name}"] == pytest.approx(100 * right / len(chosen))


@pytest.mark.parametrize("content", ["[1]", "{", '[{"index": 1}]', '{"index": 1}', "null"])
def test_files_that_are_no_answers_are_refused(tmp_path, refuses, content):
    path = tmp_path / "predictions.json"
    path.write_text(content)
    with refuses("a JSON list of answers in predictions.json"):
        read_answers(path)


def test_images_on_which_both_are_sure_come_first():
    one = {k: Answer(0, 0, c) for k, c in enumerate([0.9, 0.6, 0.8, 0.9])}
    other = {0: Answer(0, 1, 0.5), 1: Answer(0, 2, 0.9), 2: Answer(0, 1, 0.9), 3: Answer(0, 0, 1.0)}
    assert differing(one, other) == [2, 1, 0]
    assert differing(other, one) == []


def test_every_image_is_named_rightly_by_both_by_one_or_by_none(tmp_path):
    found = {"baseline": read(answers(0.5, 1), tmp_path), "kd": read(answers(0.7, 2), tmp_path)}
    table, better, worse = answer_blocks(found, ["a", "b", "c"])
    assert sum(int(row[1].text) for row in table.rows) == 60
    assert isinstance(better, Table)
    for row in better.rows:
        image = int(row[0].text)
        assert found["kd"][image].right
        assert not found["baseline"][image].right
        assert row[1].text == "abc"[image % 3]
    assert {int(row[0].text) for row in worse.rows}.isdisjoint(int(r[0].text) for r in better.rows)


def test_pictures_are_those_of_the_images(tmp_path):
    found = {"baseline": read(answers(0.5, 1), tmp_path), "kd": read(answers(0.7, 2), tmp_path)}
    asked = []

    def pictures(count):
        asked.append(count)
        return [torch.full((3, 8, 8), 4 * k, dtype=torch.uint8) for k in range(count)]

    _, better, _ = answer_blocks(found, None, pictures)
    assert isinstance(better, Gallery)
    ((_, shown),) = better.rows
    assert len(shown) == 8
    assert max(asked) <= 60
    assert all(" (" in picture.text and "kd: " in picture.text for picture in shown)


def test_a_report_of_classifiers_has_accuracy_in_the_place_of_ap(tmp_path):
    for name, share, keys in (("baseline", 0.5, {}), ("kd", 0.8, {"KD__ENABLED": True})):
        for seed in (1, 2):
            entries = answers(share, 10 * seed + len(keys), 300)
            right = sum(e["target"] == e["prediction"] for e in entries) / 3
            lines = [
                {"iteration": i, "total_loss": 1.0, "accuracy/top1": right - 200 / i, "lr": 0.1}
                for i in (99, 199)
            ]
            content = config(Path("/no"), SEED=seed, HOST="classification", **keys)
            results = {"accuracy": {"top1": right, "top1_best": right + 1, "best_epoch": 3.0}}
            folder = write_run(tmp_path / f"{name}_{seed}", content, results=results, lines=lines)
            (folder / "inference").mkdir()
            (folder / "inference" / "predictions.json").write_text(json.dumps(entries))
    page = report(tmp_path, ["kd_*"], ["baseline_*"], [])
    tables = html_tables(page)
    assert tables[0][0] == ["model", "seeds", "top1", "top1_best", "verdict", "of the gap"]
    assert [row[0] for row in tables[1]] == ["class", "0", "1", "2"]
    text = page.with_suffix(".md").read_text()
    assert "top-1 accuracy over the baseline" in text
    assert "kd right, baseline wrong" in text
    assert "## Problems\n\nNone" in text
