"""Augmentation that the network is told of, so that samples do not show it (Karras et al. 2022, appendix F.2)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import grid_sample

from undiffuse.cond import Cond
from undiffuse.seeds import seed_of, uniform
from undiffuse.types import InputError


class Augment(Protocol):
    """x (b, c, h, w), seed, global indices (b,) -> x changed and labels (b, dim): row k of both is a function of
    (seed, index k), and labels are zero where nothing was done. `dim` is the network's `augment`."""

    @property
    def dim(self) -> int: ...
    def __call__(self, x: Tensor, seed: int, index: Tensor) -> tuple[Tensor, Tensor]: ...


def labelled(cond: Cond | None, labels: Tensor) -> Cond | None:
    """The condition, if any, with augmentation's labels (b, dim), if any."""
    return dataclasses.replace(Cond() if cond is None else cond, augment=labels) if labels.shape[1] else cond


def _pictures(x: Tensor) -> None:
    if x.ndim != 4:
        raise InputError(
            f"augmentation takes only pictures (b, channels, height, width), got x {tuple(x.shape)}: use augment=none"
        )


def _probability(p: float) -> None:
    if not 0 <= p <= 1:
        raise InputError(f"augment.p must be from 0 to 1, got {p}")


@dataclass(frozen=True)
class NoAugment:
    """Data as they are; labels (b, 0)."""

    dim = 0

    def __call__(self, x: Tensor, seed: int, index: Tensor) -> tuple[Tensor, Tensor]:
        return x, x.new_zeros(len(x), 0)


@dataclass(frozen=True)
class Flip:
    """With probability `p` a picture is mirrored left to right, and its label (b, 1) is 1. Raises InputError for other
    data than pictures.

    >>> x, label = Flip(p=1.0)(torch.arange(3.0).reshape(1, 1, 1, 3), seed=0, index=torch.arange(1))
    >>> x.flatten().tolist(), label.tolist()
    ([2.0, 1.0, 0.0], [[1.0]])
    """

    p: float = 0.5
    dim = 1

    def __post_init__(self) -> None:
        _probability(self.p)

    def __call__(self, x: Tensor, seed: int, index: Tensor) -> tuple[Tensor, Tensor]:
        _pictures(x)
        labels = (uniform(seed, index) < self.p)[:, None].to(x.device, torch.float32)
        return _mirrored(x, labels[:, 0], -1), labels


@dataclass(frozen=True)
class Geometric:
    """Flips, scaling, rotation, anisotropic scaling and translation, in this order, each with probability `p`.

    Of normal z and uniform angles: `x_flip`, `y_flip`; the size times 2^(scale z); `rotation` up to this share of half
    a turn, counter-clockwise; 2^(anisotropy z) times as long along a random axis, and as much shorter across; shifted
    right and down by `translation` z of the width and of the height. 0 or False leaves one out. Labels (b, 9):
    flips, z, cos - 1 and sin of the angle, z cos and z sin of twice the axis's angle, two z. Flips are exact, the rest
    is one bicubic interpolation in float32, pictures going on as mirrored at their edges. Raises InputError for
    settings out of range and for other data than pictures.
    """

    p: float = 0.12
    x_flip: bool = True
    y_flip: bool = True
    scale: float = 0.2
    rotation: float = 1.0
    anisotropy: float = 0.2
    translation: float = 0.125
    dim = 9

    def __post_init__(self) -> None:
        _probability(self.p)
        for name in ("scale", "anisotropy", "translation"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"augment.{name} must be from 0 (off) to 1, got {getattr(self, name)}")
        if not 0 <= self.rotation <= 1:
            raise InputError(f"augment.rotation must be from 0 (off) to 1, half a turn, got {self.rotation}")

    def __call__(self, x: Tensor, seed: int, index: Tensor) -> tuple[Tensor, Tensor]:
        _pictures(x)
        labels = self.labels(seed, index)
        return self.warp(x, labels), labels.to(x.device)

    def labels(self, seed: int, index: Tensor) -> Tensor:
        """What is done to the samples `index` (b,), as float32 labels (b, 9)."""
        u = [uniform(seed_of(seed, k), index) for k in range(12)]
        angle, axis = math.pi * self.rotation * (2 * u[7] - 1), 2 * math.pi * u[8]
        z = [torch.special.ndtri(v) for v in (u[6], *u[9:])]
        one = torch.ones_like(z[0])
        steps = [  # what switches it on, its labels
            (self.x_flip, (one,)),
            (self.y_flip, (one,)),
            (self.scale, (z[0],)),
            (self.rotation, (angle.cos() - 1, angle.sin())),
            (self.anisotropy, (z[1] * axis.cos(), z[1] * axis.sin())),
            (self.translation, (z[2], z[3])),
        ]
        done = [(u[k] < self.p) & bool(on) for k, (on, _) in enumerate(steps)]
        return torch.stack([d * v for d, (_, values) in zip(done, steps, strict=True) for v in values], 1).float()

    def warp(self, x: Tensor, labels: Tensor) -> Tensor:
        """x (b, c, h, w) changed as `labels` (b, 9) say; rows with zero labels are left as they are, bit for bit."""
        x = _mirrored(_mirrored(x, labels[:, 0], -1), labels[:, 1], -2)
        labels = labels.cpu()
        rows = labels[:, 2:].any(1).nonzero().flatten()
        back, shift = self._inverse(labels[rows].double())
        part = x[rows.to(x.device)]
        h, w = part.shape[-2:]
        right, down = (torch.arange(n, dtype=torch.float64) + 0.5 - n / 2 for n in (w, h))  # pixels from the centre
        a = right - w * shift[:, 0, None, None]
        b = down[:, None] - h * shift[:, 1, None, None]
        at = [back[:, i, 0, None, None] * a + back[:, i, 1, None, None] * b for i in range(2)]
        grid = torch.stack([2 / w * at[0], 2 / h * at[1]], -1).to(x.device, torch.float32)
        moved = grid_sample(part.float(), grid, "bicubic", "reflection", align_corners=False)
        return x.index_copy(0, rows.to(x.device), moved.to(x.dtype))

    def _inverse(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Where pixels come from: the matrices (b, 2, 2) after the shifts (b, 2), in units of the sides, are undone.

        Angles are counter-clockwise as seen, in coordinates that count right and down.
        """
        _, _, z, cos, sin, p, q, *shift = labels.unbind(1)
        cos = cos + 1
        turn = torch.stack([cos, -sin, sin, cos], 1) * torch.exp2(-self.scale * z)[:, None]
        k, size = math.log(2) * self.anisotropy, torch.hypot(p, q)
        wide, long = torch.cosh(k * size), torch.sinh(k * size) / size.clamp(min=1e-30)
        squeeze = torch.stack([wide - long * p, long * q, long * q, wide + long * p], 1)
        return turn.reshape(-1, 2, 2) @ squeeze.reshape(-1, 2, 2), self.translation * torch.stack(shift, 1)


def _mirrored(x: Tensor, which: Tensor, axis: int) -> Tensor:
    return torch.where(which.bool().to(x.device)[:, None, None, None], x.flip(axis), x)


AUGMENTS: dict[str, Callable[..., Augment]] = {"none": NoAugment, "flip": Flip, "geometric": Geometric}
