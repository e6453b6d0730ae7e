"""`Given`: conditions by name, as they were read and not yet encoded, so that encoders can be trained."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from undiffuse.cond.cond import Cond
from undiffuse.cond.masks import random_known
from undiffuse.seeds import seed_of, uniform
from undiffuse.types import InputError


@dataclass(frozen=True, eq=False)
class Read:
    """One condition of b samples: tensors (b, ...) by name, and `there` (b,), False where the condition is null.

    Where it is `done` the tensors are parts of a `Cond` that its encoder made of them already.
    """

    tensors: Mapping[str, Tensor]
    there: Tensor
    done: bool = False

    def map(self, change) -> Read:  # type: ignore[no-untyped-def]
        """The same with every tensor changed."""
        return Read({name: change(v) for name, v in self.tensors.items()}, change(self.there), self.done)

    def noised(self, level: Tensor, seed: int, index: Tensor) -> Read:
        """The `map` z as sqrt(1 - level^2) z + level eps (non-truncated conditioning augmentation; Ho et al. 2021,
        arXiv 2106.15282), of levels (b,) that are kept as `level`; eps is a function of (seed, global index (b,))."""
        z = self.tensors["map"]
        elements = index.long()[:, None] * z[0].numel() + torch.arange(z[0].numel())
        eps = (math.sqrt(2) * torch.erfinv(2 * uniform(seed, elements) - 1)).reshape(z.shape).to(z)
        level = level.to(z)
        sigma = level.reshape(-1, *[1] * (z.ndim - 1))
        noisy = (1 - sigma.square()).sqrt() * z + sigma * eps
        return replace(self, tensors={**self.tensors, "map": noisy, "level": level})

    def noised_in_training(self, seed: int, index: Tensor) -> Read:
        """With noise of levels that are uniform in [0, `most`]."""
        return self.noised(self.tensors["most"] * uniform(seed, index), seed_of(seed, 1), index)

    def masked_in_training(self, seed: int, index: Tensor) -> Read:
        """With random masks of the pictures that came `whole`."""
        known, whole = self.tensors["known"], self.tensors["whole"]
        drawn = random_known(seed, index, known.shape[2:]).to(known)
        mask = torch.where(whole.reshape(-1, *[1] * (known.ndim - 1)), drawn, known)
        return replace(self, tensors={**self.tensors, "known": mask})

    @staticmethod
    def cat(parts: list[Read]) -> Read:
        """Batches one after the other; sequences are filled up with zeros, which their masks leave out."""
        tensors = {name: _filled([p.tensors[name] for p in parts]) for name in parts[0].tensors}
        return Read(tensors, torch.cat([p.there for p in parts]), parts[0].done)


# what training draws anew in each epoch, by the tensor that asks for it
DRAWN: dict[str, Callable[[Read, int, Tensor], Read]] = {
    "most": Read.noised_in_training,
    "whole": Read.masked_in_training,
}


def _filled(parts: list[Tensor]) -> Tensor:
    n = max(p.shape[1] if p.ndim > 1 else 0 for p in parts)
    return torch.cat([pad(p, [0, 0] * (p.ndim - 2) + [0, n - p.shape[1]]) if p.ndim > 1 else p for p in parts])


@dataclass(frozen=True, eq=False)
class Given:
    """A batch of conditions by name, which `Encoders` read and a `Conditioned` network encodes; it is passed, dropped,
    cut and guided as a `Cond` is.

    `instead` are conditions that stand in the place of the null condition in guidance (negative prompts). `alone` are
    the probabilities in [0, 1] with which training drops each condition by itself, besides dropping all of a sample's.
    `augment` (b, a) is what augmentation did to x, which is no condition.
    """

    reads: Mapping[str, Read]
    instead: Mapping[str, Read] = field(default_factory=dict)
    alone: Mapping[str, float] = field(default_factory=dict)
    augment: Tensor | None = None

    def __len__(self) -> int:
        return next((len(read.there) for read in self.reads.values()), 0 if self.augment is None else len(self.augment))

    def _map(self, change) -> Given:  # type: ignore[no-untyped-def]
        reads, instead = ({k: v.map(change) for k, v in each.items()} for each in (self.reads, self.instead))
        return Given(reads, instead, self.alone, None if self.augment is None else change(self.augment))

    def _without(self, which: Mapping[str, Tensor]) -> Given:
        """The conditions of the rows where `which` is True are null."""
        reads = dict(self.reads)
        for name, rows in which.items():
            reads[name] = replace(reads[name], there=reads[name].there & ~rows.to(reads[name].there.device))
        return replace(self, reads=reads)

    def null(self) -> Given:
        """The conditions that say nothing, or what stands `instead` of them."""
        return self.only(())

    def only(self, names: Collection[str]) -> Given:
        """These conditions, with the others null; InputError for a name that is not among them."""
        for name in names:
            if name not in self.reads:
                raise InputError(f"no condition {name!r} was given, but {', '.join(self.reads) or 'none'}")
        gone = [name for name in self.reads if name not in names]
        nothing = self._without({name: torch.ones_like(self.reads[name].there) for name in gone})
        return replace(nothing, reads={**nothing.reads, **{k: v for k, v in self.instead.items() if k in gone}})

    def against(self, other: Given) -> Given:
        """The same with the conditions of `other` in the place of the null condition: negative prompts.

        One row of `other` counts for all; InputError for conditions that are not given here.
        """
        instead = {}
        for name, read in other.reads.items():
            if name not in self.reads:
                raise InputError(f"{name} cannot be guided against: given are {', '.join(self.reads) or 'none'}")
            if len(read.there) not in (1, len(self)):
                raise InputError(
                    f"{len(read.there)} rows of {name} to guide {len(self)} samples against: give 1 or all"
                )
            instead[name] = read if len(read.there) == len(self) else read.map(lambda v: v[[0] * len(self)])
        return replace(self, instead={**self.instead, **instead})

    def drop(self, which: Tensor) -> Given:
        """The same batch with all conditions null in the rows where `which` (b,) is True."""
        return self._without(dict.fromkeys(self.reads, which))

    def dropped(self, seed: int, index: Tensor, p: float) -> Given:
        """The rows as training sees them: all conditions of a sample dropped with probability p, and of several each by
        itself with its probability in `alone`; and what `DRAWN` draws; functions of (seed, global index (b,)) alone."""
        given = self.drop(uniform(seed, index) < p)
        if len(self.reads) > 1:
            several = self.alone.keys() & self.reads.keys()
            draws = {name: uniform(seed_of(seed, *name.encode()), index) for name in several}
            given = given._without({name: draw < self.alone[name] for name, draw in draws.items()})
        reads = dict(given.reads)
        for name, read in given.reads.items():
            for draw in (DRAWN[part] for part in read.tensors if part in DRAWN):
                reads[name] = draw(reads[name], seed_of(seed, *name.encode(), 1), index)
        return replace(given, reads=reads)

    def noised(self, name: str, level: float, seed: int = 0) -> Given:
        """The same with noise of this level, in [0, `noise` of its encoder], in the pictures of a condition, which the
        network is told: row k of a function of (seed, k). InputError for conditions that training has no noise in."""
        read = self.reads.get(name)
        if read is None or "most" not in read.tensors:
            able = [known for known, each in self.reads.items() if "most" in each.tensors]
            raise InputError(f"{name} takes no noise; of the given conditions there do: {', '.join(able) or 'none'}")
        most = float(read.tensors["most"].max())
        if not 0 <= level <= most:
            raise InputError(f"noise of level {level} in {name}: training has levels from 0 to {most:g}")
        rows = torch.arange(len(self))
        noisy = read.noised(torch.full((len(self),), level), seed_of(seed, *name.encode()), rows)
        return replace(self, reads={**self.reads, name: noisy})

    def tensors(self) -> dict[str, Tensor]:
        """The conditions as plain tensors, to be kept in a file; `Given.of` makes the same of them."""
        named = {f"{name}.{part}": v for name, read in self.reads.items() for part, v in read.tensors.items()}
        named |= {f"{name}.there": read.there for name, read in self.reads.items()}
        return {key: v.contiguous() for key, v in named.items()}

    @staticmethod
    def of(tensors: Mapping[str, Tensor], alone: Mapping[str, float]) -> Given:
        """The conditions that `tensors` gave."""
        parts: dict[str, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            name, part = key.split(".")
            parts.setdefault(name, {})[part] = value
        return Given({name: Read(each, each.pop("there")) for name, each in parts.items()}, {}, alone)

    def flat(self) -> Tensor:
        """(b, any number) in float64: equal rows have equal conditions."""
        parts = [v for read in self.reads.values() for v in (read.there, *read.tensors.values())]
        parts += [] if self.augment is None else [self.augment]
        return torch.cat([v.reshape(len(self), -1).double() for v in parts], 1)

    def to(self, device: torch.device | str) -> Given:
        """The same batch on another device."""
        return self._map(lambda v: v.to(device))

    def __getitem__(self, rows: slice | Tensor) -> Given:
        return self._map(lambda v: v[rows])

    @staticmethod
    def beside(parts: list[Given]) -> Given:
        """Different conditions of the same samples as one."""
        reads = {name: read for part in parts for name, read in part.reads.items()}
        return replace(parts[0], reads=reads, instead={k: v for part in parts for k, v in part.instead.items()})

    @staticmethod
    def cat(parts: list[Given]) -> Given:
        """Batches one after the other; InputError unless all have the same conditions."""
        reads, instead = _joined([part.reads for part in parts]), _joined([part.instead for part in parts])
        augment = [part.augment for part in parts if part.augment is not None]
        if augment and len(augment) != len(parts):
            raise InputError("augmentation labels are present in some batches and absent in others")
        return Given(reads, instead, parts[0].alone, torch.cat(augment) if augment else None)


def in_turn(parts: Sequence[Given | Cond], numbers: Iterable[int]) -> Given | Cond:
    """The conditions of samples with these numbers, sample k having row k of each part, modulo the part's length.

    Several parts are different conditions by name.
    """
    rows = [part[torch.tensor([k % len(part) for k in numbers], dtype=torch.long)] for part in parts]
    if len(rows) == 1:
        return rows[0]
    return Given.beside([part for part in rows if isinstance(part, Given)])


def _joined(parts: list[Mapping[str, Read]]) -> dict[str, Read]:
    """The conditions of batches one after the other."""
    if any(part.keys() != parts[0].keys() for part in parts):
        names = " and ".join(", ".join(sorted(part)) or "none" for part in parts)
        raise InputError(f"batches with different conditions: {names}")
    return {name: Read.cat([part[name] for part in parts]) for name in parts[0]}
