"""Attention with normalised queries and keys (QK-norm), rotary positions, and tokens that may be masked out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, rms_norm, scaled_dot_product_attention

from undiffuse.nets.embed import sines

Rotation = tuple[Tensor, Tensor]  # cosines and sines (tokens, head width / 2)


class Context(NamedTuple):
    """Tokens of a condition (b, n, d), zero where `mask` (b, n) is False; `keys` (b, 1, 1, n) are those that queries of
    their own may see, all of a row that has none, whose answer is then multiplied by `there` (b, 1, 1) = 0."""

    tokens: Tensor
    mask: Tensor
    keys: Tensor
    there: Tensor

    @staticmethod
    def of(tokens: Tensor, mask: Tensor) -> Context:
        """Tokens that are masked out become zero, so that not even NaN in them has an effect."""
        there = mask.any(1, keepdim=True)
        keys = (mask | ~there)[:, None, None]
        return Context(tokens.masked_fill(~mask[..., None], 0), mask, keys, there[..., None])


def zero(module: nn.Module) -> nn.Module:
    """The module with all parameters zero: a branch that starts as silence."""
    for p in module.parameters():
        nn.init.zeros_(p)
    return module


def heads_of(width: int, head_width: int) -> int:
    """The most heads of at least `head_width` features that divide `width`; one where there are none."""
    return max(h for h in range(1, max(1, width // head_width) + 1) if width % h == 0)


def rotary(size: Sequence[int], width: int, extra: int, like: Tensor) -> Rotation:
    """The rotation of heads of `width` features over a grid (Su et al. 2021, arXiv 2104.09864), after `extra` tokens
    that are not turned.

    Every side turns an equal part of the pairs by its coordinate, with frequencies 1 ... 1/100 (RoPE-Axial; Heo et al.
    2024, arXiv 2403.13298): attention sees differences of coordinates, so any size will do.
    """
    part = width // (2 * len(size))
    grid = torch.meshgrid(*(torch.arange(n, device=like.device).float() for n in size), indexing="ij")
    turns = [sines(side.flatten(), part, (2 * torch.pi, 200 * torch.pi)).chunk(2, 1) for side in grid]
    still = (0, width // 2 - part * len(size), extra, 0)
    cos, sin = (torch.cat(each, 1) for each in zip(*turns, strict=True))
    return pad(cos, still, value=1.0), pad(sin, still)


def rotated(a: Tensor, rotation: Rotation) -> Tensor:
    """(b, heads, tokens, width): features i and i + width / 2 of a token turned as a pair."""
    cos, sin = (part.to(a.dtype) for part in rotation)
    first, second = a.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def normed(a: Tensor, norm: nn.RMSNorm, rotation: Rotation | None = None) -> Tensor:
    """Queries or keys (b, heads, tokens, width) over their root mean square (Dehghani et al. 2023), then turned."""
    a = rms_norm(a, a.shape[-1:]) * norm.weight.to(a.dtype)  # twice as fast on CPUs as with the weight inside
    return a if rotation is None else rotated(a, rotation)


def mixed(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(width)) v over the keys that `mask`, which meets (b, heads, queries, keys), lets through."""
    if q.device.type == "cpu" and q.requires_grad and k.shape[2] <= 512:
        # the fused kernel's backward pass takes 2 to 5 times as long as products of matrices this small
        logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        if mask is not None:
            logits = logits.masked_fill(~mask, -torch.inf)
        out: Tensor = logits.softmax(-1).to(v.dtype) @ v
        return out
    return scaled_dot_product_attention(q, k, v, mask)


def attend(
    q: Tensor, k: Tensor, v: Tensor, q_norm: nn.RMSNorm, k_norm: nn.RMSNorm, mask: Tensor | None = None
) -> Tensor:
    """Attention over (b, heads, tokens, width) with QK-norm."""
    return mixed(normed(q, q_norm), normed(k, k_norm), v, mask)


class CrossAttention(nn.Module):
    """What a condition's tokens (b, n, `tokens`) add to a sequence (b, m, `width`) that asks them: nothing at first,
    and never anything in a row whose tokens are all masked out."""

    def __init__(self, width: int, tokens: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.kv, self.proj = (
            nn.Linear(width, width),
            nn.Linear(tokens, 2 * width),
            zero(nn.Linear(width, width)),
        )
        self.q_norm, self.k_norm = nn.RMSNorm(width // heads), nn.RMSNorm(width // heads)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        q = self.q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = (part.transpose(1, 2) for part in self.kv(context.tokens).unflatten(-1, (2, self.heads, -1)).unbind(2))
        h = attend(q, k, v, self.q_norm, self.k_norm, context.keys)
        out: Tensor = self.proj(h.transpose(1, 2).flatten(2)) * context.there
        return out
