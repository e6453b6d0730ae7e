"""Exponential Adams methods in lam on x0, of any order, with corrector and noise.

The multistep family behind DPM-Solver++ (arXiv 2211.01095), UniPC (2302.04867) and SA-Solver (2309.05019), with the
weights computed instead of expanded by hand.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from undiffuse.level import Level
from undiffuse.solvers.base import Eval, combine
from undiffuse.solvers.exponential import weights
from undiffuse.types import Denoise, InputError, Noise


@dataclass(frozen=True)
class Adams:
    """x_then = sigma'/sigma e^(-eta^2 h) x + alpha' kappa int_0^h e^(-kappa (h-u)) D(u) du + noise, kappa = 1 + eta^2.

    D(u) interpolates the newest `order` evaluations in lam; the noise has std sigma' sqrt(1 - e^(-2 eta^2 h)). With
    `corrector` each step is redone once the evaluation at its end is known, at no further cost. One evaluation a step.
    A step has order `order`, one more with corrector, once enough evaluations lie behind it; the first step of a run
    has only one, which limits the global order to 2, or 3 with corrector. With eta > 0 the noise limits it to 1. Needs
    1 <= order <= 6 and 0 <= eta <= 1 (0 probability-flow ODE, 1 reverse SDE).
    """

    max_order: ClassVar[int] = 6
    calls: ClassVar[int] = 1
    order: int = 2
    eta: float = 0.0
    corrector: bool = False

    def __post_init__(self) -> None:
        if not (isinstance(self.order, int) and 1 <= self.order <= self.max_order):
            raise InputError(f"Adams needs 1 <= order <= {self.max_order}, got {self.order}")
        if not 0 <= self.eta <= 1:
            raise InputError(f"Adams needs 0 <= eta <= 1 (0 ODE, 1 SDE), got {self.eta}")

    @property
    def global_order(self) -> int:
        return min(self.order, 2) + self.corrector if self.eta == 0 else 1

    @property
    def history(self) -> int:
        return self.order

    def step(
        self, denoise: Denoise, x: Tensor, now: Level, then: Level, past: Sequence[Eval], noise: Noise
    ) -> tuple[Tensor, Eval]:
        kappa, x0 = 1 + self.eta**2, denoise(x, now)
        new = Eval(now, x, x0)
        if self.corrector and past and torch.isfinite(past[0].level.lam).all():
            start, known = past[0].level, list(past[: self.order])
            better, used = self._terms([new, *known], start, now, kappa), self._terms(known, start, now, kappa)
            x = combine((torch.ones_like(now.alpha), x), *better, *((-c, x0) for c, x0 in used))
        evals = [new, *past][: self.order]
        decay, h = then.sigma / now.sigma, then.lam - now.lam
        if self.eta:
            decay = decay * torch.exp(-(self.eta**2) * h)
        terms = [(decay, x), *self._terms(evals, now, then, kappa)]
        if self.eta and not then.is_clean:
            terms.append((then.sigma * (-torch.expm1(-2 * self.eta**2 * h)).sqrt(), noise()))
        return combine(*terms), new

    @staticmethod
    def _terms(evals: list[Eval], start: Level, end: Level, kappa: float) -> list[tuple[Tensor, Tensor]]:
        """alpha' kappa int_0^h e^(-kappa (h-u)) D(u) du as (coefficient, x0) for each evaluation."""
        h = end.lam - start.lam
        if math.isinf(h.max()):
            evals = evals[:1]
        evals = [e for e in evals if len(evals) == 1 or torch.isfinite(e.level.lam).all()]
        w = weights([e.level.lam - start.lam for e in evals], h, kappa)
        return [(end.alpha * w[..., j], e.x0) for j, e in enumerate(evals)]
