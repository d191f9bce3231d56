"""What is checked before a search trains anything, and the config it ends with."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from fvcore.common.config import CfgNode

from kd_det.core.errors import check_known, fail
from kd_det.hosts import base
from kd_det.run.yaml_files import config_path
from kd_det.tuning.space import Space, as_text

OWN_KEYS = ("OUTPUT_DIR", "SEED", "SEEDS")
_TERMS = "KD.TERMS."
_METRICS = {
    "detectron2": ("bbox/AP", ("bbox", "segm", "keypoints")),
    "torchvision_detection": ("bbox/AP", ("bbox", "segm")),
    "classification": ("accuracy/top1", ("accuracy",)),
}


def load_config(
    config_file: str, overrides: Sequence[str] = (), values: Mapping[str, float] | None = None
) -> CfgNode:
    """The config of a run, read and checked as its host does.

    Raises:
        KDError: see :func:`kd_det.run.config.merge_config`.
    """
    opts = [part for key, value in (values or {}).items() for part in (key, as_text(value))]
    return base.load_config(config_file, [*overrides, *opts])


def check_search(config_file: str, overrides: Sequence[str], spaces: Mapping[str, Space]) -> None:
    """Read the config once with every value that is known to be tried.

    Raises:
        KDError: no keys, a key or term that does not exist or that the search sets itself, a
            value that does not fit, or a term in a run without distillation.
    """
    cfg = load_config(config_file, overrides)
    if not spaces:
        fail(expected="keys to tune", received="none", remedy="add --keys KD.TERMS.<term>.WEIGHT")
    for key in [*overrides[::2], *spaces]:
        if key in OWN_KEYS:
            fail(
                expected="keys that the search does not set itself",
                received=key,
                remedy="use --output and --seeds",
            )
    for key, space in spaces.items():
        if key in overrides[::2]:
            fail(
                expected=f"{key} either to be tuned or to be given",
                received="both",
                remedy="leave out one of the two",
            )
        if key.startswith(_TERMS):
            check_known("term in KD.TERMS", key.split(".")[2], cfg.KD.TERMS)
            if not cfg.KD.ENABLED:
                fail(
                    expected=f"KD.ENABLED True, where {key} has an effect",
                    received="False",
                    remedy="tune another config, or add KD.ENABLED True",
                )
        for value in space.examples:
            load_config(config_file, overrides, {key: value})


def check_metric(config_file: str, metric: str) -> str:
    """The metric to maximise, the host's main one if none is named.

    Raises:
        KDError: the host has no metrics of this group.
    """
    default, groups = _METRICS[base.read_host(config_file)]
    group, _, name = (metric or default).partition("/")
    if group not in groups or not name:
        fail(
            expected=f"a metric of {', '.join(groups)}",
            received=f"'{metric}'",
            remedy=f"write for example {default}",
        )
    return metric or default


def choose_seeds(config_file: str, overrides: Sequence[str], seeds: Sequence[int]) -> list[int]:
    """The seeds given, or those of the config.

    Raises:
        KDError: a seed that is negative or repeats.
    """
    if not seeds:
        cfg = load_config(config_file, overrides)
        seeds = list(cfg.SEEDS) or [cfg.SEED if cfg.SEED >= 0 else 1]
    if min(seeds) < 0 or len(set(seeds)) < len(seeds):
        fail(expected="seeds from 0, each once", received=str(list(seeds)), remedy="correct them")
    return list(seeds)


def settings(cfg: CfgNode) -> dict[str, Any]:
    """Every key of a config with its value, but for those that the search sets."""
    return {key: value for key, value in _flat(cfg) if key not in OWN_KEYS}


def write_best(
    path: Path, config_file: str, overrides: Sequence[str], best: Mapping[str, float]
) -> None:
    """Write the config with the overrides and the best values, based on the one that was tuned."""
    cfg = load_config(config_file, overrides, best)
    content: dict[str, Any] = {"_BASE_": _base(config_file, path.parent)}
    for key in [*overrides[::2], *best]:
        node, found = content, cfg
        *parents, name = key.split(".")
        for parent in parents:
            node, found = node.setdefault(parent, {}), found[parent]
        node[name] = _plain(found[name])
    comment = "# The best values found by kd-det tune; the table beside tells how sure.\n"
    path.write_text(comment + yaml.safe_dump(content, sort_keys=False))


def _base(config_file: str, folder: Path) -> str:
    """A shipped config keeps its name, which is the same on every machine."""
    shipped = config_path(config_file) != config_file
    return config_file if shipped else os.path.relpath(config_file, folder)


def _flat(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, CfgNode) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(part) for key, part in value.items()}
    return value
