"""The config of a search: its checks before a training, and the config with the best values."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from fvcore.common.config import CfgNode

from kd_det.core.errors import check_known, fail
from kd_det.hosts import base
from kd_det.run.config import flatten, plain
from kd_det.run.yaml_files import config_path
from kd_det.tuning.space import Space, as_text

TABLE = "table.md"
OWN_KEYS = ("OUTPUT_DIR", "SEED", "SEEDS")
_TERMS = "KD.TERMS."
_METRICS = {
    "detectron2": ("bbox/AP", ("bbox", "segm", "keypoints")),
    "torchvision_detection": ("bbox/AP", ("bbox", "segm")),
    "classification": ("accuracy/top1", ("accuracy",)),
}


@dataclass(frozen=True)
class TunedConfig:
    """The config of a search: a file and ``KEY VALUE`` overrides that all its runs share."""

    config_file: str
    overrides: Sequence[str] = ()

    def load(self, values: Mapping[str, float] | None = None) -> CfgNode:
        """The config with ``values`` by key, read and checked as its host does."""
        opts = [part for key, value in (values or {}).items() for part in (key, as_text(value))]
        return base.load_config(self.config_file, [*self.overrides, *opts])

    def check(self, spaces: Mapping[str, Space]) -> None:
        """Read the config once with every value that is known to be tried.

        Raises:
            KDError: no keys, a key or term that does not exist or that the search sets itself, a
                value that does not fit, or a term in a run without distillation.
        """
        cfg = self.load()
        given = self.overrides[::2]
        if not spaces:
            remedy = "add --keys KD.TERMS.<term>.WEIGHT"
            fail(expected="keys to tune", received="none", remedy=remedy)
        for key in [*given, *spaces]:
            if key in OWN_KEYS:
                fail(
                    expected="keys that the search does not set itself",
                    received=key,
                    remedy="use --output and --seeds",
                )
        for key, space in spaces.items():
            if key in given:
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
            for value in space.values or (space.low, space.high):
                self.load({key: value})

    def metric(self, metric: str = "") -> str:
        """The given metric, by default the host's main one; refused if it has no such group."""
        default, groups = _METRICS[base.read_host(self.config_file)]
        group, _, name = (metric or default).partition("/")
        if group not in groups or not name:
            fail(
                expected=f"a metric of {', '.join(groups)}",
                received=f"'{metric}'",
                remedy=f"write for example {default}",
            )
        return metric or default

    def seeds(self, seeds: Sequence[int] = ()) -> list[int]:
        """The given seeds, by default the config's; negative and repeated ones are refused."""
        if not seeds:
            cfg = self.load()
            seeds = list(cfg.SEEDS) or [cfg.SEED if cfg.SEED >= 0 else 1]
        if min(seeds) < 0 or len(set(seeds)) < len(seeds):
            fail(expected="seeds from 0, each once", received=str([*seeds]), remedy="correct them")
        return list(seeds)

    def settings(self, values: Mapping[str, float]) -> dict[str, Any]:
        """Every key with its value, except for those that the search sets."""
        return {key: value for key, value in flatten(self.load(values)) if key not in OWN_KEYS}

    def write(self, path: Path, values: Mapping[str, float]) -> None:
        """Write a config with the overrides and ``values``, whose base is the tuned one."""
        cfg = self.load(values)
        # A shipped config keeps its name, which is the same on every machine.
        shipped = config_path(self.config_file) != self.config_file
        base_file = self.config_file if shipped else os.path.relpath(self.config_file, path.parent)
        content: dict[str, Any] = {"_BASE_": base_file}
        for key in [*self.overrides[::2], *values]:
            node, source = content, cfg
            *parents, name = key.split(".")
            for parent in parents:
                node, source = node.setdefault(parent, {}), source[parent]
            node[name] = plain(source[name])
        comment = f"# The best values of a search by kd-det tune; {TABLE} has their margins.\n"
        path.write_text(comment + yaml.safe_dump(content, sort_keys=False))
