"""Maps with the sides of the sample, concatenated to it: pictures, depth, and layouts of classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, one_hot

from undiffuse.cond.cond import Cond
from undiffuse.cond.transformer import Transformer, check_sizes
from undiffuse.nets.blocks import CONV
from undiffuse.types import InputError

_LINEAR = {1: "linear", 2: "bilinear", 3: "trilinear"}


def resized(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Maps (b, c, *sides) on a grid of these sides: means over areas where they become smaller, linear interpolation
    where they become larger. InputError where the proportions differ by more than a pixel."""
    own, size = tuple(maps.shape[2:]), tuple(size)
    if own == size:
        return maps
    # one scale for all sides, up to rounding by less than one pixel each
    low = max((n - 1) / m for n, m in zip(size, own, strict=False))
    high = min((n + 1) / m for n, m in zip(size, own, strict=False))
    if len(own) != len(size) or low >= high:
        raise InputError(f"a map of {'x'.join(map(str, own))} for samples of {'x'.join(map(str, size))}: crop it first")
    if all(n <= m for n, m in zip(size, own, strict=True)):
        return interpolate(maps, size, mode="area")
    return interpolate(maps, size, mode=_LINEAR[len(size)], align_corners=False)


def stacked(values: Any) -> Tensor:
    """Maps of b samples as one tensor; InputError where they differ in shape."""
    if isinstance(values, Tensor):
        return values
    if wrong := [v for v in values if not hasattr(v, "shape") and not isinstance(v, list | tuple)]:
        raise InputError(f"expected arrays, got {wrong[0]!r}")
    parts = [torch.as_tensor(v) for v in values]
    if len({p.shape for p in parts}) > 1:
        shapes = ", ".join(sorted({"x".join(map(str, p.shape)) for p in parts}))
        raise InputError(f"maps of one batch must have one shape, got {shapes}: bring them to one size first")
    return torch.stack(parts)


def pixels(values: Any, channels: int) -> Tensor:
    """Pictures (b, channels, *sides) as floats: bytes become [-1, 1], floats stay. InputError for others."""
    x = stacked(values)
    if x.ndim < 3 or x.shape[1] != channels or 0 in x.shape:
        raise InputError(f"expected (samples, {channels}, sides ...), got {tuple(x.shape)}")
    x = x / 127.5 - 1 if x.dtype == torch.uint8 else x.float()
    if not bool(x.isfinite().all()):
        raise InputError("a picture has NaN or infinite values")
    return x


class _Map(nn.Module):
    """A map on the grid of the samples; with `marked`, and a channel of ones that says that there is one, since zero
    may be a value of it; and a channel with the level of the noise in it, of those that have one."""

    def __init__(self, marked: bool) -> None:
        super().__init__()
        self.marked = marked

    def forward(self, read: Mapping[str, Tensor], size: Sequence[int]) -> Cond:
        maps = resized(read["map"].float(), size)
        if self.marked:
            maps = torch.cat([maps, torch.ones_like(maps[:, :1])], 1)
        if "level" in read:
            level = read["level"].reshape(-1, *[1] * (maps.ndim - 1)).to(maps)
            maps = torch.cat([maps, level.expand_as(maps[:, :1])], 1)
        return Cond(spatial=maps)


@dataclass(frozen=True)
class Picture:
    """A picture of `channels` channels to be kept to: of low resolution (cascades; Ho et al. 2021, arXiv 2106.15282),
    or before editing. Bytes become [-1, 1], floats stay; any size of the sample's proportions.

    With `size` > 0 the shorter side of what is given is brought to it first, by means over areas, so that training can
    give the samples themselves. With `noise` in (0, 1] training adds noise of a level that is uniform in [0, noise] and
    told to the network, so that a cascade does not depend on the faults of its low resolution; `Given.noised` does so
    at sampling, where the level is 0 otherwise.

    >>> from undiffuse.cond import Encoders
    >>> encoders = Encoders({"low": Picture(1, size=4, noise=0.5)})
    >>> given = encoders(low=torch.zeros(2, 1, 8, 8)).noised("low", 0.1)
    >>> encoders.encoded(given, (8, 8)).spatial.shape
    torch.Size([2, 3, 8, 8])
    """

    channels: int = 3
    size: int = 0
    noise: float = 0.0
    vector = tokens = 0
    reads = "picture"

    def __post_init__(self) -> None:
        if self.channels < 1 or self.size < 0 or not 0 <= self.noise <= 1:
            raise InputError(f"Picture needs channels >= 1, size >= 0, noise from 0 to 1, got {self}")

    @property
    def spatial(self) -> int:
        """The channels, one that says that there is a picture, and with `noise` one with its level."""
        return self.channels + 1 + (self.noise > 0)

    def read(self, values: Any) -> dict[str, Tensor]:
        """Pictures (b, channels, *sides); with `noise` their levels (b,), which are 0, and the greatest of training."""
        x = pixels(values, self.channels)
        if self.size:
            sides = x.shape[2:]
            x = resized(x, [round(n * self.size / min(sides)) for n in sides])
        levels = {"level": torch.zeros(len(x)), "most": torch.full((len(x),), self.noise)} if self.noise else {}
        return {"map": x, **levels}

    def build(self) -> nn.Module:
        """Nothing to train."""
        return _Map(marked=True)


