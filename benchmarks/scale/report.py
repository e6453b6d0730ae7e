"""From costs to tables: the run that is reckoned with, what it needs, and what our present choices cost it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import clusters
from common import table
from costs import SHARDS, WINDOW, Timed

RANKS = (1, 8, 64, 1000, 4096)
GPUS = (8, 64, 1000, 4096)
# coefficient of variation of a rank's step, share of slow ranks, how much slower
STRAGGLING = ((0.02, 0.0, 1.0), (0.05, 0.0, 1.0), (0.10, 0.0, 1.0), (0.05, 0.001, 1.3))
MINUTE, HOUR, DAY = 60, 3600, 86400
INTERVALS = {"10 min": 10 * MINUTE, "30 min": 30 * MINUTE, "1 h": HOUR, "3 h": 3 * HOUR}
GPU_MTBF = 16_384 * 54 * DAY / 419  # seconds: 419 unexpected interruptions of 16,384 GPUs in 54 days (2407.21783)


@dataclass(frozen=True)
class Run:
    """The run that is reckoned with; all of it is assumed."""

    samples: float = 1e9
    sample_bytes: float = 40e3
    shard_bytes: float = 1e9
    gpus: int = 1000
    node: int = 8
    rate: float = 100.0  # samples a second and GPU
    batch: int = 16_000
    window: int = 4
    workers: int = 8
    parameters: float = 1e9
    network: float = 3e9  # bytes a second from the object store into a node
    link: float = 50e9  # bytes a second between GPUs, each way, per GPU: 400 Gb/s
    memory: float = 2e12  # bytes of a node
    cores: int = 12  # per GPU
    copying: float = 2e9  # bytes a second of one process from the GPU to the host, while training stands still
    schedule: float = 5 * MINUTE  # to notice a failure, replace the node and start the processes

    @property
    def nodes(self) -> float:
        return self.gpus / self.node

    @property
    def bytes(self) -> float:
        return self.samples * self.sample_bytes

    @property
    def shards(self) -> float:
        return self.bytes / self.shard_bytes

    @property
    def per_shard(self) -> int:
        return round(self.shard_bytes / self.sample_bytes)

    @property
    def rows(self) -> int:
        """Of a GPU in a step."""
        return self.batch // self.gpus

    @property
    def step(self) -> float:
        """Seconds."""
        return self.rows / self.rate

    @property
    def cached(self) -> float:
        """Bytes in use on a node: two windows a lane, a lane a GPU."""
        return 2 * self.window * self.node * self.shard_bytes

    def stall(self, sharers: int) -> float:
        """Seconds to fetch a window where `sharers` processes of a node do so at once."""
        return sharers * self.window * self.shard_bytes / self.network


@dataclass(frozen=True)
class Reckoned:
    """Costs of the run in seconds and bytes, from those measured here."""

    state: float  # bytes of a checkpoint
    save: float
    take: float  # to verify and read a checkpoint
    opening: float  # the data, whose index is there
    step: float  # what the training process adds to a step: its order and its noise
    decode: float  # a sample of 256 pixels, one core
    save_lifted: float
    restart_lifted: float

    @staticmethod
    def of(run: Run, found: dict[str, Any]) -> Reckoned:
        """By proportion to bytes and samples."""
        c, order = found["checkpoint"], found["order"]
        state = run.parameters * c["bytes"] / c["parameters"]
        passes = 2 * found["metadata"]["again"].median  # opening, then the fingerprint
        reading = {(r["kind"], r["size"], r["workers"]): r["rate"].median for r in found["reading"]}
        return Reckoned(
            state,
            state / c["bytes"] * c["save"].median,
            state / c["bytes"] * (c["verify"].median + c["load"].median) + state * run.node / run.network,
            run.samples * (passes + order["epoch"].median),
            order["look"][1000].median + run.rows * found["loop"][-1]["noise"].median,
            1 / reading["tar", 256, 0],
            state / run.node / run.copying,
            run.schedule + state / run.network,
        )

    def restart(self, run: Run, opening: bool) -> float:
        """Seconds from a failure to the next step, with or without the opening of the data."""
        return run.schedule + self.take + (self.opening if opening else 0)


def number(value: float, digits: int = 3) -> str:
    """Rounded to so many digits, with thousands marked."""
    rounded = float(f"{value:.{digits}g}")
    return f"{rounded:,.0f}" if abs(rounded) >= 10 ** (digits - 1) else f"{rounded:.{digits}g}"


def spread(value: Timed, digits: int = 3) -> str:
    """Median (lowest to highest)."""
    return f"{number(value.median, digits)} ({number(value.low, digits)} to {number(value.high, digits)})"


def size(value: float) -> str:
    """Bytes with a unit."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= factor:
            return f"{number(value / factor)} {unit}"
    return f"{number(value)} B"


