"""The page opens in a real browser without a complaint, and shows what the Markdown says."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest

from tests.report.made_up import html_tables

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
SECONDS = 120

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium or google-chrome")


@pytest.fixture
def page(study):
    return study / "report" / "report.html"


def visit(page, folder, *flags):
    """What the browser prints of a page that it opens: standard output, and its log."""
    done = subprocess.run(
        [
            str(BROWSER),
            "--headless",
            "--no-sandbox",  # tests may run as root, in a container
            "--disable-gpu",
            "--hide-scrollbars",
            # Nothing may be fetched; and what a page asks for, it would have to log.
            "--host-resolver-rules=MAP * ~NOTFOUND",
            f"--user-data-dir={folder / 'profile'}",
            "--enable-logging=stderr",
            "--v=0",
            *flags,
            page.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=True,
    )
    return done.stdout, done.stderr


def complaints(log):
    return [line for line in log.splitlines() if "CONSOLE" in line or "ERR_" in line]


def test_the_page_opens_without_a_complaint_and_shows_its_tables(page, tmp_path):
    shown, log = visit(page, tmp_path, "--dump-dom")
    assert complaints(log) == []
    rendered = tmp_path / "rendered.html"
    rendered.write_text(shown)
    assert html_tables(rendered) == html_tables(page)
    assert len(html_tables(page)) == 9


def test_a_complaint_would_be_seen(page, tmp_path):
    broken = tmp_path / "broken.html"
    planted = '<img src="https://example.com/x.png"><script>missing()</script></body>'
    broken.write_text(page.read_text().replace("</body>", planted))
    _, log = visit(broken, tmp_path, "--dump-dom")
    assert any("missing is not defined" in line for line in complaints(log))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_picture_is_drawn_in_light_and_dark(page, tmp_path, scheme):
    # The page measures its own pictures and writes the result where --dump-dom shows it.
    probe = (
        "<script>addEventListener('load', () => {"
        "const body = document.body;"
        "const drawn = [...document.images].filter((i) => i.complete && i.naturalWidth > 100);"
        "body.setAttribute('data-drawn', drawn.length);"
        "body.setAttribute('data-page', getComputedStyle(body).backgroundColor);"
        "})</script></body>"
    )
    probed = tmp_path / "probed.html"
    probed.write_text(page.read_text().replace("</body>", probe))
    dark = ["--blink-settings=preferredColorScheme=0"] if scheme == "dark" else []
    shown, log = visit(probed, tmp_path, "--dump-dom", *dark)
    assert complaints(log) == []
    assert int(re.search(r'data-drawn="(\d+)"', shown)[1]) == page.read_text().count("<img ")
    expected = "rgb(255, 255, 255)" if scheme == "light" else "rgb(20, 24, 29)"
    assert re.search(r'data-page="([^"]+)"', shown)[1] == expected
