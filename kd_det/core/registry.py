"""Registries of losses and schedules, by the names that a config uses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fvcore.common.registry import Registry as _FvcoreRegistry

from kd_det.core.errors import check_known


class Registry(_FvcoreRegistry):
    """fvcore's registry, whose error about an unknown name suggests the nearest known one."""

    def register(self, obj: Any = None) -> Any:  # type: ignore[override]
        """Decorator that registers under the object's own name, or under a given string.

        Both ``@LOSSES.register()`` and ``@LOSSES.register("KD")`` work. A name that is taken is an
        AssertionError of fvcore.
        """
        if not isinstance(obj, str):
            return super().register(obj)

        def decorate(target: Callable[..., Any]) -> Callable[..., Any]:
            self._do_register(obj, target)
            return target

        return decorate

    def get(self, name: str) -> Any:
        """The object registered as ``name``; an unknown name is refused."""
        check_known(self._name, name, (known for known, _ in self))
        return super().get(name)


LOSSES = Registry("loss")
"""Every distillation loss by the name a config uses (``LOSS: ReviewKD``)."""

SCHEDULES = Registry("schedule")
"""Every weight schedule by the name a config uses (``SCHEDULE: {NAME: linear_warmup}``)."""
