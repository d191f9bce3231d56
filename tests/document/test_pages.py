"""The same blocks as HTML, as Markdown and in a terminal: complete, escaped and self-contained."""

from __future__ import annotations

import base64
import io
import re
from html import unescape

import pytest
from rich.console import Console

from kd_det.document import page
from kd_det.document.blocks import (
    Cell,
    Document,
    Facts,
    Figure,
    Finding,
    Findings,
    Gallery,
    Picture,
    Section,
    Table,
    Text,
    Verdict,
    row,
)
from kd_det.document.terminal import print_section

PICTURES = [
    Picture("a.svg", b"<svg light/>", "curves & dots", b"<svg dark/>"),
    Picture("b.png", b"png", "a <grid>"),
    Picture("c.jpg", b"jpg", "an image"),
]


@pytest.fixture
def document():
    findings = [Finding("error", "Taps", "<b>not</b> finite"), Finding("ok", "Taps", "fine & good")]
    table = Table(
        "Scores <AP>",
        ["model", "AP", "what"],
        [row("a|b", Cell("1.50", "good", "+0.1"), "<i>x</i>"), row("c", "2", "y")],
        note="in & out",
    )
    return Document(
        "A <title>",
        "about & this",
        [
            Section("First part", [Verdict("error", "not <ready>", findings[:1], "3 seconds")]),
            Section(
                "Taps",
                [
                    Text("a < b"),
                    Facts([("12 %", "of <all>")]),
                    table,
                    Table("Folded", ["", "n"], [row("few", "3")], folded=True),
                    Findings(findings),
                    Figure("Drawn", PICTURES[0], "under & it"),
                    Gallery("Two", ["left", "right"], [("a caption", PICTURES[1:])]),
                    Gallery("One", [], [("", PICTURES[2:])]),
                ],
                "1.2 s",
            ),
        ],
    )


def test_the_page_shows_every_block_and_asks_for_nothing(document):
    text = page.html(document)
    for markup in ("<ready>", "<AP>", "<i>", "<all>", "<grid>", "<b>not"):
        assert markup not in text
    shown = unescape(text)
    for part in (
        *("A <title>", "about & this", "not <ready>", "3 seconds", "<b>not</b> finite", "a < b"),
        *("12 %", "of <all>", "Scores <AP>", "1.50", "+0.1", "<i>x</i>", "in & out", "1.2 s"),
        *("under & it", "a caption", "curves & dots", "a <grid>", "fine & good"),
    ):
        assert part in shown, part
    assert "<details><summary>Folded</summary>" in text
    for picture in PICTURES:
        for content in filter(None, (picture.content, picture.dark)):
            assert base64.b64encode(content).decode() in text
    asked = re.findall(r'(?:src|srcset|href)="([^"]*)"|url\(|@import|<script', text)
    assert all(re.match(r"data:[a-z+/]*[;,]|#", found) for found in asked), asked
    assert re.findall(r'<a href="#([^"]+)">', text.partition("<main>")[0]) == ["first-part", "taps"]
    # The verdict leads to the section of its finding.
    assert '<a href="#taps">Taps</a>: ' in text


def test_numbers_stand_on_the_right_in_the_page_and_in_markdown(document):
    assert re.findall(r"<td[^>]*>[^<\s]+", page.html(document))[:2] == [
        '<td class="number good">1.50',
        "<td>&lt;i&gt;x&lt;/i&gt;",
    ]
    assert "| --- | ---: | --- |" in page.markdown(document, "pictures")


def test_markdown_shows_every_block_and_the_files_of_its_pictures(document):
    text = page.markdown(document, "pictures")
    for part in (
        *("# A &lt;title>", "**not &lt;ready>** (3 seconds)", "* ✗ Taps: &lt;b>not&lt;/b> finite"),
        *(
            "a &lt; b",
            "* **12 %** of &lt;all>",
            "| a\\|b | **1.50** (+0.1) |",
            "* ✓ fine &amp; good",
        ),
        *("### Folded", "![curves &amp; dots](pictures/a.svg)", "pictures/b.png", "* a caption"),
    ):
        assert part in text, part
    assert [picture.name for picture in document.pictures()] == ["a.svg", "b.png", "c.jpg", "c.jpg"]


def test_the_terminal_shows_texts_tables_and_findings(document):
    screen = Console(file=io.StringIO(), width=100)
    for section in document.sections:
        print_section(screen, section)
    text = screen.file.getvalue()
    for part in (
        "✗ Taps: <b>not</b> finite",
        "not <ready>  (3 seconds)",
        "a < b",
        "1.50",
        "✓ fine",
    ):
        assert part in text, part


def test_a_long_table_is_cut_in_the_terminal():
    screen = Console(file=io.StringIO(), width=100)
    table = Table("Long", ["name", "n"], [row(f"row{k}", str(k)) for k in range(40)])
    print_section(screen, Section("Part", [table]))
    text = screen.file.getvalue()
    assert "row15" in text
    assert "row16" not in text
    assert "... and 24 more" in text


@pytest.mark.parametrize(
    ("cells", "numeric"),
    [
        (["1,234", "-"], True),
        (["12%", "0.1%"], True),
        (["1e-07", "-3"], True),
        (["30.00 ± 0.40", "29.1", "–"], True),
        (["1.23 M", "?", ""], True),
        (["a", "1"], False),
        (["8×32", "4"], False),
        (["0.5 0.5 0.5"], False),
        (["", ""], False),
        ([], False),
    ],
)
def test_columns_of_numbers_are_told_from_texts(cells, numeric):
    table = Table("", ["name", "n"], [row(cell, cell) for cell in cells])
    # The first column names the row, if only by a number.
    assert [table.is_numeric(0), table.is_numeric(1)] == [False, numeric]
