"""Guidance that depends on the steps of the walk: CFG++ and CFG-Zero*."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from undiffuse.guide.cfg import CFG
from undiffuse.guide.contrast import Contrast, inner, one_level
from undiffuse.level import Level, from_x0, to_x0
from undiffuse.types import InputError, require


def _rising(levels: Sequence[Level]) -> tuple[float, ...]:
    """The lams of a walk's levels, each once, from noise to data."""
    return tuple(sorted({one_level(level, "guidance by the step") for level in levels}))


def _step(lams: tuple[float, ...], lam: float, kind: str) -> int:
    """The number of the step in which a level lies, which begins with it or before."""
    if not lams:
        raise InputError(f"{kind} goes by the steps of the walk: bind {kind}(...).prepared(levels), as `sample` does")
    # a level's lam is computed again on the way, and rounds
    near = 1e-9 * (1 + abs(lam)) if math.isfinite(lam) else 0.0
    return max(sum(known <= lam + near for known in lams) - 1, 0)


@dataclass(frozen=True)
class CFGpp(Contrast):
    """CFG++ (Chung et al. 2024, arXiv 2406.08070): the step goes to the guided x0_uncond + scale (x0_cond - x0_uncond)
    for a `scale` in [0, 1], and takes its noise from the unguided prediction.

    With DDIM's step, x' = sigma'/sigma x + alpha' (1 - e^-h) x0 with h = lam' - lam, this is CFG with the weight w =
    scale / (1 - e^-h): the paper's algorithm exactly, and what every other solver is given. So on
    levels of equal distance in lam it is CFG with one weight, and 1 is not off: the condition alone has no such scale.
    The steps are those of the walk, which `sample` tells it (`prepared`).

    >>> guide = CFGpp(scale=0.6).prepared([Level.at(lam) for lam in (-1.0, 0.0, 2.0)])
    >>> [round(guide.weight_at(Level.at(lam)), 3) for lam in (-1.0, 0.0)]
    [0.949, 0.694]
    """

    scale: float = 0.6
    lams: Sequence[float] | None = None

    def __post_init__(self) -> None:
        require(0 <= self.scale <= 1, "guidance.scale", self.scale, "from 0 (unconditional) to 1")

    def prepared(self, levels: Sequence[Level], rows: int = 0) -> CFGpp:
        """The same for a walk along these levels."""
        return replace(self, lams=_rising(levels))

    def weight_at(self, level: Level) -> float:
        """CFG's weight at a level: that of the step in which it lies."""
        lam, lams = one_level(level, "CFG++"), tuple(self.lams or ())
        i = _step(lams, lam, "CFGpp")
        h = lams[i + 1] - lams[i] if i + 1 < len(lams) else math.inf
        return self.scale / -math.expm1(-h)


@dataclass(frozen=True)
class CFGZero(CFG):
    """CFG-Zero* (Fan et al. 2025, arXiv 2503.18886) for flows: the unconditional velocity is scaled by its projection
    on the conditional one, and the first `zero` steps have no velocity.

    u = s u_uncond + w (u_cond - s u_uncond) with s = <u_cond, u_uncond> / |u_uncond|^2 over a sample's elements and
    u = eps - x0. The steps are those of the walk, which `sample` tells it (`prepared`); w = 1 is off, and then no step
    is zero.
    """

    w: float = 2.0
    zero: int = 1
    lams: Sequence[float] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.zero >= 0, "guidance.zero", self.zero, "a number of steps, at least 0")

    def prepared(self, levels: Sequence[Level], rows: int = 0) -> CFGZero:
        """The same for a walk along these levels."""
        return replace(self, lams=_rising(levels))

    def blend(self, x: Tensor, level: Level, w: float, cond: Tensor, uncond: Tensor) -> Tensor:
        """The x0 of the velocity."""
        lams = tuple(self.lams or ())
        if self.zero and _step(lams, one_level(level, "CFG-Zero*"), "CFGZero") < self.zero:
            return to_x0("u", torch.zeros_like(x), x, level)
        u_cond, u_uncond = (from_x0("u", x0, x, level) for x0 in (cond, uncond))
        scale = (inner(u_cond, u_uncond) / inner(u_uncond, u_uncond).clamp(min=1e-30)).to(x)
        return to_x0("u", super().blend(x, level, w, u_cond, scale * u_uncond), x, level)
