"""Heads: what the network sees and predicts, x0 = c_skip x + c_out F(c_in x, time); one formula for all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from undiffuse.level import Kind, Level, Space, skip_out
from undiffuse.schedule import Discrete
from undiffuse.types import InputError


class Clock(Protocol):
    """What the network reads as its time input."""

    def __call__(self, level: Level) -> Tensor: ...


@dataclass(frozen=True)
class LogNSR:
    """-lam / 4 = log(sigma / alpha) / 4 (Karras et al. 2022, table 1), with lam held within +-bound."""

    bound: float = 12.0

    def __call__(self, level: Level) -> Tensor:
        return -level.lam.clamp(-self.bound, self.bound) / 4


@dataclass(frozen=True, eq=False)
class Index:
    """The (fractional) integer timestep of a trained table, as DDPM-style networks read it: 0 ... T - 1."""

    schedule: Discrete

    def __call__(self, level: Level) -> Tensor:
        return (self.schedule.time(level.lam) * self.schedule.T - 1).clamp(min=0)


class Precond(Protocol):
    """The four coefficients around a network. All are functions of lam and the scale of x alone, so that a network
    may be sampled on any schedule, whatever it was trained on."""

    needs_alpha: ClassVar[bool]  # True where alpha = 0 leaves x0 undetermined

    def c_in(self, lv: Level) -> Tensor: ...
    def skip_out(self, lv: Level) -> tuple[Tensor, Tensor]: ...
    def time(self, lv: Level) -> Tensor: ...


_SCALES: dict[Space, Callable[[Level], Tensor]] = {
    "vp": lambda lv: (lv.alpha**2 + lv.sigma**2).rsqrt(),
    "flow": lambda lv: 1 / (lv.alpha + lv.sigma),
    "ve": lambda lv: 1 / lv.alpha,
}


@dataclass(frozen=True)
class _Head:
    """A network that predicts `kind` and was trained in the coordinates `space`."""

    space: Space = "vp"
    clock: Clock = field(default_factory=LogNSR)
    kind: ClassVar[Kind]
    needs_alpha: ClassVar[bool] = False

    def c_in(self, lv: Level) -> Tensor:
        return _SCALES[self.space](lv)

    def skip_out(self, lv: Level) -> tuple[Tensor, Tensor]:
        scale = self.c_in(lv)
        skip, out = skip_out(self.kind, Level(scale * lv.alpha, scale * lv.sigma))
        return scale * skip, out

    def time(self, lv: Level) -> Tensor:
        return self.clock(lv)


@dataclass(frozen=True)
class Eps(_Head):
    """The network predicts eps = (x - alpha x0) / sigma (Ho et al. 2020); undetermined at alpha = 0."""

    kind: ClassVar[Kind] = "eps"
    needs_alpha: ClassVar[bool] = True


@dataclass(frozen=True)
class X0(_Head):
    """The network predicts x0 itself."""

    kind: ClassVar[Kind] = "x0"


@dataclass(frozen=True)
class V(_Head):
    """The network predicts v = alpha eps - sigma x0 (Salimans and Ho 2022, arXiv 2202.00512)."""

    kind: ClassVar[Kind] = "v"


@dataclass(frozen=True)
class FlowVelocity(_Head):
    """The network predicts u = eps - x0, the velocity of rectified flow (Liu et al. 2022, arXiv 2209.03003)."""

    space: Space = "flow"
    kind: ClassVar[Kind] = "u"


@dataclass(frozen=True)
class Score(_Head):
    """The network predicts grad log q(x) = -eps / sigma (Song et al. 2021); undetermined at alpha = 0."""

    kind: ClassVar[Kind] = "score"
    needs_alpha: ClassVar[bool] = True


@dataclass(frozen=True)
class EDMPrecond:
    """Karras et al. 2022, table 1, for x at any scale: input and target of unit variance for data of std sigma_data.

    c_skip = alpha sd^2 / n^2, c_out = sigma sd / n, c_in = 1 / n, with n^2 = alpha^2 sd^2 + sigma^2.
    """

    sigma_data: float = 0.5
    clock: Clock = field(default_factory=LogNSR)
    needs_alpha: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not self.sigma_data > 0:
            raise InputError(f"EDMPrecond needs sigma_data > 0, the std of the data; got {self.sigma_data}")

    def c_in(self, lv: Level) -> Tensor:
        return (lv.alpha**2 * self.sigma_data**2 + lv.sigma**2).rsqrt()

    def skip_out(self, lv: Level) -> tuple[Tensor, Tensor]:
        scale = self.c_in(lv)
        return lv.alpha * self.sigma_data**2 * scale**2, lv.sigma * self.sigma_data * scale

    def time(self, lv: Level) -> Tensor:
        return self.clock(lv)


def target(head: Precond, x0: Tensor, eps: Tensor, level: Level) -> Tensor:
    """F* = (x0 - c_skip x) / c_out: what the network should answer, for any head; needs sigma > 0.

    Written in x0 and eps, so that nothing cancels in the precision of the data.
    """
    skip, out = head.skip_out(level)
    return ((1 - skip * level.alpha) / out * x0 - skip * level.sigma / out * eps).to(x0.dtype)


def loss_weight(head: Precond, level: Level, x0_weight: Tensor) -> Tensor:
    """The weight on |F - F*|^2 that equals `x0_weight` on |x0_hat - x0|^2: x0_weight c_out^2."""
    return x0_weight * torch.square(head.skip_out(level)[1])


HEADS: dict[str, Callable[..., Precond]] = {
    "eps": Eps,
    "x0": X0,
    "v": V,
    "flow": FlowVelocity,
    "score": Score,
    "edm": EDMPrecond,
}
