"""Euler and Heun with churn: Karras et al. 2022 (arXiv 2206.00364), algorithms 1 and 2."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from undiffuse.level import Level
from undiffuse.solvers.base import Eval, combine, exponential_euler
from undiffuse.types import Denoise, InputError, Noise


@dataclass(frozen=True)
class Euler:
    """Euler in sigma / alpha, which is DDIM with eta = 0; before each step `gamma` > 0 adds noise (churn).

    Churn raises sigma / alpha by 1 + gamma where it lies in [s_min, s_max]; the paper's S_churn is
    gamma = min(S_churn / N, sqrt(2) - 1). Order 1 (Heun: 2), or 0 with churn: at a fixed gamma more steps add more
    noise. One evaluation a step (Heun: 2, in the last step 1, so 2 N - 1 for N steps).
    """

    gamma: float = 0.0
    s_min: float = 0.0
    s_max: float = math.inf
    s_noise: float = 1.0
    calls: ClassVar[int] = 1
    history: ClassVar[int] = 0

    def __post_init__(self) -> None:
        if not 0 <= self.gamma <= math.sqrt(2) - 1 + 1e-9:
            raise InputError(f"churn needs 0 <= gamma <= sqrt(2) - 1, got {self.gamma}")
        if not (0 <= self.s_min <= self.s_max and self.s_noise >= 0):
            raise InputError(f"churn needs 0 <= s_min <= s_max and s_noise >= 0, got {self}")

    @property
    def global_order(self) -> int:
        return 1 if self.gamma == 0 else 0

    def churn(self, x: Tensor, now: Level, noise: Noise) -> tuple[Tensor, Level]:
        """x with noise added, and its level; alpha stays, sigma grows."""
        if self.gamma == 0:
            return x, now
        inside = (now.sigma >= self.s_min * now.alpha) & (now.sigma <= self.s_max * now.alpha)
        if not inside.any():
            return x, now
        gamma = self.gamma * inside.double()
        std = self.s_noise * now.sigma * (gamma * (2 + gamma)).sqrt()
        return combine((torch.ones_like(std), x), (std, noise())), Level(now.alpha, now.sigma * (1 + gamma))

    def step(
        self, denoise: Denoise, x: Tensor, now: Level, then: Level, past: Sequence[Eval], noise: Noise
    ) -> tuple[Tensor, Eval]:
        x, now = self.churn(x, now, noise)
        x0 = denoise(x, now)
        return exponential_euler(x, x0, now, then), Eval(now, x, x0)


@dataclass(frozen=True)
class Heun(Euler):
    """Heun's trapezoid in sigma / alpha; the Euler point plus alpha' (e^h - 1) / 2 (x0' - x0).

    A step from pure noise (alpha = 0) or to clean data (sigma = 0) is Euler's: the trapezoid has no finite end there.
    """

    calls: ClassVar[int] = 2

    @property
    def global_order(self) -> int:
        return 2 if self.gamma == 0 else 0

    def step(
        self, denoise: Denoise, x: Tensor, now: Level, then: Level, past: Sequence[Eval], noise: Noise
    ) -> tuple[Tensor, Eval]:
        x, now = self.churn(x, now, noise)
        x0, h = denoise(x, now), then.lam - now.lam
        euler = exponential_euler(x, x0, now, then)
        if not torch.isfinite(h).all():
            return euler, Eval(now, x, x0)
        half = then.alpha * torch.expm1(h) / 2
        return combine((torch.ones_like(h), euler), (half, denoise(euler, then)), (-half, x0)), Eval(now, x, x0)