def duration(seconds: float) -> str:
    """Seconds with a unit."""
    for unit, least, factor in (
        ("days", 3 * DAY, DAY),
        ("h", 2 * HOUR, HOUR),
        ("min", 3 * MINUTE, MINUTE),
        ("s", 1, 1),
    ):
        if seconds >= least:
            return f"{number(seconds / factor)} {unit}"
    return f"{number(seconds * 1e3)} ms"


def loop_table(found: dict[str, Any]) -> str:
    """What a step costs a sample beyond the network."""
    rows = []
    for row in found["loop"]:
        micro = [spread(row[k].scaled(1e6)) for k in ("noise", "levels", "order", "step")]
        rows.append([row["shape"], *micro, f"{100 * row['cv']:.0f} %"])
    return table(["a sample of", "noise", "levels", "order", "whole step of a one-parameter network", "its cv"], rows)


def files_line(found: dict[str, Any]) -> str:
    """What is read."""
    files = found["files"]
    return (
        f"{SHARDS} shards of 50 synthetic pictures of 256 x 256 with the 1/f spectrum of photographs, JPEG quality 90: "
        f"{number(files['jpeg'] / 1e3)} kB each, {number(files['tar'] / 1e3)} kB with caption and JSON in the tar; "
        f"window {WINDOW}."
    )


def reading_table(found: dict[str, Any]) -> str:
    """Samples a second by kind of file."""
    rows: dict[str, dict[tuple[int, int], str]] = {}
    for r in found["reading"]:
        rows.setdefault(r["kind"], {})[r["size"], r["workers"]] = spread(r["rate"])
    columns = [(size, workers) for size in (64, 256) for workers in (0, 1, 2)]
    header = [f"{size} pixels, {workers} worker{'s' * (workers != 1)}" for size, workers in columns]
    return table(["samples/s", *header], [[kind, *(v.get(c, "-") for c in columns)] for kind, v in rows.items()])


def remote_table(found: dict[str, Any]) -> str:
    """Reading over http through the cache."""
    rows = [
        [str(r["bound"]), str(r["workers"]), spread(r["rate"]), number(r["index"].median), number(r["fetches"].median)]
        for r in found["remote"]
    ]
    header = [
        "cache holds, shards",
        "workers",
        "samples/s, 64 pixels",
        "fetches a shard: to index",
        "in the epoch after",
    ]
    return table(header, rows)


def parts_table(found: dict[str, Any]) -> str:
    """Metadata, order, checkpoints, calls between processes."""
    meta, order, c, r = (found[k] for k in ("metadata", "order", "checkpoint", "resume"))
    mega, save = c["bytes"] / 1e6, c["save"].median
    talking = [found["talking"][k] for k in ("gather 8,000 rows", "together")]
    looks = {lanes: spread(took.scaled(1e3)) for lanes, took in order["look"].items()}
    share = {k: f"{100 * c[k].median / save:.0f} %" for k in ("flush", "hash")}
    rows = [
        ["index of a tar shard, us a sample of 3 members: make it", spread(meta["make"].scaled(1e6))],
        ["- read it again, ten shards held", spread(meta["again"].scaled(1e6))],
        ["- bytes a sample: on disk; in memory while opening", f"{number(meta['disk'])}; {number(meta['json'])}"],
        ["index of a parquet file, us a sample: make it", spread(meta["parquet"].scaled(1e6))],
        ["an epoch's order, ns a sample, which takes 8 bytes", spread(order["epoch"].scaled(1e9))],
        ["a step of 16,000 rows in that order, ms: 1; 64; 1,000 lanes", "; ".join(looks[k] for k in (1, 64, 1000))],
        ["checkpoint of 16 bytes a parameter, MB/s: save, the one before verified", spread(c["save"].rate(mega))],
        ["- of that in flushes (fsync); in hashes", f"{share['flush']}; {share['hash']}"],
        ["- verify; take up", f"{spread(c['verify'].rate(mega))}; {spread(c['load'].rate(mega))}"],
        ["256 MB through the cache from this machine, MB/s", spread(found["fetching"].scaled(1e-6))],
        ["`train`, s: to the end of its first step", spread(r["anew"])],
        ["- the same from a checkpoint; a later step", f"{spread(r['resumed'])}; {spread(r['step'])}"],
        ["gloo, 2 processes, ms: gather 8,000 rows; `together`", "; ".join(spread(t.scaled(1e3)) for t in talking)],
    ]
    return table(["what", "measured"], rows)


