"""Certificates: what a solver promises, measured on exact denoisers on this machine; no network, no Monte Carlo."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from undiffuse.denoise import Mixture
from undiffuse.level import Level
from undiffuse.sample import Noise, trajectory
from undiffuse.solvers import Adaptive, RungeKutta, Solver
from undiffuse.spectrum import Spectrum
from undiffuse.tableau import trace
from undiffuse.types import Denoise, InputError

STDS = (1.0, 0.5, 0.25, 0.1, 0.05)
WEAK = 0.3  # variance of the Gaussian on which stochastic solvers are measured


def spectrum(mean: float, *variances: float) -> Spectrum:
    """Independent elements of one mean."""
    return Spectrum(torch.full((len(variances),), mean, dtype=torch.float64), torch.tensor(variances).double())


def problem() -> tuple[Mixture, Tensor]:
    """Two Gaussians and three starts between them: the probability flow is curved, and no scheme is right by chance."""
    x = torch.tensor([[0.9, -0.4], [0.1, 0.2], [-1.3, 0.8]], dtype=torch.float64)
    return Mixture([spectrum(-1.0, 0.2, 0.05), spectrum(1.0, 0.1, 0.3)]), x


def graded(steps: int) -> list[Level]:
    """Levels from lam = -0.5 to 1, the first steps 9 times the last: constant weights for equal steps must fail."""
    u = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    return [Level.at(lam) for lam in -0.5 + 1.5 * (1.8 * u - 0.8 * u**2)]


def run(denoise: Denoise, x: Tensor, levels: Sequence[Level], solver: Solver) -> Tensor:
    """x at the last level; noise, if any, from seed 0."""
    for state in trajectory(denoise, x, levels, solver, Noise(x.shape, 0, dtype=x.dtype)):
        x = state.x
    return x


@cache
def truth() -> Tensor:
    """The solution of `problem` by 640 steps of Dormand and Prince's fifth order."""
    model, x = problem()
    return run(model, x, graded(640), RungeKutta("dormand-prince"))


def slope(few: float, many: float) -> float:
    """The order that errors at a number of steps and at twice as many show."""
    return math.log2(few / many)


def order(solver: Solver) -> float:
    """Measured global order on `problem` of a solver that draws no noise."""
    model, x = problem()
    doubled = (24, 48) if solver.global_order > 4 else (160, 320)  # the fifth order soon meets float64's rounding
    return slope(*(float((run(model, x, graded(n), solver) - truth()).norm()) for n in doubled))


def weak_order(solver: Solver) -> float:
    """Order of the exact output std on Gaussian data, started at its true marginal, for solvers that draw noise."""
    errors = []
    for n in (160, 320):
        levels = graded(n)
        end = (levels[-1].alpha ** 2 * WEAK + levels[-1].sigma ** 2).sqrt()
        got = trace(solver, levels).gaussian(torch.tensor([WEAK]), exact_start=True).variance.sqrt()
        errors.append(float((got - end).abs()))
    return slope(*errors)


def kept_std(solver: Solver, levels: Sequence[Level], stds: Sequence[float] = STDS) -> list[float]:
    """The std that this sampler gives to Gaussian data of each std, divided by it: 1 is right, below 1 is blur.

    Exact: no network and no samples. Raises InputError for solvers that cannot be traced.

    >>> from undiffuse import DDIM, VP, UniformLam
    >>> [round(kept, 2) for kept in kept_std(DDIM(), UniformLam()(VP(), 10), (1.0, 0.25))]
    [0.76, 0.76]
    """
    true = torch.tensor(stds, dtype=torch.float64)
    if not bool(((true > 0) & (true < 1e6)).all()):
        raise InputError(f"the stds of the data must be > 0 and below a million, got {list(stds)}")
    got = trace(solver, levels).gaussian(true**2)
    return [float(v) for v in got.variance.sqrt() / true]


class Certificate(NamedTuple):
    """What was documented and measured of one solver."""

    name: str
    order: int
    measured: float
    noise: bool
    calls: int
    gap: float
    kept: list[float] | None

    @property
    def holds(self) -> bool:
        """Whether every measured figure is what was promised; a stochastic solver may be better than its order."""
        off, slack = self.measured - self.order, 1.0 if self.kept is None else 0.5 if self.order > 4 else 0.1
        return (self.noise or off < slack) and off > -slack and self.gap < 1e-10


def tolerance_order(solver: Adaptive) -> float:
    """Digits of error gained per digit of tolerance, times the method's order, which a sound controller makes about
    equal to it."""
    (model, x), order = problem(), solver.global_order
    tols = (1e-4 if order > 3 else 1e-3, 10.0 ** -(order + 3))
    coarse, fine = (float((run(model, x, graded(1), Adaptive(solver.method, t, t)) - truth()).norm()) for t in tols)
    return order * math.log(coarse / fine) / math.log(tols[0] / tols[1])


def certify(name: str, solver: Solver, levels: Sequence[Level], stds: Sequence[float] = STDS) -> Certificate:
    """Measure one solver: its order, the gap between tableau and driver, the stds it keeps on these levels.

    The order is strong on a mixture's probability flow for deterministic solvers, and weak (exact std on Gaussian
    data) for stochastic ones. `Adaptive` has no fixed steps: for it, `measured` is the number of correct digits gained
    per digit of tolerance, times its order, and there is no tableau.
    """
    if isinstance(solver, Adaptive):
        return Certificate(name, solver.global_order, tolerance_order(solver), False, solver.calls, 0.0, None)
    (model, x), table = problem(), trace(solver, levels)
    driven = run(model, x, levels, solver)
    tabled = table.run(model, x, Noise(x.shape, 0, dtype=x.dtype))
    random = trace(solver, graded(4)).draws > 0  # the levels of `table` may rise, which draws noise, too
    measured = weak_order(solver) if random else order(solver)
    gap = float((driven - tabled).abs().max())
    return Certificate(name, solver.global_order, measured, random, solver.calls, gap, kept_std(solver, levels, stds))
