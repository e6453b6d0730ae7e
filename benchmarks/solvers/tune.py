"""Tuned plans beside `auto` and the best of all peers in hindsight; goes on where it stopped.

    python benchmarks/solvers/tune.py [--schedules edm,vp-linear]

The best of the peers is chosen per cell (target, schedule, evaluations) among all samplers and spacings of all
libraries, on the noises that are reported; `auto` and the tuner are given none of these noises.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parents[1])]

from auto import Peers, best, geometric, our_cell  # noqa: E402
from common import table, write  # noqa: E402
from peers import PEERS, VERSIONS  # noqa: E402
from reference import reference, unit_noise  # noqa: E402
from run import Record, Store, distance  # noqa: E402
from spectral import overall  # noqa: E402
from targets import CACHE, SCHEDULES, TARGETS, Target  # noqa: E402

import undiffuse  # noqa: E402
from undiffuse import CFG, Denoise, Label  # noqa: E402
from undiffuse.tune.auto import shortlist  # noqa: E402
from undiffuse.tune.ladder import Plan, ladder  # noqa: E402

NFE = (5, 6, 8, 10)
NAMES = ("ring", "digits", "digits-w7.5", "patches")
GOALS = {"unguided": (0.30, 0.30, 0.40, 0.40), "w = 7.5": (0.33, 0.25, 0.30, 0.60)}
ITERATIONS = 200  # evaluations of the loss in a cell; seconds would make figures hang on the load


def code() -> str:
    """A digest of the code that a tuned plan depends on."""
    root, parts = Path(undiffuse.__file__).parent, hashlib.sha256(str(ITERATIONS).encode())
    for name in ("ladder", "coefficients", "family", "trajectory", "gaussian"):
        parts.update((root / "tune" / f"{name}.py").read_bytes())
    return parts.hexdigest()[:12]


def measured(x: Tensor, truth: Tensor) -> Record:
    """`distance` with the 90th percentile."""
    e = ((x - truth).flatten(1).norm(dim=1) / math.sqrt(truth[0].numel())).sort().values
    return distance(x, truth) | {"high": float(e[math.ceil(0.9 * len(e)) - 1])}


def cell(store: Store, target: Target, name: str, nfe: int) -> Record:
    """The errors of `auto`'s plan and of the tuned one from the peers' noises."""
    schedule, chosen = SCHEDULES[name], our_cell(store, target, name, "auto", nfe)["plan"]

    def bind(indices: Sequence[int]) -> Denoise:
        mixture = target.mixture
        if target.w is None:
            return lambda x, level, /: mixture(x, level)
        return CFG(target.w)(mixture, Label(10)([k % 10 for k in indices]))

    def make() -> Record:
        clock, spectrum = time.process_time(), overall(target.mixture)
        plans, _ = shortlist(schedule, nfe, spectrum)
        found = ladder(
            bind, target.shape, schedule, (nfe,), spectrum, first=lambda n: plans[chosen], seconds=math.inf,
            iterations=ITERATIONS, seed=1, save=False,
        ).results[nfe]  # fmt: skip
        cpu, truth = time.process_time() - clock, reference(target, name, schedule)

        def of(plan: Plan) -> Record:
            return measured(plan.run(target.denoise(target.seeds), plan.start[1] * unit_noise(target)), truth)

        return {
            "kind": "tune", "target": target.name, "schedule": name, "nfe": nfe, "plan": found.plan.name, "cpu": cpu,
            "auto": of(found.first), "tuned": of(found.plan), "fresh": [found.start, found.chosen],
            "rungs": [str(rung) for rung in found.rungs],
        }  # fmt: skip

    return store.get(f"tune|{target.name}|{target.seeds}|{name}|{nfe}|{chosen}|{code()}", make)


def report(cells: dict[tuple[str, str, int], Record], peers: dict[tuple[str, str], list[Record]]) -> str:
    """The tables."""
    front: dict[tuple[str, str, int], float] = {}
    for t, s, n in cells:
        f = best(peers[t, s], n)
        assert f is not None
        front[t, s, n] = f["median"]
    rows = []
    for group, goals in GOALS.items():
        for way in ("auto", "tuned"):
            found = [
                [
                    c[way]["median"] / front[t, s, k]
                    for (t, s, k), c in cells.items()
                    if k == n and (TARGETS[t].w is None) == (group == "unguided")
                ]
                for n in NFE
            ]
            goal = [f" (goal {g:.2f})" if way == "tuned" else "" for g in goals]
            shown = [geometric(f) + g for f, g in zip(found, goal, strict=True)]
            rows.append([group, way, str(len(found[0])), *shown])
    text = f"{', '.join(f'{k} {v}' for k, v in VERSIONS.items())}\n\n"
    text += "Median error at the end over that of the best of all peers in hindsight, geometric mean over cells.\n\n"
    text += table(["guidance", "plan", "cells", *(f"{n} NFE" for n in NFE)], rows)
    rows = []
    for (t, s, n), c in cells.items():
        pairs = [
            f"{c['tuned'][part] / f:.2f} ({c['auto'][part] / f:.2f})"
            for part in ("median", "rms", "high")
            for f in [front[t, s, n]]
        ]
        start, chosen = c["fresh"]
        gains = " ".join(f"{b / a:.2f}" for a, b in zip(start[:3], chosen[:3], strict=True))
        rows.append([t, s, str(n), f"{front[t, s, n]:.4f}", *pairs, gains, c["plan"], f"{c['cpu']:.0f}"])
    text += (
        "\n\nErrors over the peers' best median, `auto`'s in brackets; tuned over `auto` on 64 fresh noises; "
        "CPU seconds of one core, references and trials included.\n\n"
    )
    header = [
        "target",
        "schedule",
        "NFE",
        "peers",
        "median",
        "RMS",
        "90 %",
        "tuned over auto: median, RMS, 90 %",
        "plan",
        "CPU s",
    ]
    text += table(header, rows)
    worse = {
        part: sum(c["tuned"][part] > c["auto"][part] for c in cells.values()) for part in ("median", "rms", "high")
    }
    return text + (
        f"\n\nOf {len(cells)} cells, tuned plans are worse than `auto` in {worse['median']} by the median, in "
        f"{worse['rms']} by RMS and in {worse['high']} by the 90th percentile, on the noises of the benchmark "
        "(32; 4 for patches)."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--schedules", default="edm", help="comma-separated")
    parser.add_argument("--only", default="", help="TARGET; nothing is written")
    args = parser.parse_args()
    torch.set_num_threads(1)
    store, cells, peers = Store(CACHE / "results.jsonl"), {}, {}
    bench = Peers(store, NFE, set(PEERS), False)
    for name in args.schedules.split(","):
        for target in (TARGETS[t] for t in NAMES if args.only in ("", t)):
            peers[target.name, name] = bench.peer_cells(target, name)
            for nfe in NFE:
                found = cells[target.name, name, nfe] = cell(store, target, name, nfe)
                print(f"{target.name} on {name} at {nfe}: {found}", flush=True)
    text = report(cells, peers)
    if args.only:
        print(text)
    else:
        write("Tuned plans", f"python benchmarks/solvers/tune.py --schedules {args.schedules}", text)


if __name__ == "__main__":
    main()
