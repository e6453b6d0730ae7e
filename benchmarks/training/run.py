"""Training speed beside other libraries: `python benchmarks/training/run.py`; goes on where it stopped."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
TOP = HERE.parents[1]
sys.path[:0] = [str(HERE), str(HERE.parent)]

import torch  # noqa: E402
from common import machine, table, write  # noqa: E402
from loops import DEPTH, IMAGES, MULTS, WIDTHS, Cell  # noqa: E402

Record = dict[str, Any]
PEERS = ("diffusers", "lucidrains", "azula")
PACKAGES = {"diffusers": "diffusers", "lucidrains": "denoising-diffusion-pytorch", "azula": "azula"}
SHAPES = ((28, 1), (32, 3))
BATCHES = {"ours": 64, "diffusers": 16, "lucidrains": 32, "azula": 64}  # each library's own default
HEADER = ["library", "M parameters", "GFLOP/sample", "samples/s", "GFLOP/s", "ours / it", "at equal FLOPs"]

NOTES = f"""
*Matched*: the first level has {WIDTHS[28]} channels at 28x28x1 and {WIDTHS[32]} at 32x32x3, the others
{MULTS[1]} times as many, {DEPTH} residual blocks a level, batch 32, {IMAGES} images in memory. FLOPs are those of
convolutions and matrix products, forward and backward, as `torch.utils.flop_counter` counts them, so the last column,
the ratio of GFLOP/s, is the comparison at equal FLOPs. What differs all the same:

* diffusers: `UNet2DModel` with scale and shift from the time embedding, as many channels a group at the first level as
  ours and one head of 32 channels in the middle, where alone both attend; it halves by a strided convolution, ours by a
  mean and a convolution; ours normalises queries and keys. Loop: accelerate, AdamW as torch chooses it, clipped, EMA.
* lucidrains: width and depth as ours, but its blocks work at the width of the level above; a linear or full attention
  at every level, a first convolution of 7x7, unshuffling with a 1x1 convolution instead of a mean, a last residual
  block, RMS norms. Its `Trainer` with `ema_update_every=1`, fed from memory.
* azula: blocks without a convolution on the skip connection, one norm a block, no attention; {DEPTH + 1} blocks at the
  coarsest level for the middle, group norm. The tutorial's loop with Adam and no clipping, and torch's `AveragedModel`.
* ours: `train` with clipping, fused AdamW, power-rule EMA, stratified levels, and a state with every sample's error.

*Own defaults* at 32x32x3, float32: the example's network of diffusers from an image folder (batch 16), lucidrains'
readme (batch 32; `Trainer` reads the folder in worker processes), azula's `UNet()` in the tutorial's loop (batch 64, no
average), ours as the configuration gives it (batch 64, in memory). These networks differ in size: read GFLOP/s.

The loop's overhead is the share of a step of `train` that forward, backward, fused AdamW and EMA alone do not take; the
two take turns.
"""


def precisions() -> list[str]:
    """float32, and bf16 where this processor computes in it."""
    return ["float32", *(["bf16"] if torch.ops.mkldnn._is_mkldnn_bf16_supported() else [])]


def groups() -> list[list[Cell]]:
    """Measurements that are compared with each other, to be made one after another."""
    libraries = ("ours", *PEERS)
    found = [[Cell(lib, *s, "matched", p) for lib in libraries] for s in SHAPES for p in precisions()]
    return [*found, [Cell(lib, 32, 3, "default", "float32", BATCHES[lib]) for lib in libraries]]


class Store:
    """Measurements as JSON lines in a file that belongs to these sources, versions and settings."""

    def __init__(self, options: argparse.Namespace) -> None:
        sources = sorted([*TOP.glob("undiffuse/**/*.py"), HERE / "cell.py", HERE / "loops.py"])
        state = [path.read_bytes() for path in sources]
        state.append(f"{machine()} {options.threads} {options.seconds}".encode())
        state += [version(name).encode() for name in PACKAGES.values()]
        name = hashlib.sha256(b"\0".join(state)).hexdigest()[:12]
        self.path = TOP / "runs" / "bench-training" / f"{name}.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        records = map(json.loads, lines)
        self.known: dict[str, Record] = {r["key"]: r for r in records if "error" not in r}  # what failed is tried again

    def add(self, key: str, record: Record) -> None:
        self.known[key] = {"key": key, **record}
        with self.path.open("a") as file:
            file.write(json.dumps(self.known[key]) + "\n")

    def all(self, key: str) -> list[tuple[int, Record]]:
        """(round, record) of all rounds known."""
        found = [(int(k.split(" ", 1)[0]), r) for k, r in self.known.items() if k.split(" ", 1)[1] == key]
        return [(i, r) for i, r in found if "error" not in r]


def measure(cell: Cell, kind: str, options: argparse.Namespace) -> Record:
    """The record of a process of its own; what goes wrong in it is recorded, too."""
    task = {"kind": kind, "cell": asdict(cell), "threads": options.threads, "seconds": options.seconds}
    env = {**os.environ, "OMP_NUM_THREADS": str(options.threads), "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, str(HERE / "cell.py"), json.dumps(task)]
    try:
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    except subprocess.TimeoutExpired:
        return {"error": "no answer within 300 s"}
    try:
        return json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        return {"error": (done.stderr.strip().splitlines() or ["no output"])[-1][:300]}


def tasks(options: argparse.Namespace) -> Iterator[tuple[str, Cell, str]]:
    """(key, cell, kind) in order: all cells each round, in alternating order; last the loop's overhead."""
    for i in range(options.rounds):
        for group in groups():
            for cell in group[:: -1 if i % 2 else 1]:
                yield f"{i} {cell.name}", cell, "speed"
        if not i:
            for cell in (group[0] for group in groups()):
                yield f"{i} overhead {cell.name}", cell, "overhead"


