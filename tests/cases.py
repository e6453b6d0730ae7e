"""The tables that the generated tests run over, and the closed forms they compare with."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from undiffuse import SCHEDULES, SOLVERS, Discrete, Level, Spectrum, zero_terminal_snr

SOLVER_CASES = {
    **{name: kind() for name, kind in SOLVERS.items()},
    "ddpm-large": SOLVERS["ddpm"](variance="large"),
    "ddim-half": SOLVERS["ddim"](eta=0.5),
    "ddim-one": SOLVERS["ddim"](eta=1.0),
    "euler-churn": SOLVERS["euler"](gamma=0.2, s_noise=1.0),
    "heun-churn": SOLVERS["heun"](gamma=0.2, s_min=0.05, s_max=50.0),
    "adams-1": SOLVERS["adams"](order=1),
    "adams-2-corrector": SOLVERS["adams"](order=2, corrector=True),
    "adams-3": SOLVERS["adams"](order=3),
    "adams-4-corrector": SOLVERS["adams"](order=4, corrector=True),
    "adams-2-half": SOLVERS["adams"](order=2, eta=0.5),
    "adams-3-sde": SOLVERS["adams"](order=3, eta=1.0, corrector=True),
}
STOCHASTIC = {k for k, s in SOLVER_CASES.items() if k.startswith("ddpm") or getattr(s, "eta", 0) or "churn" in k}
DETERMINISTIC = sorted(SOLVER_CASES.keys() - STOCHASTIC)

SCHEDULE_CASES = {
    **{name: kind() for name, kind in SCHEDULES.items()},
    "flow-3": SCHEDULES["flow"](shift=3.0),
    "ddpm-zero-snr": zero_terminal_snr(Discrete.linear()),
    "vp-zero-snr": zero_terminal_snr(SCHEDULES["vp"]()),
    "scaled-linear-zero-snr": zero_terminal_snr(SCHEDULES["scaled-linear"]()),
}


def at(lams: Tensor | list[float], space: str = "vp") -> list[Level]:
    """The levels at these lams."""
    return [Level.at(lam, space) for lam in torch.as_tensor(lams, dtype=torch.float64)]


def diagonal(*variances: float, mean: float = 0.0) -> Spectrum:
    """A Gaussian with independent elements."""
    return Spectrum(
        torch.full((len(variances),), mean, dtype=torch.float64), torch.tensor(variances, dtype=torch.float64)
    )


def gaussian_flow(x: Tensor, now: Level, then: Level, mean: Tensor, variance: Tensor) -> Tensor:
    """The probability flow of Gaussian data: x keeps its distance from the marginal's mean in units of its std."""

    def std(level: Level) -> Tensor:
        return (level.alpha**2 * variance + level.sigma**2).sqrt()

    return then.alpha * mean + std(then) / std(now) * (x - now.alpha * mean)


def drain(states):
    """The last x of a trajectory."""
    for state in states:
        x = state.x
    return x


INF = math.inf
