"""The driver: `trajectory` walks a solver along the levels, `sample` drains it; noise is seeded per sample."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from undiffuse.denoise import FixedRows
from undiffuse.grid import Grid, UniformLam, check_levels
from undiffuse.guide import Guidance, guide_of, prepared
from undiffuse.level import Level, transition
from undiffuse.schedule import Schedule
from undiffuse.seeds import mix
from undiffuse.solvers import DPMpp2M, Eval, Solver
from undiffuse.types import Denoise, InputError, Model, Plan
from undiffuse.types import Noise as NoiseLike


class State(NamedTuple):
    """After step i (1 ... N): x at `level`, the newest prediction x0, and the denoiser evaluations so far."""

    i: int
    level: Level
    x: Tensor
    x0: Tensor
    nfe: int


class Noise:
    """Standard normal draws in which sample k depends on (seed, k) alone: not on batch size, order or device.

    `shape` is (b, *data); `indices` are the b samples' numbers (default 0 ... b - 1). Drawn in float32 on the CPU and
    then moved to `dtype` and `device`.

    >>> a, b = Noise((2, 3), seed=1), Noise((1, 3), seed=1, indices=[1])
    >>> bool((a()[1] == b()[0]).all())
    True
    """

    def __init__(
        self,
        shape: Sequence[int],
        seed: int = 0,
        indices: Sequence[int] | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        indices = range(shape[0]) if indices is None else indices
        if len(indices) != shape[0]:
            raise InputError(f"Noise: {len(indices)} indices for a batch of {shape[0]}")
        self.shape, self.dtype, self.device = tuple(shape), dtype, device
        # the CPU generator reads 32 bits of its seed: consecutive ones keep the samples of a run distinct
        base = mix(seed)
        self._generators = [torch.Generator().manual_seed((base + k) % 2**32) for k in indices]

    def __call__(self) -> Tensor:
        rows = [torch.randn(self.shape[1:], generator=g) for g in self._generators]
        return torch.stack(rows).to(device=self.device, dtype=self.dtype)


def _no_noise() -> Tensor:
    raise InputError("this solver (or a grid that rises) draws noise: pass noise=Noise(x.shape, seed=...)")


class _Counted:
    """A denoiser that counts its evaluations and passes `reverse` on."""

    def __init__(self, denoise: Any) -> None:
        self.nfe, self._denoise = 0, denoise
        if hasattr(denoise, "reverse"):
            self.reverse = self._reverse

    def __call__(self, x: Tensor, level: Level) -> Tensor:
        self.nfe += 1
        return self._denoise(x, level)  # type: ignore[no-any-return]

    def _reverse(self, x: Tensor, now: Level, then: Level) -> tuple[Tensor, Tensor]:
        self.nfe += 1
        return self._denoise.reverse(x, now, then)  # type: ignore[no-any-return]


def trajectory(
    denoise: Denoise,
    x: Tensor,
    levels: Sequence[Level],
    solver: Solver,
    noise: NoiseLike | None = None,
    project: Callable[[Tensor, Level], Tensor] | None = None,
) -> Iterator[State]:
    """Walk from x at levels[0] to the last level, yielding a `State` after each step; `break` stops early.

    x (b, *data) keeps its dtype. Where the levels rise, noise is added by the forward transition and history is
    forgotten. `project(x, level)` replaces x after each step (inpainting). Raises InputError for impossible levels, NaN
    in x, and noise that is needed but not given.

    >>> from undiffuse import DDIM, Gaussian, Spectrum, VP, UniformT
    >>> model = Gaussian(Spectrum(torch.zeros(1), torch.ones(1)))
    >>> [state.nfe for state in trajectory(model, torch.ones(4, 1), UniformT()(VP(), 3), DDIM())]
    [1, 2, 3]
    """
    if isinstance(solver, type) or not callable(getattr(solver, "step", None)):
        raise InputError(f"solver must be a solver's instance such as DPMpp2M(), got {solver!r}")
    levels, rises = check_levels(levels)
    if not bool(torch.isfinite(x).all()):
        raise InputError("x has NaN or infinite values: check the noise or the picture that sampling starts from")
    count, noise = _Counted(denoise), noise or _no_noise
    past: list[Eval] = []
    x0, dtype = x, x.dtype
    for i, up in enumerate(rises):
        now, then = levels[i], levels[i + 1]
        if up:
            scale, std = transition(now, then)
            x = scale * x + std * noise()
            past = []
        else:
            x, new = solver.step(count, x, now, then, past, noise)
            past, x0 = [new, *past][: solver.history], new.x0
        if x.dtype != dtype:  # levels of shape (b, 1, ...) compute in float64
            x = x.to(dtype)
        if project is not None:
            x = project(x, then)
        yield State(i + 1, then, x, x0, count.nfe)


def sample(
    model: Model,
    shape: Sequence[int],
    schedule: Schedule,
    *,
    steps: int = 20,
    solver: Solver | None = None,
    grid: Grid | None = None,
    plan: Plan | None = None,
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
    """Samples of `shape` (n, *data) from the model, by default with DPM-Solver++(2M) on levels uniform in lam.

    `schedule` gives the levels and may differ from the one that the model was trained on. A `plan` (a `Tableau` or
    `Modal`, such as `auto` finds) takes the place of schedule, steps, solver and grid; no `State` is seen then. `cond`
    is a `Cond` or `Given` of n rows and `guidance` a weight w (1 is off), weights by the names of conditions (see
    `Composed`), or a guidance such as `CFG(w, lam_min, lam_max)`, `APG(w)` and the others in `GUIDES`. Sample k depends
    on (seed, first + k) alone; `batch` bounds the samples in memory; with `rows` every network call has exactly so many
    rows, which makes samples bit-equal for every batch (see `FixedRows`).
    `progress` sees every `State`. Raises InputError for bad input.

    >>> from undiffuse import Gaussian, Spectrum, VP
    >>> model = Gaussian(Spectrum(torch.zeros(2), torch.ones(2)))
    >>> sample(model, (5, 2), VP(), steps=4).shape
    torch.Size([5, 2])
    """
    if plan is not None and not hasattr(plan, "run"):
        inside = ": give its .plan" if hasattr(plan, "plan") else ""
        raise InputError(f"plan is a Tableau or a Modal, such as read_plan(FILE), got {type(plan).__name__}{inside}")
    if plan is not None and (solver is not None or grid is not None):
        raise InputError("a plan is a solver on its own levels: leave solver and grid out, or the plan")
    solver, grid = solver or DPMpp2M(), grid or UniformLam()
    guide = guide_of(guidance)
    if isinstance(grid, type) or not callable(grid) or isinstance(schedule, type) or not hasattr(schedule, "level"):
        raise InputError(
            f"schedule and grid must be instances such as VP() and UniformLam(), got {schedule!r}, {grid!r}"
        )
    n, levels = shape[0], () if plan is not None else check_levels(grid(schedule, steps)).levels
    if n < 1 or (batch is not None and batch < 1):
        raise InputError(f"the number of samples and the batch must be >= 1, got n = {n}, batch = {batch}")
    if cond is not None and len(cond) != n:
        raise InputError(f"the condition has {len(cond)} rows for {n} samples: give one row a sample")
    guide = prepared(guide, levels if plan is None else plan, rows or 0)
    model, out = (FixedRows(model, rows) if rows else model), []
    with torch.no_grad():
        for start in range(0, n, batch or n):
            stop = min(n, start + (batch or n))
            noise = Noise((stop - start, *shape[1:]), seed, range(first + start, first + stop), dtype, device)
            denoise = guide(model, None if cond is None else cond[start:stop].to(device))
            if plan is not None:
                out.append(plan.run(denoise, plan.start[1] * noise(), noise))
                continue
            x = levels[0].sigma * noise()
            for state in trajectory(denoise, x, levels, solver, noise):
                x = state.x
                if progress is not None:
                    progress(state)
            out.append(x)
    return torch.cat(out)


def moments(
    denoise: Denoise, levels: Sequence[Level], solver: Solver, draws: int, mean: Tensor, variance: Tensor
) -> tuple[Tensor, Tensor]:
    """Exact output (mean, variance) of a solver whose denoiser acts on each element alone, affinely (Gaussian data).

    No Monte Carlo: the chain is affine in its start and its noise, so it is run once on their basis vectors. `mean` and
    `variance` (d,) describe x at levels[0]; `draws` is at least the number of noise draws.
    """
    d, column = mean.numel(), iter(range(2, 2 + draws))
    x = torch.zeros(2 + draws, d, dtype=torch.float64)
    x[1] = 1

    def noise() -> Tensor:
        z = torch.zeros_like(x)
        z[next(column)] = 1
        return z

    for state in trajectory(denoise, x, levels, solver, noise):
        x_end = state.x
    effect = x_end[1:] - x_end[0]
    return x_end[0] + effect[0] * mean, effect[0] ** 2 * variance + (effect[1:] ** 2).sum(0)
