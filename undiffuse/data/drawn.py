"""`Drawn`: a source whose samples are computed as they are read, each from its number alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from undiffuse.data.source import Raw, Source, digest
from undiffuse.types import InputError

Draw = Callable[[int], tuple[np.ndarray, dict[str, Any]]]
_FIRST = 8


@dataclass(frozen=True, eq=False)
class Drawn:
    """Samples draw(0), ..., draw(n - 1): a picture (channels, *size) and its other columns, the same at each call.

    Workers that are started afresh need a `draw` that can be pickled. Raises InputError for n < 1.
    """

    name: str
    n: int
    draw: Draw
    columns: tuple[str, ...] = ()
    test: Source | None = None
    classes: tuple[str, ...] = ()
    counts: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.n < 1:
            raise InputError(f"{self.name}: {self.n} samples; expected at least 1")

    def __len__(self) -> int:
        return self.n

    def read(self, i: int) -> Raw:
        """Sample i."""
        x, columns = self.draw(i)
        return Raw(x, None, columns, f"{self.name}[{i}]")

    def fingerprint(self) -> str:
        """SHA-256 over the number of samples and the first of them, which differ in whatever draws otherwise."""
        first = [self.read(i) for i in range(min(_FIRST, self.n))]
        values = [np.asarray(v) for raw in first for v in (raw.x, *raw.columns.values())]
        return digest(str(self.n), *(v.tobytes() for v in values))
