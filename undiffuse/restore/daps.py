"""DAPS: Zhang et al. 2024 (arXiv 2407.01521)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from undiffuse.level import Level, between
from undiffuse.restore.problem import Problem
from undiffuse.sample import trajectory
from undiffuse.solvers import DPMpp2M, Eval, Solver
from undiffuse.types import Denoise, InputError, Noise, require

NOISIEST, CLEANEST = -4.0, 4.0  # lam between which the steps of the ODE lie


@dataclass(frozen=True)
class DAPS:
    """Decoupled annealing (algorithm 1 there): at each level x0_hat by `ode_steps` of DPM-Solver++(2M) from x, then a
    draw of x0 from N(x0_hat, r^2) given y, which is noised to the next level. For any differentiable operator.

    r^2 = sigma^2 / (alpha^2 + sigma^2 / prior_std^2); the paper's is (sigma / alpha)^2, an infinite `prior_std`. The
    draw is `langevin` steps of Langevin's equation, in size `rate` over the largest curvature (the operator's norm
    taken to be 1) and, unlike the paper's, from a draw of N(x0_hat, r^2); for linear operators `exact` draws it as it
    is. With one ODE step, `exact` and data of independent elements of std prior_std, chains are exact.

    It replaces the solver: `solver(problem)` is one. It runs in the driver only, with ode_steps evaluations a step.
    """

    ode_steps: int = 5
    langevin: int = 100
    rate: float = 0.1
    prior_std: float = 1.0
    exact: bool = False

    def __post_init__(self) -> None:
        require(self.ode_steps >= 1, "DAPS: ode_steps", self.ode_steps, "a whole number >= 1")
        require(self.langevin >= 1, "DAPS: langevin", self.langevin, "a whole number >= 1")
        require(0 < self.rate < 2, "DAPS: rate", self.rate, "between 0 and 2")
        require(self.prior_std > 0, "DAPS: prior_std", self.prior_std, "> 0")

    def solver(self, problem: Problem) -> Solver:
        """The solver that draws from this problem's posterior.

        InputError for std = 0 with Langevin steps, and where `exact` meets an operator that is not linear.
        """
        if self.exact:
            problem.linear_for(self)
        elif problem.std == 0:
            raise InputError("DAPS takes Langevin steps of size 0 at std = 0: give a small std, or DAPS(exact=True)")
        return DAPSSolver(self, problem)


@dataclass(frozen=True, eq=False)
class DAPSSolver:
    """One step of DAPS on a problem; see `DAPS`."""

    method: DAPS
    problem: Problem
    adaptive: ClassVar[bool] = True  # steps depend on the data
    global_order: ClassVar[int] = 0
    history: ClassVar[int] = 0

    @property
    def calls(self) -> int:
        return self.method.ode_steps

    def step(
        self, denoise: Denoise, x: Tensor, now: Level, then: Level, past: Sequence[Eval], noise: Noise
    ) -> tuple[Tensor, Eval]:
        x0_hat = x
        for state in trajectory(denoise, x, self._levels(now, then), DPMpp2M()):
            x0_hat = state.x
        variance = now.sigma**2 / (now.alpha**2 + now.sigma**2 / self.method.prior_std**2)
        if bool(torch.isinf(variance).any()):
            raise InputError("DAPS: r^2 is infinite at alpha = 0: give the data's std as prior_std")
        x0 = (self._exact if self.method.exact else self._langevin)(x0_hat, variance, noise)
        new = Eval(now, x, x0_hat)
        return (x0 if then.is_clean else then.diffuse(x0, noise())), new

    def _levels(self, now: Level, then: Level) -> list[Level]:
        """From `now` to clean data in `ode_steps`, the inner levels uniform in lam."""
        start, n = now.lam.clamp(min=NOISIEST), self.method.ode_steps
        end = (start + 1).clamp(min=CLEANEST)
        inner = [start + (end - start) * k / (n - 1) for k in range(1, n)]
        return [now, *(between(now, then, lam) for lam in (*inner, torch.full_like(end, math.inf)))]

    def _exact(self, x0_hat: Tensor, variance: Tensor, noise: Noise) -> Tensor:
        """A draw of the prior, moved as the residual of a draw of y tells (Papandreou and Yuille 2010)."""
        x0, problem = _widened(x0_hat, variance, noise), self.problem
        m, drawn = problem.y[0].numel(), noise().flatten(1)
        while drawn.shape[1] < m:
            drawn = torch.cat([drawn, noise().flatten(1)], 1)
        r = problem.residual(x0) + problem.std * drawn[:, :m].reshape(problem.y.shape)
        return x0 + problem.gain(r, variance)

    def _langevin(self, x0_hat: Tensor, variance: Tensor, noise: Noise) -> Tensor:
        x0, problem = _widened(x0_hat, variance, noise), self.problem
        var_y = problem.std**2
        size = self.method.rate / (1 / variance + 1 / var_y)
        for _ in range(self.method.langevin):
            with torch.enable_grad():
                at = x0.detach().requires_grad_()
                (uphill,) = torch.autograd.grad(problem.residual(at).square().sum() / (-2 * var_y), at)
            drift = (x0_hat - x0) / variance + uphill
            x0 = (x0 + size * drift + (2 * size).sqrt() * noise()).to(x0.dtype)
        if not bool(torch.isfinite(x0).all()):
            raise InputError(f"DAPS: Langevin steps diverged as the operator is steep: lower rate = {self.method.rate}")
        return x0


def _widened(x0_hat: Tensor, variance: Tensor, noise: Noise) -> Tensor:
    return (x0_hat + variance.sqrt() * noise()).to(x0_hat.dtype)
