"""Schedules: time t in [0, 1] <-> noise level; t = 0 is data. Each has its exact inverse in lam."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Protocol

import torch
from torch import Tensor
from torch.nn.functional import softplus

from undiffuse.level import Level, Space, as_coefficient
from undiffuse.types import InputError


class Schedule(Protocol):
    """Time <-> level; `space` names the coordinates (VP, flow or VE) in which the schedule's levels lie."""

    space: ClassVar[Space]

    def level(self, t: float | Tensor) -> Level:
        """The level at time t in [0, 1]."""
        ...

    def time(self, lam: float | Tensor) -> Tensor:
        """The time whose level has this lam, clamped to [0, 1]."""
        ...


def _check(ok: bool, message: str) -> None:
    if not ok:
        raise InputError(message)


def _time(t: float | Tensor) -> Tensor:
    t = as_coefficient(t)
    _check(bool(((t >= 0) & (t <= 1)).all()), f"time must lie in [0, 1] (0 is data, 1 is noise), got {t.tolist()}")
    return t


def _from_log_alpha(log_alpha: Tensor) -> Level:
    return Level(log_alpha.exp(), (-torch.expm1(2 * log_alpha)).sqrt())


def _log_alpha(lam: float | Tensor) -> Tensor:
    return -softplus(-2 * as_coefficient(lam), threshold=700) / 2


@dataclass(frozen=True)
class VP:
    """The continuous VP-SDE with linear beta(t) (Song et al. 2021, arXiv 2011.13456, equation 33).

    log alpha = -(beta_max - beta_min) t^2 / 4 - beta_min t / 2. Needs 0 < beta_min < beta_max.

    >>> round(float(VP().level(1.0).alpha), 5)
    0.00657
    """

    beta_min: float = 0.1
    beta_max: float = 20.0
    space: ClassVar[Space] = "vp"

    def __post_init__(self) -> None:
        _check(0 < self.beta_min < self.beta_max, f"VP needs 0 < beta_min < beta_max, got {self}")

    def level(self, t: float | Tensor) -> Level:
        t = _time(t)
        return _from_log_alpha(-(self.beta_max - self.beta_min) * t * t / 4 - self.beta_min * t / 2)

    def time(self, lam: float | Tensor) -> Tensor:
        a, b, c = (self.beta_max - self.beta_min) / 4, self.beta_min / 2, -_log_alpha(lam)
        return (2 * c / (b + (b * b + 4 * a * c).sqrt())).nan_to_num(1.0).clamp(0, 1)


@dataclass(frozen=True)
class ScaledLinear:
    """VP with sqrt(beta) linear in t, Stable Diffusion's schedule in continuous time (Rombach et al. 2022).

    log alpha = -(u^3 - beta_min^(3/2)) / (6 d) with d = sqrt(beta_max) - sqrt(beta_min), u = sqrt(beta_min) + d t.
    """

    beta_min: float = 0.85
    beta_max: float = 12.0
    space: ClassVar[Space] = "vp"

    def __post_init__(self) -> None:
        _check(0 < self.beta_min < self.beta_max, f"ScaledLinear needs 0 < beta_min < beta_max, got {self}")

    def level(self, t: float | Tensor) -> Level:
        lo, d = self.beta_min**0.5, self.beta_max**0.5 - self.beta_min**0.5
        td = _time(t) * d  # u^3 - lo^3, expanded so that nothing cancels at small t
        return _from_log_alpha(-td * (3 * lo * lo + 3 * lo * td + td * td) / (6 * d))

    def time(self, lam: float | Tensor) -> Tensor:
        lo, d = math.sqrt(self.beta_min), math.sqrt(self.beta_max) - math.sqrt(self.beta_min)
        cube = -6 * d * _log_alpha(lam)
        u = (lo**3 + cube) ** (1 / 3)
        return (cube / (u * u + u * lo + lo * lo) / d).nan_to_num(1.0).clamp(0, 1)


