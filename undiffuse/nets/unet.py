"""The U-Net (Ronneberger et al. 2015; Ho et al. 2020; Dhariwal and Nichol 2021) for 1-D, 2-D and 3-D data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from undiffuse.nets.attention import Context, heads_of, rotary, zero
from undiffuse.nets.blocks import (
    CONV,
    POOL,
    Down,
    ResBlock,
    Stage,
    Up,
    check_settings,
    cropped,
    group_norm,
    padded,
    shuffle,
    unshuffle,
)
from undiffuse.nets.embed import Embedding, check_input, read_spatial, read_tokens
from undiffuse.nets.transformer import Block
from undiffuse.types import InputError


class UNet(nn.Module):
    """Down path, bottleneck with self-attention, up path with skip connections; any size and number of channels.

    x (b, channels, *size) with 1, 2 or 3 sides -> the same shape, or 2 * channels with `learned_variance`. `width`
    times each of `mults` are the channels of the levels, with `depth` residual blocks each; levels in `attention` (0 is
    the finest) attend, the bottleneck always does, through `transformer` transformer blocks besides. Levels are halved
    and doubled by convolutions, or inside residual blocks with `resample` = residual. `patch` > 1 turns patches into
    channels first (pixel-unshuffle).

    `vector`, `augment`, `tokens` and `spatial` are the widths of these parts of a `Cond`, 0 for none. Levels in `cross`
    ask the tokens, and the bottleneck does. A spatial map has the sides of x and is concatenated to it. Sizes that the
    levels do not divide are padded inside and cropped outside. Raises InputError for wrong shapes.

    >>> net = UNet(channels=1, width=32, vector=10)
    >>> net(torch.zeros(2, 1, 7, 9), torch.zeros(2)).shape
    torch.Size([2, 1, 7, 9])
    """

    def __init__(
        self,
        channels: int,
        dims: int = 2,
        width: int = 64,
        mults: Sequence[int] = (1, 2),
        depth: int = 1,
        attention: Sequence[int] = (),
        patch: int = 1,
        vector: int = 0,
        dropout: float = 0.0,
        learned_variance: bool = False,
        augment: int = 0,
        tokens: int = 0,
        spatial: int = 0,
        cross: Sequence[int] = (),
        transformer: int = 0,
        resample: Literal["conv", "residual"] = "conv",
    ) -> None:
        super().__init__()
        least, mults = bool(mults) and min(channels, depth, patch, *mults) >= 1 and width >= 8, tuple(mults)
        numbers: dict[str, Any] = {"channels": channels, "depth": depth, "patch": patch, "mults": mults, "width": width}
        numbers |= {"transformer": transformer}
        conditions = {"vector": vector, "augment": augment, "tokens": tokens, "spatial": spatial}
        needs = "channels, depth, patch, mults >= 1; width >= 8; transformer >= 0"
        check_settings(least and transformer >= 0, "UNet", needs, dims, numbers, conditions, dropout)
        for name, levels in (("attention", attention), ("cross", cross)):
            if any(level not in range(len(mults)) for level in levels):
                there = f"0 ... {len(mults) - 1}, one for each of mults={list(mults)}"
                raise InputError(f"UNet {name} names levels {tuple(levels)}; there are {there}")
        if resample not in ("conv", "residual"):
            raise InputError(f"UNet resample must be conv or residual, got {resample!r}")
        self.channels, self.dims, self.patch = channels, dims, patch
        self.widths, self.multiple = {"tokens": tokens, "spatial": spatial}, patch * 2 ** (len(mults) - 1)
        embedding, widths = 4 * width, [width * m for m in mults]
        self.heads = heads_of(widths[-1], 64)
        if transformer and widths[-1] // self.heads % 2:
            raise InputError(f"UNet transformer needs heads of an even width, got {widths[-1]} / {self.heads}")
        self.embed = Embedding(width, embedding, vector, augment)
        inside, conv = channels * patch**dims, CONV[dims]

        def stage(c_in: int, level: int) -> Stage:
            asks = tokens if level in cross else 0
            return Stage(dims, c_in, widths[level], embedding, dropout, level in attention, asks)

        def resized(c: int, plain: type[Down | Up], how: nn.Module) -> nn.Module:
            return plain(dims, c) if resample == "conv" else ResBlock(dims, c, c, embedding, dropout, how)

        self.stem, c = conv(inside, width, 3, padding=1), width
        self.down, skips = nn.ModuleList(), [width]
        for level, w in enumerate(widths):
            for _ in range(depth):
                self.down.append(stage(c, level))
                c = w
                skips.append(c)
            if level + 1 < len(widths):
                self.down.append(resized(c, Down, POOL[dims](2)))
                skips.append(c)
        self.skips = (*skips, c)  # the channels of all that `encoded` gives
        self.middle = nn.ModuleList(
            Stage(dims, c, c, embedding, dropout, attend, tokens if attend else 0) for attend in (True, False)
        )
        self.up = nn.ModuleList()
        for level in reversed(range(len(widths))):
            for _ in range(depth + 1):
                self.up.append(stage(c + skips.pop(), level))
                c = widths[level]
            if level:
                self.up.append(resized(c, Up, nn.Upsample(scale_factor=2.0, mode="nearest")))
        self.norm = group_norm(c)
        self.head = zero(conv(c, inside * (1 + learned_variance), 3, padding=1))
        self.transformer = nn.ModuleList(
            Block(widths[-1], self.heads, 4, embedding, dropout, tokens=tokens) for _ in range(transformer)
        )
        self.spatial = conv(spatial * patch**dims, width, 3, padding=1, bias=False) if spatial else None
        # channels last in memory: a training step is 1.1 (float32) to 1.4 (bf16) times as fast on CPUs
        self.layout = torch.channels_last if dims == 2 else torch.contiguous_format
        self.to(memory_format=self.layout)  # type: ignore[call-overload]

    def forward(self, x: Tensor, time: Tensor, cond: Any = None) -> Tensor:
        """F(x, time): x (b, channels, *size), time (b,), and a `Cond` whose parts, `vector` (b, vector), `augment`
        (b, augment), `tokens` (b, any number, tokens) and `spatial` (b, spatial, *size), may each be None; without them
        it is unconditional and of data as they are."""
        check_input(x, time, self.channels, self.dims)
        spatial = read_spatial(cond, x, self.widths["spatial"])
        emb, context = self.told(x, time, cond)
        h = self.entered(self.stem, x)
        if self.spatial is not None and spatial is not None:
            h = h + self.entered(self.spatial, spatial.to(x.dtype))  # the convolution of both concatenated
        return self.decoded(self.encoded(h, emb, context), emb, context, x.shape[2:])

    def told(self, x: Tensor, time: Tensor, cond: Any) -> tuple[Tensor, Context | None]:
        """What every block is told: the embedding (b, 4 width), and the condition's tokens."""
        emb, given = self.embed(time, cond), read_tokens(cond, len(x), self.widths["tokens"])
        return emb, None if given is None else Context.of(given[0].to(emb.dtype), given[1])

    def entered(self, layer: nn.Module, x: Tensor) -> Tensor:
        """`layer` of x (b, c, *size) with its sides filled up and its patches as channels."""
        x = padded(x, self.multiple)
        out: Tensor = layer(unshuffle(x, self.patch) if self.patch > 1 else x)
        return out.contiguous(memory_format=self.layout)

    def encoded(self, h: Tensor, emb: Tensor, context: Context | None) -> list[Tensor]:
        """All skip connections of the down path from `h`, the stem's answer, on; the last one is the bottleneck's."""
        skips = [h]
        for layer in self.down:
            h = layer(h, emb, context)
            skips.append(h)
        first, last = self.middle
        h = first(h, emb, context)
        if len(self.transformer):
            tokens, side = h.flatten(2).transpose(1, 2), h.shape
            rotation = rotary(side[2:], side[1] // self.heads, 0, h)
            for block in self.transformer:
                tokens = block(tokens, emb, context, rotation)
            h = tokens.transpose(1, 2).reshape(side)
        return [*skips, last(h, emb, context)]

    def decoded(self, skips: list[Tensor], emb: Tensor, context: Context | None, size: Sequence[int]) -> Tensor:
        """The answer (b, channels, *size) that the up path makes of what `encoded` gives."""
        *skips, h = skips
        for layer in self.up:
            h = layer(torch.cat([h, skips.pop()], 1) if isinstance(layer, Stage) else h, emb, context)
        out: Tensor = self.head(silu(self.norm(h)))
        if self.patch > 1:
            out = shuffle(out, self.patch)
        return cropped(out, size).contiguous()
