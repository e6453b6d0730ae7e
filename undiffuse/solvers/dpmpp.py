"""DPM-Solver++: Lu et al. 2022 (arXiv 2211.01095)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from undiffuse.level import Level
from undiffuse.solvers.adams import Adams
from undiffuse.solvers.base import Eval, combine
from undiffuse.solvers.dpm import DPMSolver
from undiffuse.solvers.exponential import check_prediction, linear
from undiffuse.types import Denoise, Noise


@dataclass(frozen=True)
class DPMpp2M:
    """DPM-Solver++(2M), algorithm 2: DDIM with x0 extrapolated through the previous evaluation.

    D = (1 + 1 / (2 r)) x0 - x0_prev / (2 r), r = h_prev / h. Order 2, one evaluation a step. The first step, the
    one after a start at alpha = 0, and one that ends at sigma = 0 have no finite r and are DDIM's. eta > 0 is its SDE
    form (1 the reverse SDE; order 1).
    """

    eta: float = 0.0
    calls: ClassVar[int] = 1
    history: ClassVar[int] = 1

    def __post_init__(self) -> None:
        check_prediction("x0", self.eta)

    @property
    def global_order(self) -> int:
        return 2 if self.eta == 0 else 1

    def step(
        self, denoise: Denoise, x: Tensor, now: Level, then: Level, past: Sequence[Eval], noise: Noise
    ) -> tuple[Tensor, Eval]:
        x0, minus_h = denoise(x, now), now.lam - then.lam
        fall = then.alpha * torch.expm1((1 + self.eta**2) * minus_h)
        decay, std = linear(now, then, self.eta, "x0")
        if not past or then.is_clean:
            terms = [(decay, x), (-fall, x0)]
        else:
            slope = fall * minus_h / (2 * (past[0].level.lam - now.lam))  # fall / (2 r), 0 after a start at alpha = 0
            terms = [(decay, x), (-(fall + slope), x0), (slope, past[0].x0)]
        if std is not None and not then.is_clean:
            terms.append((std, noise()))
        return combine(*terms), Eval(now, x, x0)


def DPMpp2S(eta: float = 0.0) -> DPMSolver:
    """DPM-Solver++(2S), algorithm 1: `DPMSolver` of order 2 on x0."""
    return DPMSolver(2, "x0", eta)


def DPMpp3M(eta: float = 0.0) -> Adams:
    """DPM-Solver++(3M) with the right third-order weights, which are those of `Adams`: half the second derivative is
    integrated with the weight of u^2. The paper's code gives it the weight of u^2 / 2."""
    return Adams(3, eta)
