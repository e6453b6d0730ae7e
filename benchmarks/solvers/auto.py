"""`auto` against the best of all peers in hindsight: `python benchmarks/solvers/auto.py`; goes on where it stopped.

The best of the peers is chosen per cell (target, schedule, evaluations) among all samplers and spacings of all
libraries, on the noises that are reported; `auto` is given none of these noises.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parents[1])]

from common import table, write  # noqa: E402
from peers import PEERS, VERSIONS  # noqa: E402
from reference import reference, unit_noise  # noqa: E402
from run import Bench, Record, Store, distance  # noqa: E402
from spectral import overall  # noqa: E402
from targets import CACHE, SCHEDULES, TARGETS, Target  # noqa: E402

import undiffuse  # noqa: E402
from undiffuse import Label, auto  # noqa: E402

NFE = (5, 6, 8, 10, 20)
NOISES = {"auto": 32, "by rule": 0}
DEFAULTS = {  # (sampler, spacing), the first that fits the schedule
    "diffusers": (("dpmsolver++ 2M", "linspace"), ("EDM dpmsolver++ 2M", "karras"), ("flow Euler", "shifted")),
    "k-diffusion": (("dpmpp_2m", "karras"),),
    "azula": (("DDIM", "uniform-t"),),
    "smalldiffusion": (("DDIM gam=1", "trailing"), ("DDIM gam=1", "flow")),
}


def code() -> str:
    """A digest of the code that the choice depends on."""
    root, parts = Path(undiffuse.__file__).parent, hashlib.sha256()
    for name in ("tune/auto.py", "modal.py", "solvers/spectral.py", "grid.py", "tableau.py"):
        parts.update((root / name).read_bytes())
    return parts.hexdigest()[:12]


class Peers(Bench):
    """The peers' cells at the budgets compared here."""

    def budgets_of(self, target: Target, name: str) -> tuple[int, ...]:
        """The same for every target."""
        return NFE


def our_cell(store: Store, target: Target, name: str, way: str, nfe: int) -> Record:
    """The error of the plan that is chosen, from the peers' noises."""
    schedule = SCHEDULES[name]

    def make() -> Record:
        n = NOISES[way]
        cond = None if target.w is None or not n else Label(10)([k % 10 for k in range(n)])
        found = auto(
            target.mixture, target.shape, schedule, nfe, spectrum=overall(target.mixture), noises=n, cond=cond,
            guidance=1.0 if target.w is None else target.w, dtype=torch.float64,
        )  # fmt: skip
        x = found.plan.run(target.denoise(target.seeds), found.plan.start[1] * unit_noise(target))
        named = {"kind": "auto", "target": target.name, "schedule": name, "way": way, "nfe": nfe}
        return named | {"plan": found.plan.name, "rows": found.rows} | distance(x, reference(target, name, schedule))

    return store.get(f"auto|{target.name}|{target.seeds}|{name}|{way}|{nfe}|{code()}", make)


def geometric(values: Iterable[float]) -> str:
    """The geometric mean, or a dash for none."""
    logs = [math.log(v) for v in values]
    return f"{math.exp(sum(logs) / len(logs)):.2f}" if logs else "-"


def best(cells: list[Record], nfe: int, of: Callable[[Record], bool] = lambda cell: True) -> Record | None:
    """The cell of least median error within so many evaluations."""
    fits = [c for c in cells if "median" in c and c["nfe"] <= nfe and of(c)]
    return min(fits, key=lambda c: c["median"], default=None)


def shipped(cells: list[Record], lib: str, nfe: int) -> Record | None:
    """The cell of a library's own default."""
    for pair in DEFAULTS[lib]:
        is_it = best(cells, nfe, lambda c, pair=pair: (c["library"], c["solver"], c["spacing"]) == (lib, *pair))
        if is_it is not None:
            return is_it
    return None


def report(ours: dict[tuple[str, str, str, int], Record], peers: dict[tuple[str, str], list[Record]]) -> str:
    """The tables."""
    front = {(t, s, n): best(cells, n) for (t, s), cells in peers.items() for n in NFE}

    def ratios(way: str, target: str | None, nfe: int) -> dict[tuple[str, str], float]:
        return {
            (t, s): c["median"] / f["median"]
            for (t, s, w, n), c in ours.items()
            if (w, n) == (way, nfe) and target in (None, t) and "median" in c and (f := front[t, s, n]) is not None
        }

    names = list(dict.fromkeys(t for t, _ in peers))
    rows = []
    for way in NOISES:
        for target in (None, *names):
            found = [ratios(way, target, n) for n in NFE]
            rows.append([way, target or "**all**", str(len(found[0])), *(geometric(r.values()) for r in found)])
    text = f"{', '.join(f'{k} {v}' for k, v in VERSIONS.items())}\n\n"
    text += (
        "Median error at the end over that of the best of all peers in hindsight, geometric mean over schedules.\n\n"
    )
    text += table(["choice", "target", "cells", *(f"{n} NFE" for n in NFE)], rows)
    rows = []
    for lib in PEERS:
        pairs = [(ours[t, s, "auto", 10], shipped(cells, lib, 10)) for (t, s), cells in peers.items()]
        off = [a["median"] / b["median"] for a, b in pairs if b is not None and "median" in a]
        rows.append([lib, ", ".join(f"{a} ({b})" for a, b in DEFAULTS[lib]), str(len(off)), geometric(off)])
    text += "\n\nThe same over a library's own default, at 10 evaluations:\n\n"
    text += table(["library", "default", "cells", "auto over it"], rows)
    worst = sorted(((r, *where, n) for n in NFE for where, r in ratios("auto", None, n).items()), reverse=True)
    rows = []
    for ratio, t, s, n in worst:
        if ratio > 1.1:
            f, a = front[t, s, n], ours[t, s, "auto", n]
            assert f is not None
            rows.append([t, s, str(n), f"{ratio:.2f}", a["plan"], f"{f['library']} {f['solver']}, {f['spacing']}"])
    text += f"\n\nCells where `auto` is more than 10 % behind, {len(rows)} of {len(worst)}:\n\n"
    text += table(["target", "schedule", "NFE", "ratio", "chosen", "best of the peers"], rows)
    cost = [c["rows"] / c["nfe"] for (_, _, w, _), c in ours.items() if w == "auto" and "rows" in c]
    return text + f"\n\nA choice cost as many network rows as {min(cost):.0f} to {max(cost):.0f} samples."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="/", help="TARGET/SCHEDULE, either may be empty; nothing is written")
    args = parser.parse_args()
    torch.set_num_threads(1)
    only_target, _, only_schedule = args.only.partition("/")
    store = Store(CACHE / "results.jsonl")
    bench, ours, peers = Peers(store, NFE, set(PEERS), False), {}, {}
    for name in SCHEDULES:
        for target in TARGETS.values():
            if only_target in ("", target.name) and only_schedule in ("", name):
                start = time.perf_counter()
                peers[target.name, name] = bench.peer_cells(target, name)
                middle = time.perf_counter()
                for way in NOISES:
                    for nfe in NFE:
                        ours[target.name, name, way, nfe] = our_cell(store, target, name, way, nfe)
                spent = f"{middle - start:.0f} s of peers, {time.perf_counter() - middle:.0f} s of auto"
                print(f"{target.name} on {name}: {spent}", flush=True)
    text = report(ours, peers)
    if only_target or only_schedule:
        print(text)
    else:
        write("The default sampler", "python benchmarks/solvers/auto.py", text)


if __name__ == "__main__":
    main()
