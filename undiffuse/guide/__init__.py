"""Guidance: functions from a model and a condition to a denoiser; all return x0, so they fit every solver."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from undiffuse.guide.cfg import CFG
from undiffuse.types import Denoise, InputError, Model


class Guidance(Protocol):
    """(model, condition) -> denoiser with both bound."""

    def __call__(self, model: Model, cond: Any, /) -> Denoise: ...


def guide_of(guidance: Guidance | float) -> Guidance:
    """A guidance, a number being the weight of CFG; InputError for anything else."""
    if isinstance(guidance, int | float):
        return CFG(float(guidance))
    if not callable(guidance):
        raise InputError(f"guidance is a weight or a guidance such as CFG(2.0), got {guidance!r}")
    return guidance


GUIDES: dict[str, Callable[..., Guidance]] = {"cfg": CFG}

__all__ = ["CFG", "GUIDES", "Guidance", "guide_of"]