@dataclass(frozen=True)
class Masked:
    """A picture of `channels` channels of which a part is known, for networks that fill in the rest (Saharia et al.
    2021, Palette, arXiv 2111.05826): the picture times the mask, and the mask, 1 where it is known and 0 elsewhere.

    Values are pictures with the mask as one channel more, bytes 0 to 255 or floats 0 to 1. In training pictures without
    a mask, such as the samples themselves, get random ones (`random_known`), functions of the seed and of the sample's
    index; elsewhere half of each side of them is hidden, in the middle. That nothing is known is the null condition.

    >>> from undiffuse.cond import Encoders
    >>> encoders, picture = Encoders({"picture": Masked(1)}), torch.full((1, 1, 1, 2), 0.5)
    >>> given = encoders(picture=torch.cat([picture, torch.tensor([[[[1.0, 0.0]]]])], 1))
    >>> encoders.encoded(given, (1, 2)).spatial.tolist()
    [[[[0.5, 0.0]], [[1.0, 0.0]]]]
    """

    channels: int = 3
    vector = tokens = 0
    reads = "picture"

    def __post_init__(self) -> None:
        if self.channels < 1:
            raise InputError(f"Masked needs channels >= 1, got {self}")

    @property
    def spatial(self) -> int:
        """The channels, and the mask."""
        return self.channels + 1

    def read(self, values: Any) -> dict[str, Tensor]:
        """Pictures (b, channels, *sides), what is known of them (b, 1, *sides), and whether they came whole (b,)."""
        x = stacked(values)
        if x.ndim < 3 or x.shape[1] not in (self.channels, self.channels + 1):
            raise InputError(f"expected (samples, {self.channels} and a mask, sides ...), got {tuple(x.shape)}")
        whole = x.shape[1] == self.channels
        maps = pixels(x[:, : self.channels], self.channels)
        known = (
            _middle_hidden(maps) if whole else x[:, self.channels :].float() / (255 if x.dtype == torch.uint8 else 1)
        )
        if not bool(((known >= 0) & (known <= 1)).all()):
            raise InputError("a mask is from 0 (hidden) to 1 (known)")
        return {"map": maps, "known": known, "whole": torch.full((len(x),), whole)}

    def build(self) -> nn.Module:
        """Nothing to train."""
        return _Masked()


