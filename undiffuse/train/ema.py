"""The average of the weights over training, by the power rule (Karras et al. 2024, arXiv 2312.02696, section 3)."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from undiffuse.train.checkpoint import is_shard
from undiffuse.types import InputError


def _own(p: Tensor) -> Tensor:
    """What this process holds of a parameter: all of it, or its shard."""
    return p.detach().to_local() if is_shard(p) else p.detach()  # type: ignore[attr-defined]


class EMA:
    """average_t = beta_t average_(t-1) + (1 - beta_t) weights_t with beta_t = (1 - 1 / t)^(gamma + 1), t = 1, 2, ...

    The window grows with training (gamma 6.94: relative width 10 %), the initial weights leave it at once: beta_1 = 0.
    Buffers are copied, not averaged. `average` is a module in eval mode for sampling; the trained one is left alone.
    """

    def __init__(self, module: nn.Module, gamma: float = 6.94) -> None:
        if gamma < 0:
            raise InputError(f"EMA needs gamma >= 0 (0 averages all steps equally), got {gamma}")
        self.gamma, self.module = gamma, module
        self.average = copy.deepcopy(module).eval().requires_grad_(False)

    def beta(self, t: int) -> float:
        """The weight of the past at update t >= 1."""
        return float((1 - 1 / t) ** (self.gamma + 1))

    @torch.no_grad()
    def update(self, t: int) -> None:
        """Take in the weights after optimiser step t (1, 2, ...)."""
        averages, newest = ([_own(p) for p in m.parameters()] for m in (self.average, self.module))
        torch._foreach_lerp_(averages, newest, 1 - self.beta(t))
        for mine, theirs in zip(self.average.buffers(), self.module.buffers(), strict=True):
            mine.copy_(theirs)
