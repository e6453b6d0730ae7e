"""Guidance: functions from a model and a condition to a denoiser; all return x0, so they fit every solver."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from undiffuse.guide.apg import APG
from undiffuse.guide.auto import Autoguidance
from undiffuse.guide.cfg import CFG, PerLevel
from undiffuse.guide.classifier import ClassifierGuidance
from undiffuse.guide.composed import Composed
from undiffuse.guide.contrast import Contrast, prepared
from undiffuse.guide.effective import effective_scale
from undiffuse.guide.rescale import Rescale, Thresholded
from undiffuse.guide.steps import CFGpp, CFGZero
from undiffuse.types import Denoise, InputError, Model


class Guidance(Protocol):
    """(model, condition) -> denoiser with both bound."""

    def __call__(self, model: Model, cond: Any, /) -> Denoise: ...


GUIDES: dict[str, Callable[..., Guidance]] = {
    "cfg": CFG,
    "per-level": PerLevel,
    "rescale": Rescale,
    "threshold": Thresholded,
    "apg": APG,
    "cfg++": CFGpp,
    "cfg-zero": CFGZero,
    "autoguidance": Autoguidance,
    "classifier": ClassifierGuidance,
    "composed": Composed,
}


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


__all__ = [
    "APG",
    "CFG",
    "GUIDES",
    "Autoguidance",
    "CFGZero",
    "CFGpp",
    "ClassifierGuidance",
    "Composed",
    "Contrast",
    "Guidance",
    "PerLevel",
    "Rescale",
    "Thresholded",
    "effective_scale",
    "guide_of",
    "prepared",
]