def rate(record: Record) -> float:
    """Samples per second."""
    return record["steps"] * record["batch"] / record["seconds"]


def short(record: Record) -> str:
    """A measurement in a few words."""
    if "error" in record:
        return str(record["error"])
    return f"{rate(record):.1f} samples/s" if "steps" in record else f"{record['percent']:.1f} % overhead"


def ratio(ours: list[tuple[int, Record]], theirs: list[tuple[int, Record]], flops: bool) -> float:
    """The median over rounds of our samples/s over theirs; with `flops` of GFLOP/s."""
    weight = (lambda r: r["flops"]) if flops else (lambda r: 1.0)
    other = dict(theirs)
    found = [rate(r) * weight(r) / rate(other[i]) / weight(other[i]) for i, r in ours if i in other]
    return statistics.median(found) if found else float("nan")


def rows(store: Store, group: list[Cell]) -> list[list[str]]:
    """A table's lines, of the libraries that have been measured."""
    ours, lines = store.all(group[0].name), []
    for cell in group:
        found = store.all(cell.name)
        if not found:
            continue
        first, speed = found[0][1], statistics.median(rate(r) for _, r in found)
        flops = first["flops"] / 1e9
        millions, mine = first["parameters"] / 1e6, cell.library == "ours"
        line = [cell.library, f"{millions:.2f}", f"{flops:.2f}", f"{speed:.1f}", f"{speed * flops:.0f}"]
        lines.append(line + (["", ""] if mine else [f"{ratio(ours, found, f):.2f}" for f in (False, True)]))
    return lines


def across(store: Store) -> list[list[str]]:
    """Ours in bf16 over each peer in the precision that it has by default, on the matched networks."""
    lines = []
    for side, channels in SHAPES:
        ours = Cell("ours", side, channels, "matched", "bf16")
        for name in PEERS:
            theirs = store.all(replace(ours, library=name, precision="float32").name)
            if theirs and store.all(ours.name):
                pair = (store.all(ours.name), theirs)
                cells = [f"{ratio(*pair, flops):.2f}" for flops in (False, True)]
                lines.append([f"{side}x{side}x{channels}", name, *cells])
    return lines


def overheads(store: Store) -> list[list[str]]:
    """Our loop against the bare step."""
    lines = []
    for cell in (group[0] for group in groups()):
        for _, r in store.all(f"overhead {cell.name}"):
            shape = f"{cell.side}x{cell.side}x{cell.channels} {cell.net}"
            numbers = [f"{r['train_ms']:.1f}", f"{r['bare_ms']:.1f}", f"{r['percent']:.1f}"]
            lines.append([shape, cell.precision, *numbers, str(r["pairs"])])
    return lines


def report(store: Store) -> str:
    """The section's text, of what has been measured so far."""
    parts = []
    for group in groups():
        cell = group[0]
        title = f"{cell.side}x{cell.side}x{cell.channels}, {cell.net}, {cell.precision}"
        done = min(len(store.all(c.name)) for c in group)
        parts.append(f"**{title}** (rounds: {done})\n\n" + table(HEADER, rows(store, group)))
    header = ["matched networks", "ours in bf16 over float32 of", "samples/s", "at equal FLOPs"]
    parts.append("**Each peer's own precision**\n\n" + table(header, across(store)))
    header = ["network", "precision", "`train`, ms", "bare, ms", "overhead, %", "pairs"]
    parts.append("**The loop's own overhead**\n\n" + table(header, overheads(store)))
    failed = [f"* {r['key']}: {r['error']}" for r in store.known.values() if "error" in r]
    if failed:
        parts.append("Failed:\n\n" + "\n".join(failed))
    packages = ", ".join(f"{package} {version(package)}" for package in PACKAGES.values())
    start = f"Medians of rounds in which all take turns, each in a process of its own; {packages}."
    return "\n\n".join([start, *parts, NOTES.strip()])


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=3.0, help="measured per cell and round")
    parser.add_argument("--only", default="", help="measure only cells whose name contains this, and write nothing")
    return parser.parse_args()


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    store, start = Store(options), time.perf_counter()
    for key, cell, kind in tasks(options):
        if key in store.known or options.only not in key:
            continue
        record = measure(cell, kind, options)
        store.add(key, record)
        print(f"{time.perf_counter() - start:5.0f} s  {key}: {short(record)}", flush=True)
    text = report(store)
    if options.only:
        print(text)
    else:
        write("Training speed", "make bench-training", text)


if __name__ == "__main__":
    main()
