"""The objective: how training levels are drawn, how the error is weighted, and the error itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from undiffuse.denoise import Denoiser
from undiffuse.level import Level
from undiffuse.precond import loss_weight, target
from undiffuse.schedule import Discrete, Schedule
from undiffuse.seeds import seed_of, uniform
from undiffuse.types import InputError


class LevelDistribution(Protocol):
    """Maps u uniform in (0, 1) to levels by the inverse of its cumulative distribution: rising u, rising noise."""

    def __call__(self, u: Tensor, schedule: Schedule) -> Level: ...


@dataclass(frozen=True)
class UniformTime:
    """t uniform in [t_min, 1] (Song et al. 2021); for a table every index is equally likely (Ho et al. 2020)."""

    t_min: float = 1e-3

    def __post_init__(self) -> None:
        if not 0 < self.t_min < 1:
            raise InputError(f"levels.t_min must lie in (0, 1), got {self.t_min}")

    def __call__(self, u: Tensor, schedule: Schedule) -> Level:
        if isinstance(schedule, Discrete):
            return schedule.level((u * schedule.T).ceil().clamp(1, schedule.T) / schedule.T)
        return schedule.level(self.t_min + (1 - self.t_min) * u)


@dataclass(frozen=True)
class LogNormal:
    """log(sigma / alpha) = -lam is normal with this mean and std (Karras et al. 2022, table 1)."""

    mean: float = -1.2
    std: float = 1.2

    def __post_init__(self) -> None:
        if self.std <= 0:
            raise InputError(f"levels.std must be > 0, got {self.std}")

    def __call__(self, u: Tensor, schedule: Schedule) -> Level:
        return Level.at(-(self.mean + self.std * torch.special.ndtri(u)), schedule.space)


LEVELS: dict[str, Callable[..., LevelDistribution]] = {"uniform-time": UniformTime, "log-normal": LogNormal}


@dataclass(frozen=True)
class SNRWeight:
    """alpha^2 / sigma^2 on the error of x0: DDPM's plain loss on eps (Ho et al. 2020, equation 14)."""

    def __call__(self, level: Level, sigma_data: float) -> Tensor:
        return level.alpha**2 / level.sigma**2


@dataclass(frozen=True)
class EDMWeight:
    """(alpha^2 sd^2 + sigma^2) / (sigma sd)^2 on x0's error: a unit weight on EDM's target (Karras et al. 2022)."""

    def __call__(self, level: Level, sigma_data: float) -> Tensor:
        return (level.alpha**2 * sigma_data**2 + level.sigma**2) / (level.sigma * sigma_data) ** 2


WEIGHTS: dict[str, Callable[..., Callable[[Level, float], Tensor]]] = {"simple": SNRWeight, "edm": EDMWeight}


class Loss(NamedTuple):
    """`loss` (b,), the weighted error; `mse` (b,), the plain mean squared error of x0; `lam` (b,)."""

    loss: Tensor
    mse: Tensor
    lam: Tensor


@dataclass(frozen=True)
class Objective:
    """E w(level) |x0_hat - x0|^2 / d over levels, data and noise, for any head (one formula: see `precond`).

    `stratified` draws one level from each of b equal slices of the distribution, in random order (Kingma et al. 2021,
    appendix I): the same marginal with less variance.
    """

    schedule: Schedule
    levels: LevelDistribution = LogNormal()
    weight: Callable[[Level, float], Tensor] = EDMWeight()
    sigma_data: float = 0.5
    stratified: bool = True

    def check(self, model: Denoiser) -> None:
        """InputError for a head that cannot be trained on these levels."""
        if model.head.needs_alpha and bool(self.schedule.level(1.0).alpha == 0):
            name = type(model.head).__name__
            raise InputError(
                f"a {name} head cannot be trained for a schedule that ends in pure noise (alpha = 0): it does not "
                "determine x0 there. Use a v, flow, x0 or edm head, or a schedule that ends at alpha > 0"
            )
        if model.learned_variance:
            raise InputError("this objective trains the mean alone: build the network with learned_variance = false")

    def draw(self, b: int, seed: int = 0, step: int = 1) -> Level:
        """The levels (b,) of a step's b samples: a function of (seed, step)."""
        u = uniform(seed_of(seed, 4), torch.arange((step - 1) * b, step * b))
        if self.stratified:
            u = (torch.randperm(b, generator=torch.Generator().manual_seed(seed_of(seed, 5, step))) + u) / b
        return self.levels(u.clamp(1e-9, 1 - 1e-9), self.schedule)

    def __call__(self, model: Denoiser, x0: Tensor, eps: Tensor, level: Level, cond: Any = None) -> Loss:
        """The error at x = alpha x0 + sigma eps; level (b,), computed in float32 around the network."""
        wide = level.reshape(-1, *[1] * (x0.ndim - 1)).to(x0.device)
        answer = model.answer(wide.diffuse(x0, eps), wide, cond)
        error = (answer.float() - target(model.head, x0, eps, wide)).square().flatten(1).mean(1)
        weight = loss_weight(model.head, level, self.weight(level, self.sigma_data)).to(error)
        return Loss(weight * error, model.head.skip_out(level)[1].square().to(error) * error, level.lam)
