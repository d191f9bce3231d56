"""The report says what is on disk, the same in both files, and calls no noise a gain."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import re
import statistics
from pathlib import Path

import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from kd_det.app.report import main
from kd_det.report.groups import collect
from kd_det.report.summary import facts, headline, sentences
from tests.report.made_up import (
    config,
    html_tables,
    metric_lines,
    report,
    rows,
    write_run,
    write_truth,
)


@functools.cache
def scores(root, folder):
    """Of a run's saved predictions, by pycocotools."""
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(root / "data" / "truth.json"))
    predictions = json.loads((folder / "inference" / "coco_instances_results.json").read_text())
    found = {}
    for kind in ("bbox", "segm"):
        kept = [{k: v for k, v in p.items() if k != "bbox" or kind == "bbox"} for p in predictions]
        with contextlib.redirect_stdout(io.StringIO()):
            results = coco.loadRes(kept)
        for part in ([], [2], [5], [9]):
            with contextlib.redirect_stdout(io.StringIO()):
                evaluation = COCOeval(coco, results, kind)
                evaluation.params.catIds = part or evaluation.params.catIds
                evaluation.evaluate()
                evaluation.accumulate()
                evaluation.summarize()
            names = ["AP", "AP50", "AP75", "APs", "APm"]
            if part:
                names = [f"AP-{coco.cats[part[0]]['name']}"]
            values = 100 * evaluation.stats
            found |= {f"{kind}/{n}": v for n, v in zip(names, values, strict=False)}
    return found


def measured(root, name, metric):
    """A score of every seed."""
    return [scores(root, folder)[metric] for folder in sorted(root.glob(name))]


# What it says


@pytest.mark.parametrize(("at", "kind"), [(0, "bbox"), (1, "segm")])
def test_scores_are_means_over_seeds_of_the_saved_predictions(study, at, kind):
    tables = [t for t in html_tables(study / "report" / "report.html") if "verdict" in t[0]]
    table = {cells[0]: dict(zip(tables[at][0], cells, strict=True)) for cells in tables[at][1:]}
    for metric in ("AP", "AP50", "AP75", "APs", "APm"):
        base = measured(study, "baseline_seed*", f"{kind}/{metric}")
        own = measured(study, "review_seed*", f"{kind}/{metric}")
        (taught,) = measured(study, "teacher", f"{kind}/{metric}")
        means, deviation = [statistics.mean(v) for v in (base, own)], statistics.stdev(own)
        gained = means[1] - means[0]
        assert table["review"][metric] == f"{means[1]:.2f} ± {deviation:.2f} ({gained:+.2f})"
        assert table["baseline"][metric].startswith(f"{means[0]:.2f} ± ")
        assert table["teacher"][metric] == f"{taught:.2f}"
        if metric == "AP":
            counts = gained > 2 * max(deviation, statistics.stdev(base))
            assert table["review"]["verdict"] == ("more than 2 sd" if counts else "within noise")
            assert table["review"]["of the gap"] == f"{gained / (taught - means[0]):.0%}"
    assert {table[name]["seeds"] for name in ("review", "baseline")} == {"3"}


def test_the_ap_of_a_class_is_its_own(study):
    table = rows(study / "report" / "report.html", "class", "review")
    for name in ("cat", "dog", "fish"):
        base, own = (
            statistics.mean(measured(study, f"{who}_seed*", f"bbox/AP-{name}"))
            for who in ("baseline", "review")
        )
        assert table[name]["review"] == f"{own:.1f} ({own - base:+.1f})"


def test_the_cost_of_training_is_that_of_the_metrics(study):
    table = rows(study / "report" / "report.html", "model", "s per iteration")
    assert table["baseline"]["s per iteration"] == "0.500"
    assert table["review"]["s per iteration"] == "0.750 (× 1.50)"
    assert table["review"]["of it data"] == "0.150 (20%)"
    assert table["review"]["memory, MB"] == "512"
    assert table["review"]["parameters of the losses"] == "50"