def straggling_table() -> str:
    """Step time over that of one rank, exact and simulated."""
    rows = []
    for n in RANKS:
        drawn = [clusters.simulated_inflation(n, *kind, steps=600)[0] for kind in STRAGGLING]
        exact = [clusters.inflation(n, *kind) for kind in STRAGGLING]
        rows.append([f"{n:,}", *(f"{a:.3f} ({b:.3f})" for a, b in zip(exact, drawn, strict=True))])
    return table(["ranks", "cv 2 %", "cv 5 %", "cv 10 %", "cv 5 %, 0.1 % of ranks 1.3 times slower"], rows)


def window_cost(run: Run, reckoned: Reckoned, workers: int, share: float, sharers: int) -> float:
    """Step time over that without reading, where a window is fetched when it is first wanted."""
    period = run.window * run.per_shard // run.rows
    usual = run.rows * reckoned.decode / max(1, workers)
    loads = clusters.boundaries(run.gpus, 2 * period, period, usual, run.stall(sharers), share)
    return clusters.paced(loads, run.step, 4 * workers) / run.step  # a worker reads 4 batches ahead


def windows_table(run: Run, reckoned: Reckoned) -> str:
    """The cost of the end of a window."""
    rows = []
    for words, share, sharers in (
        ("at the same step", 0, run.node),
        ("within 1 % of it", 0.01, run.node),
        ("at any time", 1, 1),
    ):
        cost = [window_cost(run, reckoned, workers, share, sharers) for workers in (0, 2, run.workers)]
        rows.append([words, duration(run.stall(sharers)), *(f"{c:.3f}" for c in cost)])
    return table(["ranks end a window", "a fetch takes", "no worker", "2 workers", f"{run.workers} workers"], rows)


def costs_line(run: Run, reckoned: Reckoned) -> str:
    """Checkpoint and restart."""
    r = reckoned
    return (
        f"Computed for {run.parameters / 1e9:.0f} B parameters and {run.samples / 1e9:.0f} B samples: a checkpoint of "
        f"{size(r.state)} takes {duration(r.save)}; a restart {duration(r.restart(run, False))} "
        f"({duration(run.schedule)} assumed to replace the node, {duration(r.take)} to verify and read), and "
        f"{duration(r.opening)} more to open the data as is done today. Limits lifted: {duration(r.save_lifted)} and "
        f"{duration(r.restart_lifted)}."
    )


def restart_table(run: Run, reckoned: Reckoned) -> str:
    """Useful share of time over checkpoint intervals, exact and simulated."""
    rows, save = [], reckoned.save
    for gpus in GPUS:
        mtbf, restart = GPU_MTBF / gpus, reckoned.restart(run, False)
        row = [f"{gpus:,}", duration(mtbf)]
        for interval in INTERVALS.values():
            exact = clusters.goodput(interval, save, restart, mtbf)
            drawn = clusters.simulated_goodput(interval, save, restart, mtbf, pieces=50_000)
            row.append(f"{exact:.3f} ({drawn:.3f})")
        best = clusters.best_interval(save, mtbf)
        row += [f"{duration(clusters.young(save, mtbf))}; {duration(best)}"]
        row += [
            f"{clusters.goodput(best, save, restart, mtbf):.3f}",
            *(f"{best_share(run, reckoned, gpus, k):.3f}" for k in ("", "lifted")),
        ]
        rows.append(row)
    best = ["best interval: Young's; exact", "at best", "at best, data opened as today", "at best, limits lifted"]
    return table(["GPUs", "a failure every", *INTERVALS, *best], rows)


