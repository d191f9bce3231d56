"""Weights in files: the formats that teachers are published in, and the plain student."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kd_det.core.errors import fail
from kd_det.core.teacher import load_strict

logger = logging.getLogger(__name__)

DISTILLER_PREFIX = "distiller."
_STUDENT_PREFIX = "student."
SUFFIXES = (".pkl", ".pth", ".pt", ".ckpt", ".safetensors")


def read_weights(path: str | Path, keep_distiller: bool = False) -> dict[str, Tensor]:
    """Tensors by key from a weights file.

    The formats are Detectron2's zoo format (``.pkl``), torch files that hold a state dict directly
    or under ``"model"`` or ``"state_dict"`` (``.pth``, ``.pt``, ``.ckpt``), and ``.safetensors``.
    The ``module.`` prefix of DDP is dropped and so are, unless ``keep_distiller``, the adaptors
    (``distiller.*``) of an earlier distillation.

    Raises:
        KDError: the file is missing, of an unknown format, unreadable, would execute code, or holds
            no tensors.
    """
    path = Path(path)
    if not path.is_file():
        fail(
            expected="a weights file",
            received=f"'{path}', which does not exist",
            remedy="give the path of a .pkl, .pth or .safetensors file",
        )
    if path.suffix not in SUFFIXES:
        fail(
            expected=f"weights as {', '.join(SUFFIXES)}",
            received=f"'{path}'",
            remedy="convert the file, or rename it to its true format",
        )
    if path.suffix == ".safetensors" and find_spec("safetensors") is None:
        fail(
            expected=f"the package safetensors, which reads '{path}'",
            received="no installed package of that name",
            remedy="pip install 'kd_det[safetensors]'",
        )
    try:
        loaded = _load(path)
    except Exception as error:  # readers of damaged files raise nearly anything
        fail(
            expected=f"'{path}' to be a readable {path.suffix} file of tensors",
            received=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
            remedy="download or save it again",
        )
    weights = {
        str(key).removeprefix("module."): torch.as_tensor(value)
        for key, value in _state_dict(loaded).items()
        if isinstance(value, Tensor) or hasattr(value, "__array__")
    }
    if not keep_distiller:
        weights = strip_distiller(weights)
    if not weights:
        fail(
            expected=f"tensors in '{path}'",
            received="none",
            remedy="give a checkpoint that holds a model",
        )
    return weights


def strip_distiller(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The student's own keys: everything but ``distiller.*``."""
    return {k: v for k, v in state_dict.items() if not k.startswith(DISTILLER_PREFIX)}


def load_student(
    student: nn.Module,
    weights: str,
    complete: bool,
    rename: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None,
) -> None:
    """Load initial weights for training, or all weights for evaluation.

    Args:
        student: the stock model; a distiller inside it stays as it is.
        weights: a file that :func:`read_weights` reads.
        complete: require every key, for evaluation. Otherwise absent tensors and those of another
            shape (heads of other classes) keep their random start, and a warning lists them.
        rename: gives tensors of another layout the student's names.

    Raises:
        KDError: nothing in the file fits, or not every key with ``complete``.
    """
    own, given = strip_distiller(student.state_dict()), read_weights(weights)
    given = rename(given) if rename else given
    fitting = {k: v for k, v in given.items() if k in own and v.shape == own[k].shape}
    lacking = [key for key in own if key not in fitting]
    if not fitting or (complete and lacking):
        fail(
            expected=f"'{weights}' to hold the {len(own)} keys of this {type(student).__name__}",
            received=f"{len(fitting)} that fit; lacking {', '.join(lacking[:8])}",
            remedy="use the config the weights were trained with",
        )
    student.load_state_dict(fitting, strict=False)
    if lacking:
        logger.warning("%s has nothing for: %s", weights, ", ".join(lacking))