def test_the_keys_in_which_runs_differ_are_listed_and_no_others(study):
    table = rows(study / "report" / "report.html", "key", "review")
    assert set(table) == {"KD.ENABLED", "KD.TERMS.review.LOSS", "KD.TERMS.review.WEIGHT"}
    assert (table["KD.ENABLED"]["baseline"], table["KD.ENABLED"]["review"]) == ("False", "True")
    assert table["KD.TERMS.review.WEIGHT"]["baseline"] == "–"
    pair = rows(study / "report" / "report.html", "key", "teacher")
    assert pair["MODEL.BACKBONE.WIDTH"]["teacher"] == "32"


def test_a_run_is_traced_to_its_code_and_its_teacher(study):
    table = rows(study / "report" / "report.html", "folder", "commit")
    (own,) = [cells for folder, cells in table.items() if folder.endswith("review_seed2")]
    assert own["commit"] == "01234567 with changes"
    assert own["teacher's sha256"] == "feedfeedfeed"
    assert own["seed"] == "2"
    assert own["state"] == "finished"
    assert "review.yaml" in own["command"]


def test_the_first_sentence_says_what_was_bought_and_paid(study):
    page = (study / "report" / "report.md").read_text()
    sentence = page.partition("## Summary\n\n")[2].partition("\n")[0]
    base, own = (measured(study, f"{n}_seed*", "bbox/AP") for n in ("baseline", "review"))
    gained = statistics.mean(own) - statistics.mean(base)
    assert sentence.startswith(f"review gains {gained:.2f} box AP over the baseline (")
    assert "3 and 3 seeds; more than 2 sd" in sentence
    assert "1.50 times as long" in sentence


def test_examples_are_images_in_which_one_finds_more(study):
    page = study / "report" / "report.html"
    text = page.read_text()
    counts = [int(c) for c in re.findall(r"(\d+) against \d+ of 4 objects found", text)]
    assert re.search(r"review right, baseline wrong</h3>", text)
    assert len(counts) >= 5
    (table,) = [t for t in html_tables(page) if t[0] == ["", "objects"]]
    numbers = [int(row[1]) for row in table[1:]]
    assert sum(numbers) == 8 * 4
    pictures = list((study / "report" / "report_pictures").glob("better_0_*.jpg"))
    assert len(pictures) == 4  # ground truth, baseline, review, teacher


# One page and the same as Markdown


def test_the_page_asks_for_nothing_outside_itself(study):
    text = (study / "report" / "report.html").read_text()
    asked = re.findall(r'(?:src|srcset|href)="([^"]{0,40})|url\(([^)]{0,40})|@import', text)
    assert all(re.match(r"data:|#", found[0]) for found in asked), asked
    assert "<script" not in text
    assert len(re.findall(r"data:image/svg\+xml", text)) >= 8


def test_every_link_of_the_navigation_leads_to_a_section(study):
    text = (study / "report" / "report.html").read_text()
    anchors = re.findall(r'<a href="#([^"]+)"', text)
    assert anchors == re.findall(r'<section id="([^"]+)"', text)
    assert anchors[0] == "summary"
    assert anchors[-1] == "problems"


def markdown_tables(text):
    lines = text.splitlines()
    tables = []
    for before, line in zip(["", *lines], lines, strict=False):
        if line.startswith("| ") and "](" not in line:
            if not before.startswith("| "):
                tables.append([])
            cells = [c.strip().replace("**", "") for c in line.strip("| ").split(" | ")]
            tables[-1].append(cells)
    return [[row for row in t if set("".join(row)) - set("-: ")] for t in tables]


def test_the_markdown_has_the_tables_of_the_page(study):
    text = (study / "report" / "report.md").read_text()
    page = html_tables(study / "report" / "report.html")

    def content(tables):
        # Empty cells at the border of a Markdown row cannot be told from its frame.
        return [[" ".join(" ".join(row).split()) for row in t] for t in tables]

    shown = [t for t in content(markdown_tables(text)) if t[0] != "ground truth"]
    shown = [t for t in shown if not t[0].startswith("ground truth")]
    assert shown == content(page)


def test_names_are_text_in_the_markdown_too(tmp_path, undrawn):
    truth = write_truth(tmp_path / "data")
    keys = {"KD__ENABLED": True, "KD__WEIGHTS": "<script>a & b|c"}
    for name, extra in (("baseline", {}), ("kd", keys)):
        folder = tmp_path / name
        write_run(folder, config(truth, **extra), results={"bbox": {"AP": 1.0}}, lines=[])
    report(tmp_path, ["kd"], ["baseline"], [])
    text = (tmp_path / "report" / "report.md").read_text()
    assert "&lt;script>a &amp; b\\|c" in text
    assert "<script" not in text


