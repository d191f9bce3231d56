"""A crash in the middle of writing leaves the file that was there."""

from __future__ import annotations

import pytest

from kd_det.core import files
from kd_det.core.files import replace_text


def test_a_file_is_replaced_as_a_whole_and_nothing_stays_beside_it(tmp_path):
    path = tmp_path / "a.json"
    for text in ("first", "second"):
        replace_text(path, text)
        assert path.read_text() == text
    assert list(tmp_path.iterdir()) == [path]


def test_a_crash_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    replace_text(path, "old")

    def crash(*_):
        raise OSError("no space")

    monkeypatch.setattr(files.os, "replace", crash)
    with pytest.raises(OSError, match="no space"):
        replace_text(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
