"""Grids: the levels that a sampler visits, noisiest first. A grid is a function (schedule, steps) -> levels."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from undiffuse.level import Level
from undiffuse.schedule import Schedule
from undiffuse.types import InputError

Levels = tuple[Level, ...]
Grid = Callable[[Schedule, int], Levels]


class Checked(NamedTuple):
    """Levels that a solver can visit, and for each step whether the noise rises."""

    levels: Levels
    rises: list[bool]


def check_levels(levels: Sequence[Level]) -> Checked:
    """The levels and which steps rise, or InputError naming the first that no solver could visit.

    Refused: fewer than two levels, negative or non-finite amplitudes, neighbours with the same lam, and clean data
    (sigma = 0) as a start. Levels may rise again: the way up adds noise (Restart).
    """
    levels = tuple(levels)
    if len(levels) < 2:
        raise InputError(f"a grid needs at least 2 levels (1 step), got {len(levels)}")
    alpha, sigma, lam = _stacked(levels)
    sound = torch.isfinite(alpha) & torch.isfinite(sigma) & (alpha >= 0) & (sigma >= 0) & (alpha + sigma > 0)
    gap = lam[1:] - lam[:-1]
    if not bool(sound.all()):
        i = int((~sound).any(1).nonzero()[0])
        raise InputError(f"level {i} must have finite alpha, sigma >= 0, not both 0; got {levels[i]}")
    if bool((sigma[0] == 0).any()):
        raise InputError("level 0 is clean data (sigma = 0): there is nothing to denoise, start at a noisier level")
    if not bool(((gap > 0).all(1) | (gap < 0).all(1)).all()):
        i = int(((gap > 0).all(1) | (gap < 0).all(1)).logical_not().nonzero()[0])
        if bool((lam[i] == lam[i + 1]).any()):
            raise InputError(f"levels {i} and {i + 1} are the same (lam = {lam[i].tolist()}): drop one of them")
        raise InputError(f"levels {i} and {i + 1}: the noise falls for some samples and rises for others")
    return Checked(levels, (gap < 0)[:, 0].tolist())


def _stacked(levels: Levels) -> tuple[Tensor, Tensor, Tensor]:
    """alpha, sigma and lam of all levels, (levels, 1) or (levels, samples) each; the levels remember their lam."""
    parts: Any = ([level.alpha for level in levels], [level.sigma for level in levels], [level.lam for level in levels])
    if len({c.shape for c in parts[0]}) > 1:  # a 0-dim level among levels per sample
        parts = tuple(list(torch.broadcast_tensors(*part)) for part in parts)  # type: ignore[no-untyped-call]
    alpha, sigma, lam = (torch.stack(part).reshape(len(levels), -1) for part in parts)
    return alpha, sigma, lam


def _steps(steps: int) -> int:
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise InputError(f"steps must be a whole number >= 1, got {steps!r}")
    return steps


def _at_times(schedule: Schedule, times: Tensor) -> Levels:
    """The levels at these times and then clean data, once."""
    levels = [schedule.level(t) for t in times]
    if bool(levels[-1].sigma > 0):
        levels.append(Level.at(math.inf, schedule.space))
    return tuple(levels)


def _between(schedule: Schedule, steps: int, lam_min: float, lam_max: float, curve: Callable[..., Tensor]) -> Levels:
    """`steps` levels from the schedule's noisiest, along `curve` in lam, then clean data.

    Where the schedule starts at pure noise (lam = -inf) that level comes first and the curve starts at lam_min.
    """
    first, last = schedule.level(1.0), schedule.level(0.0)
    lam_max = min(lam_max, float(last.lam))
    pure = bool(first.alpha == 0)
    lams = curve(lam_min, lam_max, steps - 1) if pure else curve(float(first.lam), lam_max, steps)[1:]
    return (first, *(Level.at(lam, schedule.space) for lam in lams), Level.at(math.inf, schedule.space))


@dataclass(frozen=True)
class UniformT:
    """Equal steps in time from t = 1 to data; the last step goes to sigma = 0. For `EDM` these are its own levels."""

    def __call__(self, schedule: Schedule, steps: int) -> Levels:
        ends_clean = bool(schedule.level(0.0).sigma == 0)
        return _at_times(schedule, torch.linspace(1, 0, _steps(steps) + ends_clean, dtype=torch.float64))


@dataclass(frozen=True)
class UniformLam:
    """Equal steps in lam (half the log-SNR) down to lam_max, then one step to clean data; needs lam_min < lam_max.

    lam_min is used only where the schedule starts at pure noise (alpha = 0).
    """

    lam_min: float = -4.0
    lam_max: float = 5.0

    def __post_init__(self) -> None:
        if not self.lam_min < self.lam_max:
            raise InputError(f"UniformLam needs lam_min < lam_max, got {self}")

    def __call__(self, schedule: Schedule, steps: int) -> Levels:
        def curve(lo: float, hi: float, n: int) -> Tensor:
            return torch.linspace(lo, hi, n, dtype=torch.float64)

        return _between(schedule, _steps(steps), self.lam_min, self.lam_max, curve)


@dataclass(frozen=True)
class Karras:
    """Levels with (sigma / alpha)^(1 / rho) in equal steps (Karras et al. 2022, equation 5), then clean data.

    sigma_min bounds sigma / alpha below, unless the schedule does; sigma_max is where the curve starts after pure noise
    (alpha = 0), while other schedules start at their own noisiest level.
    """

    rho: float = 7.0
    sigma_min: float = 0.002
    sigma_max: float = 80.0

    def __post_init__(self) -> None:
        if not (0 < self.sigma_min < self.sigma_max and self.rho > 0):
            raise InputError(f"Karras needs 0 < sigma_min < sigma_max and rho > 0, got {self}")

    def __call__(self, schedule: Schedule, steps: int) -> Levels:
        def curve(lo: float, hi: float, n: int) -> Tensor:
            ends = math.exp(-lo / self.rho), math.exp(-hi / self.rho)
            return -self.rho * torch.linspace(*ends, n, dtype=torch.float64).log()

        return _between(schedule, _steps(steps), -math.log(self.sigma_max), -math.log(self.sigma_min), curve)


@dataclass(frozen=True)
class Polynomial:
    """Times (i / N)^power, i = N ... 0: power = 2 is DDIM's quadratic spacing, 1 is `UniformT`. The last step goes to
    sigma = 0. Needs power > 0."""

    power: float = 2.0

    def __post_init__(self) -> None:
        if not 0 < self.power < math.inf:
            raise InputError(f"Polynomial needs power > 0, got {self.power}")

    def __call__(self, schedule: Schedule, steps: int) -> Levels:
        ends_clean = bool(schedule.level(0.0).sigma == 0)
        return _at_times(schedule, torch.linspace(1, 0, _steps(steps) + ends_clean, dtype=torch.float64) ** self.power)


@dataclass(frozen=True)
class Beta:
    """Times at equal quantiles of the Beta(a, b) distribution (Lee et al. 2024, arXiv 2407.12173): 0.6, 0.6 puts
    more steps at both ends. The last step goes to sigma = 0. Needs a, b > 0."""

    a: float = 0.6
    b: float = 0.6

    def __post_init__(self) -> None:
        if not (0 < self.a < math.inf and 0 < self.b < math.inf):
            raise InputError(f"Beta needs a > 0 and b > 0, got {self.a} and {self.b}")

    def __call__(self, schedule: Schedule, steps: int) -> Levels:
        ends_clean = bool(schedule.level(0.0).sigma == 0)
        u = torch.linspace(1, 0, _steps(steps) + ends_clean, dtype=torch.float64)
        return _at_times(schedule, beta_quantile(u, self.a, self.b))


def beta_quantile(u: Tensor, a: float, b: float) -> Tensor:
    """The inverse of the Beta(a, b) distribution function at u in [0, 1], by bisection."""
    scale = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b))

    def lower(x: Tensor, a: float, b: float) -> Tensor:  # the power series of the distribution function, for x <= 1/2
        term, total = torch.ones_like(x), torch.ones_like(x) / a
        for n in range(1, 64):
            term = term * x * (n - b) / n
            total = total + term / (a + n)
        return scale * x**a * total

    lo, hi = torch.zeros_like(u), torch.ones_like(u)
    for _ in range(60):
        x = (lo + hi) / 2
        below = torch.where(x <= 0.5, lower(x.clamp(max=0.5), a, b), 1 - lower((1 - x).clamp(max=0.5), b, a)) < u
        lo, hi = torch.where(below, x, lo), torch.where(below, hi, x)
    return torch.where(u == 0, 0.0, torch.where(u == 1, 1.0, (lo + hi) / 2))


# sigma / alpha of ten steps, optimised for each model (Sabour et al. 2024, arXiv 2404.14507, appendix)
AYS_LEVELS: dict[str, tuple[float, ...]] = {
    "sd15": (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029),
    "sdxl": (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029),
    "svd": (700.00, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034, 0.002),
}


@dataclass(frozen=True)
class AYS:
    """The published "Align Your Steps" levels of a model, log-linear between them for other numbers of steps, then
    clean data. model: "sd15", "sdxl" or "svd"."""

    model: Literal["sd15", "sdxl", "svd"] = "sd15"

    def __post_init__(self) -> None:
        if self.model not in AYS_LEVELS:
            raise InputError(f"AYS knows the models {', '.join(AYS_LEVELS)}; got {self.model!r}")

    def __call__(self, schedule: Schedule, steps: int) -> Levels:
        known = -torch.tensor(AYS_LEVELS[self.model], dtype=torch.float64).log()
        place = torch.linspace(0, len(known) - 1, _steps(steps) + 1, dtype=torch.float64)[:-1]
        below = place.floor().long()
        lams = torch.lerp(known[below], known[below + 1], place - below)
        return (*(Level.at(lam, schedule.space) for lam in lams), Level.at(math.inf, schedule.space))


@dataclass(frozen=True)
class Restart(Karras):
    """Karras levels that go back up (Xu et al. 2023, arXiv 2306.14878): on arrival below `low` noise is added up to
    `high` and `inner` steps lead down again, `times` times; low and high are values of sigma / alpha.

    A sample costs steps + times * inner steps of denoising. Needs 0 < low < high, times >= 1, inner >= 1, and a level
    of the Karras grid on each side of `low`.
    """

    low: float = 0.06
    high: float = 0.3
    times: int = 2
    inner: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (0 < self.low < self.high and self.times >= 1 and self.inner >= 1):
            raise InputError(f"Restart needs 0 < low < high, times >= 1 and inner >= 1, got {self}")

    def __call__(self, schedule: Schedule, steps: int) -> Levels:
        levels = list(super().__call__(schedule, steps))
        ratio = [float(level.sigma / level.alpha) for level in levels]
        at = next((i for i, r in enumerate(ratio) if r <= self.low), len(levels))
        if not (ratio[min(at, len(levels) - 1)] > 0 and at > 0 and ratio[0] > self.high):
            raise InputError(
                f"Restart between {self.low} and {self.high} needs levels around it; {steps} steps visit sigma / alpha "
                f"= {', '.join(f'{r:.3g}' for r in ratio)}: take more steps or another interval"
            )
        ends = self.high ** (1 / self.rho), ratio[at] ** (1 / self.rho)
        down = -self.rho * torch.linspace(*ends, self.inner + 1, dtype=torch.float64).log()
        again = [Level.at(lam, schedule.space) for lam in down[:-1]] + [levels[at]]
        return (*levels[: at + 1], *(again * self.times), *levels[at + 1 :])


@dataclass(frozen=True)
class Indexed:
    """Steps over the integers 0 ... T - 1 of a trained table, spaced the way the field names it, then clean data.

    `trailing` starts at T - 1; `leading` takes every (T // steps)-th from `offset`; `linspace` spans both ends
    (Lin et al. 2024, table 2). Needs steps <= T.
    """

    spacing: Literal["trailing", "leading", "linspace"] = "trailing"
    T: int = 1000
    offset: int = 0

    def __post_init__(self) -> None:
        if self.spacing not in ("trailing", "leading", "linspace") or self.T < 1:
            raise InputError(f"Indexed needs spacing trailing, leading or linspace and T >= 1, got {self}")

    def indices(self, steps: int) -> list[int]:
        """The integers visited, noisiest first."""
        if _steps(steps) > self.T:
            raise InputError(f"{self.spacing} spacing has {self.T} levels; got steps = {steps}")
        if self.spacing == "trailing":
            index = [round(self.T - i * self.T / steps) - 1 for i in range(steps)]
        elif self.spacing == "leading":
            index = [i * (self.T // steps) + self.offset for i in reversed(range(steps))]
        else:
            index = [round(i) for i in torch.linspace(self.T - 1, 0, steps, dtype=torch.float64).tolist()]
        if not 0 <= index[-1] <= index[0] < self.T:
            raise InputError(f"offset {self.offset} leaves the table 0 ... {self.T - 1}")
        return index

    def __call__(self, schedule: Schedule, steps: int) -> Levels:
        times = torch.tensor([(i + 1) / self.T for i in self.indices(steps)], dtype=torch.float64)
        return _at_times(schedule, times)


@dataclass(frozen=True)
class Explicit:
    """The levels at given values of lam (inf is clean data, -inf pure noise); `steps` must be their number less 1."""

    lams: tuple[float, ...]

    def __call__(self, schedule: Schedule, steps: int) -> Levels:
        if _steps(steps) != len(self.lams) - 1:
            raise InputError(f"this grid has {len(self.lams)} levels, i.e. {len(self.lams) - 1} steps; got {steps}")
        return check_levels([Level.at(lam, schedule.space) for lam in self.lams]).levels


def Quadratic() -> Polynomial:
    """Times in DDIM's quadratic spacing."""
    return Polynomial(2.0)


def Exponential(sigma_min: float = 0.002, sigma_max: float = 80.0) -> UniformLam:
    """Levels of sigma / alpha in geometric progression, i.e. uniform in lam between these ends."""
    if not 0 < sigma_min < sigma_max < math.inf:
        raise InputError(f"Exponential needs 0 < sigma_min < sigma_max, got {sigma_min} and {sigma_max}")
    return UniformLam(-math.log(sigma_max), -math.log(sigma_min))


GRIDS: dict[str, Callable[..., Grid]] = {
    "uniform-t": UniformT,
    "polynomial": Polynomial,
    "quadratic": Quadratic,
    "beta": Beta,
    "uniform-lam": UniformLam,
    "exponential": Exponential,
    "karras": Karras,
    "restart": Restart,
    "ays": AYS,
    "indexed": Indexed,
    "explicit": Explicit,
}
