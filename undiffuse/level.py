"""Noise levels, and the linear algebra between x0, eps, score, v and u at one level."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from undiffuse.types import InputError

Space = Literal["vp", "flow", "ve"]
Kind = Literal["x0", "eps", "score", "v", "u"]


def as_coefficient(value: float | Tensor) -> Tensor:
    """A float64 tensor: 0-dim on the CPU for numbers, so that no device ever has to be waited for."""
    return value.double() if isinstance(value, Tensor) else torch.tensor(float(value), dtype=torch.float64)


@dataclass(frozen=True, eq=False)
class Level:
    """A noise level: x = alpha x0 + sigma eps with eps standard normal.

    `alpha` and `sigma` are amplitudes >= 0, held in float64: 0-dim CPU tensors when sampling, (b, 1, ..., 1) when
    every sample has its own level. alpha = 0 is pure noise, sigma = 0 is clean data.

    >>> level = Level(0.8, 0.6)
    >>> round(float(level.lam), 4)
    0.2877
    """

    alpha: Tensor
    sigma: Tensor

    def __init__(self, alpha: float | Tensor, sigma: float | Tensor) -> None:
        object.__setattr__(self, "alpha", as_coefficient(alpha))
        object.__setattr__(self, "sigma", as_coefficient(sigma))

    @staticmethod
    def at(lam: float | Tensor, space: Space = "vp") -> Level:
        """The level with this lam in VP (alpha^2 + sigma^2 = 1), flow (alpha + sigma = 1) or VE (alpha = 1) form."""
        lam = as_coefficient(lam)
        if space == "vp":
            return Level(torch.sigmoid(2 * lam).sqrt(), torch.sigmoid(-2 * lam).sqrt())
        if space == "flow":
            return Level(torch.sigmoid(lam), torch.sigmoid(-lam))
        return Level(torch.ones_like(lam), torch.exp(-lam))

    @cached_property
    def lam(self) -> Tensor:
        """log(alpha / sigma), half the log signal-to-noise ratio; -inf at pure noise, +inf at clean data."""
        return self.alpha.log() - self.sigma.log()

    @cached_property
    def is_clean(self) -> bool:
        """Whether sigma = 0, for any sample: a step that ends here adds no noise and extrapolates nothing."""
        return not bool(self.sigma.all())

    def reshape(self, *shape: int) -> Level:
        """The same level with its tensors reshaped, e.g. `(-1, 1, 1, 1)` to give each of b images its own."""
        return Level(self.alpha.reshape(*shape), self.sigma.reshape(*shape))

    def to(self, device: torch.device | str) -> Level:
        """The same level with its tensors on another device, to meet data there; 0-dim ones may stay on the CPU."""
        return Level(self.alpha.to(device), self.sigma.to(device))

    def diffuse(self, x0: Tensor, eps: Tensor) -> Tensor:
        """A draw of q(x_t | x0) = N(alpha x0, sigma^2) from standard normal `eps`; same shape and dtype as x0."""
        return (self.alpha * x0 + self.sigma * eps).to(x0.dtype)


# What each prediction F means: F = a x0 + b eps.
PREDICTIONS: dict[Kind, Callable[[Level], tuple[Tensor, Tensor]]] = {
    "x0": lambda lv: (torch.ones_like(lv.alpha), torch.zeros_like(lv.alpha)),
    "eps": lambda lv: (torch.zeros_like(lv.alpha), torch.ones_like(lv.alpha)),
    "score": lambda lv: (torch.zeros_like(lv.alpha), -1 / lv.sigma),
    "v": lambda lv: (-lv.sigma, lv.alpha),
    "u": lambda lv: (-torch.ones_like(lv.alpha), torch.ones_like(lv.alpha)),
}


def skip_out(kind: Kind, level: Level) -> tuple[Tensor, Tensor]:
    """(c_skip, c_out) with x0 = c_skip x + c_out F, solved from F = a x0 + b eps and x = alpha x0 + sigma eps."""
    a, b = PREDICTIONS[kind](level)
    det = a * level.sigma - b * level.alpha
    return -b / det, level.sigma / det


def to_x0(kind: Kind, value: Tensor, x: Tensor, level: Level) -> Tensor:
    """x0 from another prediction at x; raises InputError where the level does not determine it (eps at alpha = 0).

    >>> x0, eps = torch.ones(2), torch.full((2,), 3.0)
    >>> level = Level(0.8, 0.6)
    >>> torch.allclose(to_x0("v", 0.8 * eps - 0.6 * x0, level.diffuse(x0, eps), level), x0)
    True
    """
    if kind in ("eps", "score") and bool((level.alpha == 0).any()):
        raise InputError(f"{kind} does not determine x0 at alpha = 0 (pure noise): use v, u or x0 there")
    skip, out = skip_out(kind, level)
    return (skip * x + out * value).to(x.dtype)


def from_x0(kind: Kind, x0: Tensor, x: Tensor, level: Level) -> Tensor:
    """eps = (x - alpha x0) / sigma, score = -eps / sigma, v = alpha eps - sigma x0 or u = eps - x0; needs sigma > 0."""
    if kind == "x0":
        return x0
    if bool((level.sigma == 0).any()):
        raise InputError(f"{kind} is not defined at sigma = 0 (clean data): stop at a level with sigma > 0")
    a, b = PREDICTIONS[kind](level)
    return (a * x0 + b * (x - level.alpha * x0) / level.sigma).to(x0.dtype)


def between(now: Level, then: Level, lam: Tensor) -> Level:
    """The level with this lam on the way from `now` to `then`, in the form that both share.

    The form is VE where alpha stays, flow where alpha + sigma stays, and otherwise VP scaled by the root of
    alpha^2 + sigma^2, so that a denoiser written for one form only ever sees that form.
    """
    total = now.alpha + now.sigma
    flow = (total - (then.alpha + then.sigma)).abs() <= 1e-9 * total
    vp, plain = Level.at(lam), Level.at(lam, "flow")
    scale = torch.where(flow, total * (plain.alpha / vp.alpha), (now.alpha**2 + now.sigma**2).sqrt())
    scale = torch.where((now.alpha - then.alpha).abs() <= 1e-9 * total, now.alpha / vp.alpha, scale)
    return Level(scale * vp.alpha, scale * vp.sigma)


def transition(cleaner: Level, noisier: Level) -> tuple[Tensor, Tensor]:
    """(scale, std) of the forward step q(x_noisier | x_cleaner) = N(scale x_cleaner, std^2).

    With h = lam_cleaner - lam_noisier >= 0, std = sigma_noisier sqrt(1 - e^(-2 h)); for neighbouring DDPM levels
    this is N(sqrt(1 - beta) x, beta), equation 2 of Ho et al. 2020 (arXiv 2006.11239).
    """
    h = cleaner.lam - noisier.lam
    return noisier.alpha / cleaner.alpha, noisier.sigma * (-torch.expm1(-2 * h)).sqrt()


def reverse_transition(now: Level, then: Level) -> tuple[Tensor, Tensor, Tensor]:
    """(c_x, c_x0, std) of q(x_then | x_now, x0) = N(c_x x_now + c_x0 x0, std^2), then being the cleaner level.

    Equations 6 and 7 of Ho et al. 2020, for any two levels; std^2 is their beta-tilde.
    """
    h = then.lam - now.lam
    c_x = then.sigma / now.sigma * torch.exp(-h)
    return c_x, -then.alpha * torch.expm1(-2 * h), then.sigma * (-torch.expm1(-2 * h)).sqrt()


def reverse_bounds(now: Level, then: Level) -> tuple[Tensor, Tensor]:
    """Variances of x_then given x_now for a single data point (beta-tilde) and for data of unit variance (beta).

    Any data of variance at most one per element lies between. In VP form the second is the forward step's own variance;
    elsewhere it is scaled so that it means the same.
    """
    small = reverse_transition(now, then)[2] ** 2
    ratio = (then.alpha**2 + then.sigma**2) / (now.alpha**2 + now.sigma**2)
    return small, transition(then, now)[1] ** 2 * ratio


def interpolated(v: Tensor, small: Tensor, large: Tensor) -> Tensor:
    """The variance whose logarithm is linear in v, from `small` at v = -1 to `large` at 1 (Nichol and Dhariwal 2021,
    equation 15)."""
    fraction = (v + 1) / 2
    return large**fraction * small ** (1 - fraction)


def reverse_divergence(now: Level, then: Level, square: Tensor, var: Tensor) -> Tensor:
    """KL(q(x_then | x_now, x0) || N(c_x x_now + c_x0 x0_hat, var)) per element in nats, given (x0_hat - x0)^2.

    Both are Gaussian with independent elements (Ho et al. 2020, equation 5). Infinite at a clean `then`.
    """
    _, c_x0, std = reverse_transition(now, then)
    return 0.5 * (c_x0**2 * square / var + std**2 / var - 1 + var.log() - 2 * std.log())


def reconstruction(now: Level, square: Tensor) -> Tensor:
    """-log N(x0; x0_hat, sigma^2 / alpha^2) per element in nats, given (x0_hat - x0)^2: the bound's last term."""
    var = (now.sigma / now.alpha) ** 2
    return 0.5 * (square / var + (2 * math.pi * var).log())
