"""The contract of a host: one :class:`Host` in ``hosts/<name>/host.py``, found by its name.

A host is what trains a student: a library of models with its data, its trainer and its evaluation.
``HOST`` of a config names it. A further host is a further folder with such a file.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from fvcore.common.config import CfgNode
from torch import Tensor, nn

from kd_det.bench.workbench import Workbench
from kd_det.core.errors import check_known, fail
from kd_det.core.teacher import FrozenTeacher
from kd_det.run.plan import Results, Start
from kd_det.run.yaml_files import ConfigFile, read_config

INSTALL_GUIDE = "https://detectron2.readthedocs.io/tutorials/install.html"

HOSTS = tuple(sorted(path.parent.name for path in Path(__file__).parent.glob("*/host.py")))
"""Every host by the name that ``HOST`` gives it."""

# The extra of this package that installs what a host needs, where it is not the host's name.
_EXTRAS = {"torchvision_detection": "torchvision"}
_REMEDIES = {
    "detectron2": f"install it as {INSTALL_GUIDE} describes, or run "
    "configs/digits_torchvision/reviewkd_frcnn.yaml, which does without",
}

Progress = Callable[[str, int, int], None]
"""Called with ``"train"``, ``"evaluate"`` or ``"pre-stage"``, what is done of it, and the whole."""


@dataclass(frozen=True)
class Teacher:
    """A frozen teacher and its own complete config.

    The config stands beside the model because what a student must know of its teacher beside the
    weights (channel order, pixel statistics, classes) has a different key on every host.
    """

    frozen: FrozenTeacher
    cfg: CfgNode


class Pictures(Protocol):
    """Looks at iterations of a training and draws them; see ``VIS_PERIOD``."""

    def begin(self, iteration: int) -> None:
        """Call it before the forward of an iteration, counted from 0."""
        ...

    def end(self) -> dict[str, Tensor]:
        """Call it after the iteration: uint8 RGB ``[3, H, W]`` by TensorBoard tag."""
        ...

    def stop(self) -> None:
        """Call it when the training ends, in whatever way."""
        ...


MakePictures = Callable[[CfgNode, nn.Module], Pictures]
"""Makes the pictures of a run from its config and the module that trains, with a distiller."""


class RunHost(Protocol):
    """Trains and evaluates, or only evaluates, and leaves everything in ``OUTPUT_DIR``.

    Args:
        cfg: a config of the host.
        start: how the run is started.
        progress: called in place of a progress bar.
        pictures: makes the pictures of a run with ``VIS_PERIOD`` above 0; a function of a module,
            because processes that are started for further GPUs get it pickled.
        callbacks: further callbacks of the library that the host trains with.

    Returns:
        ``{kind: {metric: percent}}`` on the main process, empty on others.

    Raises:
        KDError: anything that would fail later, before training and before anything is written.
    """

    def __call__(
        self,
        cfg: CfgNode,
        start: Start = ...,
        *,
        progress: Progress | None = None,
        pictures: MakePictures | None = None,
        callbacks: Sequence[Any] = (),
    ) -> Results: ...


@dataclass(frozen=True)
class Host:
    """What a host offers to everything above it.

    Attributes:
        name: the value of ``HOST``.
        get_cfg: a new config with every key at its default.
        load_config: the frozen config that a file and ``KEY VALUE`` overrides describe, checked.
        check_run: refuses a config that cannot be run here and now: devices, output folder,
            loggers. Nothing is written.
        run: see :class:`RunHost`.
        open_bench: a run built from its config, to look at. The second argument is a checkpoint
            with what the losses have learnt if it holds that; ``""`` starts as the run does, from
            ``MODEL.WEIGHTS``. The third is False to leave teacher and terms out; the checkpoint
            must then be complete. Writes nothing but the digits, if they are missing. The fourth
            is None, or the module of a run that trains already, which stays as it is: then the
            second and third mean nothing.
        build_teacher: the frozen teacher that ``KD.TEACHER`` describes, on ``MODEL.DEVICE`` or
            the CPU. Random streams are left as they were.
        export_student: writes the stock student of a run, from its config and checkpoint, into a
            folder; returns the paths of weights and config.
        num_classes: classes of a config's model, without a background.
        class_names: names of the classes of a config's training data, in the order of the
            outputs; None where they are unknown.
    """

    name: str
    get_cfg: Callable[[], CfgNode]
    load_config: Callable[[str | ConfigFile, Sequence[str]], CfgNode]
    check_run: Callable[[CfgNode, Start], None]
    run: RunHost
    open_bench: Callable[..., Workbench]
    build_teacher: Callable[[CfgNode], Teacher]
    export_student: Callable[[CfgNode, str | Path, str | Path], tuple[Path, Path]]
    num_classes: Callable[[CfgNode], int]
    class_names: Callable[[CfgNode], list[str] | None]


def get_host(name: str) -> Host:
    """The host of a name.

    Raises:
        KDError: there is none, or a package that it needs is not installed.
    """
    check_known("HOST", name, HOSTS)
    try:
        module = importlib.import_module(f"kd_det.hosts.{name}.host")
    except ModuleNotFoundError as error:
        package = (error.name or "kd_det").partition(".")[0]
        if package == "kd_det" or importlib.util.find_spec(package) is not None:
            raise
        extra = _EXTRAS.get(name, name)
        fail(
            expected=f"the package '{package}', which HOST {name} needs",
            received="no installed package of that name",
            remedy=_REMEDIES.get(package, f"pip install 'kd_det[{extra}]'"),
        )
    host: Host = module.HOST
    return host


def read_host(config: str | ConfigFile) -> str:
    """The ``HOST`` that a config file (with its ``_BASE_``) names; Detectron2 by default.

    Raises:
        KDError: the file is missing or not a YAML mapping, or names an unknown host.
    """
    host = read_config(config).content.get("HOST", "detectron2")
    check_known("HOST", host, HOSTS)
    return host


def load_config(config: str | ConfigFile, opts: Sequence[str] = ()) -> CfgNode:
    """The frozen config that a file and overrides describe, checked as its host does.

    Raises:
        KDError: see :func:`kd_det.run.config.merge_config`; or its host is not installed.
    """
    file = read_config(config)
    return get_host(read_host(file)).load_config(file, opts)


def open_bench(
    cfg: CfgNode, weights: str = "", distilled: bool = True, model: nn.Module | None = None
) -> Workbench:
    """A run built from its config as its host would for training; see :class:`Host`.

    Raises:
        KDError: whatever the host refuses about the config.
    """
    return get_host(cfg.HOST).open_bench(cfg, weights, distilled, model)
