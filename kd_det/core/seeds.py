"""Random streams that depend on a key alone."""

from __future__ import annotations

import hashlib

import torch


def keyed_generator(*key: int) -> torch.Generator:
    """A CPU generator seeded by several integers, different for every combination of them."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
