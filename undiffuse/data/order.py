"""The order in which samples are seen: functions of the seed and of where in the run, so that runs can be resumed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from undiffuse.data.prepare import Prepare, bucket_of
from undiffuse.data.source import Source
from undiffuse.seeds import seed_of
from undiffuse.types import InputError

ORDER, SHARDS, LANES, STEPS = 2, 23, 24, 25  # streams of random numbers


class Order(Protocol):
    """Row j of optimiser step s = 1, 2, ... has the global index (s - 1) * batch + j, however rows are dealt out."""

    def rows(self, step: int, batch: int) -> Tensor:
        """(batch,) the sample numbers of a step."""
        ...

    def after(self, i: int) -> int:
        """The sample to take in place of i where i cannot be read; repeated, it reaches all that may stand for i."""
        ...


def permutation(n: int, *seed: int) -> Tensor:
    """(n,) a permutation fixed by whole numbers."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed_of(*seed)))


def indices(step: int, batch: int) -> Tensor:
    """(batch,) the global indices of a step."""
    return torch.arange((step - 1) * batch, step * batch)


class _Recent:
    """The last few values of a function of whole numbers."""

    def __init__(self, make: Callable[..., Tensor], keep: int = 2) -> None:
        self.make, self.keep = make, keep
        self.kept: dict[tuple[int, ...], Tensor] = {}

    def __call__(self, *key: int) -> Tensor:
        if key not in self.kept:
            while len(self.kept) >= self.keep:
                del self.kept[next(iter(self.kept))]
            self.kept[key] = self.make(*key)
        return self.kept[key]


