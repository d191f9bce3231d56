"""What is appended to a file that was cut begins on a new line."""

from __future__ import annotations

import pytest

from kd_det.run.json_lines import end_last_line


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (b"", b""),
        (b'{"a": 1}\n', b'{"a": 1}\n'),
        (b'{"a": 1}\n{"a"', b'{"a": 1}\n{"a"\n'),
        ('{"a": "\u00e4'.encode(), '{"a": "\u00e4\n'.encode()),
        ('{"a": "\u00e4'.encode()[:-1], '{"a": "\u00e4'.encode()[:-1] + b"\n"),
    ],
)
def test_only_a_last_line_without_an_end_is_ended(before, after, tmp_path):
    path = tmp_path / "metrics.json"
    path.write_bytes(before)
    for _ in range(2):
        end_last_line(path)
        assert path.read_bytes() == after


def test_a_file_that_is_not_there_is_not_made(tmp_path):
    end_last_line(tmp_path / "metrics.json")
    assert not list(tmp_path.iterdir())
