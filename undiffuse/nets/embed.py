"""Sinusoidal embedding of the time input (Vaswani et al. 2017; Ho et al. 2020, appendix B)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class TimeEmbedding(nn.Module):
    """time (b,) -> (b, dim): sines and cosines with `width` / 2 periods in geometric steps, then two linear layers.

    Periods run from 0.1 to 40, which resolves -lam / 4 in [-3, 3]; for integer timesteps give e.g. (6, 6e4).
    Sines and cosines are computed in float32 whatever the precision around them, the layers too under autocast.
    """

    def __init__(self, width: int, dim: int, periods: tuple[float, float] = (0.1, 40.0)) -> None:
        super().__init__()
        self.count, self.periods = width // 2, periods
        self.mlp = nn.Sequential(nn.Linear(self.count * 2, dim), nn.SiLU(), nn.Linear(dim, dim))

    def frequencies(self, device: torch.device) -> Tensor:
        """2 pi / period; no buffer, which `net.bfloat16()` would round."""
        shortest, longest = (math.log(p) for p in self.periods)
        return 2 * math.pi / torch.linspace(shortest, longest, self.count, dtype=torch.float64, device=device).exp()

    def forward(self, time: Tensor) -> Tensor:
        angle = time.float()[:, None] * self.frequencies(time.device).float()
        with torch.autocast(time.device.type, enabled=False):
            out: Tensor = self.mlp(torch.cat([angle.cos(), angle.sin()], 1).to(next(self.mlp.parameters()).dtype))
        return out
