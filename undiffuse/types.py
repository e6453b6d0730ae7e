"""The call signatures on which every part of the library agrees, and how a mistake is told."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
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

    @property
    def end(self) -> Tensor: ...  # that of the last one

    @property
    def levels(self) -> list[Level]: ...  # of the evaluations

    def run(self, denoise: Denoise, x: Tensor, noise: Noise | None = None) -> Tensor: ...


class InputError(ValueError):
    """A mistake in what the user gave; the message says what was given, what was expected and what to do.

    The command line prints the message alone and exits with code 2.
    """


def require(ok: bool, setting: str, value: object, expected: str) -> None:
    """InputError unless `ok`: the setting, what was expected and what was given."""
    if not ok:
        raise InputError(f"{setting} must be {expected}, got {value}")


def did_you_mean(word: str, words: Iterable[str]) -> str:
    """The known word that is nearest to an unknown one, as a question, else "": in small letters or capitals, and
    before all others one that begins like it.

    >>> did_you_mean("T-Shirt", ["shirt", "t-shirt/top"]), did_you_mean("x", ["shirt"])
    ("did you mean 't-shirt/top'?", '')
    """
    folded, known = word.casefold(), {w.casefold(): w for w in words}
    longer = [w for w in known if len(folded) > 1 and w.startswith(folded)]
    near = difflib.get_close_matches(folded, longer or known, 1, 0.0 if longer else 0.55)
    return f"did you mean {known[near[0]]!r}?" if near else ""


def one_of(word: str, words: Iterable[str]) -> str:
    """What to say of an unknown word: the nearest known one, or all.

    >>> one_of("x", ["shirt", "coat"])
    'there are shirt, coat'
    """
    known = list(words)
    return did_you_mean(word, known) or f"there are {', '.join(known)}"
