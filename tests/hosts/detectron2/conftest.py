"""Fixtures for the Detectron2 host; Detectron2 itself is imported by the tests that need it."""

from __future__ import annotations

import logging

import pytest


@pytest.fixture
def own_loggers():
    """Detectron2's logging, which a run sets up, as it was before."""
    loggers = [logging.getLogger(name) for name in ("detectron2", "fvcore", "kd_det")]
    before = [(x, list(x.handlers), x.level, x.propagate) for x in loggers]
    yield
    for logger, handlers, level, propagate in before:
        logger.handlers[:], logger.propagate = handlers, propagate
        logger.setLevel(level)
