"""Config files: where they are, and what they and the files in their ``_BASE_`` add up to."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from fvcore.common.config import BASE_KEY, CfgNode
from fvcore.common.file_io import PathManager

from kd_det.core.errors import fail

logger = logging.getLogger(__name__)

_PACKAGE = Path(__file__).resolve().parents[1]
_INSTALLED = _PACKAGE / "configs"
SHIPPED = _INSTALLED if _INSTALLED.is_dir() else _PACKAGE.parent / "configs"
"""The folder ``configs/`` of the project: inside an installed package, beside it in a checkout."""


def config_path(config_file: str) -> str:
    """The path of a config file, which may be one that comes with the package.

    ``configs/...`` names a shipped file where the working directory has no such file. Any other
    path is returned as it is, whether it exists or not.
    """
    return config_file if Path(config_file).is_file() else _shipped(config_file) or config_file


def _shipped(name: str) -> str | None:
    folder, *parts = Path(name).parts or ("",)
    path = SHIPPED.joinpath(*parts)
    return str(path) if folder == "configs" and path.is_file() else None


def load_yaml(config_file: str) -> dict[str, Any]:
    """The mapping in a config file, merged over those of its ``_BASE_``.

    ``_BASE_`` is a path or a list of paths, relative to the file that names them; ``configs/...``
    may name a shipped file, see :func:`config_path`. Of two entries the later one wins, and the
    file itself wins over all. Lists of a config are replaced, mappings merged key by key.

    Raises:
        KDError: a file is missing, is not a YAML mapping or includes itself, replaces a value by
            a mapping, or has a key that is not text.
    """
    mapping = _load(config_path(config_file), ())
    _check_keys(mapping)
    return mapping


@dataclass(frozen=True)
class ConfigFile:
    """A config file that has been read: its path, and its content; see :func:`load_yaml`."""

    path: str
    content: Mapping[str, Any]


def read_config(config: str | ConfigFile) -> ConfigFile:
    """Read a config file, unless that has been done.

    Raises:
        KDError: the file is missing; or see :func:`load_yaml`.
    """
    if isinstance(config, ConfigFile):
        return config
    path = config_path(config)
    if not Path(path).is_file():
        fail(
            expected="--config-file to name a file",
            received=repr(config),
            remedy="give a path such as configs/reviewkd_frcnn_r50_r101.yaml",
        )
    return ConfigFile(path, load_yaml(path))


def merge_file(cfg: CfgNode, config: str | ConfigFile) -> None:
    """Merge a config file into a config of any host, in place.

    Raises:
        KDError: see :func:`read_config`.
        KeyError: an unknown key.
        ValueError: a value of another type than the default.
    """
    file = read_config(config)
    if file.content.get("VERSION", 2) == 1:
        cfg.merge_from_file(file.path)  # Detectron2 translates its oldest keys
    else:
        cfg.merge_from_other_cfg(type(cfg)(file.content))


def _load(file: str, included_from: tuple[str, ...]) -> dict[str, Any]:
    chain = (*included_from, file)
    if os.path.normpath(file) in map(os.path.normpath, included_from):
        fail(
            expected=f"no file in the {BASE_KEY} of itself",
            received=" -> ".join(chain),
            remedy=f"take '{file}' out of the {BASE_KEY} of '{included_from[-1]}'",
        )
    own = _read(file, chain)
    merged: dict[str, Any] = {}
    for base in _bases(own.pop(BASE_KEY, []), file):
        _merge(_load(base, chain), merged, base)
    _merge(own, merged, file)
    return merged


def _read(file: str, chain: Sequence[str]) -> dict[str, Any]:
    try:
        with PathManager.open(file) as stream:
            text = stream.read()
        content = _parse(text, file)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        received = " ".join(str(error).split())
    else:
        if isinstance(content, dict):
            return content
        received = "nothing" if content is None else type(content).__name__
    included = len(chain) > 1
    fail(
        expected=f"'{chain[0]}' and its {BASE_KEY} to be YAML mappings of config keys",
        received=f"{received} in '{file}'" if included else received,
        remedy="correct the file" + (f", or the {BASE_KEY} of '{chain[-2]}'" if included else ""),
    )


def _parse(text: str, file: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.constructor.ConstructorError:
        # Detectron2's own RetinaNet base computes its anchor sizes by a Python expression.
        logger.warning("'%s' holds Python expressions, which are evaluated", file)
        return yaml.unsafe_load(text)


def _bases(value: Any, file: str) -> list[str]:
    names = value if isinstance(value, list) else [value]
    for name in names:
        if not isinstance(name, str):
            fail(
                expected=f"{BASE_KEY} of '{file}' to be a path or a list of paths",
                received=repr(name),
                remedy="write for example _BASE_: [pairs/frcnn.yaml, methods/kd.yaml]",
            )
    return [_base_path(name, file) for name in names]


def _base_path(name: str, file: str) -> str:
    if name.startswith(("https://", "http://")):
        return name
    path = os.path.join(os.path.dirname(file), os.path.expanduser(name))
    return path if Path(path).is_file() else _shipped(name) or path


def _merge(mapping: dict[str, Any], target: dict[str, Any], file: str, where: str = "") -> None:
    for key, value in mapping.items():
        if isinstance(value, dict) and key in target:
            if not isinstance(target[key], dict):
                fail(
                    expected=f"the value of {where}{key} in '{file}' to be of the kind its "
                    f"{BASE_KEY} has, {type(target[key]).__name__}",
                    received="a mapping",
                    remedy="correct one of the two files",
                )
            _merge(value, target[key], file, f"{where}{key}.")
        else:
            target[key] = value


def _check_keys(node: Any, where: str = "") -> None:
    """Names of classes may be numbers, which YAML does not take for text."""
    if not isinstance(node, dict):
        return
    for key, value in node.items():
        if not isinstance(key, str):
            fail(
                expected=f"text as the keys{f' of {where}' if where else ''}",
                received=f"{key!r} ({type(key).__name__})",
                remedy=f"put it in quotes: '{key}'",
            )
        _check_keys(value, f"{where}.{key}" if where else key)