@dataclass(frozen=True)
class Cosine:
    """alpha = cos((t + s) / (1 + s) pi / 2) / cos(s / (1 + s) pi / 2) (Nichol and Dhariwal 2021, equation 17).

    Pure noise at t = 1 (alpha = 0), clean data at t = 0. Needs s > 0.
    """

    s: float = 0.008
    space: ClassVar[Space] = "vp"

    def __post_init__(self) -> None:
        _check(self.s > 0, f"Cosine needs s > 0, got {self.s}")

    def level(self, t: float | Tensor) -> Level:
        t, a = _time(t), math.pi / 2 / (1 + self.s)
        alpha2 = (torch.sin(a * (1 - t)) / math.sin(a)) ** 2
        sigma2 = torch.sin(a * t) * torch.sin(a * (2 - t)) / math.sin(a) ** 2
        return Level(alpha2.sqrt(), torch.where(alpha2 == 0, 1.0, sigma2).sqrt())

    def time(self, lam: float | Tensor) -> Tensor:
        lam, a = as_coefficient(lam), math.pi / 2 / (1 + self.s)
        alpha2, sigma2 = torch.sigmoid(2 * lam), torch.sigmoid(-2 * lam)
        # sin(a(1-t)) = alpha sin a; the angle from atan2 keeps its precision at both ends
        sin2 = alpha2 * math.sin(a) ** 2
        cos2 = sigma2 * math.sin(a) ** 2 + math.cos(a) ** 2
        return (1 - torch.atan2(sin2.sqrt(), cos2.sqrt()) / a).clamp(0, 1)


@dataclass(frozen=True)
class Sigmoid:
    """alpha^2 falls as a sigmoid of time between `start` and `end` (Jabri et al. 2022, arXiv 2212.11972).

    alpha^2 = (S(end) - S(v)) / (S(end) - S(start)), v = start + t (end - start), S(v) = sigmoid(v / tau).
    """

    start: float = -3.0
    end: float = 3.0
    tau: float = 1.0
    space: ClassVar[Space] = "vp"

    def __post_init__(self) -> None:
        _check(self.start < self.end and self.tau > 0, f"Sigmoid needs start < end and tau > 0, got {self}")

    def _gap(self, hi: Tensor | float, lo: Tensor | float) -> Tensor:
        """S(hi) - S(lo) without cancellation."""
        hi, lo = as_coefficient(hi) / self.tau, as_coefficient(lo) / self.tau
        return torch.sinh((hi - lo) / 2) / (2 * torch.cosh(hi / 2) * torch.cosh(lo / 2))

    def level(self, t: float | Tensor) -> Level:
        t = _time(t)
        whole, span = self._gap(self.end, self.start), self.end - self.start
        alpha2 = self._gap(self.end, self.end - (1 - t) * span) / whole
        return Level(alpha2.sqrt(), (self._gap(self.start + t * span, self.start) / whole).sqrt())

    def time(self, lam: float | Tensor) -> Tensor:
        lam = as_coefficient(lam)
        lo, hi = (torch.sigmoid(as_coefficient(v / self.tau)) for v in (self.start, self.end))
        v = torch.logit(lo * torch.sigmoid(2 * lam) + hi * torch.sigmoid(-2 * lam)) * self.tau
        return ((v - self.start) / (self.end - self.start)).clamp(0, 1)


