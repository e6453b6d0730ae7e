"""Guidance where the truth is known: how far samples are from what guidance aims at, p(x) p(c | x)^w.

`python benchmarks/guidance.py` samples a mixture in two dimensions, whose exact denoisers and classes are known, by
every kind of guidance, and writes its section and docs/guidance-exact.png. The target is drawn from its density on a
fine grid. No network is trained.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from common import table, write
from torch import Tensor

from undiffuse import (
    APG,
    CFG,
    DDPM,
    VP,
    Autoguidance,
    CFGpp,
    CFGZero,
    ClassifierGuidance,
    Flow,
    Label,
    Level,
    Mixture,
    Noise,
    PerLevel,
    Rescale,
    Spectrum,
    Thresholded,
    UniformLam,
    sample,
)
from undiffuse.evals import sliced
from undiffuse.guide import Guidance
from undiffuse.guide.effective import Watched
from undiffuse.restore import steer
from undiffuse.restore.steer import systematic
from undiffuse.solvers import DPMpp2M, PredictorCorrector, Solver

PICTURE = Path(__file__).parents[1] / "docs" / "guidance-exact.png"
WEIGHTS = (1.0, 2.0, 4.0, 8.0)
N, STEPS, LOW, HIGH = 8_000, 100, -5.0, 6.0
MEANS = torch.tensor([[-0.45, 0.25], [0.05, 0.5], [0.1, -0.05], [0.55, 0.25], [-0.3, -0.45], [0.35, -0.5]]).double()
STDS, LABELS = (0.16, 0.11, 0.14, 0.12, 0.15, 0.13), (0, 0, 1, 1, 2, 2)


def mixture(widen: float = 1.0) -> Mixture:
    """The data, or a version of it with variances that are `widen` times as large: a blurred, weaker model."""
    parts = [Spectrum(m, torch.full((2,), widen * s**2).double()) for m, s in zip(MEANS, STDS, strict=True)]
    return Mixture(parts, labels=LABELS)


DATA, WEAK = mixture(), mixture(2.0)


def target(w: float, n: int, seed: int, side: int = 1600, reach: float = 1.3) -> Tensor:
    """n draws (n, 2) of p(x) p(c = 0 | x)^w, normalised on a grid of side x side cells."""
    line = (torch.arange(side).double() + 0.5) / side * 2 * reach - reach
    cells = torch.cartesian_prod(line, line)
    square = (cells[:, None] - MEANS).square().sum(-1)
    var = torch.tensor(STDS).double() ** 2
    joint = -square / (2 * var) - var.log()  # of equally likely components in two dimensions, up to a constant
    log_p, log_pc = joint.logsumexp(1), joint[:, :2].logsumexp(1)
    density = (log_p + w * (log_pc - log_p)).softmax(0)
    generator = torch.Generator().manual_seed(seed)
    # the cell of each draw by the inverse of the cumulative sum: more cells than `multinomial` takes
    u = torch.rand(n, generator=generator, dtype=torch.float64)
    at = torch.searchsorted(density.cumsum(0), u).clamp(max=len(cells) - 1)
    return cells[at] + (torch.rand(n, 2, generator=generator, dtype=torch.float64) - 0.5) * (2 * reach / side)


def distance(a: Tensor, b: Tensor) -> float:
    """The sliced Wasserstein distance of order 2."""
    return math.sqrt(sliced(a, b))


@dataclass(frozen=True)
class Method:
    """A guidance for each weight, and how it is sampled."""

    name: str
    guide: Callable[[float], Guidance]
    schedule: Any = VP()  # noqa: RUF009 (they are immutable)
    grid: Any = UniformLam(lam_min=LOW, lam_max=HIGH)  # noqa: RUF009
    solver: Solver = DPMpp2M()  # noqa: RUF009


H = (HIGH - LOW) / (STEPS - 1)
METHODS = (
    Method("CFG", CFG),
    Method("CFG, DDPM", CFG, solver=DDPM()),
    Method("CFG, 5 Langevin corrections a step", CFG, solver=PredictorCorrector(snr=0.15, corrections=5)),
    Method("classifier, exact", lambda w: ClassifierGuidance(w, classifier=DATA.classes)),
    Method(
        "classifier, exact, unconditional base",
        lambda w: ClassifierGuidance(w, classifier=DATA.classes, base="unconditional"),
    ),
    Method("CFG in -1 < lam < 2", lambda w: CFG(w, -1.0, 2.0)),
    Method("CFG, w rising from 1 to 2w - 1", lambda w: PerLevel((-2.0, 4.0), (1.0, 2 * w - 1))),
    Method("rescale, phi = .7", Rescale),
    Method("dynamic threshold", Thresholded),
    Method("APG", APG),
    Method("APG, momentum -.5", lambda w: APG(w, momentum=-0.5)),
    Method("CFG++, scale w (1 - e^-h)", lambda w: CFGpp(min(1.0, -w * math.expm1(-H)))),
    Method("CFG-Zero*", CFGZero, schedule=Flow()),
    Method("autoguidance", lambda w: Autoguidance(w, weak=WEAK)),
)

SHOWN = {
    "CFG": "CFG",
    "CFG, DDPM": "CFG, DDPM",
    "CFG, 5 Langevin corrections a step": "CFG, Langevin\ncorrections",
    "CFG in -1 < lam < 2": "CFG in an\ninterval",
    "APG": "APG",
    "autoguidance": "autoguidance",
}


def sampled(method: Method, w: float, n: int = N, seed: int = 0) -> tuple[Tensor, float]:
    """Samples (n, 2) of class 0, and the effective scale over all samples and evaluations."""
    watched = Watched(method.guide(w))
    x = sample(
        DATA, (n, 2), method.schedule, steps=STEPS, solver=method.solver, grid=method.grid, cond=Label(3)([0] * n),
        guidance=watched, seed=seed, dtype=torch.float64,
    )  # fmt: skip
    return x, watched.scale


def steered(w: float, n: int, seed: int = 0) -> Tensor:
    """Samples (n, 2) of class 0 by n particles that follow CFG and are weighted for the target."""
    levels, cond = UniformLam(lam_min=LOW, lam_max=HIGH)(VP(), STEPS), Label(3)([0] * n)
    noise, clean = Noise((n, 2), seed, dtype=torch.float64), Level(1.0, 0.0)
    found = steer(
        CFG()(DATA, cond), levels[0].sigma * noise(), levels, DDPM(), noise, lambda x0: DATA.classes(x0, clean)[:, 0],
        particles=n, scale=w - 1, proposal=CFG(w)(DATA, cond), seed=seed,
    )  # fmt: skip
    weights = found.log_weights.exp()
    return found.x[0, systematic(weights, torch.tensor([0.5]))[0]]


def picture(shown: Sequence[tuple[str, Sequence[Tensor]]]) -> None:
    """Densities: a row for each weight, a column for each method."""
    figure, axes = plt.subplots(len(WEIGHTS), len(shown), figsize=(2.0 * len(shown), 1.75 * len(WEIGHTS)))
    for column, (name, every) in enumerate(shown):
        for row, (w, x) in enumerate(zip(WEIGHTS, every, strict=True)):
            ax = axes[row, column]
            ax.hist2d(x[:, 0].numpy(), x[:, 1].numpy(), bins=(88, 77), range=[(-1.0, 0.6), (-0.4, 1.0)], cmap="magma_r")
            ax.set(xticks=[], yticks=[], aspect="equal")
            for spine in ax.spines.values():
                spine.set_color("#d1d5db")
            if row == 0:
                ax.set_title(name, fontsize=10)
            if column == 0:
                ax.set_ylabel(f"w = {w:g}", fontsize=11)
    figure.tight_layout(pad=0.4)
    figure.savefig(PICTURE, dpi=110)


def main() -> None:
    torch.set_num_threads(1)
    started = time.perf_counter()
    targets = {w: target(w, N, 1) for w in WEIGHTS}
    floors = [distance(targets[w], target(w, N, 2)) for w in WEIGHTS]
    rows = [["draws of the target itself", *(f"{1000 * v:.1f}" for v in floors), ""]]
    shown = [("the target", [targets[w] for w in WEIGHTS])]
    for method in METHODS:
        cells, scales, every = [], [], []
        for w in WEIGHTS:
            x, scale = sampled(method, w)
            cells.append(f"{1000 * distance(targets[w], x):.1f}")
            scales.append(f"{scale:.1f}")
            every.append(x)
        rows.append([method.name, *cells, " / ".join(scales)])
        print(rows[-1], f"{time.perf_counter() - started:.0f} s", flush=True)
        if method.name in SHOWN:
            shown.append((SHOWN[method.name], every))
    every = [steered(w, N) for w in WEIGHTS]
    cells = [f"{1000 * distance(t, x):.1f}" for t, x in zip(targets.values(), every, strict=True)]
    rows.append([f"CFG, DDPM, {N:,} weighted particles", *cells, ""])
    shown.append(("weighted\nparticles", every))
    picture(shown)
    text = (
        f"1000 x sliced Wasserstein distance of {N:,} samples of class 0 to p(x) p(c | x)^w: three classes of two "
        f"Gaussians each, exact denoisers, {STEPS} steps of DPM-Solver++(2M) unless another solver is named. The last "
        "column has the effective scales (`guide/effective.py`) at these w.\n\n"
        + table(["guidance", *(f"w = {w:g}" for w in WEIGHTS), "effective scales"], rows)
        + "\n\nw = 1 is p(x | c), which every kind keeps. Above, no guidance of "
        "the denoiser samples the target, which the exact classifier shows: it is CFG, to rounding. Noise in the steps "
        "brings samples nearer to it, and Langevin corrections nearer still; weighted particles (`restore/steer.py`) "
        "aim at it and arrive. CFG++ on levels of equal distance in lam is CFG, to rounding."
    )
    write("Guidance where the truth is known", "python benchmarks/guidance.py", text)


if __name__ == "__main__":
    main()
