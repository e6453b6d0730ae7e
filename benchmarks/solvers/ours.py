"""Every solver of undiffuse with its useful settings, on every grid that fits a schedule."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
import itertools
import math
import sys
import typing
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import undiffuse
from undiffuse import GRIDS, SOLVERS, Counter, Discrete, InputError, Noise, trajectory
from undiffuse.grid import check_levels
from undiffuse.schedule import Schedule

SKIPPED = {"consistency"}  # for consistency models: blurs with a plain denoiser
CHOICES: dict[str, list[Any]] = {
    "order": [2, 3, 4],
    "corrector": [False, True],
    "eta": [0.0, 1.0],
    "gamma": [0.0, 0.2],
    "rtol": [0.3, 0.1, 0.03, 0.01],
    "method": ["midpoint", "kutta3", "rk4", "dormand-prince"],
}
ONLY: dict[str, dict[str, list[Any]]] = {
    "unipc": {"order": [2, 3], "corrector": [True], "eta": [0.0]},
    "sa-solver": {"order": [2, 3], "corrector": [True], "eta": [1.0]},
    "adaptive": {"method": ["dormand-prince"]},
}
HIDDEN = {"schedule", "atol"}


def _made(kind: Any, options: dict[str, Any]) -> Any:
    try:
        return kind(**options)
    except (InputError, TypeError):
        return None


def variants(name: str, kind: Any, schedule: Schedule) -> Iterator[tuple[str, Any]]:
    """(name with settings, solver) for orders, correctors, predictions, variants, methods and eta in {0, 1}."""
    if not dataclasses.is_dataclass(kind):
        if (solver := _made(kind, {})) is not None:
            yield name, solver
        return
    hints, choices = typing.get_type_hints(kind), {}
    for field in [f.name for f in dataclasses.fields(kind) if f.init]:
        if field in ONLY.get(name, {}):
            choices[field] = ONLY[name][field]
        elif typing.get_origin(hints[field]) is typing.Literal:
            choices[field] = [v for v in typing.get_args(hints[field]) if v != "learned"]
        elif field == "schedule":
            choices[field] = [schedule]
        elif field in CHOICES:
            choices[field] = CHOICES[field]
    for values in itertools.product(*choices.values()):
        options = dict(zip(choices, values, strict=True))
        if options.get("eta") and options.get("order", 1) > 3:
            continue
        if "rtol" in options:
            options["atol"] = options["rtol"]
        if (solver := _made(kind, options)) is not None:
            shown = {k: v for k, v in options.items() if k not in HIDDEN and len(choices[k]) > 1}
            shown = {k: v for k, v in shown.items() if not (k in ("eta", "gamma", "corrector") and not v)}
            words = [v if isinstance(v, str) else "+c" if k == "corrector" else f"{k}={v:g}" for k, v in shown.items()]
            yield " ".join([name, *words]), solver


@functools.cache
def solvers(schedule: Schedule) -> dict[str, Any]:
    """All variants of all solvers; also multistep ones that begin with singlestep ones of almost their order."""
    found = {}
    for name, kind in SOLVERS.items():
        if name not in SKIPPED:
            found.update(variants(name, kind, schedule))
    start, single = getattr(undiffuse.solvers, "Start", None), SOLVERS.get("dpm-solver")
    for order in (3, 4) if start is not None and single is not None else ():
        for first in (single(order=2, prediction="x0"), single(order=3, prediction="x0")):  # type: ignore[misc]
            name = f"dpm-solver {first.order} then adams order={order}"  # type: ignore[attr-defined]
            found[name] = start(first, SOLVERS["adams"](order=order))  # type: ignore[misc]
    return found


@functools.cache
def grids(schedule: Schedule) -> dict[str, Callable[[Schedule, int], Any]]:
    """The grids that make sense on a schedule, with ends at its own levels too."""
    end = schedule.index(0) if isinstance(schedule, Discrete) else schedule.level(0.0)
    own = float(end.lam) if bool(end.sigma > 0) else None
    found: dict[str, Any] = {f"uniform-lam {m:g}": GRIDS["uniform-lam"](lam_max=m) for m in (3.0, 4.0, 5.0, 6.0)}
    found |= {"karras": GRIDS["karras"](), "karras .02": GRIDS["karras"](sigma_min=0.02)}
    if own is not None:
        found["uniform-lam own"] = GRIDS["uniform-lam"](lam_max=own)
        found["karras own"] = GRIDS["karras"](sigma_min=math.exp(-own))
    if isinstance(schedule, Discrete):
        found |= {s: GRIDS["indexed"](s) for s in ("trailing", "leading", "linspace")}
    for name, kind in GRIDS.items():  # ays starts at a level of its own, restart costs more than its steps
        if name not in {"uniform-lam", "karras", "indexed", "explicit", "exponential", "polynomial", "ays", "restart"}:
            grid = _made(kind, {})
            if grid is not None:
                found[name] = grid
    return found


@functools.cache
def _source(module: str) -> bytes:
    return inspect.getsource(sys.modules[module]).encode()


@functools.cache
def _code(kind: type) -> bytes:
    """The source on which a solver class depends."""
    names = {c.__module__ for c in kind.__mro__ if c.__module__.startswith("undiffuse")}
    shared = {"undiffuse.level", "undiffuse.solvers.base", "undiffuse.solvers.exponential"}
    return b"".join(_source(m) for m in sorted(names | shared) if m in sys.modules)


class Plan(typing.NamedTuple):
    """A solver on levels, with its number of steps and its evaluations (None where they depend on the data)."""

    solver: Any
    levels: tuple[undiffuse.Level, ...]
    steps: int
    nfe: int | None

    @property
    def key(self) -> str:
        """A digest of the levels, the solver's settings and its code."""
        digest = hashlib.sha256(repr(self.solver).encode() + _code(type(self.solver)))
        for part in (getattr(self.solver, "first", None), getattr(self.solver, "main", None)):
            digest.update(_code(type(part)) if part is not None else b"")
        for level in self.levels:
            digest.update(torch.stack([level.alpha, level.sigma]).numpy().tobytes())
        return digest.hexdigest()[:12]

    def run(self, denoise: Any, z: Tensor, noise: Any = None) -> tuple[Tensor, int]:
        """(x at the end, evaluations) from unit noise."""
        counter = Counter(lambda x, level, cond=None: denoise(x, level))
        with torch.no_grad():
            for state in trajectory(counter, self.levels[0].sigma * z, self.levels, self.solver, noise):
                x = state.x
        return x, counter.calls


