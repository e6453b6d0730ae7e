"""Sizes of networks that are in use, and what each costs: counted on fake tensors, with which nothing is computed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from undiffuse.nets.dit import DiT
from undiffuse.nets.unet import UNet


@dataclass(frozen=True)
class Preset:
    """A network's settings, for samples of a shape: `undiffuse train WORDS` has it."""

    kind: str
    shape: tuple[int, ...]
    settings: dict[str, Any]

    def build(self, **more: Any) -> nn.Module:
        """The network; `more` are settings that follow from the data, such as vector=10."""
        kinds: dict[str, Callable[..., nn.Module]] = {"unet": UNet, "dit": DiT}
        return kinds[self.kind](self.shape[0], len(self.shape) - 1, **self.settings, **more)

    @property
    def words(self) -> str:
        """The settings as words of the command line."""

        def text(value: Any) -> str:
            plain = list(value) if isinstance(value, tuple) else value
            return str(plain).lower().replace(" ", "") if isinstance(plain, bool | list) else str(plain)

        return " ".join([f"net={self.kind}", *(f"net.{name}={text(value)}" for name, value in self.settings.items())])


class Cost(NamedTuple):
    """Parameters; floating-point operations of a sample's forward pass (matrix products and convolutions, two for each
    multiplication and addition); and bytes that a sample's forward pass keeps for the backward pass, in float32."""

    parameters: int
    flops: int
    activations: int


_LIGHT = {"positions": "rope", "norm": "rms", "gated": True}
_PIXELS = {"patch": 1, "depth": 2}
_ADM = {"patch": 1, "mults": (1, 2, 3, 4), "depth": 3, "attention": (1, 2, 3), "resample": "residual"}

# U-Nets on pixels, from the demo's to ADM's at 64x64; transformers on pixels and on latents of 32x32x4, with the
# widths and depths of Peebles and Xie 2023, table 1
PRESETS: dict[str, Preset] = {
    "default": Preset("unet", (1, 28, 28), {"width": 64, "mults": (1,), "patch": 2}),
    "unet-s": Preset("unet", (3, 32, 32), {**_PIXELS, "width": 64, "mults": (1, 2, 2), "attention": (2,)}),
    "unet-m": Preset("unet", (3, 32, 32), {**_PIXELS, "width": 128, "mults": (1, 2, 2, 2), "attention": (1,)}),
    "unet-l": Preset("unet", (3, 64, 64), {"width": 192, **_ADM}),
    "dit-xs": Preset("dit", (3, 32, 32), {"width": 192, "depth": 6, "patch": 4, **_LIGHT}),
    "dit-s": Preset("dit", (4, 32, 32), {"width": 384, "depth": 12, "patch": 2, **_LIGHT}),
    "dit-b": Preset("dit", (4, 32, 32), {"width": 768, "depth": 12, "patch": 2, **_LIGHT}),
    "dit-l": Preset("dit", (4, 32, 32), {"width": 1024, "depth": 24, "patch": 2, **_LIGHT}),
    "dit-xl": Preset("dit", (4, 32, 32), {"width": 1152, "depth": 28, "heads": 16, "patch": 2, **_LIGHT}),
}


def cost(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> Cost:
    """What the network that `make` builds costs on samples of a shape, unconditionally.

    >>> cost(lambda: UNet(1, width=8, mults=(1,)), (1, 8, 8)).parameters
    11929
    """
    with torch.device("meta"):
        net = make()
    with FakeTensorMode():
        for module in net.modules():
            for name, p in module._parameters.items():
                fake = None if p is None else torch.empty_strided(p.shape, p.stride())
                module._parameters[name] = None if fake is None else nn.Parameter(fake)
        x, time = torch.zeros(1, *shape), torch.zeros(1)
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
            net(x, time)
        weights = {p.untyped_storage()._cdata for p in net.parameters()}
        kept: dict[int, torch.UntypedStorage] = {}

        def keep(value: Tensor) -> Tensor:
            storage = value.untyped_storage()
            kept[storage._cdata] = storage  # held, so that no other storage gets its address
            return value

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
            out = net(x, time)
        held = sum(storage.nbytes() for address, storage in kept.items() if address not in weights)
        del out
    return Cost(sum(p.numel() for p in net.parameters()), counter.get_total_flops(), held)


def rows() -> Iterator[dict[str, Any]]:
    """The table of all presets: name, words, shape, and what they cost."""
    for name, preset in PRESETS.items():
        facts = {"name": name, "words": preset.words, "shape": list(preset.shape)}
        yield {**facts, **cost(preset.build, preset.shape)._asdict()}
