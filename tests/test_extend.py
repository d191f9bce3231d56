"""The examples of docs/extend.md run as they stand there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from kd_det import LOSSES

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "extend.md").read_text()


def blocks(title, language="python"):
    """The code of a section, in order."""
    section = PAGE.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    return re.findall(rf"^```{language}\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)


def run(code, **namespace):
    """What a block defines."""
    exec(compile(code, "docs/extend.md", "exec"), namespace)
    return namespace


@pytest.fixture(autouse=True)
def _losses_as_before():
    before = dict(LOSSES)
    yield
    for name in [name for name, _ in LOSSES if name not in before]:
        LOSSES._obj_map.pop(name)


def test_a_loss():
    example, use = blocks("A loss")
    found = run(use, **run(example))
    assert found["losses"]["near"].item() == 2.0
    found["losses"]["near"].backward()
    assert (found["student"].grad < 0).all()
    assert found["L1Loss"].__module__ != "kd_det"
    empty = found["l1_loss"](torch.zeros(0, 3, requires_grad=True), torch.zeros(0, 3))
    assert empty == 0
    assert empty.requires_grad
