"""The tables that the generated tests run over, and the closed forms they compare with."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from undiffuse import SCHEDULES, SOLVERS, Discrete, Level, Spectrum, trace, zero_terminal_snr
from undiffuse.solvers import Adams, Ancestral, Butcher, DPMpp2M, DPMSolver, RungeKutta, Start, UniPC
from undiffuse.solvers.butcher import METHODS

FIXED = {name: kind for name, kind in SOLVERS.items() if not getattr(kind, "adaptive", False)}
SOLVER_CASES = {
    **{name: kind() for name, kind in FIXED.items()},
    "ddpm-large": SOLVERS["ddpm"](variance="large"),
    "ddim-half": SOLVERS["ddim"](eta=0.5),
    "ddim-one": SOLVERS["ddim"](eta=1.0),
    "euler-churn": SOLVERS["euler"](gamma=0.2, s_noise=1.0),
    "heun-churn": SOLVERS["heun"](gamma=0.2, s_min=0.05, s_max=50.0),
    "dpm-solver-1": SOLVERS["dpm-solver"](order=1),
    "dpm-solver-3": SOLVERS["dpm-solver"](order=3),
    "dpm-solver-3-x0": SOLVERS["dpm-solver"](order=3, prediction="x0"),
    "dpm-solver-2-sde": SOLVERS["dpm-solver"](order=2, eta=1.0),
    "dpmpp-2s-sde": SOLVERS["dpmpp-2s"](eta=1.0),
    "dpmpp-3s-half": SOLVERS["dpm-solver"](order=3, prediction="x0", eta=0.5),
    "dpmpp-2m-sde": SOLVERS["dpmpp-2m"](eta=1.0),
    "dpmpp-3m-sde": SOLVERS["dpmpp-3m"](eta=1.0),
    "adams-1": SOLVERS["adams"](order=1),
    "adams-2-corrector": SOLVERS["adams"](order=2, corrector=True),
    "adams-3": SOLVERS["adams"](order=3),
    "adams-4-corrector": SOLVERS["adams"](order=4, corrector=True),
    "adams-2-half": SOLVERS["adams"](order=2, eta=0.5),
    "adams-3-sde": SOLVERS["adams"](order=3, eta=1.0, corrector=True),
    "adams-2-eps": SOLVERS["adams"](order=2, prediction="eps"),
    "adams-3-eps-corrector": SOLVERS["adams"](order=3, prediction="eps", corrector=True),
    "adams-2-eps-half": SOLVERS["adams"](order=2, prediction="eps", eta=0.5),
    "unipc-1": SOLVERS["unipc"](order=1),
    "unipc-2-bh1": SOLVERS["unipc"](order=2, variant="bh1"),
    "unipc-2-vary": SOLVERS["unipc"](order=2, variant="vary"),
    "unipc-3-eps": SOLVERS["unipc"](order=3, prediction="eps"),
    "sa-solver-ode": SOLVERS["sa-solver"](eta=0.0),
    "deis-2": SOLVERS["deis"](order=2),
    "deis-3-rho": SOLVERS["deis"](order=3, coordinate="rho"),
    "ipndm-2": SOLVERS["ipndm"](order=2),
    "spectral-1": SOLVERS["spectral"](order=1, corrector=False),
    "spectral-2-wide": SOLVERS["spectral"](variance=4.0, order=2),
    "spectral-3-narrow": SOLVERS["spectral"](variance=1e-3, order=3, corrector=False),
    "spectral-4": SOLVERS["spectral"](order=4),
    **{f"runge-kutta-{method}": RungeKutta(method) for method in METHODS},
    "own-runge-kutta": RungeKutta(own=Butcher(((), (0.75,)), (1 / 3, 2 / 3), 2)),
    "start-adams-3": Start(DPMSolver(2, "x0"), Adams(3)),
    "start-adams-4": Start(RungeKutta("rk4"), Adams(4)),
    "start-unipc-3": Start(DPMSolver(3), UniPC(3)),
    "ancestral-2m-half": Ancestral(DPMpp2M(), 0.5),
    "ancestral-ode": Ancestral(DPMSolver(2), 0.0),
    "langevin-2": SOLVERS["langevin"](snr=0.1, corrections=2, eta=0.0),
}


def _draws(solver: object) -> bool:
    levels = [Level.at(lam) for lam in (-1.0, 0.0, 1.0)]
    return trace(solver, levels).draws > 0  # type: ignore[arg-type]


STOCHASTIC = {name for name, solver in SOLVER_CASES.items() if _draws(solver)}
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
