"""The diffusion transformer (Peebles and Xie 2023, arXiv 2212.09748) for 1-D, 2-D and 3-D data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from undiffuse.nets.attention import Context, heads_of, rotary, zero
from undiffuse.nets.blocks import check_settings, cropped, padded, shuffle, unshuffle
from undiffuse.nets.embed import Embedding, check_input, read_spatial, read_tokens, sines
from undiffuse.nets.transformer import NORMS, Block, JointBlock, modulated
from undiffuse.types import InputError


class DiT(nn.Module):
    """Patches as tokens through `depth` transformer blocks with adaLN-zero and QK-norm; any size.

    x (b, channels, *size) with 1, 2 or 3 sides -> the same shape, or 2 * channels with `learned_variance`. `width`, of
    `heads` heads (0: of 64 or the nearest divisor), is split evenly; `expand` times as wide inside the two-layer
    networks, or SwiGLU of as many weights with `gated`. `positions` are sines, or rope, which turns queries and keys;
    `norm` is layer or rms; `registers` learned tokens go along (Darcet et al. 2024, arXiv 2309.16588).

    `vector`, `augment`, `tokens` and `spatial` are the widths of these parts of a `Cond`, 0 for none. Tokens are read
    as `tokens_by` says: cross (every block asks them), context (they go along with the patches) or joint (so they do,
    with weights of their own: MMDiT). A spatial map has the sides of x and joins the patches. Sizes that `patch` does
    not divide are padded inside and cropped outside. Raises InputError for wrong shapes.

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
        tokens: int = 0,
        spatial: int = 0,
        positions: Literal["sines", "rope"] = "sines",
        norm: Literal["layer", "rms"] = "layer",
        gated: bool = False,
        registers: int = 0,
        tokens_by: Literal["cross", "context", "joint"] = "cross",
    ) -> None:
        super().__init__()
        least = min(channels, depth, patch, expand) >= 1 and min(heads, registers) >= 0 and width >= 8
        even = width % 2 == 0 and (heads < 1 or width % heads == 0)
        numbers = {"channels": channels, "depth": depth, "patch": patch, "expand": expand}
        numbers |= {"width": width, "heads": heads, "registers": registers}
        conditions = {"vector": vector, "augment": augment, "tokens": tokens, "spatial": spatial}
        needs = "channels, depth, patch, expand >= 1; registers >= 0; an even width >= 8 that heads divide"
        check_settings(least and even, "DiT", needs, dims, numbers, conditions, dropout)
        choices = {"positions": ("sines", "rope"), "norm": tuple(NORMS), "tokens_by": ("cross", "context", "joint")}
        for name, value in (("positions", positions), ("norm", norm), ("tokens_by", tokens_by)):
            if value not in choices[name]:
                raise InputError(f"DiT {name} must be one of {', '.join(choices[name])}, got {value!r}")
        heads = heads or heads_of(width, 64)
        if positions == "rope" and (width // heads % 2 or width // heads < 2 * dims):
            raise InputError(
                f"DiT positions=rope needs heads of an even width of at least {2 * dims}, got {width} / {heads}: "
                "take fewer heads, or positions=sines"
            )
        self.channels, self.dims, self.patch = channels, dims, patch
        self.heads, self.positions, self.norm = heads, positions, norm
        self.widths, self.joint = {"tokens": tokens, "spatial": spatial}, bool(tokens) and tokens_by == "joint"
        inside = channels * patch**dims
        self.embed = Embedding(width, width, vector, augment)
        self.stem = nn.Linear(inside, width)
        self.blocks = nn.ModuleList()
        for i in range(depth):
            if self.joint:
                last = i + 1 == depth
                self.blocks.append(JointBlock(width, heads, expand, width, dropout, norm, gated, last))
            else:
                asked = tokens if tokens_by == "cross" else 0
                self.blocks.append(Block(width, heads, expand, width, dropout, norm, gated, asked))
        self.modulate = zero(nn.Linear(width, 2 * width))
        self.head = zero(nn.Linear(width, inside * (1 + learned_variance)))
        self.spatial = nn.Linear(spatial * patch**dims, width, bias=False) if spatial else None
        self.text = nn.Linear(tokens, width) if tokens and tokens_by != "cross" else None
        self.registers = nn.Parameter(0.02 * torch.randn(registers, width)) if registers else None

    def _positions(self, size: Sequence[int], x: Tensor) -> Tensor:
        """(tokens, width): sines and cosines of every side's coordinate, an equal part of the width each."""
        width = self.stem.out_features
        part = 2 * (width // (2 * len(size)))
        grid = torch.meshgrid(*(torch.arange(n, device=x.device).float() for n in size), indexing="ij")
        each = [sines(side.flatten(), part // 2, (2 * torch.pi, 2e4 * torch.pi)) for side in grid]
        return pad(torch.cat(each, 1), (0, width - part * len(size))).to(x.dtype)

    def _patches(self, x: Tensor) -> Tensor:
        return unshuffle(padded(x, self.patch), self.patch)

    def forward(self, x: Tensor, time: Tensor, cond: Any = None) -> Tensor:
        """F(x, time): x (b, channels, *size), time (b,), and a `Cond` whose parts, `vector` (b, vector), `augment`
        (b, augment), `tokens` (b, any number, tokens) and `spatial` (b, spatial, *size), may each be None; without them
        it is unconditional and of data as they are."""
        check_input(x, time, self.channels, self.dims)
        given = read_tokens(cond, len(x), self.widths["tokens"])
        spatial = read_spatial(cond, x, self.widths["spatial"])
        emb, size, patches = self.embed(time, cond), x.shape[2:], self._patches(x)
        h = self.stem(patches.flatten(2).transpose(1, 2))
        if self.positions == "sines":
            h = h + self._positions(patches.shape[2:], h)
        if self.spatial is not None and spatial is not None:
            h = h + self.spatial(self._patches(spatial.to(x.dtype)).flatten(2).transpose(1, 2))
        context = None if given is None else Context.of(given[0].to(emb.dtype), given[1])
        text = None if self.text is None or context is None else self.text(context.tokens)
        along = [] if self.registers is None else [self.registers.to(h.dtype).expand(len(x), -1, -1)]
        if text is not None and not self.joint:
            along.append(text)
        n = h.shape[1]
        h = torch.cat([*along, h], 1) if along else h
        extra, mask = h.shape[1] - n, None
        if text is not None and context is not None:
            others = h.shape[1] if self.joint else n
            before = 0 if self.joint else extra - text.shape[1]
            mask = pad(context.mask, (before, others), value=True)[:, None, None]
        rotation = None
        if self.positions == "rope":
            rotation = rotary(patches.shape[2:], h.shape[-1] // self.heads, extra, h)
        for block in self.blocks:
            if self.joint:
                h, text = block(h, text, emb, rotation, mask)
            else:
                h = block(h, emb, context, rotation, mask)
        shift, scale = self.modulate(emb)[:, None].chunk(2, -1)
        out = (
            self.head(modulated(h[:, extra:], shift, scale, self.norm)).transpose(1, 2).unflatten(2, patches.shape[2:])
        )
        return cropped(shuffle(out, self.patch), size).contiguous()
