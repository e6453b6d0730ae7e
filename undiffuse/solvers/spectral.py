"""Adams methods about a Gaussian: exact for Gaussian data of one variance, and polynomial in what is left of the data.

For centred data of variance v let n = sqrt(alpha^2 v + sigma^2), the std of x, w = x / n, and tan phi = alpha sqrt(v) /
sigma: phi = 0 is pure noise, pi/2 clean data. Then the probability-flow ODE is dw/dphi = g,

    g = n / (sigma sqrt(v)) (D - alpha v / n^2 x),

zero for a Gaussian (the bracket is D less the best linear denoiser), zero at pure noise and bounded everywhere: -g is
the v-prediction of whitened data in VP coordinates (Salimans and Ho 2022, arXiv 2202.00512, appendix D).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from undiffuse.level import Level
from undiffuse.solvers.base import Eval, combine
from undiffuse.types import Denoise, InputError, Noise

LIMIT = 2.5  # on the sum of a step's |weights|, whose sum is 1: how much an extrapolation may amplify


def adams(nodes: list[Tensor], start: Tensor, end: Tensor) -> Tensor:
    """Weights of the nodes, stacked last, that integrate from start to end the polynomial through the first ones; each
    further node counts as far as the sum stays within `LIMIT`, so that the weights do not jump as levels move, and
    one that coincides with a node before it has weight 0."""
    if start.ndim == 0 and not any(t.requires_grad for t in (*nodes, start, end)):
        return _known(tuple(float(n) for n in nodes), float(start), float(end))
    return _solved(nodes, start, end)


@lru_cache(maxsize=4096)  # a grid's weights are the same for every batch
def _known(nodes: tuple[float, ...], start: float, end: float) -> Tensor:
    return _solved([*torch.tensor(nodes, dtype=torch.float64)], *torch.tensor([start, end], dtype=torch.float64))


def _solved(nodes: list[Tensor], start: Tensor, end: Tensor) -> Tensor:
    h = end - start
    at = (torch.stack(nodes, -1) - start[..., None]) / h[..., None]
    best, more = (
        pad(torch.ones_like(h)[..., None], (0, len(nodes) - 1)),
        torch.ones_like(h, dtype=torch.bool)[..., None],
    )
    for k in range(2, len(nodes) + 1):
        distinct = _weights(at[..., :k].detach()).abs().sum(-1, keepdim=True) < 1e6
        # no gradient comes through a system that is not used, which may be singular
        some = torch.arange(k, dtype=at.dtype, device=at.device)
        w = pad(_weights(torch.where(distinct, at[..., :k], some)), (0, len(nodes) - k))
        low, high = best.abs().sum(-1, keepdim=True), w.abs().sum(-1, keepdim=True)
        far = high > LIMIT
        share = torch.where(far, (LIMIT - low) / torch.where(far, high - low, 1.0), 1.0)
        best = best + torch.where(distinct & more, share, 0.0) * (w - best)
        more = more & ~far
    return h[..., None] * best


def _weights(at: Tensor) -> Tensor:
    """Weights of nodes at (..., k) that integrate polynomials of degree below k from 0 to 1."""
    p = torch.arange(at.shape[-1], dtype=at.dtype, device=at.device)
    due = (1 / (p + 1)).expand(at.shape)[..., None]
    w: Tensor = torch.linalg.solve_ex(at[..., None, :] ** p[:, None], due)[0]
    return w[..., 0]


@dataclass(frozen=True)
class Spectral:
    """The newest `order` values of g as a polynomial in phi, integrated exactly; exact for N(0, variance) in one step.

    Pure noise, where g = 0, is one more known value while there are too few. Older values count less where they
    would be extrapolated too far (`LIMIT`). With `corrector` each step is redone once the evaluation at its end is
    known, at no further cost. One evaluation a step; from a cold start the global order is at most 2, or 3 with
    corrector. The step to clean data takes g to fall like cos phi, as it does for data with a density, and tends to
    x0 as variance -> 0. Data are centred; `spectral` has the data's mean, and a variance for each direction. Needs
    variance > 0 and 1 <= order <= 4.
    """

    calls: ClassVar[int] = 1
    variance: float = 0.25
    order: int = 3
    corrector: bool = True

    def __post_init__(self) -> None:
        if not (0 < self.variance < math.inf and isinstance(self.order, int) and 1 <= self.order <= 4):
            raise InputError(f"Spectral needs variance > 0 and 1 <= order <= 4, got {self}")

    @property
    def global_order(self) -> int:
        return min(self.order, 2) + self.corrector

    @property
    def history(self) -> int:
        return self.order - 1 + self.corrector

    def std(self, level: Level) -> Tensor:
        """n: the std of x."""
        return (level.alpha**2 * self.variance + level.sigma**2).sqrt()

    def phi(self, level: Level) -> Tensor:
        """The angle, 0 at pure noise and pi/2 at clean data."""
        return torch.atan2(level.alpha * math.sqrt(self.variance), level.sigma)

    def integral(self, evals: Sequence[Eval], count: int, now: Level, then: Level) -> list[tuple[Tensor, Tensor]]:
        """n' int g dphi from `now` to `then` through at most `count` values, as coefficients of x and x0."""
        nodes, start, end = [self.phi(e.level) for e in evals[:count]], self.phi(now), self.phi(then)
        if len(nodes) < count:
            nodes.append(torch.zeros_like(start))
        w = adams(nodes, start, end)
        if then.is_clean:
            falls = 2 * torch.cos((start + end) / 2) * torch.sin((end - start) / 2) / torch.cos(start)
            w = torch.where(then.sigma[..., None] == 0, pad(falls[..., None], (0, len(nodes) - 1)), w)
        terms, root = [], math.sqrt(self.variance)
        for e, c in zip(evals[:count], w.unbind(-1), strict=False):
            n, c = self.std(e.level), c * self.std(then) / e.level.sigma
            terms += [(c * n / root, e.x0), (-c * e.level.alpha * root / n, e.x)]
        return terms

    def step(
        self, denoise: Denoise, x: Tensor, now: Level, then: Level, past: Sequence[Eval], noise: Noise
    ) -> tuple[Tensor, Eval]:
        new = Eval(now, x, denoise(x, now))
        if self.corrector and past:
            better = self.integral([new, *past], self.order + 1, past[0].level, now)
            used = self.integral(past, self.order, past[0].level, now)
            x = combine((torch.ones_like(now.alpha), x), *better, *((-c, v) for c, v in used))
        change = self.integral([new, *past], self.order, now, then)
        return combine((self.std(then) / self.std(now), x), *change), new
