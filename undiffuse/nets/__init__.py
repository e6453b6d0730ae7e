"""Networks: net(x, time, cond) -> the shape of x (twice its channels with learned variance)."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from undiffuse.nets.control import Control
from undiffuse.nets.dit import DiT
from undiffuse.nets.unet import UNet

NETS: dict[str, Callable[..., nn.Module]] = {"unet": UNet, "dit": DiT}

__all__ = ["NETS", "Control", "DiT", "UNet"]
