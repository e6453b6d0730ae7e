"""DPM-Solver++: Lu et al. 2022 (arXiv 2211.01095)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from undiffuse.level import Level
from undiffuse.solvers.base import Eval
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
        x0, h = denoise(x, now), then.lam - now.lam
        d = x0
        if past and (h / (now.lam - past[0].level.lam) > 0).all() and torch.isfinite(h).all():
            over_2r = h / (now.lam - past[0].level.lam) / 2
            d = (1 + over_2r) * x0 - over_2r * past[0].x0
        return then.sigma / now.sigma * x - then.alpha * torch.expm1(-h) * d, Eval(now, x, x0)
