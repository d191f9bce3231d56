"""Fixtures for the whole suite: every random number comes from one seed."""

from __future__ import annotations

import os
import re
import sys
from contextlib import contextmanager

import pytest
import torch

from kd_det.core.errors import KDError

if "PYTEST_XDIST_WORKER" in os.environ:
    # Processes that share the cores must not each start as many threads: they would wait for one
    # another in every operator. Programs that tests start inherit it.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def randn(generator):
    """``randn(*shape, grad=False, dtype=torch.float64)`` from the seeded generator."""

    def make(*shape, grad=False, dtype=torch.float64):
        return torch.randn(*shape, generator=generator, dtype=dtype).requires_grad_(grad)

    return make


@pytest.fixture(params=[torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def half(request) -> torch.dtype:
    """The dtypes that losses must upcast."""
    return request.param


@pytest.fixture
def refuses():
    """``with refuses(part, ...):`` the block fails with the one kind of error, which says them."""

    @contextmanager
    def check(*parts):
        with pytest.raises(KDError) as error:
            yield
        message = str(error.value)
        assert re.fullmatch(r"expected .+; received .+; remedy: .+", message, re.DOTALL), message
        for part in parts:
            assert part in message, message

    return check


@pytest.fixture
def opened():
    """The paths of all files that are opened in this process during a test, in order."""
    if not _AUDITED:
        sys.addaudithook(lambda event, args: event == "open" and _note(str(args[0])))
        _AUDITED.append(True)
    paths: list[str] = []
    _WATCHED.append(paths)
    yield paths
    _WATCHED.remove(paths)


# An audit hook cannot be removed.
_AUDITED: list[bool] = []
_WATCHED: list[list[str]] = []


def _note(path: str) -> None:
    for paths in _WATCHED:
        paths.append(path)


@pytest.fixture
def own_modules():
    """The package's modules as they were: what a test imports anew or first does not stay.

    Modules that stayed would hold registries of their own.
    """
    before = {k: v for k, v in sys.modules.items() if k.partition(".")[0] == "kd_det"}
    yield
    for name in [k for k in sys.modules if k.partition(".")[0] == "kd_det" and k not in before]:
        parent, _, leaf = name.rpartition(".")
        vars(before.get(parent, sys.modules[name])).pop(leaf, None)
        del sys.modules[name]
    sys.modules.update(before)
    for name, module in before.items():
        parent, _, leaf = name.rpartition(".")
        if parent:
            setattr(before[parent], leaf, module)
