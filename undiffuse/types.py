"""The call signatures on which every part of the library agrees."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from undiffuse.level import Level


class Denoise(Protocol):
    """E[x0 | x] with condition and guidance bound: x (b, *data) at a level -> x0 of the same shape."""

    def __call__(self, x: Tensor, level: Level, /) -> Tensor: ...


class Model(Protocol):
    """A denoiser that still takes its condition: `Denoiser`, the exact denoisers, or a user's own."""

    def __call__(self, x: Tensor, level: Level, cond: Any = None, /) -> Tensor: ...


class Noise(Protocol):
    """The next draw of standard normal noise, of the shape of x."""

    def __call__(self) -> Tensor: ...


class Plan(Protocol):
    """A solver on its levels, ready to run: a `Tableau` or a `Modal`."""

    @property
    def start(self) -> Tensor: ...  # (alpha, sigma) of the first level

    def run(self, denoise: Denoise, x: Tensor, noise: Noise | None = None) -> Tensor: ...


class InputError(ValueError):
    """A mistake in what the user gave; the message says what was given, what was expected and what to do.

    The command line prints the message alone and exits with code 2.
    """