def best_share(run: Run, reckoned: Reckoned, gpus: float, kind: str = "") -> float:
    """Useful share of time at the best interval: as things are, or `lifted`."""
    r = reckoned
    save, restart = (r.save_lifted, r.restart_lifted) if kind else (r.save, r.restart(run, True))
    mtbf = GPU_MTBF / gpus
    return clusters.goodput(clusters.best_interval(save, mtbf), save, restart, mtbf)


def needs_table(run: Run, found: dict[str, Any], reckoned: Reckoned) -> str:
    """What the run asks of network, disk, memory and metadata."""
    read = run.rate * run.sample_bytes
    lanes = f"{size(read * run.node)}/s into a node, {size(read * run.gpus)}/s in all"
    one = f"{size(read * run.gpus)}/s into a node, {size(read * run.gpus * run.nodes)}/s in all"
    burst = run.window * run.shard_bytes * run.gpus
    gradient = 8 * run.parameters * (run.gpus - 1) / run.gpus
    ring = f"{size(gradient)} into each GPU a step: {duration(gradient / run.link)} of {duration(run.step)}"
    mixed = run.gpus * clusters.shards_mixed(run.rows, run.window, run.per_shard)
    alike = clusters.same_shard(run.batch, run.gpus, run.window, run.per_shard)
    whole = (run.per_shard - 1) / (run.samples - 1)
    epoch = (
        f"{run.samples / run.batch:,.0f} steps of {duration(run.step)}: {duration(run.samples / run.rate / run.gpus)}"
    )
    rows = [
        ["data", f"{size(run.bytes)}: {run.shards:,.0f} shards of {run.per_shard:,} samples"],
        ["an epoch", epoch],
        ["from the object store, `data.lanes` = GPUs", lanes],
        ["the same with one lane, the default", one],
        ["all ranks end a window", f"{size(burst)} at once, every {duration(run.window * run.per_shard / run.rate)}"],
        ["shards on a node's disk", f"{size(run.cached)}: two windows of {run.window} shards for {run.node} lanes"],
        ["index on a node's disk", f"{size(found['metadata']['disk'] * run.samples)} in {run.shards:,.0f} files"],
        ["decoding", f"{number(run.rate * reckoned.decode)} cores a GPU, of {run.cores}"],
        ["gradients, float32, by a ring", ring],
        ["a checkpoint", size(reckoned.state)],
        ["shards mixed in a batch (exact)", f"{mixed:,.0f} of {run.shards:,.0f}"],
        ["two rows of a batch are of one shard (exact)", f"{alike:.2g}; were all shuffled, {whole:.2g}"],
    ]
    return table(["what", "computed"], rows)


def limits_table(run: Run, found: dict[str, Any], reckoned: Reckoned) -> str:
    """What each present choice would cost there, from where on it is in the way, and what would lift it."""
    rows = [*reading_limits(run, found), *state_limits(run, found, reckoned)]
    return table(["today", "cost in this run (computed)", "in the way from", "what would lift it"], rows)


