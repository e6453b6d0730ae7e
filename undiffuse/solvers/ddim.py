"""DDIM: Song et al. 2021 (arXiv 2010.02502)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from undiffuse.level import Level
from undiffuse.solvers.base import Eval, combine, exponential_euler
from undiffuse.types import Denoise, InputError, Noise


@dataclass(frozen=True)
class DDIM:
    """x_then = alpha x0 + sqrt(sigma^2 - std^2) eps + std z, std = eta sigma sqrt(1 - e^(-2 h)) (equations 12 and 16).

    eta = 0 is deterministic: exponential Euler on the probability-flow ODE; eta = 1 is DDPM with the small variance.
    Order 1, one evaluation a step.
    """

    eta: float = 0.0
    global_order: ClassVar[int] = 1
    calls: ClassVar[int] = 1
    history: ClassVar[int] = 0

    def __post_init__(self) -> None:
        if not 0 <= self.eta <= 1:
            raise InputError(f"DDIM needs 0 <= eta <= 1 (0 deterministic, 1 DDPM), got {self.eta}")

    def step(
        self, denoise: Denoise, x: Tensor, now: Level, then: Level, past: Sequence[Eval], noise: Noise
    ) -> tuple[Tensor, Eval]:
        x0 = denoise(x, now)
        if self.eta == 0:  # alpha' - sigma'/sigma alpha = alpha' (1 - e^-h)
            return exponential_euler(x, x0, now, then), Eval(now, x, x0)
        fresh = -(self.eta**2) * torch.expm1(2 * (now.lam - then.lam))
        keep = then.sigma * (1 - fresh).sqrt() / now.sigma
        terms = [(keep, x), (then.alpha - keep * now.alpha, x0)]
        if not then.is_clean:
            terms.append((then.sigma * fresh.sqrt(), noise()))
        return combine(*terms), Eval(now, x, x0)
