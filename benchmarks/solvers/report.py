"""Tables, CSV and plot of the results."""

from __future__ import annotations

import csv
import math
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from common import table, write  # noqa: E402
from targets import BUDGETS, NFE, SCHEDULES, TARGETS  # noqa: E402

Record = dict[str, Any]
COMMAND = "python benchmarks/solvers/run.py"
LIBRARIES = ("ours", "diffusers", "k-diffusion", "azula", "smalldiffusion")
COLUMNS = ("target", "schedule", "library", "solver", "spacing", "steps", "nfe", "rms", "median", "kind", "std", "mean",
           "energy", "error")  # fmt: skip
FAMOUS = (
    ("diffusers", "DDIM", "leading", "DDIM as shipped by diffusers"),
    ("diffusers", "dpmsolver++ 2M", "linspace", "DPM++2M as shipped by diffusers"),
    ("k-diffusion", "dpmpp_2m", "karras", "DPM++2M Karras of k-diffusion"),
    ("ours", "dpmpp-2m", "uniform-lam 5", "default of undiffuse"),
)


class Results:
    """The deterministic cells, to be asked for the best."""

    def __init__(self, records: list[Record]) -> None:
        self.groups: dict[tuple[str, str, str], list[Record]] = {}
        for r in records:
            if "rms" in r and r["target"] in TARGETS:
                self.groups.setdefault((r["target"], r["schedule"], r["library"]), []).append(r)

    def best(self, target: str, schedule: str, library: str, budget: int) -> Record | None:
        """The cell of least RMS error within the budget."""
        cells = self.groups.get((target, schedule, library), [])
        if not any(0.7 * budget < r["nfe"] <= budget for r in cells):  # this budget was not run
            return None
        fits = [r for r in cells if r["nfe"] <= budget]
        return min(fits, key=lambda r: r["rms"], default=None)

    def curve(self, target: str, schedule: str, library: str, solver: str, spacing: str) -> list[tuple[int, float]]:
        """(NFE, RMS error) of one sampler."""
        cells = self.groups.get((target, schedule, library), [])
        return sorted({(r["nfe"], r["rms"]) for r in cells if r["solver"] == solver and r["spacing"] == spacing})


def short(value: Any) -> Any:
    """Numbers with four digits."""
    if isinstance(value, list):
        return " ".join(str(short(v)) for v in value)
    return f"{value:.4g}" if isinstance(value, float) else value


def named(r: Record | None) -> str:
    """A cell as error, solver and spacing."""
    return "–" if r is None else f"{r['rms']:.2g} ({r['solver']}, {r['spacing']})"


def best_tables(results: Results) -> str:
    """One table a target on VP-linear, and the ratio of the best peer's error to ours on every schedule."""
    parts = []
    for target in TARGETS:
        rows = []
        for nfe in NFE:
            cells = {lib: results.best(target, "vp-linear", lib, nfe) for lib in LIBRARIES}
            least = min((c["rms"] for c in cells.values() if c is not None), default=0.0)
            shown = [f"**{named(c)}**" if c is not None and c["rms"] == least else named(c) for c in cells.values()]
            rows.append([str(nfe), *shown])
        ratios = []
        for name in SCHEDULES:
            row = [name]
            for nfe in NFE:
                ours = results.best(target, name, "ours", nfe)
                theirs = [c for lib in LIBRARIES[1:] if (c := results.best(target, name, lib, nfe)) is not None]
                rival = min(theirs, key=lambda c: c["rms"], default=None)
                both = ours is not None and rival is not None
                row.append(f"{rival['rms'] / ours['rms']:.2f} ({rival['library']})" if both else "–")
            ratios.append(row)
        parts.append(
            f"**{target}**, VP-linear: least RMS error within the NFE.\n\n{table(['NFE', *LIBRARIES], rows)}\n\n"
            f"Error of the best peer over ours (above 1: ours is nearer to the exact solution).\n\n"
            f"{table(['schedule', *(f'NFE {n}' for n in NFE)], ratios)}"
        )
    return "\n\n".join(parts)


def spread_table(records: list[Record]) -> str:
    """Output std of stochastic samplers on Gaussian data, the best of each library."""
    rows = []
    truth = (1.0, 0.25, 0.05)
    for name in ("vp-linear", "edm", "flow-1"):
        for nfe in NFE:
            for lib in LIBRARIES:
                cells = [r for r in records if r.get("kind") == "std" and "std" in r and r["library"] == lib
                         and r["schedule"] == name and r["nfe"] <= nfe]  # fmt: skip

                def cost(r: Record) -> float:
                    ratios = (s / t for s, t in zip(r["std"], truth, strict=True))
                    return sum(abs(math.log(x)) if x > 0 and math.isfinite(x) else 99.0 for x in ratios)

                r = min(cells, key=cost, default=None)
                if r is not None:
                    stds = [f"{s / t:.3f}" for s, t in zip(r["std"], truth, strict=True)]
                    rows.append([name, str(nfe), lib, f"{r['solver']}, {r['spacing']}", *stds])
    return table(["schedule", "NFE", "library", "best stochastic sampler", "std 1", "std 0.25", "std 0.05"], rows)


def energy_table(records: list[Record]) -> str:
    """Energy distance of stochastic samplers, the best of each library."""
    rows = []
    for target, name in (("ring", "vp-linear"), ("ring", "edm"), ("ring", "flow-1"), ("digits", "vp-linear")):
        cells = [r for r in records if r.get("kind") == "energy" and "energy" in r]
        cells = [r for r in cells if r["target"] == target and r["schedule"] == name]
        floor = next((r["energy"] for r in records if r.get("kind") == "floor" and r["target"] == target), math.nan)
        for nfe in NFE:
            row = [f"{target}, {name}", str(nfe), f"{floor:.1e}"]
            for lib in LIBRARIES:
                fits = [r for r in cells if r["library"] == lib and r["nfe"] <= nfe]
                r = min(fits, key=lambda r: r["energy"], default=None)
                row.append("–" if r is None else f"{r['energy']:.1e} ({r['solver']}, {r['spacing']})")
            rows.append(row)
    return table(["target", "NFE", "exact", *LIBRARIES], rows)


