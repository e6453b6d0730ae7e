"""Shards of tensors: .safetensors files of `x` and `label`, such as `undiffuse sample` writes into a folder."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

from undiffuse.data.arrays import open_arrays
from undiffuse.data.cache import Cache, Recent, Shards
from undiffuse.data.source import Arrays, Raw, Source, Unreadable
from undiffuse.types import InputError

JOB, LEDGER = "job.json", "ledger.jsonl"  # of a folder of samples: its settings, and a line for each shard at the end
_OPEN, _MEMORY = 16, 2**30  # shards, and bytes of them, at hand: two windows of 8


def check_job(folder: Path) -> None:
    """InputError if a folder of samples is unfinished or a shard's size is not the one in its ledger."""
    try:
        if "identity" not in json.loads((folder / JOB).read_text()):
            return
    except (OSError, ValueError, TypeError):  # not there, or of others
        return
    again = "run its `undiffuse sample` command again, which makes what is missing"
    try:
        rows = [json.loads(line) for line in (folder / LEDGER).read_text().splitlines()]
        sizes = {str(row["file"]): int(row["bytes"]) for row in rows}
    except FileNotFoundError as error:
        raise InputError(f"{folder} holds samples that are not finished: {again}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder / LEDGER} is damaged: {again}") from error
    for name, size in sizes.items():
        path = folder / name
        found = path.stat().st_size if path.is_file() else None
        if found != size:
            raise InputError(f"{path} {'is missing' if found is None else f'has {found} bytes, not {size}'}: {again}")


def tensors_index(file: BinaryIO) -> dict[str, Any]:
    """The number of a shard's samples, its highest label, and its other columns."""
    found = open_arrays(Path(file.name))
    return {"n": len(found), "label": len(found.classes) - 1, "columns": list(found.columns)}


@dataclass(frozen=True, eq=False)
class Tensors(Shards):
    """Samples of .safetensors shards by number: an index of every shard, made once, says how many each has."""

    name: str
    places: tuple[str, ...]
    cache: Cache
    test: Source | None = None
    counts: tuple[int, ...] = field(init=False)
    classes: tuple[str, ...] = field(init=False)
    columns: tuple[str, ...] = field(init=False)
    _starts: list[int] = field(init=False, repr=False)
    _recent: Recent[Arrays] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        found = [self.cache.index(place, tensors_index) for place in self.places]
        counts = tuple(int(index["n"]) for index in found)
        values = {
            "counts": counts,
            "classes": tuple(str(k) for k in range(max(int(index["label"]) for index in found) + 1)),
            "columns": tuple(sorted({column for index in found for column in index["columns"]})),
            "_starts": list(itertools.accumulate(counts, initial=0)),
            "_recent": Recent(_OPEN, _MEMORY),
        }
        for key, value in values.items():
            object.__setattr__(self, key, value)

    def read(self, i: int) -> Raw:
        shard, k = self._find(i)
        place = self.places[shard]
        try:
            found = self._recent.get(shard, lambda: self._shard(place))
        except InputError as error:
            raise Unreadable(place, str(error)) from error
        if k >= len(found):
            raise Unreadable(place, "the shard was changed")
        return found.read(k)

    def _shard(self, place: str) -> tuple[Arrays, int]:
        with self.cache.open(place) as file:
            found = open_arrays(Path(file.name))
        return replace(found, where=place), found.x.nbytes

    def _stamps(self) -> Iterable[tuple[Any, Any]]:
        return zip((self.cache.index(place, tensors_index)["stamp"] for place in self.places), self.counts, strict=True)
