"""`bulk`: many samples as shards in a folder, by any number of processes or on Ray; the same bytes however it is done.

A job's folder holds `job.json` (what decides the samples), `shard-000012.safetensors` (or `.tar`) with its sidecar
`shard-000012.json`, which appears after the shard is durable, and when all are there `ledger.jsonl` and
`manifest.json`. A shard counts if its sidecar's size and SHA-256 hold, so the same command makes only what is missing
or damaged.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from undiffuse.bulk.folder import MISSING, finish, inspect, trouble_of
from undiffuse.bulk.job import SETTINGS, Job, configure, plan
from undiffuse.bulk.make import Count, Maker, Progress
from undiffuse.bulk.ray import on_ray
from undiffuse.model import Model
from undiffuse.train import Processes, launched
from undiffuse.types import InputError

__all__ = ["SETTINGS", "Job", "Maker", "Report", "bulk", "carry_out", "configure", "plan"]


@dataclass(frozen=True)
class Report:
    """What a job did: shards made for the first time, found sound, and made again, with the seconds that it took."""

    out: str
    n: int
    shards: int
    written: int
    kept: int
    remade: int
    damaged: tuple[str, ...]
    seconds: float
    samples_per_second: float


def bulk(
    run: str | Path,
    out: str | Path,
    n: int | None = None,
    label: str | None = None,
    *,
    words: Mapping[str, Sequence[str]] | None = None,
    settings: Mapping[str, Any] | None = None,
    shard: int = 1000,
    format: str = "safetensors",
    device: str = "auto",
    threads: int = 1,
    ema: float | None = None,
    engine: str = "local",
    workers: int | None = None,
    progress: Progress | None = None,
) -> Report:
    """n samples of a finished run as shards of `shard` samples in the folder `out`; the same call again completes it.

    Files hold x (k, *shape) float32 and label (k,), or PNGs (`format="png"`). `label` is a class by name or number,
    several in turn as "0,1,2", or "each"; `words` are conditions by name, in turn, as `Model.words` has them. `ema` is
    the length of another average of the weights (`Model.load`); `settings` such as {"solver": "ddim", "sample":
    {"steps": 10}} win over the run's. Under torchrun or `accelerate launch` the processes share the work;
    `engine="ray"` spreads it over `workers` actors of Ray Data (default: one for each CPU or GPU). Sample k is
    bit-equal for all of these, on one kind of device with `threads` threads a process. Raises InputError for settings
    that cannot be and for folders that are not this job's, NonFinite for samples that are not finite, Lost if another
    process failed, OSError for a full disk.
    """
    model = Model.load(run, ema)
    settings = dict(settings or {})
    if n is not None:
        settings["sample"] = {**settings.get("sample", {}), "n": n}
    job = plan(
        model,
        run,
        out,
        label,
        words=words,
        settings=settings,
        shard=shard,
        format=format,
        device=device,
        threads=threads,
    )
    return carry_out(job, model, engine=engine, workers=workers, progress=progress)


def carry_out(
    job: Job,
    model: Model | None = None,
    *,
    engine: str = "local",
    workers: int | None = None,
    progress: Progress | None = None,
) -> Report:
    """Do what is left of a job, see `bulk`; `model` is the run's, if it is loaded, and moves to the job's device."""
    if engine not in ("local", "ray"):
        raise InputError(f"unknown engine {engine!r}: local or ray")
    if workers is not None and (workers < 1 or engine != "ray"):
        raise InputError(f"workers are Ray's, and at least 1; got {workers} with engine {engine}")
    if engine == "ray" and launched() > 1:
        raise InputError("Ray spreads the work by itself: leave torchrun or accelerate out, or leave out --ray")
    started, threads = time.perf_counter(), torch.get_num_threads()
    try:
        # one that is done waits for the slowest, which may take hours
        processes = Processes.start(job.device, patience=timedelta(days=30))
        found, made = _complete(job, model, processes, engine, workers, progress)
        processes.end()
    finally:
        torch.set_num_threads(threads)
    seconds = time.perf_counter() - started
    damaged = {index: trouble for index, trouble in found.items() if trouble != MISSING}
    remade, drawn = len(damaged.keys() & set(made)), sum(len(job.span(index)) for index in made)
    return Report(
        out=str(job.out),
        n=job.n,
        shards=job.shards,
        written=len(made) - remade,
        kept=job.shards - len(made),
        remade=remade,
        damaged=tuple(f"{job.path(index).name}: {damaged[index]}" for index in sorted(damaged)),
        seconds=round(seconds, 3),
        samples_per_second=round(drawn / seconds, 3),
    )


def _complete(
    job: Job, model: Model | None, processes: Processes, engine: str, workers: int | None, progress: Progress | None
) -> tuple[dict[int, str], list[int]]:
    """What was wrong with which shards, and those that these processes made."""

    def search() -> dict[int, str]:
        numbers = range(processes.rank, job.shards, processes.world)
        return {index: trouble for index in numbers if (trouble := trouble_of(job, index)) is not None}

    def make() -> list[int]:
        mine = todo[processes.rank :: processes.world]
        count = Count(job, todo, processes.world, progress)
        if engine == "ray" and mine:
            return on_ray(job, mine, workers, count)
        maker = Maker(job, model, processes.device) if mine else None
        return [index for index in mine if maker is not None and maker.make(index, count)]

    processes.together(lambda: inspect(job))
    found = {index: trouble for part in processes.each(search) for index, trouble in part.items()}
    todo = sorted(found)
    made = sorted({index for part in processes.each(make) for index in part})
    processes.together(lambda: finish(job))
    return found, made