@dataclass(frozen=True)
class EDM:
    """VE levels alpha = 1, sigma = (a + t (b - a))^rho, a = sigma_min^(1/rho), b = sigma_max^(1/rho).

    Uniform times are the sampling levels of Karras et al. 2022 (arXiv 2206.00364, equation 5). t = 0 is sigma_min;
    grids append the clean level.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    space: ClassVar[Space] = "ve"

    def __post_init__(self) -> None:
        ok = 0 < self.sigma_min < self.sigma_max and self.rho > 0
        _check(ok, f"EDM needs 0 < sigma_min < sigma_max and rho > 0, got {self}")

    def level(self, t: float | Tensor) -> Level:
        t, a, b = _time(t), self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        return Level(torch.ones_like(t), (a + t * (b - a)) ** self.rho)

    def time(self, lam: float | Tensor) -> Tensor:
        a, b = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        t: Tensor = (torch.exp(-as_coefficient(lam) / self.rho) - a) / (b - a)
        return t.clamp(0, 1)


@dataclass(frozen=True)
class VE:
    """VE levels alpha = 1, sigma = sigma_min (sigma_max / sigma_min)^t (Song et al. 2021, equation 30)."""

    sigma_min: float = 0.01
    sigma_max: float = 50.0
    space: ClassVar[Space] = "ve"

    def __post_init__(self) -> None:
        _check(0 < self.sigma_min < self.sigma_max, f"VE needs 0 < sigma_min < sigma_max, got {self}")

    def level(self, t: float | Tensor) -> Level:
        t = _time(t)
        return Level(torch.ones_like(t), self.sigma_min * (self.sigma_max / self.sigma_min) ** t)

    def time(self, lam: float | Tensor) -> Tensor:
        log = math.log(self.sigma_min)
        return ((-as_coefficient(lam) - log) / (math.log(self.sigma_max) - log)).clamp(0, 1)


@dataclass(frozen=True)
class Flow:
    """Rectified flow: alpha = 1 - s, sigma = s, s = shift t / (1 + (shift - 1) t) (Esser et al. 2024, equation 23).

    shift > 1 spends more time at high noise, as larger images need. Needs shift > 0.
    """

    shift: float = 1.0
    space: ClassVar[Space] = "flow"

    def __post_init__(self) -> None:
        _check(self.shift > 0, f"Flow needs shift > 0, got {self.shift}")

    def level(self, t: float | Tensor) -> Level:
        t = _time(t)
        whole = 1 + (self.shift - 1) * t
        return Level((1 - t) / whole, self.shift * t / whole)

    def time(self, lam: float | Tensor) -> Tensor:
        lam = as_coefficient(lam)
        alpha, sigma = torch.sigmoid(lam), torch.sigmoid(-lam)
        return (sigma / (sigma + self.shift * alpha)).clamp(0, 1)


@dataclass(frozen=True, eq=False)
class Discrete:
    """A table of T levels given by alphas_cumprod (alpha^2, decreasing): `index` i is time (i + 1) / T.

    Exact at its grid points; between them alpha^2 is linear in t, from 1 at t = 0. `Discrete.linear()` is DDPM's
    schedule of 1,000 betas. Raises InputError unless 1 > alphas_cumprod[0] > ... > alphas_cumprod[T - 1] >= 0.

    >>> ddpm = Discrete.linear()
    >>> float(ddpm.index(0).alpha ** 2)
    0.9999
    """

    alphas_cumprod: tuple[float, ...]
    space: ClassVar[Space] = "vp"

    def __post_init__(self) -> None:
        object.__setattr__(self, "alphas_cumprod", tuple(float(a) for a in self.alphas_cumprod))
        down = all(a > b for a, b in zip((1.0, *self.alphas_cumprod), self.alphas_cumprod, strict=False))
        _check(
            len(self.alphas_cumprod) > 0 and down and self.alphas_cumprod[-1] >= 0,
            "alphas_cumprod must fall strictly from below 1 to at least 0: a repeated or rising entry has no inverse",
        )

    @cached_property
    def _table(self) -> Tensor:
        return torch.tensor((1.0, *self.alphas_cumprod), dtype=torch.float64)

    @property
    def T(self) -> int:
        """The number of levels."""
        return len(self.alphas_cumprod)

    @staticmethod
    def from_betas(betas: Tensor) -> Discrete:
        """From the variances beta_i in (0, 1] of the forward steps q(x_i | x_(i-1)) = N(sqrt(1 - beta_i) x, beta_i)."""
        return Discrete(tuple((1 - betas.double()).cumprod(0).tolist()))

    @staticmethod
    def linear(T: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> Discrete:
        """DDPM's linear betas (Ho et al. 2020, section 4)."""
        return Discrete.from_betas(torch.linspace(beta_start, beta_end, T, dtype=torch.float64))

    @staticmethod
    def scaled_linear(T: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012) -> Discrete:
        """Stable Diffusion's betas: sqrt(beta) linear (Rombach et al. 2022)."""
        return Discrete.from_betas(torch.linspace(beta_start**0.5, beta_end**0.5, T, dtype=torch.float64) ** 2)

    @staticmethod
    def cosine(T: int = 1000, s: float = 0.008, max_beta: float = 0.999) -> Discrete:
        """Improved DDPM's cosine table with its betas clipped at 0.999 (Nichol and Dhariwal 2021)."""
        bar = Cosine(s).level(torch.linspace(0, 1, T + 1, dtype=torch.float64)).alpha ** 2
        return Discrete.from_betas((1 - bar[1:] / bar[:-1]).clamp(max=max_beta))

    def index(self, i: int) -> Level:
        """The level of `index` i in 0 ... T - 1."""
        _check(0 <= i < self.T, f"index must lie in 0 ... {self.T - 1}, got {i}")
        return self.level((i + 1) / self.T)

    def level(self, t: float | Tensor) -> Level:
        position = _time(t) * self.T
        position = torch.where((position - position.round()).abs() < 1e-9, position.round(), position)
        lo = position.floor().long().clamp(max=self.T - 1)
        part, table = position - lo, self._table
        alpha2 = torch.lerp(table[lo], table[lo + 1], part)
        return Level(alpha2.sqrt(), torch.lerp(1 - table[lo], 1 - table[lo + 1], part).sqrt())

    def time(self, lam: float | Tensor) -> Tensor:
        lam, table = as_coefficient(lam), self._table
        alpha2, sigma2 = torch.sigmoid(2 * lam), torch.sigmoid(-2 * lam)
        hi = torch.searchsorted(-table, -alpha2.contiguous()).clamp(1, self.T)
        part = (sigma2 - (1 - table[hi - 1])) / (table[hi - 1] - table[hi])
        return ((hi - 1 + part) / self.T).clamp(0, 1)


