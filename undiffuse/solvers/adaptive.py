"""Embedded Runge-Kutta pairs that choose their own steps (Hairer, Norsett, Wanner 1993, sections II.4 and IV.2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from undiffuse.level import Level, between
from undiffuse.solvers.base import Eval, combine, exponential_euler
from undiffuse.solvers.butcher import METHODS, method_of
from undiffuse.solvers.rk import stages, weighted
from undiffuse.types import Denoise, InputError, Noise


@dataclass(frozen=True)
class Adaptive:
    """Crosses each step of the grid in as many steps in lam as the tolerance needs, chosen for every sample alone.

    The pair's error per step, root mean square over the sample in units of x / alpha, is kept under
    atol + rtol |x / alpha| by a PI controller that starts with steps of `first` in lam. Order and evaluations a step
    are the pair's. The grid needs few levels, but its steps from pure noise and to clean data take one evaluation, for
    which no tolerance holds: have levels near both ends, as `UniformLam` does from 3 steps on. Depends on the data:
    runs in the driver, cannot be traced. InputError where a step of the grid needs more than `max_steps`.
    """

    adaptive: ClassVar[bool] = True
    history: ClassVar[int] = 0
    method: str = "dormand-prince"
    rtol: float = 1e-3
    atol: float = 1e-3
    first: float = 0.05
    max_steps: int = 1_000

    def __post_init__(self) -> None:
        if not method_of(self.method, None).low:
            pairs = ", ".join(name for name, m in METHODS.items() if m.low)
            raise InputError(f"Adaptive needs an embedded pair: {pairs}; got {self.method!r}")
        if not (self.rtol >= 0 and self.atol > 0 and self.first > 0 and self.max_steps >= 1):
            raise InputError(f"Adaptive needs rtol >= 0, atol > 0, first > 0 and max_steps >= 1, got {self}")

    @property
    def global_order(self) -> int:
        return METHODS[self.method].order

    @property
    def calls(self) -> int:
        return len(METHODS[self.method].b)

    def step(
        self, denoise: Denoise, x: Tensor, now: Level, then: Level, past: Sequence[Eval], noise: Noise
    ) -> tuple[Tensor, Eval]:
        new = Eval(now, x, denoise(x, now))
        if not bool(torch.isfinite(then.lam - now.lam).all()):
            return exponential_euler(x, new.x0, now, then), new
        a, b, order, low = METHODS[self.method]
        each = (-1, *(1 for _ in x.shape[1:]))
        rows = torch.zeros(x.shape[0], dtype=torch.float64, device=x.device).reshape(each)

        def ask(y: Tensor, level: Level, /) -> Tensor:
            return denoise(y.to(x.dtype), level).double()

        def spread(c: Tensor) -> Tensor:
            return c.to(x.device) + rows

        start, end = (Level(spread(lv.alpha), spread(lv.sigma)) for lv in (now, then))
        lam, y, x0, h = start.lam, x.double(), new.x0.double(), rows + self.first
        before, here = rows + 1.0, start
        for _ in range(self.max_steps):
            target = torch.minimum(lam + h, end.lam)
            reach = between(start, end, target)
            evals = stages(ask, Eval(here, y, x0), reach, a)
            ds, scaled = reach.sigma / reach.alpha - here.sigma / here.alpha, y / here.alpha
            fine = combine((torch.ones_like(ds), scaled), *weighted(b, ds, evals))
            gap = combine(*weighted([w - v for w, v in zip(b, low, strict=True)], ds, evals))
            size = self.atol + self.rtol * torch.maximum(scaled.abs(), fine.abs())
            error = (gap / size).square().flatten(1).mean(1).sqrt().reshape(each)
            error = torch.nan_to_num(error, nan=1e6, posinf=1e6).clamp(min=1e-10)
            ok = error <= 1
            y, lam = torch.where(ok, fine * reach.alpha, y), torch.where(ok, target, lam)
            if bool((lam >= end.lam).all()):
                return y.to(x.dtype), new
            here, factor = between(start, end, lam), 0.9 * error ** (-0.7 / order)
            h = h * (factor * torch.where(ok, before, 1.0) ** (0.4 / order)).clamp(0.2, 5.0)
            before = torch.where(ok, error, before)
            # the last stage of a pair such as Dormand and Prince's lies where the next step starts
            x0 = torch.where(ok, evals[-1].x0 if a[-1] == b[:-1] else ask(y, here), x0)
        raise InputError(f"{self} took {self.max_steps} steps and did not arrive: raise rtol, atol or max_steps")
