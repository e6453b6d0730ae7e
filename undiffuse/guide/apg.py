"""Adaptive projected guidance (Sadat et al. 2024, arXiv 2410.02416)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from undiffuse.guide.cfg import CFG
from undiffuse.guide.contrast import Bound, inner, one_level
from undiffuse.level import Level
from undiffuse.types import Denoise, Model, require


@dataclass(frozen=True)
class APG(CFG):
    """x0 = x0_cond + (w - 1) (orthogonal + eta parallel): the parts of d = x0_cond - x0_uncond that are orthogonal and
    parallel to x0_cond, of which the second is what saturates.

    Before, d is averaged with earlier ones, d <- d + momentum d_before, for a `momentum` in (-1, 0] that damps what
    they have in common, and cut to at most the length `norm` (the root of the sum of squares over a sample; 0: any).
    eta = 1 with the rest off is CFG. Momentum is a memory: it begins anew with each batch and where levels do not fall
    in noise, and every evaluation of a solver counts.
    """

    w: float = 2.0
    eta: float = 0.0
    norm: float = 0.0
    momentum: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(math.isfinite(self.eta), "guidance.eta", self.eta, "a number, 1 for the parallel part as it is")
        require(0 <= self.norm < math.inf, "guidance.norm", self.norm, "at least 0 (0: any length)")
        require(-1 < self.momentum <= 0, "guidance.momentum", self.momentum, "above -1 and at most 0 (0: no memory)")

    def blend(self, x: Tensor, level: Level, w: float, cond: Tensor, uncond: Tensor) -> Tensor:
        """x0 without a memory."""
        return self.applied(w, cond, cond - uncond)

    def applied(self, w: float, cond: Tensor, difference: Tensor) -> Tensor:
        """x0 from the difference, averaged or not."""
        if self.norm:
            length = inner(difference, difference).sqrt()
            difference = difference * (self.norm / length.clamp(min=1e-30)).clamp(max=1).to(difference)
        along = (inner(difference, cond) / inner(cond, cond).clamp(min=1e-30)).to(cond) * cond
        return cond + (w - 1) * (difference - (1 - self.eta) * along)

    def __call__(self, model: Model, cond: Any, /) -> Denoise:
        bound = super().__call__(model, cond)
        return _Remembering(model, cond, self) if self.momentum else bound


@dataclass
class _Remembering(Bound):
    """What an APG with momentum knows of the evaluations before."""

    lam: float = math.inf
    average: Tensor | None = None

    def __call__(self, x: Tensor, level: Level) -> Tensor:
        guide = self.guide
        assert isinstance(guide, APG)
        w, lam = guide.weight_at(level), one_level(level, "APG with momentum")
        if w in (0, 1):
            return super().__call__(x, level)
        cond, uncond = guide.pair(self.model, x, level, self.cond)
        fresh = self.average is None or lam <= self.lam or self.average.shape != x.shape
        self.average = cond - uncond if fresh else cond - uncond + guide.momentum * self.average  # type: ignore[operator]
        self.lam = lam
        return guide.applied(w, cond, self.average)
