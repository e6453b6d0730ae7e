"""Guidance: functions from a model and a condition to a denoiser; all return x0, so they fit every solver."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from undiffuse.guide.cfg import CFG
from undiffuse.guide.composed import Composed
from undiffuse.types import Denoise, InputError, Model


class Guidance(Protocol):
    """(model, condition) -> denoiser with both bound."""

    def __call__(self, model: Model, cond: Any, /) -> Denoise: ...


GUIDES: dict[str, Callable[..., Guidance]] = {"cfg": CFG, "composed": Composed}


def guide_of(guidance: Guidance | float | Mapping[str, float]) -> Guidance:
    """A weight as `CFG`, weights by the names of conditions as `Composed` in their order, a guidance as it is.

    InputError for anything else.
    """
    if isinstance(guidance, int | float):
        return CFG(float(guidance))
    if isinstance(guidance, Mapping):
        return Composed(tuple(guidance), tuple(float(w) for w in guidance.values()))
    if not callable(guidance):
        raise InputError(f"guidance is a weight, weights by name or a guidance such as CFG(2.0), got {guidance!r}")
    return guidance


__all__ = ["CFG", "GUIDES", "Composed", "Guidance", "guide_of"]