def load_distiller(distiller: nn.Module, path: str | Path) -> None:
    """Load the parameters of losses from ``distiller.*`` of a checkpoint, where they fit.

    Raises:
        KDError: nothing in the file fits.
    """
    own = distiller.state_dict()
    given = {
        key.removeprefix(DISTILLER_PREFIX): value
        for key, value in read_weights(path, keep_distiller=True).items()
        if key.startswith(DISTILLER_PREFIX)
    }
    # Steps and the measurements of KD.BALANCE belong to their own run.
    fitting = {
        k: v
        for k, v in given.items()
        if k in own and v.shape == own[k].shape and k != "step" and not k.startswith("balance.")
    }
    if not fitting:
        fail(
            expected=f"'{path}' to hold adaptors of this run's terms ({DISTILLER_PREFIX}*)",
            received=f"{len(given)} keys of adaptors, none of which fits",
            remedy="give a checkpoint of a run with the same terms, or leave KD.WEIGHTS empty",
        )
    distiller.load_state_dict(fitting, strict=False)


def name_keys_as_student(module: nn.Module) -> None:
    """Give the ``state_dict()`` of a module with a ``student`` the stock model's keys.

    The keys of ``distiller.*`` stay beside them; loading accepts the same.
    """
    module.register_state_dict_post_hook(_drop_prefix)
    module.register_load_state_dict_pre_hook(_add_prefix)


def _drop_prefix(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    start = prefix + _STUDENT_PREFIX
    for key in [k for k in state if k.startswith(start)]:
        state[prefix + key[len(start) :]] = state.pop(key)


def _add_prefix(module: nn.Module, state: dict[str, Any], prefix: str, *arguments: Any) -> None:
    for key in [k for k in state if k.startswith(prefix)]:
        if not key.startswith(prefix + DISTILLER_PREFIX):
            state[prefix + _STUDENT_PREFIX + key[len(prefix) :]] = state.pop(key)


def export_student(
    model: nn.Module,
    weights: str | Path,
    config: str,
    output: str | Path,
    wrap: bool = False,
    optional_parts: tuple[str, ...] = (),
) -> tuple[Path, Path]:
    """Write ``model.pth`` and ``config.yaml`` of the plain student; returns both paths.

    The stock model loads the checkpoint strictly before anything is written.

    Args:
        model: the stock model that ``config``, a text, describes.
        weights: the checkpoint of a distillation run.
        output: a folder; its two files must not exist yet.
        wrap: store the state under ``"model"``, as Detectron2 does.
        optional_parts: see :func:`kd_det.core.teacher.load_strict`.

    Raises:
        KDError: the checkpoint does not hold this student, or the files exist.
    """
    output = Path(output)
    model_path, config_path = output / "model.pth", output / "config.yaml"
    existing = [str(path) for path in (model_path, config_path) if path.exists()]
    if existing:
        fail(
            expected="an output folder without an earlier export",
            received=", ".join(existing),
            remedy="choose another --output",
        )
    load_strict(model, read_weights(weights), str(weights), optional_parts)
    output.mkdir(parents=True, exist_ok=True)
    state = model.state_dict()
    torch.save({"model": state} if wrap else state, model_path)
    config_path.write_text(config)
    return model_path, config_path


def _load(path: Path) -> Any:
    if path.suffix == ".pkl":
        with path.open("rb") as file:
            return _NumpyUnpickler(file, encoding="latin1").load()
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)


_DATA = {"_reconstruct", "ndarray", "dtype", "scalar", "_frombuffer", "OrderedDict", "encode"}


class _NumpyUnpickler(pickle.Unpickler):
    """Constructs dicts of numpy arrays, the content of zoo files, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if module.partition(".")[0] in ("numpy", "collections", "_codecs") and name in _DATA:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} is not data")


def _state_dict(loaded: Any) -> Mapping[str, Any]:
    for key in ("model", "state_dict"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            return loaded[key]
    return loaded if isinstance(loaded, Mapping) else {}