def reading_limits(run: Run, found: dict[str, Any]) -> list[list[str]]:
    """Those of the data."""
    meta, order = found["metadata"], found["order"]
    held, make, again = meta["json"], meta["make"].median, meta["again"].median
    look, kept = order["look"][1000].median, 2 * order["bytes"]
    share = run.memory / run.node  # of memory, a process's
    return [
        [
            "each process holds the index of every sample while it opens the shards",
            f"{size(held * run.samples)} a process, {size(held * run.samples * run.node)} a node of {size(run.memory)}",
            f"{number(share / held / 1e6)} M samples: memory is full",
            "keep of each index its counts, classes and columns; read a shard's members when it is opened",
        ],
        [
            "each process makes every shard's index, one by one, before the first step",
            f"{duration(make * run.samples)}; a node fetches {size(run.bytes)} in {duration(run.bytes / run.network)}",
            f"{number(10 * MINUTE / make / 1e6)} M samples: 10 min",
            "a file of counts beside the shards, made once by many processes, each a part of the shards",
        ],
        [
            "... and reads them all, twice, at every later start",
            duration(2 * again * run.samples),
            f"{number(5 * MINUTE / again / 1e6)} M samples: 10 min",
            "the same file; the fingerprint from what is in it",
        ],
        [
            "a step's order is looked up for all lanes, in the training process",
            f"{duration(look)} of each step of {duration(run.step)}",
            f"{number(1000 * 0.05 * run.step / look, 2)} lanes: 5 % of the step",
            "`Order.rows(step, batch, rank, world)`: only the lanes of this process",
        ],
        [
            "one lane by default",
            f"every node reads every shard: {size(run.rate * run.sample_bytes * run.gpus)}/s into each",
            f"{number(run.network / run.rate / run.sample_bytes)} GPUs: {size(run.network)}/s",
            "as many lanes as processes by default; a warning where they are no multiple of them",
        ],
        [
            "the cache holds `data.cache_gb` = 8, and a shard is fetched when it is first wanted",
            f"{size(run.cached)} are in use: up to {run.workers} workers fetch a shard each, and keep 16 open",
            "2 lanes a node, shards of 1 GB",
            "8 GB a lane, or a bound that follows window, lanes and workers; fetch the next window ahead of time",
        ],
        [
            "an epoch's order is held for all lanes, of two epochs",
            f"{size(kept * run.samples * run.node)} on a node",
            f"{number(share / 10 / kept / 1e9)} B samples: a tenth of memory",
            "permute each window when it is reached",
        ],
    ]


def state_limits(run: Run, found: dict[str, Any], reckoned: Reckoned) -> list[list[str]]:
    """Those of steps and checkpoints."""
    r, noise = reckoned, found["loop"][-1]["noise"].median
    often = 500 * run.step
    return [
        [
            "noise is drawn on the CPU, in the training process",
            f"{duration(noise * run.rows)} of a step (3x256x256)",
            f"{number(0.05 / noise, 2)} samples/s and GPU: 5 % of the step",
            "draw it where the batch is read, in the workers",
        ],
        [
            "the main process copies, writes, flushes and hashes, then hashes the checkpoint before",
            f"{duration(r.save)} while all wait; with `train.every` = 500 once in {duration(often)}",
            f"{number(often * 0.02 / r.save * run.parameters / 1e6, 2)} M parameters: 2 % of the time",
            "copy, then write in the background, each process its shard; hash while writing; verify each once",
        ],
        [
            "of sharded parameters each process gathers the whole state for a checkpoint, though one writes",
            f"{size(r.state * run.node)} of a node's memory",
            f"{number(run.memory / run.node / 10 / r.state * run.parameters / 1e9)} B parameters: a tenth of memory",
            "each process writes its shards, into one manifest",
        ],
        [
            "each process verifies and reads the whole checkpoint",
            f"{size(r.state * run.gpus)} read, {duration(r.take)} of a restart",
            "-",
            "the main process verifies, one of a node reads and hands it on",
        ],
        [
            "a process that hangs is noticed after the group's 30 minutes",
            "30 min of all GPUs, each time",
            "-",
            "a shorter time for steps than for checkpoints; `torchrun --max-restarts`",
        ],
    ]


def left_table(run: Run, reckoned: Reckoned) -> str:
    """What is left of the time of the GPUs, factor by factor."""
    straggling = 1 / clusters.inflation(run.gpus, 0.05)
    ends = 1 / window_cost(run, reckoned, run.workers, 0, run.node)
    rows = [
        ("order and noise in the training process", run.step / (run.step + reckoned.step), 1.0),
        (
            "failures, at the best interval",
            best_share(run, reckoned, run.gpus),
            best_share(run, reckoned, run.gpus, "lifted"),
        ),
        (f"ends of windows, {run.workers} workers, all at the same step", ends, 1.0),
        ("stragglers, cv 5 %", straggling, straggling),
    ]
    products = [1.0, 1.0]
    for row in rows:
        products = [p * v for p, v in zip(products, row[1:], strict=True)]
    lines = [[name, f"{a:.3f}", f"{b:.3f}"] for name, a, b in (*rows, ("product", *products))]
    return table(["useful share of time", "as it is, had it the memory to start", "limits lifted"], lines)
