"""The objective: how training levels are drawn, how the error is weighted, and the error itself."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from undiffuse.denoise import Denoiser
from undiffuse.level import Level
from undiffuse.precond import loss_weight, target
from undiffuse.schedule import Discrete, Schedule
from undiffuse.train.coupling import Coupling, IndependentCoupling
from undiffuse.train.draws import Drawer, Draws, Stratified
from undiffuse.train.variance import Fixed, Variance
from undiffuse.types import InputError, require

_U_MIN = 1e-9  # quantiles are finite inside (0, 1)
_FAR = 1000  # lam up to here has numbers for sigma / alpha, or nearly
_T_MIN = 1e-12  # a schedule may end in sigma = 0, where only x0 itself could be learned


class LevelDistribution(Protocol):
    """Maps u uniform in (0, 1) to levels by the inverse of its cumulative distribution: rising u, rising noise."""

    def __call__(self, u: Tensor, schedule: Schedule) -> Level: ...


def _normal(mean: float, std: float) -> None:
    require(abs(mean) <= _FAR, "levels.mean", mean, f"from -{_FAR} to {_FAR}")
    require(0 < std <= _FAR, "levels.std", std, f"above 0 and at most {_FAR}")


def _at_time(t: Tensor, schedule: Schedule) -> Level:
    """The level at t, or a table's next index: a table has no others, and index i gets the mass of (i, i + 1] / T."""
    if isinstance(schedule, Discrete):
        return schedule.level((t * schedule.T).ceil().clamp(1, schedule.T) / schedule.T)
    return schedule.level(t.clamp(_T_MIN, 1))


@dataclass(frozen=True)
class UniformTime:
    """t uniform in [t_min, 1] (Song et al. 2021); for a table every index is equally likely (Ho et al. 2020)."""

    t_min: float = 1e-3

    def __post_init__(self) -> None:
        require(0 < self.t_min < 1, "levels.t_min", self.t_min, "in (0, 1)")

    def __call__(self, u: Tensor, schedule: Schedule) -> Level:
        return _at_time(u if isinstance(schedule, Discrete) else self.t_min + (1 - self.t_min) * u, schedule)


@dataclass(frozen=True)
class LogitNormal:
    """t = sigmoid(mean + std z), z standard normal, on the schedule's own time (Esser et al. 2024, section 3.1).

    A `mean` above 0 favours noise; |mean| and std > 0 are at most 1000. On the straight `Flow` it is `LogNormal` with
    the same settings, since sigma / alpha = t / (1 - t) there; a `shift` adds its logarithm to the mean.

    >>> from undiffuse import Flow
    >>> round(float(LogitNormal(mean=0.5)(torch.tensor(0.5), Flow()).lam), 6)
    -0.5
    """

    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        _normal(self.mean, self.std)

    def __call__(self, u: Tensor, schedule: Schedule) -> Level:
        return _at_time(torch.sigmoid(self.mean + self.std * torch.special.ndtri(u.double())), schedule)


@dataclass(frozen=True)
class Mode:
    """t = v + s (v - sin^2(pi v / 2)), v uniform, on the schedule's own time (Esser et al. 2024, section 3.1).

    `s` in [-1, 2 / (pi - 2)], where t rises with v: above 0 it favours the middle, below 0 the ends, and 0 is uniform.
    Unlike the logit-normal's, the density is above 0 at both ends.
    """

    s: float = 1.29

    def __post_init__(self) -> None:
        require(-1 <= self.s <= 2 / (math.pi - 2), "levels.s", self.s, "from -1 to 2 / (pi - 2) = 1.7519")

    def __call__(self, u: Tensor, schedule: Schedule) -> Level:
        u = u.double()
        return _at_time(u + self.s * (u - torch.sin(math.pi / 2 * u).square()), schedule)


