"""Sinusoidal embedding of the time input (Vaswani et al. 2017; Ho et al. 2020, appendix B)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class TimeEmbedding(nn.Module):
    """time (b,) -> (b, dim): sines and cosines with `width` / 2 periods in geometric steps, then two linear layers.

    Periods run from 0.1 to 40, which resolves -lam / 4 in [-3, 3]; for integer timesteps give e.g. (6, 6e4).
    Computed in float32 whatever the precision around it.
    """

    frequencies: Tensor

    def __init__(self, width: int, dim: int, periods: tuple[float, float] = (0.1, 40.0)) -> None:
        super().__init__()
        shortest, longest = (math.log(p) for p in periods)
        steps = torch.linspace(shortest, longest, width // 2, dtype=torch.float64)
        self.register_buffer("frequencies", (2 * math.pi / steps.exp()).float(), persistent=False)
        self.mlp = nn.Sequential(nn.Linear(width // 2 * 2, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, time: Tensor) -> Tensor:
        angle = time.float()[:, None] * self.frequencies
        out: Tensor = self.mlp(torch.cat([angle.cos(), angle.sin()], 1).to(next(self.mlp.parameters()).dtype))
        return out
