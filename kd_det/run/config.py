"""The ``HOST`` and ``KD`` keys that every host shares, and the errors about configs."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fvcore.common.config import CfgNode

from kd_det.balance import build_balance
from kd_det.core.errors import KDError, check_choice, check_known, fail, nearest
from kd_det.core.registry import LOSSES, SCHEDULES
from kd_det.core.terms import Term, parse_terms
from kd_det.procedures.base import add_procedures, refuse_unsupported
from kd_det.run.yaml_files import ConfigFile, merge_file

_PARSED: dict[tuple[Any, ...], tuple[Term, ...]] = {}

_OPEN_NODES = ("KD.TERMS.", "KD.CLASS_MAP.", "KD.BALANCE.SHARES.", "DATASETS.COCO_JSON.")


def add_kd_config(cfg: CfgNode, offers: frozenset[str] = frozenset()) -> None:
    """Add ``HOST``, ``KD`` and ``DATASETS.COCO_JSON`` to a yacs config, in place.

    What the host ``offers`` decides the procedures; see :mod:`kd_det.procedures.base`.
    """
    node = type(cfg)
    cfg.HOST = "detectron2"  # or torchvision_detection, classification
    cfg.KD = node()
    # False trains the plain student from the same file: the honest baseline.
    cfg.KD.ENABLED = True
    cfg.KD.TEACHER = node()
    # A complete config: a path or, on Detectron2, a model-zoo name.
    cfg.KD.TEACHER.CONFIG_FILE = ""
    # The teacher's own file; never merged with the student's weights.
    cfg.KD.TEACHER.WEIGHTS = ""
    # Only this allows an untrained teacher.
    cfg.KD.TEACHER.ALLOW_RANDOM = False
    # Preflight refuses a teacher whose box AP (top-1 accuracy of a classifier) on the validation
    # images it looks at is lower, in percent. 0: no floor.
    cfg.KD.TEACHER.MIN_AP = 0.0
    # Names of its classes, in the order of its outputs, where its training data does not tell.
    cfg.KD.TEACHER.CLASS_NAMES = []
    # Student's class name -> teacher's, where the names differ.
    cfg.KD.CLASS_MAP = node(new_allowed=True)
    # name of the logged loss -> {LOSS, WEIGHT, TAPS, SCHEDULE, further loss arguments}
    cfg.KD.TERMS = node(new_allowed=True)
    # Names of the terms that are on; empty: all. STAGES sets it.
    cfg.KD.ACTIVE_TERMS = []
    # A checkpoint whose distiller.* is the start of what the losses learn (adaptors).
    cfg.KD.WEIGHTS = ""
    # Iterations after which a term that was always exactly zero is reported by name.
    cfg.KD.REPORT_PERIOD = 1000
    # Of the task losses beside the terms (w_ce of classifier recipes). 0 trains with the terms
    # alone: the first stage of FSP and of the original FitNet.
    cfg.KD.TASK_WEIGHT = 1.0
    _add_balance(cfg)
    add_procedures(cfg, offers)
    # Look at the run for two minutes before it starts; see kd_det.preflight.
    cfg.PREFLIGHT = False
    # Loggers beside metrics.json and TensorBoard, by name: wandb, mlflow.
    cfg.LOGGERS = []
    # Iterations between two pictures of what is distilled, into TensorBoard. 0: none.
    cfg.VIS_PERIOD = 0
    # Runs one after the other: [{NAME, TERMS, TASK, CARRY, OVERRIDES}]; see kd_det.run.plan.
    cfg.STAGES = []
    # Several seeds in one command, each in OUTPUT_DIR/seed_<n>.
    cfg.SEEDS = []
    if "DATASETS" not in cfg:
        cfg.DATASETS = node()
    # name -> [json, image_root]: any COCO-format data set without code.
    cfg.DATASETS.COCO_JSON = node(new_allowed=True)


def _add_balance(cfg: CfgNode) -> None:
    """How the weights of the terms follow the run; the published methods keep them constant."""
    node = type(cfg)
    cfg.KD.BALANCE = node()
    # none, measure (log the shares only), gradient_share, gradnorm or uncertainty.
    cfg.KD.BALANCE.NAME = "none"
    # Of gradient_share: term -> its share of the gradient on the shared parameters; the rest is
    # the task's.
    cfg.KD.BALANCE.SHARES = node(new_allowed=True)
    # Iterations between two measurements; each costs a backward pass per term and one of the task.
    cfg.KD.BALANCE.PERIOD = 10
    # Of gradnorm, as in its paper: how strongly a loss that falls more slowly is pulled after the
    # others.
    cfg.KD.BALANCE.ALPHA = 1.5
    cfg.KD.BALANCE.LR = 0.025  # of gradnorm, as in its paper: the relative step of a weight


def merge_config(cfg: CfgNode, config: str | ConfigFile, opts: Sequence[str] = ()) -> CfgNode:
    """Merge a file and command-line overrides into ``cfg``, in place.

    Raises:
        KDError: an unknown key (the nearest known key is suggested), a value of the wrong type, or
            another host than that of ``cfg``; a term that :func:`read_terms` refuses, or a
            ``KD.BALANCE`` that :func:`kd_det.balance.build_balance` does.
    """
    known, host = list(_keys(cfg)), cfg.HOST
    try:
        merge_file(cfg, config)
        _merge_options(cfg, opts)
    except (KeyError, AssertionError, ValueError) as error:
        if isinstance(error, KDError):
            raise
        _explain(error, known)
    check_choice("HOST", cfg.HOST, (host,))
    if cfg.KD.ENABLED:
        build_balance(cfg, read_terms(cfg))
    return cfg


def read_terms(cfg: CfgNode) -> tuple[Term, ...]:
    """The parsed ``KD.TERMS`` that are active; every name, type and schedule is checked.

    They are parsed once: equal nodes have the same terms, as long as no loss is registered anew.
    """
    terms, active = plain(cfg.KD.TERMS), list(cfg.KD.ACTIVE_TERMS)
    # Detectron2 builds its models from the config alone, so terms cannot be handed on beside it.
    key = (repr((terms, active)), *LOSSES, *SCHEDULES)
    if key not in _PARSED:
        parsed = parse_terms(terms)
        for name in active:
            check_known("term in KD.ACTIVE_TERMS", name, [term.name for term in parsed])
        _PARSED[key] = tuple(t for t in parsed if not active or t.name in active)
    return _PARSED[key]


def without_distillation(cfg: CfgNode) -> CfgNode:
    """A thawed copy of a run's config that describes the plain student."""
    stock = cfg.clone()
    stock.defrost()
    stock.KD = type(cfg)({"ENABLED": False})
    return stock


