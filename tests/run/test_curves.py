"""Curves have the same names on every host."""

from __future__ import annotations

import pytest

from kd_det.run.curves import CurveTag

TERMS = ("review", "roi_logits")


@pytest.mark.parametrize(
    ("name", "tag"),
    [
        ("total_loss", "loss/total"),
        ("loss_cls", "loss/task/cls"),
        ("loss_rpn_box_reg", "loss/task/rpn_box_reg"),
        ("classification", "loss/task/classification"),
        ("review", "loss/kd/review"),
        ("share/review", "share/review"),
        ("raw/review", "raw/review"),
        ("weight/review", "weight/review"),
        ("bbox/AP", "bbox/AP"),
        ("lr", "lr"),
    ],
)
def test_a_loss_is_a_task_loss_a_term_or_the_total_and_all_else_keeps_its_name(name, tag):
    assert CurveTag(TERMS)(name) == tag


def test_a_term_that_is_named_like_a_task_loss_is_a_term():
    assert CurveTag(["loss_hint"])("loss_hint") == "loss/kd/loss_hint"
