"""Guided predictions brought back to the range of unguided ones: by their std, or by clipping."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from undiffuse.guide.cfg import CFG
from undiffuse.level import PREDICTIONS, Kind, Level, from_x0, to_x0
from undiffuse.types import InputError, one_of, require


@dataclass(frozen=True)
class Rescale(CFG):
    """CFG whose std over a sample's elements is brought back to that of the conditional prediction, by a share `phi` in
    [0, 1] (Lin et al. 2023, arXiv 2305.08891, equations 15 and 16).

    F = F_cfg (phi std(F_cond) / std(F_cfg) + 1 - phi), where F is the prediction in `space`: x0, eps, v, u or score. It
    is another method in each; the paper's model predicts v. phi = 0 is CFG.
    """

    w: float = 2.0
    phi: float = 0.7
    space: Kind = "x0"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.phi <= 1, "guidance.phi", self.phi, "from 0 (CFG) to 1")
        if self.space not in PREDICTIONS:
            raise InputError(f"guidance.space={self.space}: {one_of(self.space, PREDICTIONS)}")

    def blend(self, x: Tensor, level: Level, w: float, cond: Tensor, uncond: Tensor) -> Tensor:
        """The rescaled x0."""
        guided = from_x0(self.space, super().blend(x, level, w, cond, uncond), x, level)
        over = tuple(range(1, x.ndim))
        own = guided.std(over, keepdim=True, correction=0)
        wanted = from_x0(self.space, cond, x, level).std(over, keepdim=True, correction=0)
        # a prediction without any std is one value, which no factor brings to another std
        factor = torch.where(own > 0, self.phi * wanted / own.clamp(min=1e-30) + 1 - self.phi, 1.0)
        return to_x0(self.space, factor * guided, x, level)


@dataclass(frozen=True)
class Thresholded(CFG):
    """CFG with dynamic thresholding (Saharia et al. 2022, arXiv 2205.11487, section 2.3): x0 is clipped at the
    `quantile` in (0, 1] of its absolute values, or at 1 where that is less, and divided by what it was clipped at.

    For data in [-1, 1] of which much is near the ends: pixels, not latents.
    """

    w: float = 2.0
    quantile: float = 0.995

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 < self.quantile <= 1, "guidance.quantile", self.quantile, "above 0 and at most 1")

    def blend(self, x: Tensor, level: Level, w: float, cond: Tensor, uncond: Tensor) -> Tensor:
        """The clipped x0."""
        return thresholded(super().blend(x, level, w, cond, uncond), self.quantile)


def thresholded(x0: Tensor, quantile: float) -> Tensor:
    """x0 (b, ...) between -1 and 1, by the quantile of each sample's absolute values.

    >>> thresholded(torch.tensor([[0.5, -0.25], [4.0, 2.0]]), 1.0).tolist()
    [[0.5, -0.25], [1.0, 0.5]]
    """
    flat = x0.abs().flatten(1)
    most = flat.float().quantile(quantile, 1).clamp(min=1).reshape(-1, *(1 for _ in x0.shape[1:])).to(x0)
    return x0.clamp(-most, most) / most
