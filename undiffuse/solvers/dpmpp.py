"""DPM-Solver++: Lu et al. 2022 (arXiv 2211.01095)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from undiffuse.level import Level
from undiffuse.solvers.base import Eval, combine, exponential_euler
from undiffuse.types import Denoise, Noise


@dataclass(frozen=True)
class DPMpp2M:
    """DPM-Solver++(2M), algorithm 2: DDIM with x0 extrapolated through the previous evaluation.

    D = (1 + 1 / (2 r)) x0 - x0_prev / (2 r), r = h_prev / h. Order 2, one evaluation a step. The first step, the
    one after a start at alpha = 0, and one that ends at sigma = 0 have no finite r and are DDIM's.
    """

    global_order: ClassVar[int] = 2
    calls: ClassVar[int] = 1
    history: ClassVar[int] = 1

    def step(
        self, denoise: Denoise, x: Tensor, now: Level, then: Level, past: Sequence[Eval], noise: Noise
    ) -> tuple[Tensor, Eval]:
        x0 = denoise(x, now)
        if not past or then.is_clean:
            return exponential_euler(x, x0, now, then), Eval(now, x, x0)
        minus_h = now.lam - then.lam
        fall = then.alpha * torch.expm1(minus_h)
        slope = fall * minus_h / (2 * (past[0].level.lam - now.lam))  # fall / (2 r), 0 after a start at alpha = 0
        return combine((then.sigma / now.sigma, x), (-(fall + slope), x0), (slope, past[0].x0)), Eval(now, x, x0)
