"""Predictor-corrector sampling: Song et al. 2021 (arXiv 2011.13456), algorithms 2 and 3."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from undiffuse.level import Level
from undiffuse.solvers.base import Eval, combine
from undiffuse.solvers.ddim import DDIM
from undiffuse.types import Denoise, InputError, Noise


@dataclass(frozen=True)
class PredictorCorrector:
    """`corrections` Langevin steps at each level, then DDIM(eta) to the next (eta = 1: ancestral prediction).

    A Langevin step is x + d sigma^2 score + sqrt(2 d) sigma z with d = 2 snr^2: the paper's step with the norm of the
    score taken as that of z / sigma, so that a sample does not depend on its batch; where the data's own spread exceeds
    sigma the paper's step is longer. Many such steps leave Gaussian data of true variance T at
    T / (1 - d sigma^2 / (2 T)): order 0, as more levels do not remove it. `corrections` + 1 evaluations a step.
    """

    snr: float = 0.16
    corrections: int = 1
    eta: float = 1.0
    global_order: ClassVar[int] = 0
    history: ClassVar[int] = 0

    def __post_init__(self) -> None:
        if not (0 < self.snr <= math.sqrt(0.5) and self.corrections >= 0 and 0 <= self.eta <= 1):
            raise InputError(f"PredictorCorrector needs 0 < snr <= 0.7, corrections >= 0 and 0 <= eta <= 1, got {self}")

    @property
    def calls(self) -> int:
        return 1 + self.corrections

    def step(
        self, denoise: Denoise, x: Tensor, now: Level, then: Level, past: Sequence[Eval], noise: Noise
    ) -> tuple[Tensor, Eval]:
        d = torch.as_tensor(2 * self.snr**2, dtype=torch.float64)
        for _ in range(self.corrections):  # sigma^2 score = alpha x0 - x
            x = combine((1 - d, x), (d * now.alpha, denoise(x, now)), ((2 * d).sqrt() * now.sigma, noise()))
        return DDIM(self.eta).step(denoise, x, now, then, past, noise)
