"""Check golden files: ``python -m tests.golden FILE...``.

Prints the error of every ``out_``, ``grad_`` and ``gradnb_`` key in float64 and float32 and exits
with 1 if one is outside its tolerance, or if a file holds a method nothing here can check. Each
module of this folder offers ``CHECKS``: a method's name to the function that recomputes a file.
"""

from __future__ import annotations

import argparse
import importlib
import json
import pkgutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tests.golden.reader import PART_A, Golden, Row, compare

CHECKS: dict[str, Callable[[Golden], dict[str, Tensor]]] = {}
for _module in pkgutil.iter_modules(__path__):
    if not _module.name.startswith("_"):
        CHECKS |= getattr(importlib.import_module(f"{__name__}.{_module.name}"), "CHECKS", {})


def check_file(path: Path, dtype: torch.dtype) -> Iterator[Row]:
    """Rows for every expected key of one file.

    Raises:
        KeyError: the file's method is not implemented.
    """
    with np.load(path, allow_pickle=False) as data:
        arrays = {k: data[k] for k in data.files if k != "meta"}
        meta = json.loads(str(data["meta"]))
    method = meta["method"]
    if method not in CHECKS:
        raise KeyError(method)
    ours = CHECKS[method](Golden(path.name, meta, arrays, dtype))
    for key, expected in arrays.items():
        if key.startswith(("out_", "grad_", "gradnb_")):
            yield compare(key, ours.get(key), expected, dtype, method)


def main(argv: list[str] | None = None) -> int:
    """Check the files named on the command line; 0 if all keys of all files pass."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path)
    failed = 0
    for path in parser.parse_args(argv).files:
        for dtype in PART_A:
            try:
                rows = list(check_file(path, dtype))
            except KeyError as missing:
                print(f"{path.name}: no check for method {missing}")
                failed += 1
                break
            for row in rows:
                verdict = "ok  " if row.passed else "FAIL"
                precision = str(dtype).removeprefix("torch.")
                print(f"{verdict} {path.name} {precision} {row.key}: {row.error:.1e}")
                failed += not row.passed
    print(f"{failed} failed" if failed else "all passed")
    return 1 if failed else 0