class Ours:
    """One solver on one grid of one schedule; plans its steps for a budget of evaluations."""

    def __init__(self, solver: Any, grid: Any, schedule: Schedule) -> None:
        self.solver, self.grid, self.schedule = solver, grid, schedule
        self.adaptive, self.stochastic, self._counts = bool(getattr(solver, "adaptive", False)), False, {}

    def _count(self, steps: int) -> int | None:
        """Evaluations of this many steps, by a dry run up to 6 and linear beyond; None where it is refused."""
        if steps > 6:
            five, six = self._count(5), self._count(6)
            return None if five is None or six is None else six + (steps - 6) * (six - five)
        if steps not in self._counts:
            noise = Noise((1, 1), dtype=torch.float64)

            def draw() -> Tensor:
                self.stochastic = True
                return noise()

            try:
                levels = check_levels(self.grid(self.schedule, steps)).levels
                plan = Plan(self.solver, levels, steps, None)
                self._counts[steps] = plan.run(lambda x, level: x * 0, torch.ones(1, 1).double(), draw)[1]
            except InputError:
                self._counts[steps] = None
        return self._counts[steps]

    def plan(self, budget: int) -> Plan | None:
        """The longest run that fits the budget; adaptive solvers have one plan, given for a budget of 50."""
        if self.adaptive:
            levels = check_levels(self.grid(self.schedule, 50)).levels
            return Plan(self.solver, (levels[0], *levels[-2:]), 0, None) if budget == 50 else None
        for steps in range(budget, 0, -1):
            nfe = self._count(steps)
            if nfe is not None and nfe <= budget:
                return Plan(self.solver, check_levels(self.grid(self.schedule, steps)).levels, steps, nfe)
        return None
