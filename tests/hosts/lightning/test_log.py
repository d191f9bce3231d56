"""``log.txt`` has everything the package says, each line once, and the screen its warnings."""

from __future__ import annotations

import logging
from contextlib import contextmanager

import pytest

from kd_det.app.quickstart.run import log_to
from kd_det.hosts.lightning.log import RunLog

OURS = logging.getLogger("kd_det.some.module")


@pytest.fixture
def screen(monkeypatch, capsys):
    """``with screen() as shown``: no handler anywhere, as in Python before anyone adds one."""

    @contextmanager
    def bare():
        shown = []
        with monkeypatch.context() as patch:
            patch.setattr(logging.root, "handlers", [])
            patch.setattr(logging.getLogger("kd_det"), "handlers", [])
            yield shown
            shown += capsys.readouterr().err.splitlines()

    return bare


def messages(path):
    return [line.rpartition(": ")[2] for line in path.read_text().splitlines()]


def test_what_was_said_before_there_was_a_file_is_in_it(tmp_path):
    with RunLog() as log:
        OURS.info("early")
        log.write_to(tmp_path / "log.txt")
        OURS.info("late")
    OURS.info("after")
    assert messages(tmp_path / "log.txt") == ["early", "late"]


def test_a_resumed_run_writes_after_what_is_there(tmp_path):
    for text in ("first", "second"):
        with RunLog() as log:
            log.write_to(tmp_path / "log.txt")
            OURS.info(text)
    assert messages(tmp_path / "log.txt") == ["first", "second"]


def test_every_run_of_a_process_has_its_own_log(tmp_path):
    for name in ("a", "b"):
        with RunLog() as log:
            log.write_to(tmp_path / name)
            OURS.info(name)
    assert [messages(tmp_path / name) for name in ("a", "b")] == [["a"], ["b"]]


def test_a_refused_run_leaves_no_file_and_no_handler(tmp_path):
    package = logging.getLogger("kd_det")
    before = (list(package.handlers), package.level)

    def refused():
        with RunLog():
            OURS.info("early")
            raise ValueError("refused")

    with pytest.raises(ValueError, match="refused"):
        refused()
    assert (package.handlers, package.level) == before
    assert list(tmp_path.iterdir()) == []


def test_other_processes_write_nothing(tmp_path):
    with RunLog() as log:
        log.write_to(None)
        OURS.info("text")
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_another_handler_writes_has_every_line_once(tmp_path):
    path = tmp_path / "log.txt"
    package = logging.getLogger("kd_det")
    before = (list(package.handlers), package.propagate)
    try:
        with log_to(path), RunLog() as log:
            OURS.info("early")
            log.write_to(path)
            OURS.warning("late")
    finally:
        package.handlers, package.propagate = before
    assert messages(path) == ["early", "late"]


def test_the_screen_shows_warnings_and_no_more(tmp_path, screen):
    with screen() as shown:
        with RunLog() as log:
            OURS.info("calm")
            OURS.warning("early trouble")
            log.write_to(tmp_path / "log.txt")
            OURS.info("calm")
            OURS.warning("late trouble")
        OURS.warning("trouble after")
    assert shown == ["early trouble", "late trouble", "trouble after"]


def test_a_traceback_is_for_the_file(tmp_path, screen):
    with screen() as shown, RunLog() as log:
        log.write_to(tmp_path / "log.txt")
        try:
            raise ZeroDivisionError
        except ZeroDivisionError:
            OURS.info("failed", exc_info=True)
    assert "ZeroDivisionError" in (tmp_path / "log.txt").read_text()
    assert shown == []