def _middle_hidden(maps: Tensor) -> Tensor:
    known = torch.ones_like(maps[:, :1])
    middle = known
    for axis, n in enumerate(maps.shape[2:], 2):
        middle = middle.narrow(axis, n // 4, n - 2 * (n // 4))
    middle.zero_()
    return known


class _Masked(nn.Module):
    """What is known of a picture, and where that is, on the grid of the samples."""

    def forward(self, read: Mapping[str, Tensor], size: Sequence[int]) -> Cond:
        return Cond(spatial=resized(torch.cat([read["map"] * read["known"], read["known"]], 1).float(), size))


@dataclass(frozen=True)
class Depth:
    """A depth map (b, *sides) or (b, 1, *sides) with values from `near` to `far`, seen as 1 to -1: as disparity, linear
    in 1 / depth, with `inverse`. Values beyond are cut off; InputError for `inverse` with near <= 0.

    >>> Depth(near=1.0, far=3.0).read(torch.tensor([[[1.0, 2.0, 9.0]]]))["map"].flatten().tolist()
    [1.0, 0.0, -1.0]
    """

    near: float = 0.0
    far: float = 1.0
    inverse: bool = False
    dims: int = 2
    vector = tokens = 0
    spatial = 2
    reads = "depth"

    def __post_init__(self) -> None:
        if not -torch.inf < self.near < self.far < torch.inf or (self.inverse and self.near <= 0):
            above = "0 < near" if self.inverse else "near"
            raise InputError(f"Depth needs finite {above} < far, got near={self.near}, far={self.far}")

    def read(self, values: Any) -> dict[str, Tensor]:
        """Maps (b, 1, *sides) in [-1, 1]."""
        x = stacked(values)
        x = (x[:, None] if x.ndim == 1 + self.dims else x).float()
        if x.ndim != 2 + self.dims or x.shape[1] != 1 or 0 in x.shape:
            raise InputError(
                f"expected depth (samples, {'sides' if self.dims > 1 else 'side'} ...), got {tuple(x.shape)}"
            )
        if bool(x.isnan().any()):
            raise InputError("a depth map has NaN values: give what is not known the largest depth")
        x, (near, far) = x.clamp(self.near, self.far), (self.near, self.far)
        if self.inverse:
            x, near, far = 1 / x, 1 / self.near, 1 / self.far
        return {"map": 1 - 2 * (x - near) / (far - near)}

    def build(self) -> nn.Module:
        """Nothing to train."""
        return _Map(marked=True)


@dataclass(frozen=True)
class Layout:
    """A segmentation mask (b, *sides) of whole numbers 0 ... classes - 1 as one channel a class, one-hot; `unknown`
    pixels, 255 as in most sets, have none. Where it is made smaller a pixel has each class's share of its area.

    >>> Layout(2).read(torch.tensor([[[0, 1, 255]]]))["map"].int().tolist()
    [[[[1, 0, 0]], [[0, 1, 0]]]]
    """

    classes: int
    unknown: int = 255
    dims: int = 2
    vector = tokens = 0
    reads = "segmentation"

    def __post_init__(self) -> None:
        if self.classes < 1 or 0 <= self.unknown < self.classes:
            raise InputError(f"Layout needs classes >= 1 without the unknown one, got {self.classes}, {self.unknown}")

    @property
    def spatial(self) -> int:
        """One channel a class."""
        return self.classes

    def read(self, values: Any) -> dict[str, Tensor]:
        """Masks (b, classes, *sides) of True and False."""
        x = stacked(values)
        x = x[:, 0] if x.ndim == 2 + self.dims and x.shape[1] == 1 else x
        if x.ndim != 1 + self.dims or x.is_floating_point() or 0 in x.shape:
            raise InputError(f"expected whole numbers (samples, sides ...), got {x.dtype} of shape {tuple(x.shape)}")
        x = x.long()
        wrong = ((x < 0) | (x >= self.classes)) & (x != self.unknown)
        if bool(wrong.any()):
            raise InputError(
                f"class {int(x[wrong][0])} in a mask: classes={self.classes} are 0 ... {self.classes - 1}, and "
                f"{self.unknown} is unknown"
            )
        ones = one_hot(torch.where(x == self.unknown, self.classes, x), self.classes + 1)[..., :-1]
        return {"map": ones.movedim(-1, 1).bool()}

    def build(self) -> nn.Module:
        """Nothing to train."""
        return _Map(marked=False)


@dataclass(frozen=True)
class Variation:
    """A picture of `channels` channels and `dims` sides as tokens, to be varied, and their mean: patches of side
    `patch` through a transformer of `depth` layers of `width` features, trained along with the network.

    Pictures are brought to `size` on every side first, so that their number of tokens is bounded.

    >>> from undiffuse.cond import Encoders
    >>> encoders = Encoders({"like": Variation(1, size=8, width=16, depth=1)})
    >>> encoders.encoded(encoders(like=torch.zeros(2, 1, 9, 9)), ()).tokens.shape
    torch.Size([2, 4, 16])
    """

    channels: int = 3
    size: int = 32
    patch: int = 4
    width: int = 128
    depth: int = 2
    dims: int = 2
    spatial = 0
    reads = "picture"

    def __post_init__(self) -> None:
        check_sizes("Variation", self.width, self.depth, channels=self.channels, size=self.size, patch=self.patch)
        if self.size % self.patch or self.dims not in CONV:
            raise InputError(f"Variation needs a patch that divides size, and dims from 1 to 3: got {self}")

    @property
    def vector(self) -> int:
        """The width of the mean."""
        return self.width

    @property
    def tokens(self) -> int:
        """The width of the tokens."""
        return self.width

    def read(self, values: Any) -> dict[str, Tensor]:
        """Pictures (b, channels, size, ...)."""
        x = pixels(values, self.channels)
        if x.ndim != 2 + self.dims:
            raise InputError(f"expected pictures with {self.dims} sides, got {tuple(x.shape)}")
        return {"picture": resized(x, (self.size,) * self.dims)}

    def build(self) -> nn.Module:
        """Patches and the transformer."""
        return _Patches(self)


class _Patches(nn.Module):
    def __init__(self, of: Variation) -> None:
        super().__init__()
        self.patches = CONV[of.dims](of.channels, of.width, of.patch, of.patch)
        self.positions = nn.Parameter(0.02 * torch.randn((of.size // of.patch) ** of.dims, of.width))
        self.transformer = Transformer(of.width, of.depth)

    def forward(self, read: Mapping[str, Tensor], size: Sequence[int]) -> Cond:
        tokens = self.patches(read["picture"].to(self.positions.dtype)).flatten(2).mT + self.positions
        everywhere = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        out: Cond = self.transformer(tokens, everywhere)
        return out
