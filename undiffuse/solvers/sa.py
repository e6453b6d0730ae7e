"""SA-Solver: Xue et al. 2023 (arXiv 2309.05019)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from undiffuse.level import Level
from undiffuse.solvers.adams import Adams
from undiffuse.types import InputError


@dataclass(frozen=True)
class SASolver(Adams):
    """Stochastic Adams predictor and corrector (algorithm 1) with noise `eta` only where lam_min <= lam <= lam_max.

    The defaults are the paper's: three predictions, their corrector, and eta = 1 for t in [0.2, 0.8] of the linear VP
    schedule, which is this range of lam. One evaluation a step, order 1 for eta > 0, else as `Adams`.
    """

    order: int = 3
    eta: float = 1.0
    corrector: bool = True
    lam_min: float = -3.22
    lam_max: float = 0.33

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.lam_min < self.lam_max or math.isnan(self.lam_max):
            raise InputError(f"SASolver needs lam_min < lam_max, got {self.lam_min} and {self.lam_max}")

    def eta_of(self, now: Level, then: Level) -> float | Tensor:
        inside = (now.lam >= self.lam_min) & (now.lam <= self.lam_max)
        return self.eta * float(inside) if inside.ndim == 0 else self.eta * inside.double()
