"""`Drawn`: a source whose samples are computed as they are read, each from its number alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from undiffuse.data.source import Raw, Source, digest
from undiffuse.types import InputError

_FIRST = 8


@dataclass(frozen=True, eq=False)
class Drawn:
    """Samples draw(0), ..., draw(n - 1), whose x are arrays: the same at each call.

    Workers that are started afresh need a `draw` that can be pickled. Raises InputError for n < 1.
    """

    name: str
    n: int
    draw: Callable[[int], Raw]
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
        return replace(self.draw(int(i)), where=f"{self.name}[{i}]")

    def fingerprint(self) -> str:
        """SHA-256 over the number of samples and the first of them, which differ in whatever draws otherwise."""
        first = [self.read(i) for i in range(min(_FIRST, self.n))]
        values = [np.asarray(v) for raw in first for v in (raw.x, raw.label or 0, *raw.columns.values())]
        return digest(str(self.n), *(v.tobytes() for v in values))
