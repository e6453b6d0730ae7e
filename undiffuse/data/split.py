"""Held-out samples: the set's own test split, the last shards, or a fixed random choice."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from undiffuse.data.data import Data, check_held_out
from undiffuse.data.feed import Batch, stack
from undiffuse.data.prepare import Example, Prepare
from undiffuse.data.source import Source, Subset, Unreadable, choice
from undiffuse.data.statistics import shapes_differ
from undiffuse.types import InputError

_CHUNK = 256  # samples whose columns are in memory before they are read
Conditions = Callable[[Batch], Any]


def split(
    source: Source,
    held_out: int,
    seed: int = 0,
    prepare: Prepare | None = None,
    conditions: Conditions | None = None,
) -> tuple[Source, Data]:
    """(training source, held-out samples in the form for evaluation).

    The second are at most `held_out` of the source's own test split, a fixed choice; without one, of shards the last
    whole ones that make up `held_out` (as many of their samples), else the choice of `Data.split`.
    """
    name = f"{source.name} (held out)"
    if source.test is not None:
        ids = choice(source.test, held_out, seed)
        return source, materialise(Subset(source.test, ids, name), prepare, conditions)
    n = len(source)
    check_held_out(source.name, held_out, n)
    train = f"{source.name} (train)"
    if len(source.counts) > 1:
        kept = len(source.counts)
        while kept > 1 and sum(source.counts[kept:]) < held_out:
            kept -= 1
        first = sum(source.counts[:kept])
        rest = range(first, min(n, first + held_out))
        return Subset(source, range(first), train, source.counts[:kept]), materialise(
            Subset(source, rest, name), prepare, conditions
        )
    order = np.random.default_rng(seed).permutation(n)
    held = materialise(Subset(source, order[:held_out], name), prepare, conditions)
    return Subset(source, order[held_out:], train), held


def materialise(source: Source, prepare: Prepare | None = None, conditions: Conditions | None = None) -> Data:
    """All samples in memory, cropped at the centre and never flipped, with what `conditions` reads of a batch of them;
    unreadable ones are left out."""
    plain = (prepare or Prepare()).plain()
    x, labels, count, bad, last = torch.empty(0), list[int | None](), 0, 0, ""
    told, chunk = list[Any](), list[tuple[int, Example]]()

    def read_chunk() -> None:
        if conditions is not None and chunk:
            told.append(conditions(stack(source.name, chunk, torch.arange(len(chunk)))))
        chunk.clear()

    for i in range(len(source)):
        try:
            example = plain(source.read(i), 0, 0)
        except Unreadable as error:
            bad, last = bad + 1, f"the last of those that cannot be read, {error}"
            continue
        if not count:
            x = torch.empty(len(source), *example.x.shape)
        if x.shape[1:] != example.x.shape:
            raise InputError(shapes_differ(source.name, tuple(x.shape[1:]), tuple(example.x.shape)))
        x[count] = example.x
        labels.append(example.label)
        if conditions is not None:
            chunk.append((i, example))
        if len(chunk) == _CHUNK:
            read_chunk()
        count += 1
    read_chunk()
    if not count:
        raise InputError(f"{source.name}: no samples; {last}")
    if bad:
        warnings.warn(f"{source.name}: {bad} samples are left out; {last}", stacklevel=2)
    known = [label for label in labels if label is not None]
    cond = type(told[0]).cat(told) if told else None
    return Data(x[:count], torch.tensor(known) if len(known) == count else None, source.name, cond)
