"""`Source`: samples by number, not yet decoded; arrays, subsets and a cache of decoded samples."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from undiffuse.data.data import Data
from undiffuse.types import InputError


class Unreadable(InputError):
    """One sample that cannot be read: `where` it lies and the `reason`."""

    def __init__(self, where: str, reason: str) -> None:
        super().__init__(f"{where}: {reason}")
        self.where, self.reason = where, reason

    def __reduce__(self) -> tuple[type[Unreadable], tuple[str, str]]:
        return type(self), (self.where, self.reason)


_HASHED = 2**32  # bytes of a mapped file up to which its content is hashed
Stored = bytes | Path | np.ndarray  # a picture's file or its content, or an array (channels, *size)


@dataclass(frozen=True, eq=False)
class Raw:
    """One sample as stored: `x` a picture (bytes or file) or an array (channels, *size), its label and other columns.

    `where` names it in messages; `target` is the (height, width) to crop to, once `Prepare.decode` has settled it.
    """

    x: Stored
    label: int | None = None
    columns: dict[str, Any] = field(default_factory=dict)
    where: str = "sample"
    target: tuple[int, int] | None = None


class Source(Protocol):
    """Samples 0, ..., len - 1.

    `classes` names the labels (empty without), `columns` the other modalities present, `counts` the samples of each
    shard (empty where samples can be read in any order at no cost), `test` is the set's own test split.
    """

    @property
    def name(self) -> str: ...
    @property
    def classes(self) -> tuple[str, ...]: ...
    @property
    def columns(self) -> tuple[str, ...]: ...
    @property
    def counts(self) -> tuple[int, ...]: ...
    @property
    def test(self) -> Source | None: ...
    def __len__(self) -> int: ...
    def read(self, i: int) -> Raw:
        """Sample i; raises Unreadable."""
        ...

    def fingerprint(self) -> str:
        """SHA-256 in hex, another if the data changes (arrays to 4 GiB: their bytes; files: names, sizes, times)."""
        ...


def digest(*parts: str | bytes) -> str:
    """SHA-256 of the parts in hex; their boundaries count."""
    total = hashlib.sha256()
    for part in parts:
        content = part.encode("utf-8", "surrogateescape") if isinstance(part, str) else part
        total.update(len(content).to_bytes(8, "big") + content)
    return total.hexdigest()


@dataclass(frozen=True, eq=False)
class Arrays:
    """Arrays as a source: x (n, channels, *size), memory-mapped or not; `extra` holds n rows of each other column."""

    x: np.ndarray
    labels: np.ndarray | None = None
    classes: tuple[str, ...] = ()
    name: str = "data"
    extra: dict[str, np.ndarray] = field(default_factory=dict)
    test: Source | None = None
    where: str = ""
    counts: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.x.ndim < 3 or 0 in self.x.shape:
            raise InputError(
                f"{self.name}: samples of shape {self.x.shape}; expected (n, channels, side, ...), all sides >= 1"
            )
        if self.x.dtype not in (np.uint8, np.uint16) and not np.issubdtype(self.x.dtype, np.floating):
            raise InputError(
                f"{self.name}: samples of type {self.x.dtype}; expected uint8 or uint16, or floats in [-1, 1]"
            )
        for key, values in {"labels": self.labels, **self.extra}.items():
            if values is not None and len(values) != len(self.x):
                raise InputError(f"{self.name}: {len(values)} {key} for {len(self.x)} samples; expected as many")
        if self.labels is not None and (
            not np.issubdtype(self.labels.dtype, np.integer) or self.labels.ndim != 1 or int(self.labels.min()) < 0
        ):
            raise InputError(f"{self.name}: labels must be {len(self.x)} whole numbers >= 0")

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(self.extra)

    def __len__(self) -> int:
        return len(self.x)

    def read(self, i: int) -> Raw:
        columns = {key: _plain(values[i]) for key, values in self.extra.items()}
        label = None if self.labels is None else int(self.labels[i])
        return Raw(self.x[i], label, columns, f"{self.where or self.name}[{i}]")

    def fingerprint(self) -> str:
        parts: list[str | bytes] = []
        for key, values in {"x": self.x, "labels": self.labels, **self.extra}.items():
            if values is not None:
                parts += [key, str(values.dtype), str(values.shape), _content(values)]
        return digest(*parts)


def _content(array: np.ndarray) -> str:
    """What changes with an array's content: its hash, or its file's size and time where hashing would take minutes."""
    if isinstance(array, np.memmap) and array.nbytes > _HASHED and array.filename is not None:
        stat = os.stat(array.filename)
        return f"{stat.st_size} {stat.st_mtime_ns}"
    return hash_rows(array)


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


def hash_rows(array: np.ndarray) -> str:
    """SHA-256 of the array's bytes, read 16 MiB at a time."""
    total, row = hashlib.sha256(), max(1, array[:1].nbytes)
    step = max(1, (1 << 24) // row)
    for start in range(0, len(array), step):
        total.update(np.ascontiguousarray(array[start : start + step]).tobytes())
    return total.hexdigest()


def names(labels: np.ndarray | None) -> tuple[str, ...]:
    """Class names 0, 1, ... for whole-number labels; none without labels or for labels of another kind."""
    if labels is None or not np.issubdtype(labels.dtype, np.integer) or labels.size == 0:
        return ()
    return tuple(str(i) for i in range(int(labels.max()) + 1))


def from_data(data: Data) -> Arrays:
    """`Data` as a source."""
    labels = None if data.labels is None else data.labels.numpy()
    return Arrays(data.x.numpy(), labels, names(labels), data.name)


@dataclass(frozen=True, eq=False)
class Subset:
    """The samples `ids` of a source, in that order; `counts` where they are whole shards."""

    source: Source
    ids: Sequence[int] | np.ndarray
    name: str = ""
    counts: tuple[int, ...] = ()
    test: Source | None = None

    def __post_init__(self) -> None:
        if not self.name:
            object.__setattr__(self, "name", self.source.name)
        ends = (self.ids[0], self.ids[-1]) if isinstance(self.ids, range) and self.ids else self.ids
        if len(ends) and not (min(ends) >= 0 and max(ends) < len(self.source)):
            raise InputError(f"{self.name}: a subset of samples that are not in 0, ..., {len(self.source) - 1}")

    @property
    def classes(self) -> tuple[str, ...]:
        return self.source.classes

    @property
    def columns(self) -> tuple[str, ...]:
        return self.source.columns

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, i: int) -> Raw:
        return self.source.read(int(self.ids[i]))

    def fingerprint(self) -> str:
        return digest(self.source.fingerprint(), np.asarray(self.ids, np.int64).tobytes())