@dataclass(frozen=True)
class ZeroTerminalSNR:
    """Another VP schedule with its alpha shifted and scaled so that alpha = 0 at t = 1 (Lin et al. 2024, algorithm 1).

    The wrapper for continuous schedules; use `zero_terminal_snr`, which also treats tables as the paper does.
    """

    base: Schedule
    space: ClassVar[Space] = "vp"

    def level(self, t: float | Tensor) -> Level:
        was, last = self.base.level(t), self.base.level(1.0).alpha
        short = was.sigma**2 / (1 + was.alpha) / (1 - last)  # 1 - alpha without cancellation
        alpha = (was.alpha - last) / (1 - last)
        return Level(alpha, torch.where(alpha == 0, 1.0, short * (1 + alpha)).sqrt())

    def time(self, lam: float | Tensor) -> Tensor:
        now, last = Level.at(lam), self.base.level(1.0).alpha
        short = now.sigma**2 / (1 + now.alpha) * (1 - last)  # 1 - alpha of the base
        alpha = 1 - short
        return self.base.time(alpha.log() - (short * (1 + alpha)).log() / 2)


def zero_terminal_snr(schedule: Schedule) -> Schedule:
    """The VP schedule rescaled to end in pure noise (Lin et al. 2024, arXiv 2305.08891, algorithm 1).

    Train and sample with a v, flow or x0 head on it: eps says nothing about x0 at alpha = 0. Raises InputError for
    schedules that are not VP.

    >>> float(zero_terminal_snr(VP()).level(1.0).alpha)
    0.0
    """
    _check(schedule.space == "vp", f"zero terminal SNR rescales VP schedules; {schedule} is in {schedule.space} form")
    if isinstance(schedule, Discrete):
        alpha = torch.tensor(schedule.alphas_cumprod, dtype=torch.float64).sqrt()
        alpha = (alpha - alpha[-1]) * (alpha[0] / (alpha[0] - alpha[-1]))
        return Discrete(tuple((alpha**2).tolist()))
    return schedule if bool(schedule.level(1.0).alpha == 0) else ZeroTerminalSNR(schedule)


SCHEDULES: dict[str, Callable[..., Schedule]] = {
    "vp": VP,
    "scaled-linear": ScaledLinear,
    "cosine": Cosine,
    "sigmoid": Sigmoid,
    "edm": EDM,
    "ve": VE,
    "flow": Flow,
    "ddpm": Discrete.linear,
    "stable-diffusion": Discrete.scaled_linear,
    "iddpm": Discrete.cosine,
}
