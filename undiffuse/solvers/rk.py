"""Explicit Runge-Kutta methods on the probability-flow ODE, from a Butcher tableau (Butcher 1964)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from undiffuse.level import Level, between
from undiffuse.solvers.base import Eval, combine, exponential_euler
from undiffuse.solvers.butcher import Butcher, method_of
from undiffuse.types import Denoise, Noise


def stages(denoise: Denoise, first: Eval, then: Level, a: tuple[tuple[float, ...], ...]) -> list[Eval]:
    """The evaluations of a step; its equal parts are equal steps in sigma / alpha."""
    now, out = first.level, [first]
    s, end = now.sigma / now.alpha, then.sigma / then.alpha
    for row in a[1:]:
        c = sum(row)
        level = then if abs(c - 1) < 1e-12 else between(now, then, -(s + c * (end - s)).log())
        x = combine((level.alpha / now.alpha, first.x), *weighted(row, level.alpha * (end - s), out))
        out.append(Eval(level, x, denoise(x, level)))
    return out


def weighted(weights: Sequence[float], scale: Tensor, evals: list[Eval]) -> list[tuple[Tensor, Tensor]]:
    """scale * sum of weight * eps as terms."""
    return [(w * scale, e.eps) for w, e in zip(weights, evals, strict=True) if w]


@dataclass(frozen=True)
class RungeKutta:
    """Any explicit Runge-Kutta method on d(x / alpha) = eps d(sigma / alpha), by name in `METHODS` or `own`.

    Its order and as many evaluations a step as it has stages; a step from pure noise (alpha = 0) or to clean data is
    Euler's, with 1, as eps has no value at those ends.
    """

    method: str = "rk4"
    own: Butcher | None = None
    history: ClassVar[int] = 0

    def __post_init__(self) -> None:
        method_of(self.method, self.own)

    @property
    def butcher(self) -> Butcher:
        """The method's coefficients."""
        return method_of(self.method, self.own)

    @property
    def global_order(self) -> int:
        return self.butcher.order

    @property
    def calls(self) -> int:
        return len(self.butcher.b)

    def step(
        self, denoise: Denoise, x: Tensor, now: Level, then: Level, past: Sequence[Eval], noise: Noise
    ) -> tuple[Tensor, Eval]:
        new, (a, b, *_) = Eval(now, x, denoise(x, now)), self.butcher
        if not bool(torch.isfinite(then.lam - now.lam).all()):
            return exponential_euler(x, new.x0, now, then), new
        change = then.sigma - then.alpha * now.sigma / now.alpha
        return combine((then.alpha / now.alpha, x), *weighted(b, change, stages(denoise, new, then, a))), new
