"""Guidance: functions from a model and a condition to a denoiser; all return x0, so they fit every solver."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from undiffuse.guide.cfg import CFG
from undiffuse.guide.composed import Composed
from undiffuse.types import Denoise, Model


class Guidance(Protocol):
    """(model, condition) -> denoiser with both bound."""

    def __call__(self, model: Model, cond: Any, /) -> Denoise: ...


GUIDES: dict[str, Callable[..., Guidance]] = {"cfg": CFG, "composed": Composed}

__all__ = ["CFG", "GUIDES", "Composed", "Guidance"]
