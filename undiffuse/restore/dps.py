"""DPS: Chung et al. 2023 (arXiv 2209.14687)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from undiffuse.grid import check_levels
from undiffuse.guide.contrast import dot
from undiffuse.level import Level
from undiffuse.restore.problem import Problem
from undiffuse.restore.tangent import linearised
from undiffuse.solvers import DDPM, Solver
from undiffuse.types import Denoise, InputError


@dataclass(frozen=True)
class DPS:
    """Diffusion posterior sampling: after every step of the solver, x' <- x' - zeta grad_x |y - A(D(x))| (algorithm 1
    there, its zeta divided by the norm as its authors do), for any differentiable operator.

    A step moves by its gain c times x0, so that this is x0 = D - zeta / c grad_x |y - A(D)|, for a solver that asks
    once a step, at the levels of the grid: `prepared` takes the gains from it. `zeta` is tuned for each task (0.3 to 1
    in the paper); samples are not those of the posterior, as std is not used. An evaluation and a backward pass a call.
    """

    zeta: float = 1.0
    usual: ClassVar[Solver] = DDPM()
    gains: tuple[tuple[float, float], ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        if not (math.isfinite(self.zeta) and self.zeta >= 0):
            raise InputError(f"DPS: zeta must be a finite number >= 0, got {self.zeta}")

    def prepared(self, levels: Sequence[Level], solver: Solver | None = None) -> DPS:
        """The method on these levels, with the gain of `solver` (DDPM by default) at each.

        InputError for levels per sample, and for solvers that ask more than once a step or look back.
        """
        solver = solver or DDPM()
        if solver.calls != 1 or solver.history or getattr(solver, "adaptive", False):
            raise InputError(f"DPS needs a solver of one evaluation a step such as DDPM() or DDIM(), got {solver}")
        if any(level.alpha.ndim for level in levels):
            raise InputError("DPS has one grid for all samples: levels must be 0-dim")
        levels, rises = check_levels(levels)
        zero, gains = torch.zeros(1, dtype=torch.float64), dict[float, float]()
        for now, then, up in zip(levels, levels[1:], rises, strict=False):
            if not up:
                x, _ = solver.step(lambda x, _: torch.ones_like(x), zero, now, then, [], lambda: zero)
                gains.setdefault(float(now.lam), float(x))
        return replace(self, gains=tuple(gains.items()))

    def __call__(self, denoise: Denoise, problem: Problem, /) -> Denoise:
        """The denoiser moved towards the observations; InputError before `prepared`."""
        if not self.gains:
            raise InputError("DPS depends on the steps: bind DPS().prepared(levels, solver), as restore does")
        gains = dict(self.gains)

        def restored(x: Tensor, level: Level) -> Tensor:
            lam = float(level.lam) if level.lam.ndim == 0 else math.nan
            if lam not in gains:
                raise InputError(f"DPS was prepared for other levels than lam = {level.lam.tolist()}: see `prepared`")
            x0, pull = linearised(denoise, x, level)
            with torch.enable_grad():
                seen = x0.requires_grad_()
                r = problem.residual(seen)
                size = dot(r, r).sqrt()
                (slope,) = torch.autograd.grad(r, seen, (r / torch.where(size > 0, size, 1.0)).detach())
            return (x0.detach() - self.zeta / gains[lam] * pull(slope)).to(x.dtype)

        return restored