def test_every_picture_of_the_markdown_lies_beside_it(study):
    text = (study / "report" / "report.md").read_text()
    names = re.findall(r"\]\((report_pictures/[^)]+)\)", text)
    assert len(names) > 10
    assert all((study / "report" / name).stat().st_size for name in names)


def test_the_same_runs_give_the_same_report(copy, study):
    def stripped(page):
        text = re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d UTC", "", page.read_text())
        return text.replace(str(study), "").replace(str(copy), "")

    assert stripped(report(copy)) == stripped(study / "report" / "report.html")


# Honesty


def scored(root, name, values, **keys):
    for seed, value in enumerate(values, start=1):
        write_run(
            root / f"{name}_seed{seed}",
            config(Path("/nowhere.json"), SEED=seed, **keys),
            results={"bbox": {"AP": value}},
            lines=metric_lines(seed),
        )


def summary_of(root, *names):
    """Sentences and facts, without a page."""
    named = [str(root / f"{name}_seed*") for name in names]
    found = collect(named, [str(root / "baseline_seed*")], [str(root / "teacher_seed*")])
    best = headline(found)
    return " ".join(t.text for t in sentences(found, best, [])), facts(found, best, []).entries


@pytest.mark.parametrize(
    ("baseline", "own", "said"),
    [
        (
            [30.0, 32.0],
            [32.0, 34.0],
            "No gain: kd, the highest, differs from the baseline by +2.00",
        ),
        ([30.0, 30.2], [33.0, 33.2], "kd gains 3.00 box AP over the baseline"),
        ([30.0, 30.2], [27.0, 27.2], "No gain: kd, the highest, loses 3.00 box AP"),
        ([30.0], [33.0], "kd_seed1 is 3.00 box AP above the baseline (33.00 against 30.00)"),
    ],
)
def test_a_gain_within_noise_is_reported_as_no_gain(tmp_path, baseline, own, said):
    scored(tmp_path, "baseline", baseline)
    scored(tmp_path, "kd", own, KD__ENABLED=True)
    scored(tmp_path, "teacher", [40.0], MODEL__BACKBONE__WIDTH=32)
    text, entries = summary_of(tmp_path, "kd")
    assert said in text
    assert ("closes 30%" in text) == ("kd gains" in said)
    assert any("of the gap" in meaning for _, meaning in entries) == ("kd gains" in said)


def test_the_summary_speaks_of_the_best_gain_that_counts(tmp_path):
    scored(tmp_path, "baseline", [30.0, 30.2])
    scored(tmp_path, "teacher", [40.0])
    scored(tmp_path, "kd", [33.0, 33.2], KD__ENABLED=True)
    scored(tmp_path, "noisy", [20.0, 60.0], KD__ENABLED=True, KD__X=1)
    text, _ = summary_of(tmp_path, "noisy", "kd")
    assert "kd gains 3.00 box AP" in text
    assert "Of 2 distilled configurations: 1 gains more than 2 sd, 1 within noise (box AP)." in text


# Command line


def test_a_baseline_that_names_no_folder_is_one_sentence_and_status_2(study, capsys):
    arguments = [str(study / "review_seed1"), "--baseline", "nowhere", "--output"]
    assert main([*arguments, str(study / "other")]) == 2
    error = capsys.readouterr().err
    assert "error: expected --baseline to name a folder; received nowhere; remedy:" in error


def test_an_output_that_cannot_be_written_is_refused_before_anything_is_read(study, capsys):
    runs = [str(study / "review_seed1"), "--baseline", str(study / "baseline_seed1")]
    assert main([*runs, "--output", str(study / "teacher" / "config.yaml" / "below")]) == 2
    assert "an output folder that can be written to" in capsys.readouterr().err


def test_nothing_is_written_into_the_folders_of_runs(copy, undrawn):
    def content():
        files = (p for p in copy.rglob("*") if p.is_file() and "report" not in p.parts)
        return {path: path.read_bytes() for path in files}

    before = content()
    report(copy)
    assert content() == before
