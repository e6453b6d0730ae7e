"""Quality per minute on Fashion-MNIST: `python run.py [STUDY ...] [--jobs N]` trains what is not yet measured, then
writes its sections of RESULTS.md. Stopped, the same command goes on; `--table` only writes."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from common import table, write  # noqa: E402
from ours import LENGTHS, SETTINGS  # noqa: E402
from score import ROOT  # noqa: E402

BUDGETS = (60, 180, 600)
START = {60: (0.48, 0.70), 180: (0.73, 0.91), 600: (0.78, 0.95)}  # class accuracy at w = 1 and 2 of the starting point


class Cell(NamedTuple):
    """One training; `more` are words for `ours.py`."""

    name: str
    seed: int
    seconds: int
    more: tuple[str, ...] = ()


@dataclass(frozen=True)
class Study:
    """Settings compared at one budget of CPU seconds, the first of them the yardstick."""

    title: str
    text: str
    names: tuple[str, ...]
    seconds: tuple[int, ...]
    more: tuple[str, ...] = ()  # words for `ours.py` with the first seed
    seeds: int = 3

    def cells(self) -> list[Cell]:
        every = ((name, seed, s) for seed in range(self.seeds) for s in self.seconds for name in self.names)
        return [Cell(name, seed, s, () if seed else self.more) for name, seed, s in every]


_SAMPLES = (
    "Fashion-MNIST 28x28, class-conditional, one thread, bf16; 1,000 samples for each weight w by DPM-Solver++(2M) in "
    "20 steps, read by the set's own classifier; median (least to largest) of the seeds."
)
_START = ", ".join(f"{a} / {b} after {s} s" for s, (a, b) in START.items())
STUDIES: dict[str, Study] = {
    "budgets": Study(
        "Quality for a budget, one core",
        f"{_SAMPLES} The starting point that was to be beaten has, by w = 1 / w = 2: {_START}.",
        ("best",),
        BUDGETS,
        ("ema",),
    ),
    "options": Study(
        "What each option of training is worth",
        f"{_SAMPLES} Every setting at the same CPU seconds; a difference inside the seeds' spread is none.",
        (
            *("base", "edm-levels", "edm2-levels", "adamw", "independent", "adaptive", "immiscible", "simple"),
            *("min-snr", "flip", "v-head", "classic", "wide"),
        ),
        (90,),
    ),
    "networks": Study(
        "Networks at equal seconds",
        f"{_SAMPLES} Each DiT at two rates.",
        (
            *("base", "flat", "narrow", "deep", "attends", "pixels", "patch-4"),
            *("dit-2", "dit-2-fast", "dit-4", "dit-4-fast"),
        ),
        (90,),
    ),
}


def file_of(name: str, seed: int, seconds: int) -> Path:
    return ROOT / "ours" / f"{name}-{seed}-{seconds}.json"


def measure(cell: Cell) -> None:
    """Train and score one cell in a process of its own, unless that was done."""
    name, seed, seconds, more = cell
    file = file_of(name, seed, seconds)
    if not file.is_file():
        command = [sys.executable, str(HERE / "ours.py"), name, str(seed), str(seconds), *more]
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
        print(file.read_text(), flush=True)


def found(name: str, seconds: int, seeds: int) -> list[dict]:
    files = [file_of(name, seed, seconds) for seed in range(seeds)]
    return [json.loads(f.read_text()) for f in files if f.is_file()]


def spread(values: list[float], digits: int) -> str:
    """The median, with the least and the largest."""
    if not values:
        return "-"
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def compared(study: Study) -> str:
    rows = []
    for seconds in study.seconds:
        for name in study.names:
            runs = found(name, seconds, study.seeds)
            if not runs:
                continue
            row = [
                f"`{name}`",
                SETTINGS[name] or "-",
                str(seconds),
                f"{statistics.median(r['pictures'] for r in runs):,.0f}",
            ]
            row += [spread([r["w1"]["frechet"] for r in runs], 2), spread([r["w1"]["accuracy"] for r in runs], 3)]
            rows.append([*row, spread([r["w2"] for r in runs], 3)])
    header = ["setting", "differs by", "CPU s", "pictures", "Fréchet, w = 1", "accuracy, w = 1", "accuracy, w = 2"]
    return table(header, rows)


def lengths(study: Study) -> str:
    """Fréchet distance by the length of the average, of the runs that measured it."""
    rows = []
    for seconds in study.seconds:
        runs = [r for r in found(study.names[0], seconds, study.seeds) if f"ema {LENGTHS[0]:g}" in r]
        if runs:
            each = [spread([r[f"ema {length:g}"]["frechet"] for r in runs], 2) for length in LENGTHS]
            rows.append([str(seconds), *each])
    return table(["CPU s", *(f"length {length:g}" for length in LENGTHS)], rows) if rows else ""


def minutes(most: int = 2000) -> str:
    """The shipped model beside the peers' that had a budget of 30 CPU-minutes, all by as many samples."""
    import numpy as np
    import torch
    from score import labels, scores

    from undiffuse.model import Model
    from undiffuse.runfolder import SHIPPED

    peers = {}
    for info in sorted((ROOT / "peers").glob("*-1800/info.json")):
        files = [info.parent / f"samples-w{w}.npz" for w in (1, 2)]
        if all(file.is_file() for file in files):
            about = json.loads(info.read_text())
            peers[about["name"]] = about, [np.load(file) for file in files]
    n = min([most, *(len(file["x"]) for _, files in peers.values() for file in files)])
    made = {}
    clock = ROOT.parent / "models" / "fashion" / "cpu.json"
    model = Model.load(SHIPPED / "fashion")
    for w in (1.0, 2.0):
        made["undiffuse", w] = model.sample(n, labels(n), guidance=w), labels(n)
    facts = {"undiffuse": [f"{model.parameters:,}", f"{float(clock.read_text()):.0f}" if clock.is_file() else "-"]}
    for name, (about, files) in peers.items():
        facts[name] = [f"{about['parameters']:,}", f"{about['cpu_seconds']:.0f}"]
        for w, file in zip((1.0, 2.0), files, strict=True):
            made[name, w] = torch.from_numpy(file["x"][:n]), torch.from_numpy(file["labels"][:n])
    rows = []
    for (name, w), (x, asked) in made.items():
        s = scores(x, asked)
        digits = {"frechet": 2, "kernel": 1, "precision": 3, "recall": 3, "accuracy": 3}
        rows.append([name, *facts[name], f"{w:g}", str(len(x)), *(f"{s[key]:.{d}f}" for key, d in digits.items())])
    header = ["trained by", "parameters", "CPU s", "w", "samples"]
    return table([*header, "Fréchet", "1000 KID", "precision", "recall", "accuracy"], rows)


