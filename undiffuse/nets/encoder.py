"""The down path of a U-Net as a classifier (the EncoderUNet of Dhariwal and Nichol 2021, arXiv 2105.05233)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn.functional import silu

from undiffuse.nets.attention import zero
from undiffuse.nets.blocks import group_norm
from undiffuse.nets.embed import check_input
from undiffuse.nets.unet import UNet
from undiffuse.types import InputError


class EncoderUNet(nn.Module):
    """Down path and bottleneck of a `UNet` with these settings, then the mean over all positions and a linear layer.

    x (b, channels, *size) with 1, 2 or 3 sides, time (b,) -> (b, classes), zero before training. It reads
    `Cond.augment` (b, augment) alone. Raises InputError for impossible settings and wrong shapes.

    >>> import torch
    >>> net = EncoderUNet(channels=1, classes=10, width=32)
    >>> net(torch.zeros(2, 1, 7, 9), torch.zeros(2)).shape
    torch.Size([2, 10])
    """

    def __init__(
        self,
        channels: int,
        classes: int,
        dims: int = 2,
        width: int = 64,
        mults: Sequence[int] = (1, 2),
        depth: int = 1,
        attention: Sequence[int] = (),
        patch: int = 1,
        dropout: float = 0.0,
        augment: int = 0,
        transformer: int = 0,
        resample: Literal["conv", "residual"] = "conv",
    ) -> None:
        super().__init__()
        if not isinstance(classes, int) or classes < 2:
            raise InputError(f"a classifier needs classes >= 2, got {classes}")
        self.path = UNet(
            channels, dims, width, mults, depth, attention, patch,
            dropout=dropout, augment=augment, transformer=transformer, resample=resample,
        )  # fmt: skip
        del self.path.up, self.path.norm, self.path.head
        self.norm, self.head = group_norm(self.path.skips[-1]), zero(nn.Linear(self.path.skips[-1], classes))

    def forward(self, x: Tensor, time: Tensor, cond: Any = None) -> Tensor:
        """F(x, time) (b, classes)."""
        path = self.path
        check_input(x, time, path.channels, path.dims)
        emb, context = path.told(x, time, cond)
        h = path.encoded(path.entered(path.stem, x), emb, context)[-1]
        out: Tensor = self.head(silu(self.norm(h)).flatten(2).mean(2))
        return out
