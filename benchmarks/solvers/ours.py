"""Every solver of undiffuse with its useful settings, on every grid that fits a schedule."""

from __future__ import annotations

import functools
import hashlib
import inspect
import math
import sys
import typing
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import undiffuse
from undiffuse import (
    DDIM,
    DDPM,
    DEIS,
    IPNDM,
    LMS,
    PNDM,
    Adams,
    Adaptive,
    Beta,
    Counter,
    Discrete,
    DPM2Ancestral,
    DPMpp2M,
    DPMpp2S,
    DPMpp3M,
    DPMSolver,
    Euler,
    Heun,
    Indexed,
    InputError,
    Karras,
    Noise,
    PredictorCorrector,
    Quadratic,
    RungeKutta,
    SASolver,
    Start,
    UniformLam,
    UniformT,
    UniPC,
    trajectory,
)
from undiffuse.grid import check_levels
from undiffuse.schedule import Schedule

SOLVER_CASES: dict[str, Any] = {
    "ddim": DDIM(),
    "heun": Heun(),
    "dpm-solver 2": DPMSolver(2),
    "dpm-solver 3": DPMSolver(3),
    "dpmpp-2s": DPMpp2S(),
    "dpm-solver 3 x0": DPMSolver(3, "x0"),
    "dpmpp-2m": DPMpp2M(),
    "dpmpp-3m": DPMpp3M(),
    "adams 2 +c": Adams(2, corrector=True),
    "adams 4": Adams(4),
    "unipc 2 bh1": UniPC(2, variant="bh1"),
    "unipc 2 bh2": UniPC(2),
    "unipc 3": UniPC(3),
    "unipc 3 eps": UniPC(3, prediction="eps"),
    "lms 4": LMS(4),
    "ipndm 4": IPNDM(4),
    "pndm": PNDM(),
    "runge-kutta rk4": RungeKutta("rk4"),
    "2s, then adams 3": Start(DPMpp2S(), Adams(3)),
    "adaptive 0.1": Adaptive(rtol=0.1, atol=0.1),
    "adaptive 0.01": Adaptive(rtol=0.01, atol=0.01),
    "ddpm": DDPM(),
    "ddim 1": DDIM(1.0),
    "dpmpp-2m 1": DPMpp2M(1.0),
    "dpmpp-3m 1": DPMpp3M(1.0),
    "dpmpp-2s 1": DPMpp2S(1.0),
    "adams 2 +c 0.5": Adams(2, 0.5, corrector=True),
    "sa-solver": SASolver(),
    "dpm2-ancestral": DPM2Ancestral(),
    "euler 0.2": Euler(0.2),
    "heun 0.2": Heun(0.2),
    "langevin": PredictorCorrector(),
}


@functools.cache
def solvers(schedule: Schedule) -> dict[str, Any]:
    """The solvers compared, as many with their spacings as the peer with most has; DEIS reads the schedule's time."""
    return SOLVER_CASES | {"deis 3": DEIS(3, schedule=schedule), "deis 4": DEIS(4, schedule=schedule)}


@functools.cache
def grids(schedule: Schedule) -> dict[str, Callable[[Schedule, int], Any]]:
    """The spacings, with ends at the schedule's own cleanest level where it has one."""
    end = schedule.index(0) if isinstance(schedule, Discrete) else schedule.level(0.0)
    lam = float(end.lam) if bool(end.sigma > 0) else -math.log(0.002)
    return {
        "uniform-lam 5": UniformLam(),
        "uniform-lam": UniformLam(lam_max=lam),
        "karras": Karras(sigma_min=math.exp(-lam)),
        "uniform-t": Indexed("trailing") if isinstance(schedule, Discrete) else UniformT(),
        "quadratic": Quadratic(),
        "beta": Beta(),
    }


@functools.cache
def _source(module: str) -> bytes:
    return inspect.getsource(sys.modules[module]).encode()


@functools.cache
def _code(kind: type) -> bytes:
    """The source on which a solver class depends."""
    names = {c.__module__ for c in kind.__mro__ if c.__module__.startswith("undiffuse")}
    shared = {"undiffuse.level", "undiffuse.solvers.base", "undiffuse.solvers.exponential"}
    return b"".join(_source(m) for m in sorted(names | shared) if m in sys.modules)


@functools.cache
def _levels(schedule: Schedule, grid: str, steps: int) -> tuple[Any, bytes] | None:
    """The levels of a grid by name, and their bytes; None where the grid refuses so many steps."""
    try:
        levels = check_levels(grids(schedule)[grid](schedule, steps)).levels
    except InputError:
        return None
    return levels, torch.stack([torch.stack([lv.alpha, lv.sigma]) for lv in levels]).numpy().tobytes()


class Plan(typing.NamedTuple):
    """A solver on levels and its number of steps; `key` is a digest of the levels, its settings and its code."""

    solver: Any
    levels: tuple[undiffuse.Level, ...]
    steps: int
    key: str = ""

    def run(self, denoise: Any, z: Tensor, noise: Any = None) -> tuple[Tensor, int]:
        """(x at the end, evaluations) from unit noise."""
        counter = Counter(lambda x, level, cond=None: denoise(x, level))
        with torch.no_grad():
            for state in trajectory(counter, self.levels[0].sigma * z, self.levels, self.solver, noise):
                x = state.x
        return x, counter.calls


class Ours:
    """One solver on a schedule, on any of its grids; plans its steps for a budget of evaluations."""

    def __init__(self, solver: Any, schedule: Schedule) -> None:
        self.solver, self.schedule, self.adaptive = solver, schedule, bool(getattr(solver, "adaptive", False))
        code = b"".join(
            _code(type(s)) for s in (solver, *(vars(solver).get(k) for k in ("first", "main", "inner"))) if s
        )
        self._digest, self._counts, self.stochastic = repr(solver).encode() + code, {}, False
        self._count(3)

    def _count(self, steps: int) -> int | None:
        """Evaluations of this many steps, by a dry run up to 6 and linear beyond; None where it is refused."""
        if steps > 6:
            five, six = self._count(5), self._count(6)
            return None if five is None or six is None else six + (steps - 6) * (six - five)
        if steps not in self._counts:
            noise, found = Noise((1, 1), dtype=torch.float64), _levels(self.schedule, "uniform-t", steps)

            def draw() -> Tensor:
                self.stochastic = True
                return noise()

            try:
                assert found is not None
                run = Plan(self.solver, found[0], steps).run
                self._counts[steps] = run(lambda x, level: x * 0, torch.ones(1, 1).double(), draw)[1]
            except InputError:
                self._counts[steps] = None
        return self._counts[steps]

    def plan(self, grid: str, budget: int) -> Plan | None:
        """The longest run that fits the budget; adaptive solvers have one plan, for a budget of 50 and uniform lam."""
        for steps in range(budget, 0, -1):
            nfe = steps if self.adaptive else self._count(steps)
            if nfe is not None and nfe <= budget and (found := _levels(self.schedule, grid, steps)) is not None:
                levels, data = found
                if self.adaptive:
                    if budget != 50 or grid != "uniform-lam":
                        return None
                    levels = (*levels[: 2 if levels[0].alpha == 0 else 1], *levels[-2:])
                return Plan(self.solver, levels, steps, hashlib.sha256(self._digest + data).hexdigest()[:12])
        return None