@dataclass(frozen=True)
class UniformInLam:
    """lam, half the log-SNR, uniform from lam_min to lam_max, or as much of that as the schedule has.

    Under it a weight on eps is the w of the weighted ELBO of Kingma and Gao 2023 (arXiv 2303.00848). Needs
    -1000 <= lam_min < lam_max <= 1000; InputError on a schedule that has no such levels.
    """

    lam_min: float = -7.5
    lam_max: float = 7.5

    def __post_init__(self) -> None:
        ok, wanted = -_FAR <= self.lam_min < self.lam_max <= _FAR, f"from -{_FAR} to {_FAR} with lam_min < lam_max"
        require(ok, "levels.lam_min and lam_max", (self.lam_min, self.lam_max), wanted)

    def __call__(self, u: Tensor, schedule: Schedule) -> Level:
        first = 1 / schedule.T if isinstance(schedule, Discrete) else 0.0
        noisy, clean = float(schedule.level(1.0).lam), float(schedule.level(first).lam)
        low, high = max(self.lam_min, noisy), min(self.lam_max, clean)
        if not low < high:
            raise InputError(
                f"levels.lam_min = {self.lam_min} to lam_max = {self.lam_max} has no level of the schedule, whose lam "
                f"is {noisy:.4g} to {clean:.4g}: choose bounds that overlap it"
            )
        return Level.at(high - (high - low) * u.double(), schedule.space)


@dataclass(frozen=True)
class LogNormal:
    """log(sigma / alpha) = -lam is normal with this mean and std > 0, at most 1000 (Karras et al. 2022, table 1)."""

    mean: float = -1.2
    std: float = 1.2

    def __post_init__(self) -> None:
        _normal(self.mean, self.std)

    def __call__(self, u: Tensor, schedule: Schedule) -> Level:
        return Level.at(-(self.mean + self.std * torch.special.ndtri(u)), schedule.space)


LEVELS: dict[str, Callable[..., LevelDistribution]] = {
    "uniform-time": UniformTime,
    "log-normal": LogNormal,
    "logit-normal": LogitNormal,
    "mode": Mode,
    "uniform-lam": UniformInLam,
}


def _snr(level: Level) -> Tensor:
    return level.alpha**2 / level.sigma**2


@dataclass(frozen=True)
class SNRWeight:
    """alpha^2 / sigma^2 on the error of x0: DDPM's plain loss on eps (Ho et al. 2020, equation 14)."""

    def __call__(self, level: Level, sigma_data: float) -> Tensor:
        return _snr(level)


@dataclass(frozen=True)
class EDMWeight:
    """(alpha^2 sd^2 + sigma^2) / (sigma sd)^2 on x0's error: a unit weight on EDM's target (Karras et al. 2022)."""

    def __call__(self, level: Level, sigma_data: float) -> Tensor:
        return (level.alpha**2 * sigma_data**2 + level.sigma**2) / (level.sigma * sigma_data) ** 2


@dataclass(frozen=True)
class TruncatedSNRWeight:
    """max(SNR, 1) on x0's error: SNR, held up where there is mostly noise (Salimans and Ho 2022, section 4)."""

    def __call__(self, level: Level, sigma_data: float) -> Tensor:
        return _snr(level).clamp(min=1)


@dataclass(frozen=True)
class MinSNRWeight:
    """min(SNR, gamma) on x0's error, which is min(SNR, gamma) / SNR on eps (Hang et al. 2023, arXiv 2303.09556).

    gamma > 0, at most 1e9.
    """

    gamma: float = 5.0

    def __post_init__(self) -> None:
        require(0 < self.gamma <= 1e9, "weight.gamma", self.gamma, "above 0 and at most 1e9")

    def __call__(self, level: Level, sigma_data: float) -> Tensor:
        return _snr(level).clamp(max=self.gamma)


@dataclass(frozen=True)
class P2Weight:
    """SNR / (k + SNR)^gamma on x0's error, which is 1 / (k + SNR)^gamma on eps (Choi et al. 2022, arXiv 2204.00227).

    k > 0, at most 1e9, and gamma from 0 to 10; gamma = 0 is DDPM's plain loss.
    """

    k: float = 1.0
    gamma: float = 1.0

    def __post_init__(self) -> None:
        require(0 < self.k <= 1e9, "weight.k", self.k, "above 0 and at most 1e9")
        require(0 <= self.gamma <= 10, "weight.gamma", self.gamma, "from 0 to 10")

    def __call__(self, level: Level, sigma_data: float) -> Tensor:
        snr = _snr(level)
        return snr * (self.k + snr) ** -self.gamma


