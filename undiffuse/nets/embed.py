"""What every block of a network is told: the time, the condition vector, and what augmentation did."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from undiffuse.types import InputError


def sines(values: Tensor, count: int, periods: tuple[float, float]) -> Tensor:
    """(n,) -> (n, 2 count) in float32: cosines and sines with `count` periods in geometric steps (Vaswani et al. 2017).

    Frequencies are computed anew and kept in no buffer, which `net.bfloat16()` would round.
    """
    shortest, longest = (math.log(p) for p in periods)
    steps = torch.linspace(shortest, longest, count, dtype=torch.float64, device=values.device)
    angle = values.float()[:, None] * (2 * math.pi / steps.exp()).float()
    return torch.cat([angle.cos(), angle.sin()], 1)


class TimeEmbedding(nn.Module):
    """time (b,) -> (b, dim): sines and cosines of `width` / 2 periods, then two linear layers (Ho et al. 2020).

    Periods run from 0.1 to 40, which resolves -lam / 4 in [-3, 3]; for integer timesteps give e.g. (6, 6e4).
    All is computed in float32 under autocast.
    """

    def __init__(self, width: int, dim: int, periods: tuple[float, float] = (0.1, 40.0)) -> None:
        super().__init__()
        self.count, self.periods = width // 2, periods
        self.mlp = nn.Sequential(nn.Linear(self.count * 2, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, time: Tensor) -> Tensor:
        with torch.autocast(time.device.type, enabled=False):
            out: Tensor = self.mlp(sines(time, self.count, self.periods).to(next(self.mlp.parameters()).dtype))
        return out


class Embedding(nn.Module):
    """(time (b,), cond) -> (b, dim): the sum of the time's embedding and of the condition's parts, through SiLU.

    `vector` and `augment` are the widths of `Cond.vector` and of `Cond.augment`, 0 for none, each with a linear layer
    of its own; what a condition lacks adds nothing. InputError for parts that were not provided for, and other widths.
    """

    def __init__(self, width: int, dim: int, vector: int, augment: int) -> None:
        super().__init__()
        self.time = TimeEmbedding(width, dim)
        self.vector = nn.Linear(vector, dim, bias=False) if vector else None
        self.augment = nn.Linear(augment, dim, bias=False) if augment else None

    def forward(self, time: Tensor, cond: Any) -> Tensor:
        emb: Tensor = self.time(time)
        parts = (("vector", "a condition", self.vector), ("augment", "augmentation labels", self.augment))
        for name, what, layer in parts if cond is not None else ():
            given = getattr(cond, name)
            if given is None:
                continue
            if layer is None:
                raise InputError(
                    f"this network was built without {what} ({name}=0) and was given some: build it with "
                    f"{name}={given.shape[-1]}"
                )
            if given.shape != (len(time), layer.in_features):
                raise InputError(
                    f"condition {name} of shape {tuple(given.shape)}: expected ({len(time)}, {layer.in_features})"
                )
            emb = emb + layer(given.to(emb.dtype))
        return silu(emb)


def check_input(x: Tensor, time: Tensor, channels: int, dims: int) -> None:
    """InputError unless x is (b, channels, *size) with `dims` sides, and time (b,)."""
    if x.ndim != 2 + dims or x.shape[1] != channels or 0 in x.shape[1:]:
        raise InputError(f"this network takes (batch, {channels}, {', '.join(['side'] * dims)}), got {tuple(x.shape)}")
    if time.shape != x.shape[:1]:
        raise InputError(f"time of shape {tuple(time.shape)} for {len(x)} samples: expected ({len(x)},)")


def read_tokens(cond: Any, b: int, width: int) -> tuple[Tensor, Tensor] | None:
    """`Cond.tokens` and their mask, None where there are none; InputError where they do not fit the network."""
    if cond is None or cond.tokens is None:
        return None
    tokens, mask = cond.tokens, cond.tokens_mask
    if not width:
        raise InputError("this network was built without tokens (tokens=0) and was given some")
    if tokens.ndim != 3 or tokens.shape[::2] != (b, width):
        raise InputError(f"condition tokens of shape {tuple(tokens.shape)}: expected ({b}, any number, {width})")
    if mask.shape != tokens.shape[:2] or mask.dtype != torch.bool:
        got = f"{tuple(mask.shape)} and {mask.dtype}"
        raise InputError(f"tokens_mask of shape {got}: expected {tuple(tokens.shape[:2])} and torch.bool")
    return (tokens, mask) if tokens.shape[1] else None


def read_spatial(cond: Any, x: Tensor, channels: int) -> Tensor | None:
    """`Cond.spatial` (b, channels, the sides of x) or None; InputError where it does not fit the network."""
    if cond is None or cond.spatial is None:
        return None
    if not channels:
        raise InputError("this network was built without a spatial map (spatial=0) and was given one")
    expected = (len(x), channels, *x.shape[2:])
    if cond.spatial.shape != expected:
        raise InputError(f"condition spatial of shape {tuple(cond.spatial.shape)}: expected {expected}")
    spatial: Tensor = cond.spatial
    return spatial
