"""The cost of scale, measured, computed and simulated: `python benchmarks/scale/run.py`; writes docs/scale.* too."""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parents[1])]

import clusters  # noqa: E402
import costs  # noqa: E402
import report  # noqa: E402
from common import write  # noqa: E402
from report import GPU_MTBF, INTERVALS, STRAGGLING, Reckoned, Run  # noqa: E402

from undiffuse.plot import ACCENT, INK, MUTED, PALETTE  # noqa: E402

DOCS = HERE.parents[1] / "docs"


def measure(repeats: int) -> dict[str, Any]:
    """All that is measured here, one after the other."""
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        (folder := scratch / "data").mkdir()
        parts = {
            "files": lambda: costs.write_files(folder),
            "loop": costs.looping,
            "order": costs.ordering,
            "metadata": lambda: costs.metadata(scratch),
            "checkpoint": lambda: costs.checkpoint(scratch),
            "reading": lambda: costs.reading(folder, scratch / "store", repeats),
            "remote": lambda: costs.remote(folder, scratch, round(found["files"]["shard"]), repeats - 1),
            "fetching": lambda: costs.fetching(scratch),
            "resume": lambda: costs.resuming(folder, scratch, scratch / "store"),
            "talking": costs.talking,
        }
        for part, work in parts.items():
            start = time.perf_counter()
            found[part] = work()
            print(f"{part}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    return found


def figure(run: Run, reckoned: Reckoned, path: Path) -> None:
    """Goodput over GPUs by checkpoint interval, and step time over ranks."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    ink = dict.fromkeys(("axes.labelcolor", "text.color", "xtick.color", "ytick.color"), INK)
    bare = {"axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": MUTED, "font.size": 10}
    plt.rcParams |= {**ink, **bare}
    fig, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), constrained_layout=True)
    failures(left, run, reckoned)
    stragglers(right)
    for axis in (left, right):
        axis.set_xscale("log")
        axis.grid(color=MUTED, alpha=0.2, lw=0.6)
        axis.legend(frameon=False, fontsize=9)
    fig.savefig(path, dpi=130)


def failures(axis: Any, run: Run, reckoned: Reckoned) -> None:
    """Useful share of time over GPUs."""
    gpus, restart = [2.0 ** (k / 4) for k in range(12, 57)], reckoned.restart(run, False)
    for (name, interval), colour in zip(INTERVALS.items(), PALETTE[1:], strict=False):
        share = [clusters.goodput(interval, reckoned.save, restart, GPU_MTBF / n) for n in gpus]
        axis.plot(gpus, share, color=colour, lw=1.8, label=f"checkpoint every {name}")
    today, lifted = ([report.best_share(run, reckoned, n, kind) for n in gpus] for kind in ("", "lifted"))
    axis.plot(gpus, today, color=INK, lw=1.8, ls="--", label="best interval, data opened as today")
    axis.plot(gpus, lifted, color=ACCENT, lw=2.2, label="best interval, limits lifted")
    axis.set(xlabel="GPUs", ylabel="useful share of time", ylim=(0, 1.02), xlim=(8, gpus[-1]))
    axis.set_title("Failures, checkpoints and restarts (computed)", loc="left", fontsize=11)


def stragglers(axis: Any) -> None:
    """Step time over ranks."""
    ranks = sorted({round(2 ** (k / 2)) for k in range(25)})
    names = ["cv 2 %", "cv 5 %", "cv 10 %", "cv 5 %, 0.1 % of ranks 1.3 times slower"]
    for kind, name, colour in zip(STRAGGLING, names, (*PALETTE[1:4], ACCENT), strict=True):
        axis.plot(ranks, [clusters.inflation(n, *kind) for n in ranks], color=colour, lw=1.8, label=name)
        drawn = [clusters.simulated_inflation(n, *kind, steps=400)[0] for n in ranks[::4]]
        axis.plot(ranks[::4], drawn, "o", ms=4.5, mfc="white", color=colour, clip_on=False)
    axis.set(xlabel="ranks that step together", ylabel="step time / that of one rank", xlim=(1, 4300), ylim=(0.98, 1.5))
    axis.set_title("Stragglers (circles: simulated)", loc="left", fontsize=11)


def fill(path: Path, tables: dict[str, str]) -> None:
    """Put each table after its mark in a text, up to the next empty line."""
    text = path.read_text()
    for name, content in tables.items():
        mark = rf"(<!-- {re.escape(name)} -->)(\n[^\n]+)*"
        text, count = re.subn(mark, lambda m, content=content: f"{m[1]}\n{content}", text)
        assert count == 1, f"{path} has no place for {name}"
    path.write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3, help="repetitions of reading files; over http one less")
    given = parser.parse_args()
    publish(measure(max(2, given.repeats)))


def publish(found: dict[str, Any]) -> None:
    """Compute, simulate, draw and write."""
    run = Run()
    reckoned = Reckoned.of(run, found)
    tables = {
        "loop": report.loop_table(found),
        "files": report.files_line(found),
        "reading": report.reading_table(found),
        "remote": report.remote_table(found),
        "parts": report.parts_table(found),
        "straggling": report.straggling_table(),
        "windows": report.windows_table(run, reckoned),
        "costs": report.costs_line(run, reckoned),
        "restarts": report.restart_table(run, reckoned),
        "needs": report.needs_table(run, found, reckoned),
        "limits": report.limits_table(run, found, reckoned),
        "left": report.left_table(run, reckoned),
    }
    figure(run, reckoned, DOCS / "scale.png")
    fill(DOCS / "scale.md", tables)
    noisy = "One thread of a shared machine of two cores: medians (lowest to highest). docs/scale.md says what is what."
    write("Scale", "python benchmarks/scale/run.py", "\n\n".join([noisy, *tables.values()]))


if __name__ == "__main__":
    main()