class Cached:
    """A source whose samples, once decoded by `decode`, stay in memory up to `limit` bytes (per process).

    Each is decoded once; what cannot be read is remembered, too. Random choices come after `decode`, so none is cached.
    """

    def __init__(self, source: Source, decode: Callable[[Raw], Raw], limit: int = 512 << 20) -> None:
        self.source, self.decode, self.left = source, decode, limit
        self.name, self.classes, self.columns = source.name, source.classes, source.columns
        self.counts, self.test = source.counts, source.test
        self.kept: dict[int, Raw | Unreadable] = {}

    def __len__(self) -> int:
        return len(self.source)

    def fingerprint(self) -> str:
        return self.source.fingerprint()

    def read(self, i: int) -> Raw:
        if (known := self.kept.get(i)) is None:
            known = self._decoded(i)
        if isinstance(known, Unreadable):
            raise known
        return known

    def _decoded(self, i: int) -> Raw | Unreadable:
        try:
            raw = self.source.read(i)
            decoded = self.decode(raw)
            if decoded.x is raw.x:  # an array that is in memory or mapped already
                return decoded
            found: Raw | Unreadable = decoded
        except Unreadable as error:
            found = error
        size = 256 if isinstance(found, Unreadable) else _bytes(found)
        if size <= self.left:
            self.left -= size
            self.kept[i] = found
        return found


def _bytes(raw: Raw) -> int:
    values = [raw.x, *raw.columns.values()]
    return 1024 + sum(v.nbytes if isinstance(v, np.ndarray) else len(v) for v in values if hasattr(v, "__len__"))


def choice(source: Source, count: int, seed: int = 0) -> list[int]:
    """At most `count` sample numbers, a fixed random choice; of shards, whole ones in a random order. Ascending."""
    n = len(source)
    if count >= n:
        return list(range(n))
    if not source.counts:
        return sorted(np.random.default_rng(seed).permutation(n)[:count].tolist())
    starts = np.cumsum([0, *source.counts])
    out: list[int] = []
    for shard in torch.randperm(len(source.counts), generator=torch.Generator().manual_seed(seed)).tolist():
        out += range(int(starts[shard]), int(starts[shard + 1]))
        if len(out) >= count:
            break
    return sorted(out[:count])
