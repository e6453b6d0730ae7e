"""Variance kept per direction of real data: `python benchmarks/solvers/variance.py`; exact, no sampling.

Kept is the variance of the output over the true one, for Gaussian data, from noise as samplers start. Every choice is
made from the fitted spectrum (or from nothing) and asked about others: 20 with each variance times exp(0.3 z); two with
a tilt of slope 0.2 in log frequency (the rank of a direction); and that of real data that were held out, in the fitted
directions.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parents[1])]

from common import table, write  # noqa: E402

from undiffuse import (  # noqa: E402
    DDIM,
    EDM,
    IPNDM,
    Discrete,
    DPMpp2M,
    InputError,
    Karras,
    Modal,
    SpectralGrid,
    Spectrum,
    Tableau,
    UniformLam,
    UniformT,
    UniPC,
    spectral,
    trace,
)
from undiffuse.modal import counted  # noqa: E402
from undiffuse.schedule import Schedule  # noqa: E402
from undiffuse.tune.family import Family  # noqa: E402
from undiffuse.tune.gaussian import tune_gaussian, tune_kept  # noqa: E402

NFE = (5, 10, 20)
ITERATIONS, LONGER = {5: 150, 10: 150, 20: 50}, {5: 800, 10: 100, 20: 50}  # many groups need more
SCHEDULES: dict[str, Schedule] = {"vp-linear": Discrete.linear(), "edm": EDM()}
SOLVERS = {"DPM-Solver++(2M)": DPMpp2M(), "UniPC": UniPC(3), "iPNDM": IPNDM(4), "DDIM": DDIM()}
GRIDS = {"Karras": Karras(), "uniform t": UniformT(), "uniform lam": UniformLam()}


def digits() -> tuple[Tensor, Tensor, float]:
    """Handwritten digits in [-1, 1], the even and the odd ones, and the variance of their rounding to 16 steps."""
    from sklearn.datasets import load_digits

    x = torch.from_numpy(load_digits().data) / 8 - 1
    return x[::2], x[1::2], (1 / 8) ** 2 / 12


def patches() -> tuple[Tensor, Tensor, float]:
    """32 x 32 colour patches of the left and the right halves of two photos, and the variance of rounding to 8 bits."""
    from sklearn.datasets import load_sample_images

    halves: tuple[list[Tensor], list[Tensor]] = ([], [])
    for image in load_sample_images().images:
        for half, part in zip(halves, np.split(image, 2, 1), strict=True):
            view = np.lib.stride_tricks.sliding_window_view(part, (32, 32), (0, 1))[::12, ::12]
            half.append(torch.from_numpy(view.reshape(-1, 3072) / 127.5 - 1))
    return torch.cat(halves[0]), torch.cat(halves[1]), (1 / 127.5) ** 2 / 12


def fitted(x: Tensor) -> Spectrum:
    """The principal components of data."""
    torch.manual_seed(0)
    return Spectrum.measure(x)


def along(spectrum: Spectrum, x: Tensor) -> Tensor:
    """The variances of data x along the directions of a spectrum, and their mean in the complement."""
    assert spectrum.basis is not None
    off, k, d = x.double() - x.double().mean(0), len(spectrum.variances), len(spectrum.mean)
    inside = (off @ spectrum.basis.T).square().mean(0)
    rest = (off.square().mean(0).sum() - inside.sum()) / max(d - k, 1)
    return inside if k == d else torch.cat([inside, rest[None]])


def others(spectrum: Spectrum) -> list[Tensor]:
    """Variances drawn around the fitted ones, and tilted ones."""
    v, count = counted(spectrum)
    rank = (count.cumsum(0) - (count - 1) / 2).log()
    tilt, g = rank - rank.mean(), torch.Generator().manual_seed(0)
    drawn = [v * torch.exp(0.3 * torch.randn(len(v), generator=g, dtype=torch.float64)) for _ in range(20)]
    return [*drawn, v * torch.exp(0.2 * tilt), v * torch.exp(-0.2 * tilt)]


def kept(plan: Tableau | Modal, variances: Tensor) -> Tensor:
    """The variance of the output over the true one, in each direction."""
    if isinstance(plan, Tableau):
        return plan.gaussian(variances).variance / variances
    out = torch.empty_like(variances)
    for g, part in enumerate(plan.tables):
        of = plan.group == g
        if bool(of.any()):
            out[of] = part.gaussian(variances[of]).variance / variances[of]
    return out


Plan = Tableau | Modal


def tuned(spectrum: Spectrum, schedule: Schedule, n: int, least: float) -> dict[str, Callable[[], Plan]]:
    """The choices made from the fitted spectrum."""
    grid, plain = SpectralGrid(spectrum), Family(DPMpp2M())

    def gaussian(coefficients: bool) -> Plan:
        found = tune_gaussian(plain, schedule, n, spectrum, grid, coefficients)
        return plain.plan(found.levels, found.corrections)

    def ranged(family: Family, iterations: int) -> Plan:
        found = tune_kept(family, schedule, n, spectrum, least=least, iterations=iterations)
        return family.plan(found.levels, found.corrections)

    return {
        "`spectral`, 8 groups": lambda: spectral(spectrum, grid(schedule, n)),
        "`spectral`, a table each": lambda: spectral(spectrum, grid(schedule, n), groups=None),
        "`tune_gaussian`, levels": lambda: gaussian(False),
        "`tune_gaussian`, levels and coefficients": lambda: gaussian(True),
        "`tune_kept`, one table": lambda: ranged(plain, ITERATIONS[n]),
        "`tune_kept`, 16 groups": lambda: ranged(Family(DPMpp2M(), spectrum, 16), LONGER[n]),
    }


def main() -> None:
    torch.set_num_threads(1)
    text, begun = "", time.perf_counter()
    for name, load in {"digits": digits, "patches": patches}.items():
        x, held_out, least = load()
        spectrum = fitted(x)
        v, _ = counted(spectrum)
        seen, spectra, real = v >= least, others(spectrum), along(spectrum, held_out)
        for on, schedule in SCHEDULES.items():
            rows: dict[str, list[str]] = {}
            for n in NFE:
                made: dict[str, Callable[[], Plan]] = {
                    f"{s}, {g}": lambda s=s, g=g, n=n, on=schedule: trace(SOLVERS[s], GRIDS[g](on, n))  # type: ignore[misc]
                    for s in SOLVERS
                    for g in GRIDS
                }
                for label, make in (made | tuned(spectrum, schedule, n, least)).items():
                    try:
                        plan = make()
                    except InputError:
                        cells = ["-", "-", "-"]
                    else:
                        off = torch.stack([(kept(plan, o) - 1).abs()[seen] for o in spectra])
                        truly = (kept(plan, real) - 1).abs()[seen]
                        cells = [f"{100 * float(f):.2g}" for f in (off.max(), off.mean(), truly.mean())]
                    rows.setdefault(label, [label]).append(" / ".join(cells))
                print(f"{name} {on} {n}: {time.perf_counter() - begun:.0f} s", flush=True)
            text += (
                f"\n\n{name} on {on}, {int(seen.sum())} directions above the rounding of the data, whose variances are "
                f"{float(v[seen].min()):.2g} to {float(v.max()):.2g}:\n\n"
            )
            text += table(["choice", *(f"{n} NFE" for n in NFE)], list(rows.values()))
    head = """\
|kept - 1| in per cent, kept being the output's variance over the true one in each principal direction of Gaussian data:
worst / mean over the directions of 22 spectra around the fitted one / mean over those of real data that were held out.
The 22: each variance times exp(0.3 z), 20 draws, and slopes of +-0.2 in log frequency (rank). Digits: even images
fitted, odd ones held out; patches: left halves of two photos fitted, right halves held out. Tuned choices know the
fitted spectrum alone. Exact, from noise as samplers start.
"""
    write("Variance kept per frequency", "python benchmarks/solvers/variance.py", head + text)


if __name__ == "__main__":
    main()
