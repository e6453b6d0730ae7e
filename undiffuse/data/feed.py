"""`Feed`: the batches of a run, the same whatever the number of workers and processes, past damaged samples."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from undiffuse.data.order import Order, Shuffled, indices
from undiffuse.data.prepare import Draws, Example, Prepare
from undiffuse.data.source import Cached, Source, Unreadable
from undiffuse.data.statistics import shapes_differ
from undiffuse.types import InputError

_IN_A_ROW = 1000  # unreadable samples one after the other, after which there is no hope


@dataclass(frozen=True, eq=False)
class Batch:
    """One process's rows of a global batch: x (b, channels, *size), labels (b,) or None, a list per other column.

    Where some samples have a label and others none, labels are None, and the column `label` has those that are there.
    `ids` (b,) are sample numbers, `index` (b,) global indices; `cond` are rows of a condition computed beforehand.
    """

    x: Tensor
    labels: Tensor | None
    columns: dict[str, list[Any]]
    ids: Tensor
    index: Tensor
    cond: Any = None

    def __len__(self) -> int:
        return len(self.x)


class _Bad(NamedTuple):
    id: int
    where: str
    reason: str


Key = tuple[Tensor, Tensor]  # sample numbers and global indices
Read = tuple[Batch | str, list[_Bad]]  # or the message of an InputError; an exception would lose its type on its way


@dataclass(frozen=True, eq=False)
class _Reader(Dataset[Read]):
    """The part that runs in workers: keys to batches."""

    source: Source
    prepare: Prepare
    after: Callable[[int], int]
    seed: int
    patience: int

    def __getitem__(self, key: Key) -> Read:
        bad: list[_Bad] = []
        try:
            draws = self.prepare.draws(key[1], self.seed)
            found = [self._one(i, d, bad) for i, d in zip(key[0].tolist(), draws, strict=True)]
            return stack(self.source.name, found, key[1]), bad
        except InputError as error:
            return str(error), bad

    def _one(self, i: int, draws: Draws, bad: list[_Bad]) -> tuple[int, Example]:
        for _ in range(self.patience):
            try:
                return i, self.prepare.finish(self.prepare.decode(self.source.read(i)), draws)
            except Unreadable as error:
                bad.append(_Bad(i, error.where, error.reason))
                i = self.after(i)
        raise InputError(
            f"{self.source.name}: {self.patience} samples in a row cannot be read; the last, {bad[-1].where}: "
            f"{bad[-1].reason}. Check the data"
        )


def stack(name: str, found: list[tuple[int, Example]], index: Tensor) -> Batch:
    """Samples by their numbers as a batch; InputError where their shapes differ."""
    examples = [example for _, example in found]
    shapes = sorted({tuple(e.x.shape) for e in examples})
    if len(shapes) > 1:
        raise InputError(shapes_differ(name, shapes[0], shapes[1]))
    labels = [e.label for e in examples if e.label is not None]
    keys = {key: None for e in examples for key in e.columns}
    columns: dict[str, list[Any]] = {key: [e.columns.get(key) for e in examples] for key in keys}
    if 0 < len(labels) < len(examples):
        columns["label"] = [e.label for e in examples]
    return Batch(
        torch.stack([e.x for e in examples]),
        torch.tensor(labels) if len(labels) == len(examples) else None,
        columns,
        torch.tensor([i for i, _ in found]),
        index,
    )


class Ledger:
    """bad.jsonl: one line {where, reason} for each unreadable sample, written once, also over several runs."""

    def __init__(self, path: Path | None) -> None:
        self.path, self.known = path, set[str]()
        if path is not None and path.is_file():
            for line in path.read_text(errors="replace").splitlines():
                try:
                    self.known.add(json.loads(line)["where"])
                except (ValueError, KeyError, TypeError):  # half a line, where a run was killed
                    continue

    def add(self, where: str, reason: str) -> None:
        """Record a sample unless it is recorded."""
        if where in self.known:
            return
        self.known.add(where)
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a", encoding="utf-8", errors="backslashreplace") as file:
                file.write(json.dumps({"where": where, "reason": reason}) + "\n")


def of_rank(path: Path | None, rank: int) -> Path | None:
    """bad.jsonl for rank 0, bad-1.jsonl for rank 1, ...: no two processes write one file."""
    return path if path is None or rank == 0 else path.with_name(f"{path.stem}-{rank}{path.suffix}")


@dataclass(frozen=True, eq=False)
class Feed:
    """Batches of a source, prepared, in an order; `workers` processes read ahead (0: none), to the same result.

    A sample that cannot be read is written to `ledger` and replaced by the one after it (`Order.after`); the others
    keep their places. The run stops with InputError when the number of different unreadable samples exceeds
    `share` * n (one is always allowed), or earlier, when among the m samples read so far it exceeds
    10 + share * m + 3 sqrt(share * m). Decoded samples are kept in memory up to `cache` bytes, all workers together.
    """

    source: Source
    prepare: Prepare
    order: Order
    seed: int = 0
    workers: int = 0
    share: float = 0.01
    ledger: Path | None = None
    cache: int = 512 << 20
    _cached: Source = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.workers < 0 or not 0 <= self.share <= 1:
            raise InputError(
                f"engine.workers = {self.workers}, data.bad_share = {self.share}: expected >= 0, and 0 to 1"
            )
        kept = Cached(self.source, self.prepare.decode, self.cache // max(1, self.workers)) if self.cache else None
        object.__setattr__(self, "_cached", kept or self.source)

    def __len__(self) -> int:
        return len(self.source)

    def steps(self, first: int, last: int, batch: int, rank: int = 0, world: int = 1) -> Iterator[Batch]:
        """The rows rank, rank + world, ... of the global batches of the steps first, ..., last (both included)."""
        _check(batch, rank, world)
        n, ledger = len(self.source), Ledger(of_rank(self.ledger, rank))
        patience = min(n, _IN_A_ROW, max(1, int(self.share * n)) + 1)
        reader = _Reader(self._cached, self.prepare, self.order.after, self.seed, patience)
        keys = (_rows(self.order.rows(s, batch), s, batch, rank, world) for s in range(first, last + 1))
        bad: set[int] = set()
        seen = 0
        for found, damaged in self._read(reader, keys):
            for item in damaged:
                bad.add(item.id)
                ledger.add(item.where, item.reason)
            seen += len(damaged) + (0 if isinstance(found, str) else len(found))
            if damaged:
                self._judge(len(bad), min(n, seen), damaged[-1])
            if isinstance(found, str):
                raise InputError(found)
            yield found

    def _read(self, reader: _Reader, keys: Iterator[Key]) -> Iterator[Read]:
        if not self.workers:
            for key in keys:
                yield reader[key]
            return
        loader = DataLoader(
            reader,
            batch_size=None,
            sampler=_Keys(keys),
            num_workers=self.workers,
            collate_fn=_same,
            prefetch_factor=4,
            generator=torch.Generator(),  # else it draws from the global one
        )
        running: Any = iter(loader)
        try:
            yield from running
        finally:
            running._shutdown_workers()  # at once, not when the garbage collector comes by

    def _judge(self, bad: int, seen: int, last: _Bad) -> None:
        expected = self.share * seen
        allowed = min(max(1.0, self.share * len(self.source)), 10 + expected + 3 * math.sqrt(expected))
        if bad > allowed:
            where = f"; all are listed in {self.ledger}" if self.ledger else ""
            raise InputError(
                f"{self.source.name}: {bad} of {seen} samples read cannot be decoded, more than data.bad_share = "
                f"{self.share:g} allows; the last, {last.where}: {last.reason}{where}. Mend or remove them, or raise "
                "data.bad_share"
            )


class _Keys:
    """An iterator as a sampler: consumed once."""

    def __init__(self, keys: Iterator[Key]) -> None:
        self.keys = keys

    def __iter__(self) -> Iterator[Key]:
        return self.keys


def _same(x: Any) -> Any:
    return x


def _check(batch: int, rank: int, world: int) -> None:
    if not (0 <= rank < world <= batch):
        raise InputError(f"rank {rank} of {world} with a batch of {batch}: expected at least one row a process")


def _rows(ids: Tensor, step: int, batch: int, rank: int, world: int) -> Key:
    return ids[rank::world], indices(step, batch)[rank::world]


@dataclass(frozen=True, eq=False)
class InMemory:
    """Batches of a tensor x (n, channels, *size) in the model's range, shuffled; `cond` has n rows or is None."""

    x: Tensor
    cond: Any = None
    seed: int = 0
    labels: Tensor | None = None
    _order: Shuffled = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.cond is not None and len(self.cond) != len(self.x):
            raise InputError(f"the condition has {len(self.cond)} rows for {len(self.x)} samples")
        object.__setattr__(self, "_order", Shuffled(len(self.x), self.seed))

    def __len__(self) -> int:
        return len(self.x)

    def steps(self, first: int, last: int, batch: int, rank: int = 0, world: int = 1) -> Iterator[Batch]:
        """As of `Feed`."""
        _check(batch, rank, world)
        for step in range(first, last + 1):
            ids, index = _rows(self._order.rows(step, batch), step, batch, rank, world)
            labels, cond = (None if v is None else v[ids] for v in (self.labels, self.cond))
            yield Batch(self.x[ids], labels, {}, ids, index, cond)
