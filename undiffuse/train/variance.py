"""The variance of the reverse steps in training: fixed, learned beside the mean, or learned with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from undiffuse.level import Level, interpolated, reconstruction, reverse_bounds, reverse_divergence
from undiffuse.schedule import Discrete, Schedule
from undiffuse.types import InputError, require

Levels = Callable[[Tensor, Schedule], Level]  # u in (0, 1) -> levels


class Variance(Protocol):
    """The loss (b,) from the plain one (b,), the error x0_hat - x0 (b, *data), the levels (b,), and the network's
    second half v (b, *data) where the variance is `learned`."""

    learned: ClassVar[bool]

    def check(self, schedule: Schedule, levels: Levels) -> None: ...
    def __call__(self, plain: Tensor, error: Tensor, now: Level, schedule: Schedule, *v: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Fixed:
    """Nothing is learned but the mean: sample with `DDPM(variance="small")` or "large"."""

    learned: ClassVar[bool] = False

    def check(self, schedule: Schedule, levels: Levels) -> None:
        """Any schedule and levels will do."""

    def __call__(self, plain: Tensor, error: Tensor, now: Level, schedule: Schedule, *v: Tensor) -> Tensor:
        return plain


def earlier(schedule: Schedule, now: Level, steps: int) -> Level:
    """The level 1 / steps of time before `now` on the schedule: clean data from t <= 1 / steps.

    >>> from undiffuse import Flow
    >>> earlier(Flow(), Flow().level(torch.tensor([0.25, 0.75])), 2).sigma
    tensor([0.0000, 0.2500], dtype=torch.float64)
    """
    t = schedule.time(now.lam) - 1 / steps
    then = schedule.level(t.clamp(min=0))
    return Level(then.alpha, torch.where(t < 1e-9, 0.0, then.sigma))


def bound(error: Tensor, level: Level, schedule: Schedule, steps: int, v: Tensor) -> Tensor:
    """L_vlb (b,) in nats per dimension: steps times the term of the variational bound that leads from `level`.

    The term is KL(q(x_then | x_now, x0) || N(c_x x_now + c_x0 x0_hat, var)) averaged over elements, `then` being
    `earlier`, and to clean data -log N(x0; x0_hat, sigma^2 / alpha^2), in which v has no part: no noise is drawn there.
    Over times uniform in (0, 1] its mean is the density's bound without its prior (Nichol and Dhariwal 2021, equations
    4 to 7; the terms of `undiffuse.evals.bound`), averaged over the chains that start in (1 - 1 / steps, 1]: a table's
    own chain starts at t = 1 alone.
    """
    shape = (-1, *[1] * (error.ndim - 1))
    now, then = (lv.reshape(*shape).to(error.device) for lv in (level, earlier(schedule, level, steps)))
    small, large = reverse_bounds(now, then)
    last, square = then.sigma == 0, error.double().square()
    var = interpolated(v.double(), torch.where(last, large, small), large)  # the last small = 0 has no logarithm
    nats = torch.where(last, reconstruction(now, square), reverse_divergence(now, then, square, var))
    return steps * nats.flatten(1).mean(1)


@dataclass(frozen=True)
class Hybrid:
    """L_hybrid = the plain loss + weight L_vlb, whose mean is held: it trains the variance alone (Nichol and Dhariwal
    2021, section 3.1 and equation 16).

    L_vlb (see `bound`) is that of a chain of `steps` >= 2 steps uniform in time; a table's own steps are its T, of
    which `steps` must be a divisor. `weight` > 0 is the paper's lambda, on the sum of the terms: 0.001 is
    0.001 steps on the one drawn. At each level the best variance does not depend on how levels are drawn.
    """

    weight: float = 0.001
    steps: int = 1000
    learned: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require(0 < self.weight <= 1e6, "variance.weight", self.weight, "above 0 and at most 1e6")
        _check_steps(self.steps)

    def check(self, schedule: Schedule, levels: Levels) -> None:
        """InputError unless the table, if it is one, has steps of that length."""
        _check_table(schedule, self.steps)

    def __call__(self, plain: Tensor, error: Tensor, now: Level, schedule: Schedule, *v: Tensor) -> Tensor:
        return plain + self.weight * bound(error.detach(), now, schedule, self.steps, *v).to(plain)


@dataclass(frozen=True)
class VLB:
    """L_vlb alone, for mean and variance: in expectation the variational bound of a chain of `steps` >= 2 steps uniform
    in time without its prior, in nats per dimension (see `bound`); the objective's weight has no part in it.

    Needs levels uniform in time. A table's own steps are its T, of which `steps` must be a divisor.
    """

    steps: int = 1000
    learned: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_steps(self.steps)

    def check(self, schedule: Schedule, levels: Levels) -> None:
        """InputError for a table without steps of that length, and unless each step gets its equal share of levels."""
        _check_table(schedule, self.steps)
        u = (torch.arange(self.steps, dtype=torch.float64) + 0.5) / self.steps
        off = (schedule.time(levels(u, schedule).lam) - u).abs().max()
        if not off * self.steps <= 0.5 + 1e-6:
            raise InputError(
                f"variance = vlb is a bound for levels uniform in time, each of its {self.steps} steps equally likely; "
                f"{levels} is off by up to {float(off):.2g} of time: choose levels=uniform-time with levels.t_min="
                f"{0.4 / self.steps:.1g} (UniformTime; at most {0.5 / self.steps:.2g}), fewer variance.steps, or "
                "variance=hybrid, which takes any levels"
            )

    def __call__(self, plain: Tensor, error: Tensor, now: Level, schedule: Schedule, *v: Tensor) -> Tensor:
        return bound(error, now, schedule, self.steps, *v).to(plain)


def _check_steps(steps: int) -> None:
    require(2 <= steps <= 1_000_000, "variance.steps", steps, "from 2 to 1000000")


def _check_table(schedule: Schedule, steps: int) -> None:
    if isinstance(schedule, Discrete) and schedule.T % steps:
        raise InputError(
            f"variance.steps must divide the table's {schedule.T} levels (schedule.T), got {steps}: give "
            f"variance.steps={schedule.T}, its own steps, or schedule.T={steps}"
        )


VARIANCES: dict[str, Callable[..., Variance]] = {"fixed": Fixed, "hybrid": Hybrid, "vlb": VLB}
