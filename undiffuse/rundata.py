"""`RunData`: what a run's configuration makes of its data, and what the run folder keeps of it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from undiffuse.conditions import Conditions, unread
from undiffuse.config import Config, DataConfig
from undiffuse.data import (
    Data,
    Feed,
    InMemory,
    Prepare,
    Source,
    Statistics,
    Subset,
    materialise,
    open_source,
    order_for,
    settle,
    split,
)
from undiffuse.data.source import choice
from undiffuse.train import Engine, Rows

_REFERENCE = 2**28  # bytes of float64 data from which the spectrum is measured, where the data do not fit


@dataclass(frozen=True, eq=False)
class RunData:
    """The configured data: all of `source` to train on, as `prepare` makes it; `train` is it in memory, or a part.

    `complete` says whether `train` is all of it, free of random crops and flips and of damaged samples.
    """

    source: Source
    prepare: Prepare
    train: Data
    held_out: Data
    complete: bool
    conditions: Conditions
    fingerprint: str
    statistics: Statistics
    notes: tuple[str, ...]

    @staticmethod
    def of(config: Config) -> RunData:
        """Open, split and look over the data; InputError says what is wrong with it."""
        use: DataConfig = config.section("data")
        source = open_source(use.name, use.path or None, use.cache or None, int(use.cache_gb * 2**30))
        fingerprint = source.fingerprint()
        prepare, found = _settled(source, use.prepare(), about_of(Path(config.values["out"]), fingerprint))
        found.refuse(source.name)
        held_out = config.values["held_out"]
        if "held_out" not in config.given and use.name != "digits":  # the default suits the digits
            held_out = min(held_out, len(source.test) if source.test else max(2, len(source) // 5))
        conditions = Conditions.of(config, source, prepare, len(source.classes))
        part, held = split(source, held_out, prepare=prepare, conditions=conditions.reader)
        still = use.crop == "center" and not use.flip and not use.buckets
        size = 4 * math.prod(found.shape)
        fits = still and not part.counts and len(part) * size <= use.memory_mb << 20
        most = len(part) if fits else max(2, min(10_000, _REFERENCE // (2 * size)))
        data = materialise(Subset(part, choice(part, most), part.name), prepare, conditions.reader)
        if conditions.encoders is None:
            conditions = replace(conditions, classes=max(len(source.classes), data.classes, held.classes))
        notes = list(found.warnings()) if use.normalize == "range" else []
        notes += [] if config.classifies else unread(source, conditions)
        complete = fits and len(data) == len(part)
        return RunData(part, prepare, data, held, complete, conditions, fingerprint, found, tuple(notes))

    @property
    def classes(self) -> int:
        """The number of classes that the network is told of; 0 for none."""
        return self.conditions.classes

    def about(self, use: DataConfig) -> dict[str, Any]:
        """What a run folder keeps of the data, so that nothing is measured twice."""
        return {
            "name": self.source.name,
            "samples": len(self.source),
            "classes": list(self.source.classes),
            "fingerprint": self.fingerprint,
            "statistics": json.loads(self.statistics.to_json()),
            "channels": self.prepare.channels,
            "asked": repr(use.prepare()),
            "prepare": repr(self.prepare),
        }

    def feed(self, use: DataConfig, engine: Engine, seed: int, ledger: Path) -> InMemory | Encoded:
        """What training reads: tensors where all is in memory, else the source, with damaged samples in `ledger`."""
        if self.complete:
            return InMemory(self.train.x, self.conditions.told(self.train), seed)
        order = order_for(self.source, self.prepare, seed, use.window, use.lanes)
        cache = use.memory_mb << 20
        feed = Feed(self.source, self.prepare, order, seed, engine.workers, use.bad_share, ledger, cache)
        return Encoded(feed, self.conditions)


@dataclass(frozen=True, eq=False)
class Encoded:
    """A feed whose labels or columns are read as conditions."""

    feed: Feed
    conditions: Conditions

    def steps(self, first: int, last: int, batch: int, rank: int = 0, world: int = 1) -> Iterator[Rows]:
        """See `undiffuse.train.Feed`."""
        for rows in self.feed.steps(first, last, batch, rank, world):
            yield replace(rows, cond=self.conditions(rows))


def about_of(out: Path, fingerprint: str) -> dict[str, Any]:
    """What the run folder says of this data; nothing if it is of other data or not there."""
    try:
        about: dict[str, Any] = json.loads((out / "data.json").read_text())
    except (OSError, ValueError):
        return {}
    return about if isinstance(about, dict) and about.get("fingerprint") == fingerprint else {}


def _settled(source: Source, prepare: Prepare, about: dict[str, Any]) -> tuple[Prepare, Statistics]:
    """Channels and statistics, measured once: of a run that goes on, those in its folder."""
    if about.get("asked") != repr(prepare):
        return settle(source, prepare)
    found = Statistics.from_json(json.dumps(about["statistics"]))
    channels = prepare.channels or int(about["channels"])
    return replace(prepare, channels=channels, statistics=found if prepare.normalize == "channels" else None), found