MINUTES = (
    "Fashion-MNIST 28x28, class-conditional, 30 CPU-minutes of training each, one thread; the peers by "
    "`benchmarks/quality/peers.py`, ours by `recipes/models.py`: it is the model that is shipped. Features and "
    "accuracy are those of the project's own classifier. Peers sample by their own DDIM in 50 steps, ours in 20."
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", nargs="*", metavar="study", help=f"of minutes, {', '.join(STUDIES)}; all if none")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at once, one core each")
    parser.add_argument("--table", action="store_true", help="measure nothing")
    given = parser.parse_args()
    known = ["minutes", *STUDIES]
    if unknown := set(given.studies) - set(known):
        parser.error(f"no study is named {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    names = given.studies or known
    if not given.table:
        with ThreadPoolExecutor(given.jobs) as pool:
            every = dict.fromkeys(cell for key in names if key in STUDIES for cell in STUDIES[key].cells())
            list(pool.map(measure, every))
    for key in names:
        if key == "minutes":
            text = f"{MINUTES}\n\n{minutes()}"
            write("Quality for 30 CPU-minutes", "python benchmarks/quality/run.py minutes", text)
            continue
        study = STUDIES[key]
        more = f"\n\nThe average's length, Fréchet at w = 1:\n\n{by}" if (by := lengths(study)) else ""
        write(study.title, f"python benchmarks/quality/run.py {key}", f"{study.text}\n\n{compared(study)}{more}")


if __name__ == "__main__":
    main()
