"""A small transformer over a condition's tokens, trained with the network that asks them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, rms_norm

from undiffuse.cond.cond import Cond
from undiffuse.nets.attention import Context, Rotation, mixed, normed, rotary
from undiffuse.types import InputError


class _Layer(nn.Module):
    """Self-attention with QK-norm and rotary positions, then a two-layer network, each after an RMS norm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.q_norm, self.k_norm = nn.RMSNorm(width // heads), nn.RMSNorm(width // heads)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, keys: Tensor, rotation: Rotation) -> Tensor:
        """x (b, n, width); `keys` (b, 1, 1, n) is False for what must not be seen."""
        q, k, v = self.qkv(rms_norm(x, x.shape[-1:])).unflatten(-1, (3, self.heads, -1)).transpose(1, 3).unbind(2)
        h = mixed(normed(q, self.q_norm, rotation), normed(k, self.k_norm, rotation), v, keys)
        x = x + self.proj(h.transpose(1, 2).flatten(2))
        out: Tensor = x + self.down(gelu(self.up(rms_norm(x, x.shape[-1:])), approximate="tanh"))
        return out


class Transformer(nn.Module):
    """Tokens (b, n, width) that are there where the mask (b, n) is True -> a `Cond` with them, after `depth` layers,
    and with the mean of those that are there as its vector (b, width). What is masked out has no effect."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.heads = max(1, width // 64)
        self.layers = nn.ModuleList(_Layer(width, self.heads) for _ in range(depth))
        self.norm = nn.RMSNorm(width)

    def forward(self, x: Tensor, mask: Tensor, weights: Tensor | None = None) -> Cond:
        """`weights` (b, n), if given, multiply the tokens that come out, and their share of the mean."""
        context = Context.of(x, mask)
        h, rotation = context.tokens, rotary((x.shape[1],), x.shape[2] // self.heads, 0, x)
        for layer in self.layers:
            h = layer(h, context.keys, rotation)
        return pooled(normed(h, self.norm), mask, weights)


def pooled(tokens: Tensor, mask: Tensor, weights: Tensor | None = None) -> Cond:
    """The tokens, zero where they are masked out, times their weights; and the mean of those as the vector."""
    tokens = tokens.masked_fill(~mask[..., None], 0)
    if weights is not None:
        tokens = tokens * weights[..., None]
    return Cond(tokens.sum(1) / mask.sum(1, keepdim=True).clamp(min=1), tokens, mask)


def check_sizes(kind: str, width: int, depth: int, **least: int) -> None:
    """InputError unless width is a multiple of 64, or even and under 128, depth >= 0, and the others are >= 1."""
    fine = width >= 8 and width % (64 if width >= 128 else 2) == 0
    if not fine or depth < 0 or min(least.values(), default=1) < 1:
        given = ", ".join(f"{k}={v}" for k, v in {"width": width, "depth": depth, **least}.items())
        raise InputError(
            f"{kind} needs an even width >= 8, from 128 on a multiple of 64; depth >= 0"
            + "".join(f"; {name} >= 1" for name in least)
            + f". Got {given}"
        )


def sequences(parts: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Sequences (n_i, ...) of any lengths -> (b, most, ...) filled up with zeros, and the mask (b, most)."""
    n = max(len(p) for p in parts)
    whole = parts[0].new_zeros(len(parts), n, *parts[0].shape[1:])
    mask = torch.zeros(len(parts), n, dtype=torch.bool)
    for row, part in enumerate(parts):
        whole[row, : len(part)], mask[row, : len(part)] = part, True
    return whole, mask
