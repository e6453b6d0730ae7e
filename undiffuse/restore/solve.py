"""Samples of the posterior p(x0 | y): any method, solver, schedule, head and guidance."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from undiffuse.grid import Grid, UniformLam
from undiffuse.guide import Guidance, guide_of, prepared
from undiffuse.level import Level
from undiffuse.restore.daps import DAPS
from undiffuse.restore.mmps import MMPS
from undiffuse.restore.problem import Problem
from undiffuse.sample import State, sample
from undiffuse.schedule import Schedule
from undiffuse.solvers import DPMpp2M, Solver
from undiffuse.types import Denoise, InputError, Model


class Restorer(Protocol):
    """(denoiser, problem) -> the denoiser given the observations; one that depends on the steps has `prepared(levels,
    solver)`, which returns the method for them."""

    def __call__(self, denoise: Denoise, problem: Problem, /) -> Denoise: ...


@dataclass(frozen=True)
class _Given:
    """Conditions and observations of the same samples, as one condition."""

    cond: Any
    problem: Problem

    def __len__(self) -> int:
        return len(self.problem)

    def __getitem__(self, rows: slice | Sequence[int] | Tensor) -> _Given:
        return _Given(None if self.cond is None else self.cond[rows], self.problem[rows])

    def to(self, device: torch.device | str) -> _Given:
        return _Given(None if self.cond is None else self.cond.to(device), self.problem.to(device))


@dataclass(frozen=True)
class _Restored:
    """Guidance, and then the method."""

    guide: Guidance
    method: Restorer | None

    def prepared(self, levels: Sequence[Level], rows: int) -> _Restored:
        """The same with its guidance for a walk along these levels."""
        return replace(self, guide=prepared(self.guide, levels, rows))

    def __call__(self, model: Model, given: Any, /) -> Denoise:
        denoise = self.guide(model, given.cond)
        return denoise if self.method is None else self.method(denoise, given.problem)


def restore(
    model: Model,
    problem: Problem,
    schedule: Schedule,
    *,
    method: Restorer | DAPS | None = None,
    steps: int = 50,
    solver: Solver | None = None,
    grid: Grid | None = None,
    cond: Any = None,
    guidance: Guidance | float | Mapping[str, float] = 1.0,
    seed: int = 0,
    first: int = 0,
    batch: int | None = None,
    rows: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    progress: Callable[[State], None] | None = None,
) -> Tensor:
    """Samples (n, *data) of p(x0 | y), one a row of the problem, by a `method` (default `MMPS()`) around the model.

    Other arguments are those of `sample`; the solver is DPM-Solver++(2M) with noise by default, whose spread is right
    in few steps (for DPS it is DDPM), and none is given with `DAPS`. Use `problem.repeat(n)` for n samples of each
    posterior. Sample k depends on (seed, first + k) and on row k of problem and `cond` alone; `batch` bounds the
    samples in memory, and with `rows` exactly so many are computed at a time, which makes samples bit-equal for every
    number of them, on one device. Raises InputError for bad input.

    >>> from undiffuse import Gaussian, Spectrum, VP
    >>> from undiffuse.restore import Mask
    >>> model = Gaussian(Spectrum(torch.zeros(2), torch.ones(2)))
    >>> restore(model, Problem(Mask(torch.tensor([1, 0])), torch.ones(4, 2)), VP(), steps=10)[:, 0]
    tensor([1., 1., 1., 1.])
    """
    method, grid, n, size = method or MMPS(), grid or UniformLam(), len(problem), rows or batch or len(problem)
    own = getattr(method, "solver", None)  # of a method that is one
    if isinstance(method, type) or not callable(own or method):
        raise InputError(f"method must be a restorer's instance such as MMPS() or DAPS(), got {method!r}")
    if own is not None and solver is not None:
        raise InputError("DAPS is a solver itself: leave solver out, or take another method")
    if size < 1:
        raise InputError(f"batch and rows must be >= 1, got batch = {batch}, rows = {rows}")
    if cond is not None and len(cond) != n:
        raise InputError(f"the condition has {len(cond)} rows for {n} observations: give one row a sample")
    solver = solver or getattr(method, "usual", DPMpp2M(eta=1.0))
    if hasattr(method, "prepared"):
        method = method.prepared(grid(schedule, steps), solver)
    given, guide, out = _Given(cond, problem), guide_of(guidance), []
    for start in range(0, n, size):
        stop = start + size if rows else min(n, start + size)
        # the last row again where `rows` are more than are left
        some = given[torch.arange(start, stop).clamp(max=n - 1)]
        if own is not None:
            solver = own(some.problem.to(device))
        x0 = sample(
            model,
            (stop - start, *problem.shape),
            schedule,
            steps=steps,
            solver=solver,
            grid=grid,
            cond=some,
            guidance=_Restored(guide, method if own is None else None),  # type: ignore[arg-type]
            seed=seed,
            first=first + start,
            dtype=dtype,
            device=device,
            progress=progress,
        )
        out.append(x0[: n - start])
    return torch.cat(out)
