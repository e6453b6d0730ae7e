"""`Job`: what decides the samples of a job, and the files that they go to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from undiffuse.conditions import FILES
from undiffuse.config import DEFAULTS, Config
from undiffuse.guide import GUIDES
from undiffuse.modal import read_plan
from undiffuse.model import Model
from undiffuse.runfolder import fingerprint, run_folder
from undiffuse.train import sha256
from undiffuse.types import InputError

SETTINGS = ("schedule", "solver", "grid", "guidance", "sample")  # what a job may set; the rest was fixed by training
FORMATS = {"safetensors": ".safetensors", "png": ".tar"}


@dataclass(frozen=True)
class Job:
    """What decides the samples (`identity`), and where they come from and go to; plain data, so it can be sent.

    `labels` is the cycle of classes: sample k has labels[k % len(labels)]; empty, it is unconditional.
    `plan`, a saved plan's file and its SHA-256, takes the place of schedule, solver and grid. `words` are conditions by
    name of a model that has them, in turn, and `files` the SHA-256 of those that are files.
    """

    run: Path
    out: Path
    model: str
    ema: float | None
    values: dict[str, Any]
    labels: tuple[int, ...]
    classes: int
    shard: int
    format: str
    device: str
    threads: int
    plan: tuple[Path, str] | None = None
    words: tuple[tuple[str, tuple[str, ...]], ...] = ()
    files: tuple[tuple[str, str], ...] = ()

    @property
    def n(self) -> int:
        """The number of samples."""
        return int(self.values["sample"]["n"])

    @property
    def shards(self) -> int:
        """The number of shards."""
        return -(-self.n // self.shard)

    @property
    def identity(self) -> dict[str, Any]:
        """The settings on which the bytes depend; `sample.batch` and guidance without labels are none of them."""
        every = self.labels == tuple(range(self.classes))
        labels = "each" if every else ",".join(map(str, self.labels))
        decide = ("n", "steps", "seed", "rows") if self.plan is None else ("n", "seed", "rows")
        settings = {k: self.values[k] for k in ("schedule", "solver", "grid") if self.plan is None}
        settings["sample"] = {k: v for k, v in self.values["sample"].items() if k in decide}
        settings |= {} if self.plan is None else {"plan": self.plan[1]}
        guidance = self.values["guidance"]
        guided = bool(self.labels) or getattr(GUIDES[guidance["kind"]], "unconditional", False)
        settings |= {"label": labels if self.labels else None, **({"guidance": guidance} if guided else {})}
        if self.words:
            known = dict(self.files)
            given = {name: [known.get(word, word) for word in each] for name, each in self.words}
            settings |= {"given": given, "guidance": guidance}
        fixed = {"shard": self.shard, "format": self.format, "device": self.device, "threads": self.threads}
        ema = {} if self.ema is None else {"ema": self.ema}
        return {"model": self.model, **ema, **settings, **fixed}

    def path(self, index: int) -> Path:
        """The file of a shard."""
        return self.out / f"shard-{index:06d}{FORMATS[self.format]}"

    def sidecar(self, index: int) -> Path:
        """The file that appears once the shard's is durable."""
        return self.out / f"shard-{index:06d}.json"

    def span(self, index: int) -> range:
        """The numbers of a shard's samples."""
        return range(index * self.shard, min(self.n, (index + 1) * self.shard))


def configure(model: Model, settings: Mapping[str, Any]) -> Config:
    """The model's configuration with other settings of sampling; InputError for those that training fixed."""
    for key in settings:
        if key in DEFAULTS and key not in SETTINGS:
            raise InputError(f"{key} was fixed when the run was trained; sampling takes {', '.join(SETTINGS)}")
    return Config.resolve(model.config.values, settings)


def plan(
    model: Model,
    run: str | Path,
    out: str | Path,
    label: str | None = None,
    *,
    settings: Mapping[str, Any] | None = None,
    shard: int = 1000,
    format: str = "safetensors",
    device: str = "auto",
    threads: int = 1,
    table: Path | None = None,
    words: Mapping[str, Sequence[str]] | None = None,
) -> Job:
    """The job of these settings, or by the saved plan `table`, given `words` (see `Model.words`), checked; nothing is
    written. Raises InputError for settings that cannot be."""
    config = configure(model, settings or {})
    values, use = config.values, config.section("sample")
    if table is None:
        config.build("grid")(config.build("schedule"), use.steps)  # not every grid has every number of steps
    else:
        read_plan(table)
    cuda = torch.cuda.is_available()
    device = ("cuda" if cuda else "cpu") if device == "auto" else device
    if shard < 1 or threads < 1:
        raise InputError(f"a shard needs >= 1 samples and a process >= 1 threads, got {shard} and {threads}")
    if use.rows < 1:
        raise InputError("sample.rows=0 would make samples depend on the batch: shards need sample.rows >= 1")
    if format not in FORMATS:
        raise InputError(f"unknown format {format!r}: shards are written as {' or '.join(FORMATS)}")
    if format == "png" and (len(model.shape) != 3 or model.shape[0] not in (1, 3)):
        raise InputError(f"png needs images of 1 or 3 channels, samples have shape {model.shape}: use safetensors")
    if device not in ("cpu", "cuda") or (device == "cuda" and not cuda):
        raise InputError(f"device {device!r} is not to be had here: give {'cpu or cuda' if cuda else 'cpu'}")
    kept = {key: values[key] for key in SETTINGS}
    found = run_folder(run)
    where = found.resolve(), Path(out).resolve(), fingerprint(found), model.ema
    by = None if table is None else (table.resolve(), sha256(table))
    if model.encoders is not None:
        words = {**(words or {}), **({} if label is None else {"label": [label]})}
        label = None
    model.words(words or {})  # says what is wrong with them
    told, files = [], dict[str, str]()
    for name, each in (words or {}).items():
        if model.encoders is not None and model.encoders.encoders[name].reads in FILES:
            each = [str(Path(word).expanduser().absolute()) for word in each]
            files |= {word: sha256(Path(word)) for word in each}
        told.append((name, tuple(each)))
    given = tuple(told), tuple(files.items())
    return Job(*where, kept, model.cycle(label), model.classes, shard, format, device, threads, by, *given)
