"""Building blocks for 1-D, 2-D and 3-D data: residual blocks with adaptive group norm, self-attention, resampling."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, pad, silu

from undiffuse.nets.attention import Context, CrossAttention, attend, heads_of, zero
from undiffuse.types import InputError

CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
POOL = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}


def check_settings(
    fine: bool,
    net: str,
    needs: str,
    dims: int,
    numbers: Mapping[str, int | Sequence[int]],
    conditions: Mapping[str, int],
    dropout: float,
) -> None:
    """InputError unless `fine`, all are whole numbers, dims from 1 to 3, sizes of conditions >= 0, dropout in [0, 1).

    `needs` says what makes the network's own `numbers` fine.
    """
    whole = {**numbers, **conditions}
    every = [n for v in whole.values() for n in (v if isinstance(v, Sequence) else (v,))]
    if dims not in CONV or not all(isinstance(n, int) for n in every) or not fine or min(conditions.values()) < 0:
        raise InputError(
            f"{net} needs whole numbers: dims 1 to 3; {needs}; {', '.join(conditions)} >= 0. "
            f"Got {', '.join(f'{name}={value}' for name, value in {'dims': dims, **whole}.items())}"
        )
    if not 0 <= dropout < 1:
        raise InputError(f"{net} dropout must be in [0, 1), got {dropout}")


def group_norm(channels: int) -> nn.GroupNorm:
    """Group norm with at least 16 channels a group, where they divide evenly (Karras et al. 2024, appendix B)."""
    groups = max(g for g in range(1, 33) if channels % g == 0 and (g == 1 or channels // g >= 16))
    return nn.GroupNorm(groups, channels)


class ResBlock(nn.Module):
    """Two convolutions around adaptive group norm: emb scales and shifts (Dhariwal and Nichol 2021, eq. 7).

    `resample`, if given, changes the size of the first convolution's input and of what skips (their appendix A).
    """

    def __init__(
        self,
        dims: int,
        channels: int,
        out: int,
        embedding: int,
        dropout: float = 0.0,
        resample: nn.Module | None = None,
    ) -> None:
        super().__init__()
        conv = CONV[dims]
        self.norm1, self.conv1 = group_norm(channels), conv(channels, out, 3, padding=1)
        self.modulate = zero(nn.Linear(embedding, 2 * out))
        self.norm2, self.dropout = group_norm(out), nn.Dropout(dropout)
        self.conv2 = zero(conv(out, out, 3, padding=1))
        self.skip = conv(channels, out, 1) if channels != out else nn.Identity()
        self.resample = resample or nn.Identity()

    def forward(self, x: Tensor, emb: Tensor, context: Context | None = None) -> Tensor:
        h, x = self.resample(silu(self.norm1(x))), self.resample(x)
        h = self.conv1(h)
        modulation = self.modulate(emb)
        scale, shift = modulation.reshape(*modulation.shape, *[1] * (x.ndim - 2)).chunk(2, 1)
        h = silu(torch.addcmul(shift, self.norm2(h), 1 + scale))
        out: Tensor = self.skip(x) + self.conv2(self.dropout(h))
        return out


class Attention(nn.Module):
    """Self-attention over all positions, with QK-norm."""

    def __init__(self, dims: int, channels: int, head_width: int = 32) -> None:
        super().__init__()
        self.heads = heads_of(channels, head_width)
        conv = CONV[dims]
        self.norm, self.qkv = group_norm(channels), conv(channels, 3 * channels, 1)
        self.proj = zero(conv(channels, channels, 1))
        self.q_norm, self.k_norm = nn.RMSNorm(channels // self.heads), nn.RMSNorm(channels // self.heads)

    def forward(self, x: Tensor) -> Tensor:
        c = x.shape[1]
        qkv = self.qkv(self.norm(x)).flatten(2).unflatten(1, (3, self.heads, c // self.heads)).transpose(-1, -2)
        q, k, v = qkv.unbind(1)
        h = attend(q, k, v, self.q_norm, self.k_norm)
        out: Tensor = x + self.proj(h.transpose(-1, -2).reshape(x.shape))
        return out


class Cross(nn.Module):
    """Every position asks the tokens (b, n, `tokens`) of a condition."""

    def __init__(self, channels: int, tokens: int, head_width: int = 32) -> None:
        super().__init__()
        self.norm, self.attention = (
            group_norm(channels),
            CrossAttention(channels, tokens, heads_of(channels, head_width)),
        )

    def forward(self, x: Tensor, context: Context) -> Tensor:
        h = self.attention(self.norm(x).flatten(2).transpose(1, 2), context)
        out: Tensor = x + h.transpose(1, 2).reshape(x.shape)
        return out


class Stage(nn.Module):
    """A residual block; where asked for self-attention after it, and attention to `tokens` features of a condition."""

    def __init__(
        self, dims: int, channels: int, out: int, embedding: int, dropout: float, attend: bool, tokens: int = 0
    ) -> None:
        super().__init__()
        self.block = ResBlock(dims, channels, out, embedding, dropout)
        self.attention = Attention(dims, out) if attend else nn.Identity()
        self.cross = Cross(out, tokens) if tokens else None

    def forward(self, x: Tensor, emb: Tensor, context: Context | None = None) -> Tensor:
        x = self.attention(self.block(x, emb))
        return x if self.cross is None or context is None else self.cross(x, context)


class Down(nn.Module):
    """Halves every side by averaging, then a convolution."""

    def __init__(self, dims: int, channels: int) -> None:
        super().__init__()
        self.pool, self.conv = POOL[dims](2), CONV[dims](channels, channels, 3, padding=1)

    def forward(self, x: Tensor, emb: Tensor, context: Context | None = None) -> Tensor:
        out: Tensor = self.conv(self.pool(x))
        return out


class Up(nn.Module):
    """Doubles every side by repetition, then a convolution."""

    def __init__(self, dims: int, channels: int) -> None:
        super().__init__()
        self.conv = CONV[dims](channels, channels, 3, padding=1)

    def forward(self, x: Tensor, emb: Tensor, context: Context | None = None) -> Tensor:
        out: Tensor = self.conv(interpolate(x, scale_factor=2.0, mode="nearest"))
        return out


def padded(x: Tensor, multiple: int) -> Tensor:
    """x (b, c, *size) with every side filled up to a multiple by its edges, half before it."""
    margins = [-side % multiple for side in x.shape[2:]]
    if not any(margins):
        return x
    # torch lists the last side first
    return pad(x, [m for side in reversed(margins) for m in (side // 2, side - side // 2)], mode="replicate")


def cropped(x: Tensor, size: Sequence[int]) -> Tensor:
    """What `padded` had around it taken away."""
    for axis, side in enumerate(size, 2):
        x = x.narrow(axis, (x.shape[axis] - side) // 2, side)
    return x


def unshuffle(x: Tensor, patch: int) -> Tensor:
    """(b, c, n p, ...) -> (b, c p^dims, n, ...): every p-sided patch becomes channels; exact inverse of `shuffle`."""
    b, c, *size = x.shape
    dims = len(size)
    x = x.reshape(b, c, *(n for side in size for n in (side // patch, patch)))
    order = [0, 1, *range(3, 3 + 2 * dims, 2), *range(2, 2 + 2 * dims, 2)]
    return x.permute(order).reshape(b, c * patch**dims, *(side // patch for side in size))


def shuffle(x: Tensor, patch: int) -> Tensor:
    """(b, c p^dims, n, ...) -> (b, c, n p, ...)."""
    b, c, *size = x.shape
    dims = len(size)
    x = x.reshape(b, c // patch**dims, *[patch] * dims, *size)
    order = [0, 1, *(axis for i in range(dims) for axis in (2 + dims + i, 2 + i))]
    return x.permute(order).reshape(b, c // patch**dims, *(side * patch for side in size))
