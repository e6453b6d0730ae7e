"""Classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598), with an optional interval of levels."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from undiffuse.level import Level
from undiffuse.types import Denoise, InputError, Model


def check_interval(lam_min: float, lam_max: float) -> None:
    """InputError for an interval of levels without any."""
    if not lam_min < lam_max:
        raise InputError(f"the guidance interval needs lam_min < lam_max, got {lam_min} and {lam_max}")


def inside(level: Level, lam_min: float, lam_max: float) -> bool:
    """Whether lam_min <= lam <= lam_max; InputError for levels of a batch of which only some are."""
    if math.isinf(lam_min) and math.isinf(lam_max):
        return True
    there = (level.lam >= lam_min) & (level.lam <= lam_max)
    if bool(there.any()) != bool(there.all()):
        raise InputError(
            "a guidance interval (lam_min, lam_max) needs one level for the batch; Adaptive, Tableau.parallel "
            "and levels per sample give every row its own: use them without an interval"
        )
    return bool(there.all())


@dataclass(frozen=True)
class CFG:
    """x0 = x0_uncond + w (x0_cond - x0_uncond), both from one batched call; w = 1 is off and costs a single row.

    w is a number (1 conditional, 0 unconditional, > 1 sharper and less diverse). Guidance acts for lam_min <= lam <=
    lam_max only (Kynkaanniemi et al. 2024, arXiv 2404.07724) and is off outside, where it costs nothing either.

    >>> CFG(w=2.0, lam_min=-2.0, lam_max=3.0).weight_at(Level(0.1, 0.995))
    1.0
    """

    w: float = 1.0
    lam_min: float = -math.inf
    lam_max: float = math.inf

    def __post_init__(self) -> None:
        if not math.isfinite(self.w):
            raise InputError(f"the guidance weight w must be a finite number (1 is off), got {self.w}")
        check_interval(self.lam_min, self.lam_max)

    def weight_at(self, level: Level) -> float:
        """The weight at a level: w inside the interval, 1 outside."""
        return self.w if inside(level, self.lam_min, self.lam_max) else 1.0

    def __call__(self, model: Model, cond: Any, /) -> Denoise:
        """The denoiser with `cond` (a `Cond` with null(), or None where w = 1) bound and guided."""
        if cond is None and self.w != 1:
            raise InputError(f"guidance with w = {self.w} needs a condition: give one, or leave w at 1")
        return _Bound(model, cond, self)


@dataclass(frozen=True)
class _Bound:
    model: Any
    cond: Any
    guide: CFG

    def __call__(self, x: Tensor, level: Level) -> Tensor:
        w = self.guide.weight_at(level)
        if w == 1:
            return self.model(x, level, self.cond)  # type: ignore[no-any-return]
        if w == 0:
            return self.model(x, level, self.cond.null())  # type: ignore[no-any-return]
        both, twice = type(self.cond).cat([self.cond, self.cond.null()]), torch.cat([x, x])
        if level.alpha.ndim:
            level = Level(torch.cat([level.alpha] * 2), torch.cat([level.sigma] * 2))
        x0_cond, x0_uncond = self.model(twice, level, both).chunk(2)
        return x0_uncond + w * (x0_cond - x0_uncond)  # type: ignore[no-any-return]

    def reverse(self, x: Tensor, now: Level, then: Level) -> tuple[Tensor, Tensor]:
        """The guided mean with the conditional variance."""
        x0, variance = self.model.reverse(x, now, then, self.cond)
        return (x0 if self.guide.weight_at(now) == 1 else self(x, now)), variance