def _look_up(position: Tensor, n: int, epoch: Callable[[int], Tensor]) -> Tensor:
    """epoch(position // n)[position % n], row by row."""
    out = torch.empty_like(position)
    for e in torch.unique(position // n).tolist():
        mine = position // n == e
        out[mine] = epoch(e)[position[mine] % n]
    return out


@dataclass(frozen=True, eq=False)
class Shuffled:
    """A new permutation of n samples each epoch; the sample at a global index depends on (seed, index) alone.

    >>> order = Shuffled(10, seed=3)
    >>> sorted(torch.cat([order.rows(s, 5) for s in (1, 2)]).tolist()) == list(range(10))
    True
    """

    n: int
    seed: int = 0
    _epoch: _Recent = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_epoch", _Recent(self._order))

    def _order(self, epoch: int) -> Tensor:
        return permutation(self.n, self.seed, ORDER, epoch)

    def rows(self, step: int, batch: int) -> Tensor:
        return _look_up(indices(step, batch), self.n, self._epoch)

    def after(self, i: int) -> int:
        return (i + 1) % self.n


@dataclass(frozen=True, eq=False)
class Bucketed:
    """Every step's rows lie in one bucket: `bucket_of` (n,) whole numbers. A function of (seed, step, batch).

    An epoch sees every sample at least once: a bucket's last step is filled up with samples of that bucket, and its
    steps are mixed with those of the others.
    """

    bucket_of: Tensor
    seed: int = 0
    _members: list[Tensor] = field(init=False, repr=False)
    _steps: _Recent = field(init=False, repr=False)
    _rows: _Recent = field(init=False, repr=False)
    _next: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        present = torch.unique(self.bucket_of).tolist()
        members = [(self.bucket_of == b).nonzero().flatten() for b in present]
        after = torch.empty_like(self.bucket_of)
        for m in members:
            after[m] = m.roll(-1)
        recent = _Recent(self._order, 2 * len(members))
        for name, value in {
            "_members": members,
            "_next": after,
            "_steps": _Recent(self._mixed),
            "_rows": recent,
        }.items():
            object.__setattr__(self, name, value)

    def epoch(self, batch: int) -> int:
        """The number of steps of an epoch."""
        return sum(-(-len(m) // batch) for m in self._members)

    def _mixed(self, epoch: int, batch: int) -> Tensor:
        """(steps, 2): the bucket and the step within it, of each step of an epoch."""
        pairs = [(b, k) for b, m in enumerate(self._members) for k in range(-(-len(m) // batch))]
        return torch.tensor(pairs)[permutation(len(pairs), self.seed, STEPS, epoch)]

    def _order(self, epoch: int, bucket: int) -> Tensor:
        members = self._members[bucket]
        return members[permutation(len(members), self.seed, ORDER, epoch, bucket)]

    def rows(self, step: int, batch: int) -> Tensor:
        epoch, place = divmod(step - 1, self.epoch(batch))
        bucket, k = self._steps(epoch, batch)[place].tolist()
        order = self._rows(epoch, bucket)
        return order[torch.arange(k * batch, (k + 1) * batch) % len(order)]

    def after(self, i: int) -> int:
        return int(self._next[i])


@dataclass(frozen=True, eq=False)
class Windowed:
    """For shards of `counts` samples each: shards are shuffled, then samples, jointly within `window` shards.

    So a reader needs `window` shards at hand (twice that where two windows meet). Shards are dealt to `lanes` streams,
    balanced by samples and for the whole run; global index g is the next sample of lane g % lanes, so process r of R,
    which takes the rows r, r + R, ..., reads shards of its own alone if R divides `lanes` and the batch. Each lane
    passes over its shards exactly once an epoch of its own; with one lane that is the epoch of the run.
    """

    counts: tuple[int, ...]
    seed: int = 0
    window: int = 8
    lanes: int = 1
    _starts: Tensor = field(init=False, repr=False)
    _shards: list[list[int]] = field(init=False, repr=False)
    _lengths: list[int] = field(init=False, repr=False)
    _epoch: _Recent = field(init=False, repr=False)

    def __post_init__(self) -> None:
        full = [s for s, count in enumerate(self.counts) if count]
        if not 1 <= self.lanes <= len(full) or self.window < 1:
            raise InputError(
                f"{self.lanes} lanes and a window of {self.window} for {len(full)} shards with samples; expected at "
                "least one shard a lane, and window >= 1"
            )
        dealt: list[list[int]] = [[] for _ in range(self.lanes)]
        load = [0] * self.lanes
        mixed = [full[k] for k in permutation(len(full), self.seed, LANES).tolist()]
        for shard in sorted(mixed, key=lambda s: -self.counts[s]):  # the largest first, each to the emptiest lane
            lane = load.index(min(load))
            dealt[lane].append(shard)
            load[lane] += self.counts[shard]
        starts = torch.tensor([0, *self.counts]).cumsum(0)
        recent = _Recent(self._order, 2 * self.lanes)
        for name, value in {"_starts": starts, "_shards": dealt, "_lengths": load, "_epoch": recent}.items():
            object.__setattr__(self, name, value)

    def _order(self, lane: int, epoch: int) -> Tensor:
        mine = self._shards[lane]
        shards = [mine[k] for k in permutation(len(mine), self.seed, SHARDS, lane, epoch).tolist()]
        starts = self._starts.tolist()
        parts = []
        for first in range(0, len(shards), self.window):
            ids = torch.cat([torch.arange(starts[s], starts[s + 1]) for s in shards[first : first + self.window]])
            parts.append(ids[permutation(len(ids), self.seed, ORDER, lane, epoch, first)])
        return torch.cat(parts)

    def rows(self, step: int, batch: int) -> Tensor:
        index = indices(step, batch)
        out = torch.empty_like(index)
        for lane in torch.unique(index % self.lanes).tolist():
            mine = index % self.lanes == lane
            n = self._lengths[lane]
            out[mine] = _look_up(index[mine] // self.lanes, n, lambda e, lane=lane: self._epoch(lane, e))  # type: ignore[misc]
        return out

    def after(self, i: int) -> int:
        """The next sample of the same shard; after its last, the first of the next one."""
        return (i + 1) % int(self._starts[-1])


def order_for(source: Source, prepare: Prepare, seed: int = 0, window: int = 8, lanes: int = 1) -> Order:
    """Buckets where `prepare` has them (headers are read once), windows for shards, else all samples shuffled."""
    if prepare.buckets and len(source.counts) > 1:
        raise InputError(
            f"{source.name}: data.buckets needs samples in any order, not in shards: use a folder, or none"
        )
    if prepare.buckets:
        return Bucketed(bucket_of(source, prepare), seed)
    if len(source.counts) > 1:
        return Windowed(source.counts, seed, window, lanes)
    return Shuffled(len(source), seed)


def shard_of(counts: tuple[int, ...], ids: Tensor) -> Tensor:
    """The shard of each sample number."""
    return torch.bucketize(ids.contiguous(), torch.tensor([0, *counts]).cumsum(0)[1:], right=True)
