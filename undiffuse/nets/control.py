"""A control branch for a U-Net that is trained already (ControlNet; Zhang et al. 2023, arXiv 2302.05543)."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import silu

from undiffuse.nets.attention import zero
from undiffuse.nets.blocks import CONV
from undiffuse.nets.embed import check_input, read_spatial
from undiffuse.nets.unet import UNet
from undiffuse.types import InputError


class Control(nn.Module):
    """A frozen U-Net and a trainable copy of its down path that reads a map `Cond.spatial` (b, `spatial`, *size).

    The copy's answers join the skip connections through convolutions that are zero at first, so training starts from
    what `net` does, and a row whose map is null (zero) keeps it for ever. Only `branch`, `hint` and `joins` have
    gradients; `net`, whose parameters are frozen in place, stays in eval mode. Called as a network is. Raises
    InputError for other networks than a `UNet`, and for one that reads a map by itself.

    >>> import torch
    >>> from undiffuse import Cond
    >>> net = Control(UNet(channels=1, width=16), spatial=2)
    >>> net(torch.zeros(3, 1, 8, 8), torch.zeros(3), Cond(spatial=torch.ones(3, 2, 8, 8))).shape
    torch.Size([3, 1, 8, 8])
    """

    def __init__(self, net: UNet, spatial: int) -> None:
        super().__init__()
        if not isinstance(net, UNet):
            raise InputError(f"a control branch needs a UNet, got {type(net).__name__}")
        if net.widths["spatial"]:
            raise InputError("this network reads a spatial map by itself: a control branch needs one with spatial=0")
        if not isinstance(spatial, int) or spatial < 1:
            raise InputError(f"a control branch needs a map of at least one channel, got spatial={spatial}")
        self.channels = spatial
        self.branch = copy.deepcopy(net).requires_grad_()
        del self.branch.up, self.branch.norm, self.branch.head
        self.net = net.requires_grad_(False).eval()
        conv, width = CONV[net.dims], net.skips[0]
        read = conv(spatial * net.patch**net.dims, width, 3, padding=1)
        self.hint = nn.ModuleList([read, zero(conv(width, width, 3, padding=1))])
        self.joins = nn.ModuleList(zero(conv(c, c, 1)) for c in net.skips)
        self.to(memory_format=net.layout)  # type: ignore[call-overload]

    def train(self, mode: bool = True) -> Control:
        """As of any module, but the frozen network keeps to eval mode."""
        super().train(mode)
        self.net.eval()
        return self

    def forward(self, x: Tensor, time: Tensor, cond: Any = None) -> Tensor:
        """F(x, time) as `UNet.forward` gives it; without a map, that of `net`."""
        net, branch = self.net, self.branch
        check_input(x, time, net.channels, net.dims)
        spatial = read_spatial(cond, x, self.channels)
        emb, context = net.told(x, time, cond)
        skips = net.encoded(net.entered(net.stem, x), emb, context)
        if spatial is not None:
            there = spatial.flatten(1).any(1).reshape(-1, *[1] * (net.dims + 1))
            emb_, context_ = branch.told(x, time, cond)
            first, last = self.hint
            h = branch.entered(branch.stem, x) + last(silu(branch.entered(first, spatial.to(x.dtype))))
            heard = branch.encoded(h, emb_, context_)
            skips = [skip + there * join(h) for skip, join, h in zip(skips, self.joins, heard, strict=True)]
        return net.decoded(skips, emb, context, x.shape[2:])
