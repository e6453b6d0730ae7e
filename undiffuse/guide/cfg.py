"""Classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598), in an interval of levels or by a weight of its
own at each."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from undiffuse.guide.contrast import Bound, Contrast, check_interval, check_weight, inside, one_level
from undiffuse.level import Level
from undiffuse.types import Denoise, InputError, Model


@dataclass(frozen=True)
class CFG(Contrast):
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
        check_weight(self.w)
        check_interval(self.lam_min, self.lam_max)

    def weight_at(self, level: Level) -> float:
        """The weight at a level: w inside the interval, 1 outside."""
        return self.w if inside(level, self.lam_min, self.lam_max) else 1.0

    def __call__(self, model: Model, cond: Any, /) -> Denoise:
        """The denoiser with `cond` (a `Cond` with null(), or None where w = 1) bound and guided."""
        return super().__call__(model, cond) if cond is not None or self.w != 1 else Bound(model, None, self)


@dataclass(frozen=True)
class PerLevel(Contrast):
    """CFG with a weight for each level: `w` at the levels `lam`, linear in lam between them, and constant beyond.

    Any schedule of weights (Wang et al. 2024, arXiv 2404.13040: weights that rise towards clean data keep diversity).
    InputError unless `lam` rises and there are as many weights.

    >>> PerLevel(lam=(-2.0, 2.0), w=(1.0, 5.0)).weight_at(Level.at(0.0))
    3.0
    """

    lam: tuple[float, ...] = (-2.0, 2.0)
    w: tuple[float, ...] = (1.0, 3.0)

    def __post_init__(self) -> None:
        rising = all(a < b for a, b in zip(self.lam, self.lam[1:], strict=False))
        if not self.lam or len(self.lam) != len(self.w) or not rising or not all(map(math.isfinite, self.lam)):
            raise InputError(f"weights per level need lam that rise, and as many w: got {self.lam} and {self.w}")
        for w in self.w:
            check_weight(w)

    def weight_at(self, level: Level) -> float:
        """The weight at a level."""
        lam = one_level(level, "a weight per level")
        if lam <= self.lam[0] or lam >= self.lam[-1]:
            return self.w[0] if lam <= self.lam[0] else self.w[-1]
        i = next(i for i, known in enumerate(self.lam) if lam < known)
        share = (lam - self.lam[i - 1]) / (self.lam[i] - self.lam[i - 1])
        return self.w[i - 1] + share * (self.w[i] - self.w[i - 1])