def order_table(records: list[Record]) -> str:
    """Measured beside claimed order."""
    rows = []
    for r in records:
        if r.get("kind") == "order":
            short = r["slope"] < r["claimed"] - 0.3
            slope = f"**{r['slope']:.2f}**" if short else f"{r['slope']:.2f}"
            rows.append([r["library"], r["solver"], str(r["claimed"]), slope, f"{r['errors'][1]:.1e}"])
    return table(["library", "sampler", "claimed", "measured", "error at 160 steps"], rows)


def failures(records: list[Record]) -> str:
    """What could not run, by message."""
    groups: dict[tuple[str, str], list[Record]] = {}
    for r in records:
        if "error" in r and r.get("library") not in (None, "ours"):
            groups.setdefault((r["library"], r["error"]), []).append(r)
    rows = []
    for (lib, error), cells in sorted(groups.items(), key=lambda g: -len(g[1])):
        which = sorted({f"{c['solver']}, {c['spacing']}" for c in cells})
        shown = "; ".join(which[:4]) + (f" and {len(which) - 4} more" if len(which) > 4 else "")
        steps = sorted({c["steps"] for c in cells})
        rows.append([lib, error.replace("|", "/")[:120], shown, f"{steps[0]}–{steps[-1]}", str(len(cells))])
    return table(["library", "error", "where", "steps", "cells"], rows)


def plot(results: Results, path: Path) -> None:
    """Least error over NFE on VP-linear, one panel a target."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    titles = {
        "ring": "ring of 8 Gaussians, 2-D", "digits": "digits, 64-D, 40 components",
        "digits-w3": "digits, guided w = 3",
        "digits-w7.5": "digits, guided w = 7.5", "patches": "photo patches, 3,072-D",
    }  # fmt: skip
    colours = dict(zip(LIBRARIES, ("#d62728", "#1f77b4", "#2ca02c", "#9467bd", "#8c564b"), strict=True))
    figure, axes = plt.subplots(2, 3, figsize=(13, 8), constrained_layout=True)
    for ax, (target, title) in zip(axes.flat, titles.items(), strict=False):
        budgets = NFE if target in ("digits-w7.5", "patches") else BUDGETS
        for lib in LIBRARIES:
            points = [(n, r["rms"]) for n in budgets if (r := results.best(target, "vp-linear", lib, n)) is not None]
            if points:
                label = f"best of {'undiffuse' if lib == 'ours' else lib}"
                width = 2.6 if lib == "ours" else 1.6
                ax.plot(*zip(*points, strict=True), color=colours[lib], lw=width, marker="o", ms=3.5, label=label,
                        zorder=3 if lib == "ours" else 2)  # fmt: skip
        for style, (lib, solver, spacing, label) in zip((":", "--", "-.", "--"), FAMOUS, strict=True):
            points = [p for p in results.curve(target, "vp-linear", lib, solver, spacing) if p[0] in budgets]
            if points:
                ax.plot(*zip(*points, strict=True), color=colours[lib], lw=1.1, ls=style, alpha=0.85, label=label)
        ax.set(xscale="log", yscale="log", title=title)
        ticks = [n for n in (3, 5, 10, 20, 50) if n in budgets]
        ax.set_xticks(ticks, [str(n) for n in ticks])
        ax.minorticks_off()
        ax.grid(alpha=0.3, lw=0.5)
    for ax in axes[:, 0]:
        ax.set_ylabel("RMS distance to the exact solution")
    for ax in axes[1, :2]:
        ax.set_xlabel("denoiser evaluations (NFE)")
    axes[0, 2].set_xlabel("denoiser evaluations (NFE)")
    handles, names = axes.flat[0].get_legend_handles_labels()
    axes.flat[5].axis("off")
    axes.flat[5].legend(handles, names, loc="center", fontsize=11, frameon=False)
    figure.suptitle("Same exact denoiser, same noise, VP-linear schedule, float64", fontsize=13)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def report(records: list[Record], publish: bool) -> None:
    """Print, and with `publish` write, all tables; the CSV and the plot only with `publish`."""
    results = Results(records)
    intro = "RMS over seeds of the distance to the exact probability-flow solution from the same noise, per element."
    sections = {
        "Solvers against the exact solution": f"{intro}\n\n{best_tables(results)}",
        "Stochastic solvers: exact std on Gaussian data": "Output std over the true one.\n\n" + spread_table(records),
        "Stochastic solvers: energy distance": "2,000 draws each on the ring, 400 on digits.\n\n"
        + energy_table(records),
        "Order of convergence of peers": "Gaussian data, 80 to 160 equal steps in lam; bold: short of the claim.\n\n"
        + order_table(records),
        "Peers that fail": failures(records),
    }
    for title, text in sections.items():
        if publish:
            write(title, COMMAND, text)
        else:
            print(f"## {title}\n\n{text}\n")
    if not publish:
        return
    cells = [r for r in records if "library" in r and r.get("kind") != "order"]
    with (HERE / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
        writer.writeheader()
        once = {tuple(str(r.get(c)) for c in (*COLUMNS[:6], "kind")): r for r in cells}  # the newest of each
        writer.writerows({k: short(v) for k, v in once[key].items()} for key in sorted(once))
    plot(results, HERE.parents[1] / "docs" / "solvers.png")
