"""What training reads: the rows of each step for this process."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

from torch import Tensor


class Rows(Protocol):
    """Clean samples x (b, *data), their condition (a `Cond` of b rows or None) and their numbers in the data (b,)."""

    @property
    def x(self) -> Tensor: ...
    @property
    def cond(self) -> Any: ...
    @property
    def ids(self) -> Tensor: ...


class Feed(Protocol):
    """Gives, for the steps first ... last, rows rank, rank + world, ... of each step's `batch` samples.

    Which samples these are is a function of the step alone, so that a run can go on anywhere with any `world`.
    """

    def steps(self, first: int, last: int, batch: int, rank: int = 0, world: int = 1) -> Iterator[Rows]: ...
