"""Forward hooks that record tensors of a stock model while it runs unchanged.

A :class:`Tap` names a tensor of a model, a :class:`TapRecorder` records several taps of one model.
Hooks exist only inside :meth:`TapRecorder.recording`: a deep copy (EMA) or a pickle of the model
carries none, and inference has no overhead.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from kd_det.core.errors import fail, nearest
from kd_det.core.teacher import FrozenTeacher


@dataclass(frozen=True)
class Tap:
    """The input or output of one module.

    Attributes:
        path: dotted module path, as in ``named_modules()``.
        at: the module's output or its positional input.
        select: key or index into a dict, tuple or list output (``"p3"``, ``0``), or the
            position of the argument for ``at="input"``. ``None`` keeps the whole output, or the
            first argument.
        calls: how often the module runs in one forward. ``1`` returns the capture itself, more
            returns the list of captures in order.
        clone: copy tensors at capture. Needed only where a later layer works in place.
    """

    path: str
    at: Literal["output", "input"] = "output"
    select: str | int | None = None
    calls: int = 1
    clone: bool = False


class TapRecorder:
    """Records the taps of one model.

    Args:
        model: a module, or a frozen teacher. It is not changed and its forward is not wrapped. In
            a deep copy of a module that owns its recorder, the recorder belongs to the copy; a
            frozen teacher stays shared.
        taps: name to :class:`Tap`, or to a plain module path.

    Raises:
        KDError: a tap names a module the model does not have.

    Example:
        >>> taps = TapRecorder(model, {"mid": "layer2", "logits": "fc"})
        >>> with taps.recording():
        ...     model(images)
        >>> taps.read()["mid"].shape
    """

    def __init__(self, model: nn.Module | FrozenTeacher, taps: Mapping[str, Tap | str]) -> None:
        self._target = model
        self.taps = {n: Tap(t) if isinstance(t, str) else t for n, t in taps.items()}
        self._captured: dict[str, list[tuple[Any, list[tuple[Tensor, int]]]]] = {}
        paths = dict(self.model.named_modules())
        for name, tap in self.taps.items():
            if tap.path not in paths:
                fail(
                    expected=f"tap '{name}' to name a module of {type(self.model).__name__}",
                    received=f"'{tap.path}'",
                    remedy=_suggest_path(tap.path, paths),
                )

    @property
    def model(self) -> nn.Module:
        """The recorded module."""
        target = self._target
        return target.model if isinstance(target, FrozenTeacher) else target

    @contextmanager
    def recording(self) -> Iterator[TapRecorder]:
        """Record while the block runs; earlier captures are dropped."""
        self.release()
        handles = []
        modules = dict(self.model.named_modules())
        try:
            for name, tap in self.taps.items():
                module, hook = modules[tap.path], self._hook(name, tap)
                if tap.at == "input":
                    handles.append(module.register_forward_pre_hook(hook))
                else:
                    handles.append(module.register_forward_hook(hook))
            yield self
        finally:
            for handle in handles:
                handle.remove()

    def read(self) -> dict[str, Any]:
        """Recorded values by tap name.

        Raises:
            KDError: a module did not run as often as its tap states; or a recorded tensor was
                overwritten in place afterwards and no longer holds what the model used.
        """
        return {name: self._read_one(name, tap) for name, tap in self.taps.items()}

    def release(self) -> None:
        """Drop all captures, so that no activation outlives its step."""
        self._captured = {}

    def __getstate__(self) -> dict[str, Any]:
        # Captures belong to one step of one model, and non-leaf tensors cannot be deep-copied.
        return {**self.__dict__, "_captured": {}}

    def _read_one(self, name: str, tap: Tap) -> Any:
        captures = self._captured.get(name, [])
        if len(captures) != tap.calls:
            fail(
                expected=f"'{tap.path}' (tap '{name}') to run {tap.calls} time(s) in one forward",
                received=f"{len(captures)} run(s)",
                remedy="tap a module that runs as often, or set Tap(calls=...)",
            )
        for _, versions in captures:
            for tensor, version in versions:
                if tensor._version != version:
                    fail(
                        expected=f"the {tap.at} of '{tap.path}' (tap '{name}') to stay as recorded",
                        received="a tensor that a later layer overwrote in place",
                        remedy="tap the layer that overwrites it, or set Tap(clone=True)",
                    )
        values = [value for value, _ in captures]
        return values[0] if tap.calls == 1 else values

    def _hook(self, name: str, tap: Tap) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any = None) -> None:
            if tap.at == "input":
                value = _pick(name, tap, args, tap.select or 0)
            else:
                value = output if tap.select is None else _pick(name, tap, output, tap.select)
            if tap.clone:
                value = _cloned(value)
            versions = [(t, t._version) for t in _tensors(value) if not t.is_inference()]
            self._captured.setdefault(name, []).append((value, versions))

        return hook


def _pick(name: str, tap: Tap, values: Any, key: str | int) -> Any:
    try:
        return values[key]
    except (KeyError, IndexError, TypeError):
        has = ", ".join(map(str, values)) if isinstance(values, Mapping) else type(values).__name__
        if isinstance(values, (list, tuple)):
            has += f" of length {len(values)}"
        fail(
            expected=f"tap '{name}' to find '{key}' in the {tap.at} of '{tap.path}'",
            received=has,
            remedy="select one of these, or tap another module",
        )


def _cloned(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, Mapping):
        return {key: _cloned(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(_cloned, value))
    return value


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def _suggest_path(path: str, paths: Mapping[str, nn.Module]) -> str:
    # A model has thousands of paths: list those beside the deepest ancestor that does exist.
    parent = path
    while parent not in paths:
        parent = parent.rpartition(".")[0]
    depth = parent.count(".") + 1 if parent else 0
    beside = [p for p in paths if p.startswith(f"{parent}." if parent else "") and p]
    return nearest(path, [p for p in beside if p.count(".") == depth])
