"""A multistep method with the start that its order deserves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from undiffuse.level import Level
from undiffuse.solvers.base import Eval, Solver
from undiffuse.solvers.exponential import finite
from undiffuse.types import Denoise, Noise


@dataclass(frozen=True)
class Start:
    """`first` takes the steps until `main` has all the evaluations that it reads, also after levels have risen.

    Its few steps may be of one order less: the global order is the smaller of `first`'s plus one and the order that
    `main` has with all its evaluations, e.g. 3 for `Start(DPMSolver(2, "x0"), Adams(3))`.
    """

    first: Solver
    main: Solver

    @property
    def global_order(self) -> int:
        return min(self.first.global_order + 1, getattr(self.main, "full_order", self.main.global_order))

    @property
    def adaptive(self) -> bool:
        """Whether steps are chosen from the data."""
        return bool(any(getattr(s, "adaptive", False) for s in (self.first, self.main)))

    @property
    def calls(self) -> int:
        return self.main.calls

    @property
    def history(self) -> int:
        return self.main.history

    def step(
        self, denoise: Denoise, x: Tensor, now: Level, then: Level, past: Sequence[Eval], noise: Noise
    ) -> tuple[Tensor, Eval]:
        solver = self.main if len(finite(past)) >= self.main.history else self.first
        return solver.step(denoise, x, now, then, past, noise)