def _merge_options(cfg: CfgNode, opts: Sequence[str]) -> None:
    if len(opts) % 2:
        fail(
            expected="overrides as KEY VALUE pairs",
            received=" ".join(opts),
            remedy="write for example SOLVER.BASE_LR 0.01",
        )
    rest: list[str] = []
    for key, value in zip(opts[::2], opts[1::2], strict=True):
        # Names below these nodes are the user's own, a term's argument may be unset in the file,
        # and 1 is a fine value for 0.5: yacs would refuse all three. Their values are taken as
        # they are and checked afterwards, as terms and data sets.
        if key.startswith(_OPEN_NODES):
            _set(cfg, key.split("."), literal(value))
        else:
            rest += [key, _as_float(cfg, key, value)]
    cfg.merge_from_list(rest)


def _set(cfg: CfgNode, path: Sequence[str], value: Any) -> None:
    node = cfg
    for part in path[:-1]:
        if part not in node:
            node[part] = type(cfg)()
        node = node[part]
        if not isinstance(node, CfgNode):
            raise KeyError(f"Non-existent key: {'.'.join(path)}")
    node[path[-1]] = type(cfg)(value) if isinstance(value, dict) else value


def _as_float(cfg: CfgNode, key: str, value: str) -> Any:
    """``SOLVER.BASE_LR 1`` means 1.0: yacs does not take an int for a float."""
    node: Any = cfg
    for part in key.split("."):
        if not isinstance(node, CfgNode):
            raise KeyError(f"Non-existent key: {key}")
        if part not in node:
            return value
        node = node[part]
    number = literal(value)
    whole = isinstance(number, int) and not isinstance(number, bool)
    return float(number) if isinstance(node, float) and whole else value


def literal(value: Any) -> Any:
    """What a value of the command line means as Python; a string where it means nothing."""
    try:
        return ast.literal_eval(value) if isinstance(value, str) else value
    except (ValueError, SyntaxError, TypeError):
        return value


def _keys(node: CfgNode, prefix: str = "") -> Iterator[str]:
    for key, value in node.items():
        yield f"{prefix}{key}"
        if isinstance(value, CfgNode):
            yield from _keys(value, f"{prefix}{key}.")


def _explain(error: Exception, known: list[str]) -> None:
    message = str(error.args[0]) if error.args else str(error)
    if "Non-existent" in message:
        key = message.rpartition(": ")[2].strip("'\"")
        refuse_unsupported(key)
        # Suggest what stands beside the first wrong part of the key.
        wrong = key
        while not (siblings := [k for k in known if _parent(k) == _parent(wrong)]):
            wrong = _parent(wrong)
        fail(expected="a known config key", received=f"'{key}'", remedy=nearest(wrong, siblings))
    fail(expected="a config this host can read", received=message, remedy="correct this value")


def _parent(key: str) -> str:
    return key.rpartition(".")[0]


def flatten(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of nested mappings; an empty mapping is a value."""
    for key, value in node.items():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def plain(node: Any) -> Any:
    """The value with dicts in place of config nodes."""
    return {k: plain(v) for k, v in node.items()} if isinstance(node, dict) else node