@dataclass(frozen=True)
class SigmoidWeight:
    """SNR sigmoid(bias - log SNR) on x0's error, which is the sigmoid itself on eps (Kingma and Gao 2023).

    A finite `bias` in units of log SNR = 2 lam. It equals SNR where log SNR << bias, and e^bias where it is >> bias.
    """

    bias: float = 2.0

    def __post_init__(self) -> None:
        # e^-bias must be a number
        require(abs(self.bias) <= 100, "weight.bias", self.bias, "from -100 to 100")

    def __call__(self, level: Level, sigma_data: float) -> Tensor:
        return level.alpha**2 / (level.sigma**2 + level.alpha**2 * math.exp(-self.bias))


@dataclass(frozen=True)
class X0Weight:
    """1: the plain loss on x0."""

    def __call__(self, level: Level, sigma_data: float) -> Tensor:
        return torch.ones_like(level.alpha)


@dataclass(frozen=True)
class VWeight:
    """SNR + 1 on x0's error: the plain loss on v (Salimans and Ho 2022, section 4)."""

    def __call__(self, level: Level, sigma_data: float) -> Tensor:
        return _snr(level) + 1


@dataclass(frozen=True)
class FlowWeight:
    """((alpha + sigma) / sigma)^2 on x0's error: the plain loss on u = eps - x0, flow matching (Liu et al. 2022)."""

    def __call__(self, level: Level, sigma_data: float) -> Tensor:
        return (level.alpha / level.sigma + 1) ** 2


WEIGHTS: dict[str, Callable[..., Callable[[Level, float], Tensor]]] = {
    "simple": SNRWeight,
    "edm": EDMWeight,
    "x0": X0Weight,
    "v": VWeight,
    "flow": FlowWeight,
    "truncated-snr": TruncatedSNRWeight,
    "min-snr": MinSNRWeight,
    "p2": P2Weight,
    "sigmoid": SigmoidWeight,
}


class Loss(NamedTuple):
    """`loss` (b,), whose gradient trains; `error` (b,), the plain error: of a denoiser the mean squared one of x0, of a
    classifier 1 where it takes another class for the likeliest; `lam` (b,)."""

    loss: Tensor
    error: Tensor
    lam: Tensor


@dataclass(frozen=True)
class Drawn:
    """A batch's levels (b,), the weights (b,) of its losses that undo how they were drawn, and their quantiles u (b,).

    `drawn[part]` is that part of the batch.
    """

    level: Level
    weight: Tensor
    u: Tensor

    def __getitem__(self, part: slice) -> Drawn:
        return Drawn(Level(self.level.alpha[part], self.level.sigma[part]), self.weight[part], self.u[part])


class Aim(Protocol):
    """What a module is trained for: an `Objective`, or a `ClassifierObjective`."""

    @property
    def draws(self) -> Draws: ...
    @property
    def coupling(self) -> Coupling: ...

    def check(self, model: Any) -> None:
        """InputError for what cannot be trained so."""

    def draw(self, b: int, seed: int = 0, step: int = 1, drawer: Drawer | None = None) -> Drawn:
        """The levels of a step's b samples."""

    def dropped(self, cond: Any, seed: int, index: Tensor, p: float) -> Any:
        """The conditions of samples `index` (b,) with a share p of them dropped, where that is of use."""

    def __call__(self, model: Any, x0: Tensor, eps: Tensor, level: Level, cond: Any = None) -> Loss:
        """The rows' losses at x = alpha x0 + sigma eps."""


def draw_levels(levels: LevelDistribution, schedule: Schedule, b: int, seed: int, step: int, drawer: Drawer) -> Drawn:
    """The levels of a step's b samples: a function of (seed, step), and of what `drawer` has learned."""
    u, weight = drawer(b, seed, step)
    return Drawn(levels(u.clamp(_U_MIN, 1 - _U_MIN), schedule), weight, u)


