"""The diffusion transformer (Peebles and Xie 2023, arXiv 2212.09748) for 1-D, 2-D and 3-D data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, layer_norm, pad

from undiffuse.nets.attention import attend, heads_of, zero
from undiffuse.nets.blocks import check_settings, cropped, padded, shuffle, unshuffle
from undiffuse.nets.embed import Embedding, check_input, sines


def _modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return torch.addcmul(shift, layer_norm(x, x.shape[-1:]), 1 + scale)


class _Block(nn.Module):
    """Self-attention and a two-layer network, each after adaptive layer norm and through a gate that starts shut."""

    def __init__(self, width: int, heads: int, expand: int, embedding: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.modulate = zero(nn.Linear(embedding, 6 * width))
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.q_norm, self.k_norm = nn.RMSNorm(width // heads), nn.RMSNorm(width // heads)
        self.up, self.down = nn.Linear(width, expand * width), nn.Linear(expand * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulate(emb)[:, None].chunk(6, -1)
        qkv = self.qkv(_modulated(x, shift1, scale1)).unflatten(-1, (3, self.heads, -1))
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
        h = attend(q, k, v, self.q_norm, self.k_norm).transpose(1, 2).flatten(2)
        x = torch.addcmul(x, gate1, self.proj(h))
        h = self.dropout(gelu(self.up(_modulated(x, shift2, scale2)), approximate="tanh"))
        return torch.addcmul(x, gate2, self.down(h))


class DiT(nn.Module):
    """Patches as tokens through `depth` transformer blocks with adaLN-zero, QK-norm and sine positions; any size.

    x (b, channels, *size) with 1, 2 or 3 sides -> the same shape, or 2 * channels with `learned_variance`. `width`, of
    `heads` heads (0: of 64 or the nearest divisor), is split evenly; `expand` times as wide inside the two-layer
    networks. `vector` and `augment` are the widths of `Cond.vector` and of `Cond.augment`, 0 for none. Sizes that
    `patch` does not divide are padded inside and cropped outside. Raises InputError for wrong shapes.

    >>> net = DiT(channels=1, width=32, depth=2, vector=10)
    >>> net(torch.zeros(2, 1, 7, 9), torch.zeros(2)).shape
    torch.Size([2, 1, 7, 9])
    """

    def __init__(
        self,
        channels: int,
        dims: int = 2,
        width: int = 192,
        depth: int = 6,
        heads: int = 0,
        patch: int = 4,
        expand: int = 4,
        vector: int = 0,
        dropout: float = 0.0,
        learned_variance: bool = False,
        augment: int = 0,
    ) -> None:
        super().__init__()
        least = min(channels, depth, patch, expand) >= 1 and heads >= 0 and width >= 8
        even = width % 2 == 0 and (heads < 1 or width % heads == 0)
        numbers = {"channels": channels, "depth": depth, "patch": patch, "expand": expand}
        numbers |= {"width": width, "heads": heads}
        needs = "channels, depth, patch, expand >= 1; an even width >= 8 that heads divide"
        check_settings(least and even, "DiT", needs, dims, numbers, vector, augment, dropout)
        heads = heads or heads_of(width, 64)
        self.channels, self.dims, self.patch = channels, dims, patch
        inside = channels * patch**dims
        self.embed = Embedding(width, width, vector, augment)
        self.stem = nn.Linear(inside, width)
        self.blocks = nn.ModuleList(_Block(width, heads, expand, width, dropout) for _ in range(depth))
        self.modulate = zero(nn.Linear(width, 2 * width))
        self.head = zero(nn.Linear(width, inside * (1 + learned_variance)))

    def _positions(self, size: Sequence[int], x: Tensor) -> Tensor:
        """(tokens, width): sines and cosines of every side's coordinate, an equal part of the width each."""
        width = self.stem.out_features
        part = 2 * (width // (2 * len(size)))
        grid = torch.meshgrid(*(torch.arange(n, device=x.device).float() for n in size), indexing="ij")
        each = [sines(side.flatten(), part // 2, (2 * torch.pi, 2e4 * torch.pi)) for side in grid]
        return pad(torch.cat(each, 1), (0, width - part * len(size))).to(x.dtype)

    def forward(self, x: Tensor, time: Tensor, cond: Any = None) -> Tensor:
        """F(x, time): x (b, channels, *size), time (b,), cond with `vector` (b, vector) and `augment` (b, augment), or
        None; without them it is unconditional and of data as they are."""
        check_input(x, time, self.channels, self.dims)
        emb, size = self.embed(time, cond), x.shape[2:]
        patches = unshuffle(padded(x, self.patch), self.patch)
        h = self.stem(patches.flatten(2).transpose(1, 2))
        h = h + self._positions(patches.shape[2:], h)
        for block in self.blocks:
            h = block(h, emb)
        shift, scale = self.modulate(emb)[:, None].chunk(2, -1)
        out = self.head(_modulated(h, shift, scale)).transpose(1, 2).unflatten(2, patches.shape[2:])
        return cropped(shuffle(out, self.patch), size).contiguous()
