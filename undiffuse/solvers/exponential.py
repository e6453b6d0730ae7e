"""Exponential integrators of the diffusion equations in lam = log(alpha / sigma): one formula, two predictions.

With h = lam' - lam, kappa = 1 + eta^2 and z standard normal, a step is exactly (Lu et al. 2022, arXiv 2211.01095)

    x0:   x' = sigma'/sigma e^(-eta^2 h) x + alpha' kappa int_0^h e^(-kappa (h-u)) x0(u) du
               + sigma' sqrt(1 - e^(-2 eta^2 h)) z
    eps:  x' = alpha'/alpha x - sigma' kappa int_0^h e^(h-u) eps(u) du + eta sigma' sqrt(e^(2 h) - 1) z

Solvers differ in how they replace the prediction by what they have evaluated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from undiffuse.level import Level
from undiffuse.solvers.base import Eval
from undiffuse.types import InputError

Prediction = Literal["x0", "eps"]
Weigh = Callable[[list[Tensor], Tensor, "float | Tensor"], Tensor]


def check_prediction(prediction: str, eta: float) -> None:
    """Raises InputError unless prediction is "x0" or "eps" and 0 <= eta <= 1."""
    if prediction not in ("x0", "eps"):
        raise InputError(f"prediction must be 'x0' or 'eps', got {prediction!r}")
    if not 0 <= eta <= 1:
        raise InputError(f"eta must be 0 (probability-flow ODE) to 1 (reverse SDE), got {eta}")


# J_p = sum over k of (-1)^k p! / (p + k + 1)! z^(k + 1): row k, column p
SERIES = torch.tensor(
    [[(-1) ** k * math.factorial(p) / math.factorial(p + k + 1) for p in range(8)] for k in range(20)],
    dtype=torch.float64,
)
EXPONENTS = torch.arange(1, 21, dtype=torch.float64)


def moments(z: Tensor, count: int) -> Tensor:
    """J_p = z int_0^1 e^(-z (1 - s)) s^p ds for p = 0 ... count - 1 < 8, stacked last: a series at small z, else the
    recurrence J_p = 1 - p J_(p-1) / z."""
    small = z.abs() < 1
    if bool(small.all()):
        return (z[..., None] ** EXPONENTS.to(z.device)) @ SERIES[:, :count].to(z.device)
    safe, out = torch.where(small, 1.0, z), [-torch.expm1(-z)]
    for p in range(1, count):
        out.append(1 - p * out[-1] / safe)
    large = torch.stack(out, -1)
    return (
        torch.where(small[..., None], moments(torch.where(small, z, 0.0), count), large) if bool(small.any()) else large
    )


def weights(nodes: list[Tensor], h: Tensor, kappa: float | Tensor) -> Tensor:
    """Weights w_j of the nodes (offsets in lam from the step's start), stacked last, such that sum_j w_j D(node_j) =
    kappa int_0^h e^(-kappa (h - u)) D(u) du for every polynomial D of lower degree than there are nodes."""
    if len(nodes) == 1:  # also where h is infinite
        return -torch.expm1(-kappa * h)[..., None]
    if h.ndim == 0 and not (h.requires_grad or any(n.requires_grad for n in nodes)):
        return _known(tuple(float(n) for n in nodes), float(h), float(kappa))
    return _solved(nodes, h, kappa)


@lru_cache(maxsize=4096)  # a grid's weights are the same for every batch
def _known(nodes: tuple[float, ...], h: float, kappa: float) -> Tensor:
    numbers = [torch.tensor(n, dtype=torch.float64) for n in nodes]
    return _solved(numbers, torch.tensor(h, dtype=torch.float64), kappa)


def _solved(nodes: list[Tensor], h: Tensor, kappa: float | Tensor) -> Tensor:
    powers = torch.arange(len(nodes), dtype=torch.float64, device=h.device)[:, None]
    vandermonde = (torch.stack(nodes, -1) / h[..., None])[..., None, :] ** powers
    w: Tensor = torch.linalg.solve(vandermonde, moments(kappa * h, len(nodes)))
    return w


def halved(nodes: list[Tensor], h: Tensor, kappa: float | Tensor, whole: Tensor | None = None) -> Tensor:
    """The papers' shorter weights of two nodes, one of them the step's start: the slope counts B / 2 with B = `whole`,
    by default 1 - e^(-kappa h), instead of its exact integral, a difference of third order. Other numbers of nodes get
    `weights`."""
    if len(nodes) != 2:
        return weights(nodes, h, kappa)
    total = -torch.expm1(-kappa * h)
    slope = (total if whole is None else whole) * h / (2 * (nodes[1] - nodes[0]))
    starts_first = bool((nodes[0] == 0).all())
    return torch.stack([total - slope, slope] if starts_first else [-slope, total + slope], -1)


def linear(now: Level, then: Level, eta: float | Tensor, prediction: Prediction) -> tuple[Tensor, Tensor | None]:
    """(decay, std) of x' = decay x + predictions + std z; std is None where nothing is random."""
    h = then.lam - now.lam
    decay = then.alpha / now.alpha if prediction == "eps" else then.sigma / now.sigma
    if isinstance(eta, float | int) and eta == 0:
        return decay, None
    if prediction == "eps":
        return decay, eta * then.sigma * torch.expm1(2 * h).sqrt()
    lost = torch.nan_to_num(eta**2 * h, nan=0.0)  # no noise over an infinite step: 0 * inf
    return decay * torch.exp(-lost), then.sigma * (-torch.expm1(-2 * lost)).sqrt()


def integral(
    evals: Sequence[Eval], start: Level, end: Level, eta: float | Tensor, prediction: Prediction, weigh: Weigh = weights
) -> list[tuple[Tensor, Tensor]]:
    """The predictions' part of a step as (coefficient, x0 or eps) of each evaluation."""
    h, kappa = end.lam - start.lam, 1 + eta**2
    nodes = [e.level.lam - start.lam for e in evals]
    if prediction == "eps":
        w = end.sigma[..., None] * kappa * weigh(nodes, h, -1.0)
        return [(w[..., j], e.eps) for j, e in enumerate(evals)]
    w = end.alpha[..., None] * weigh(nodes, h, kappa)
    return [(w[..., j], e.x0) for j, e in enumerate(evals)]


def finite(evals: Sequence[Eval]) -> list[Eval]:
    """The evaluations at a finite lam: one at pure noise is no node of a polynomial in lam."""
    return [e for e in evals if bool(torch.isfinite(e.level.lam).all())]
