"""Studies that are reported on."""

from __future__ import annotations

import pytest

from kd_det.document.blocks import Picture
from tests.report.made_up import report, write_study


@pytest.fixture(scope="package")
def study(tmp_path_factory):
    """Three seeds of two students and a teacher, reported on; only to be read."""
    root = tmp_path_factory.mktemp("study")
    write_study(root, masks=True)
    report(root)
    return root


@pytest.fixture
def copy(tmp_path):
    """The same runs anew, to be broken."""
    write_study(tmp_path, masks=True)
    return tmp_path


@pytest.fixture
def undrawn(monkeypatch):
    """Pictures take most of the time, and these tests do not look at them."""
    monkeypatch.setattr("kd_det.report.sections.panels", lambda *arguments: None)
    picture = Picture("dots.svg", b"<svg/>", "dots")
    monkeypatch.setattr("kd_det.report.sections.dots", lambda *arguments: picture)
