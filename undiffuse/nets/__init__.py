"""Networks: net(x, time, cond) -> the shape of x (twice its channels with learned variance), or (b, classes)."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from undiffuse.nets.control import Control
from undiffuse.nets.dit import DiT
from undiffuse.nets.encoder import EncoderUNet
from undiffuse.nets.unet import UNet

NETS: dict[str, Callable[..., nn.Module]] = {"unet": UNet, "dit": DiT}
CLASSIFIERS: dict[str, Callable[..., nn.Module]] = {"unet": EncoderUNet}  # of the same settings, for classifiers

__all__ = ["CLASSIFIERS", "NETS", "Control", "DiT", "EncoderUNet", "UNet"]
