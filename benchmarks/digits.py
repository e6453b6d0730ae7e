"""The demo's model sampled with the full 1,000-step DDPM chain and with few-step solvers: distances to held-out digits.

Needs a finished run folder (default runs/demo, from `make demo`); a second argument bounds the number of samples.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from common import table, write

from undiffuse import DDIM, DDPM, DPMpp2M, UniformT
from undiffuse.data import Data
from undiffuse.evals import Reader, distances
from undiffuse.model import Model
from undiffuse.rundata import RunData


def main() -> None:
    run = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/demo")
    model = Model.load(run)
    data = RunData.of(model.config)
    train, held_out = data.train, data.held_out
    reader = Reader(held_out)
    if len(sys.argv) > 2:
        held_out = Data(held_out.x[: int(sys.argv[2])], held_out.labels[: int(sys.argv[2])])
    rows = []
    for name, solver, steps, grid in (
        ("DDPM, the full chain", DDPM(), 1000, UniformT()),
        ("DDPM", DDPM(), 50, None),
        ("DDIM", DDIM(), 50, None),
        ("DPM-Solver++(2M)", DPMpp2M(), 20, None),
    ):
        start = time.perf_counter()
        x = model.sample(len(held_out), held_out.labels, steps=steps, solver=solver, grid=grid, guidance=1.0, seed=1)
        seconds = (time.perf_counter() - start) / len(x)
        d, read = distances(x.clamp(-1, 1), held_out.x), reader.accuracy(x, held_out.labels)
        rows.append(
            [
                name,
                str(steps),
                f"{d.frechet:.2f}",
                f"{1000 * d.kernel:.1f}",
                f"{100 * read:.1f} %",
                f"{1000 * seconds:.1f}",
            ]
        )
        print(rows[-1], flush=True)
    floor = distances(train.x[: len(held_out)], held_out.x)
    read = reader.accuracy(train.x, train.labels)
    rows.append(
        ["real against real", "", f"{floor.frechet:.2f}", f"{1000 * floor.kernel:.1f}", f"{100 * read:.1f} %", ""]
    )
    header = ["solver", "steps", "Frechet", "1000 x kernel", "read as its class (w = 1)", "ms an image"]
    n = len(held_out)
    text = f"{n} conditional samples (w = 1) against {n} held-out digits of the same classes, on pixels.\n\n"
    write(
        "Digits, the full chain",
        " ".join(["python benchmarks/digits.py", str(run), *sys.argv[2:]]),
        text + table(header, rows),
    )


if __name__ == "__main__":
    main()