@dataclass(frozen=True)
class Objective:
    """E w(level) |x0_hat - x0|^2 / d over levels, data and noise, for any head (one formula: see `precond`).

    `draws` says how a batch's levels are drawn from their distribution, and `coupling` which of its noise meets which
    sample. `variance` adds terms of the variational bound, or puts them in the error's place, for a network that
    predicts the variance of the reverse steps.
    """

    schedule: Schedule
    levels: LevelDistribution = LogNormal()
    weight: Callable[[Level, float], Tensor] = EDMWeight()
    sigma_data: float = 0.5
    draws: Draws = Stratified()  # noqa: RUF009 (it is immutable)
    coupling: Coupling = IndependentCoupling()  # noqa: RUF009
    variance: Variance = Fixed()  # noqa: RUF009

    def check(self, model: Denoiser) -> None:
        """InputError for a head that cannot be trained on these levels, for levels that the schedule lacks, for a
        weight that is not finite and >= 0 on them, and for a variance that cannot be trained, or would not be."""
        if model.head.needs_alpha and bool(self.schedule.level(1.0).alpha == 0):
            name = type(model.head).__name__
            raise InputError(
                f"the {name} head cannot be trained for a schedule that ends in pure noise (alpha = 0): it does not "
                "determine x0 there. Use a v, flow, x0 or edm head, or a schedule that ends at alpha > 0"
            )
        if model.learned_variance and not self.variance.learned:
            raise InputError(
                "this network predicts a variance, which variance = fixed does not train: choose variance = hybrid or "
                "vlb, or build it with learned_variance = false"
            )
        if self.variance.learned and not model.learned_variance:
            raise InputError(
                f"{self.variance} trains a variance, which this network does not predict: build it with "
                "learned_variance = true, or choose variance = fixed"
            )
        if self.variance.learned and not isinstance(self.coupling, IndependentCoupling):
            raise InputError(
                f"{self.variance} trains reverse steps for noise that is independent of the data, unlike that of "
                f"{self.coupling}: choose the independent coupling, or variance = fixed"
            )
        require(0 < self.sigma_data < math.inf, "sigma_data, the std of the data,", self.sigma_data, "> 0 and finite")
        level = self.levels(torch.tensor([_U_MIN, 0.5, 1 - _U_MIN], dtype=torch.float64), self.schedule)
        weight = self.weight(level, self.sigma_data).float()
        if not bool(((weight >= 0) & weight.isfinite()).all()):
            raise InputError(
                f"{self.weight} must be finite and >= 0 on the levels, got {weight.tolist()} at lam = "
                f"{level.lam.tolist()}: keep {self.levels} away from clean data, or choose another weight"
            )
        self.variance.check(self.schedule, self.levels)

    def draw(self, b: int, seed: int = 0, step: int = 1, drawer: Drawer | None = None) -> Drawn:
        """The levels of a step's b samples: a function of (seed, step), and of what `drawer` has learned (None: a new
        one, that of a run's beginning)."""
        return draw_levels(self.levels, self.schedule, b, seed, step, drawer or self.draws.start())

    def dropped(self, cond: Any, seed: int, index: Tensor, p: float) -> Any:
        """The conditions of samples `index` (b,), each dropped with probability p, a function of (seed, index)."""
        return cond.dropped(seed, index, p)

    def __call__(self, model: Denoiser, x0: Tensor, eps: Tensor, level: Level, cond: Any = None) -> Loss:
        """The error at x = alpha x0 + sigma eps; level (b,), computed in float32 around the network."""
        wide = level.reshape(-1, *[1] * (x0.ndim - 1)).to(x0.device)
        answer, *v = model.answer(wide.diffuse(x0, eps), wide, cond).float().chunk(1 + model.learned_variance, 1)
        off, out = answer - target(model.head, x0, eps, wide), model.head.skip_out(wide)[1].to(answer)
        error = off.square().flatten(1).mean(1)
        weight = loss_weight(model.head, level, self.weight(level, self.sigma_data)).to(error)
        loss = self.variance(weight * error, out * off, level, self.schedule, *v)
        return Loss(loss, model.head.skip_out(level)[1].square().to(error) * error, level.lam)
