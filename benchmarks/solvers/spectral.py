"""A first look at the spectral solver: median error at the end against multistep solvers, on exact mixtures.

    python benchmarks/solvers/spectral.py [target ...]

The spectrum is that of the mixture's overall covariance; the error is the distance to the exact solution over its norm.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

import torch
from reference import reference, unit_noise
from targets import SCHEDULES, TARGETS

from undiffuse import (
    IPNDM,
    DPMpp2M,
    Karras,
    Level,
    Mixture,
    Spectral,
    SpectralGrid,
    Spectrum,
    UniformLam,
    UniPC,
    spectral,
    trace,
)

NFE = (5, 6, 8, 10)
SOLVERS = {"dpmpp-2m": DPMpp2M(), "unipc": UniPC(3), "unipc 2": UniPC(2), "ipndm": IPNDM(4)}


def overall(mixture: Mixture) -> Spectrum:
    """Mean and covariance of all components together, in closed form."""
    w, d = mixture.log_w.exp(), mixture.means.shape[1]
    mean, bases = w @ mixture.means, mixture.bases
    if bases is None:
        bases = torch.eye(d, dtype=w.dtype).expand(len(w), d, d)
    rest = mixture.rest[:, 0] if bases.shape[1] < d else torch.zeros_like(w)
    within = (w[:, None] * (mixture.variances - rest[:, None])).clamp(min=0).sqrt()[..., None] * bases
    root = torch.cat([w.sqrt()[:, None] * (mixture.means - mean), within.reshape(-1, d)])
    _, values, vectors = torch.linalg.svd(root, full_matrices=False)
    keep = values > 1e-9
    return Spectrum(mean, values[keep] ** 2 + float(w @ rest), vectors[keep].contiguous(), float(w @ rest))


def main(names: list[str]) -> None:
    for target in (TARGETS[name] for name in names or ["digits", "digits-w3", "patches"]):
        data, denoise = overall(target.mixture), target.denoise(target.seeds)
        for name in ("edm", "vp-linear"):
            schedule, due = SCHEDULES[name], reference(target, name, SCHEDULES[name]).flatten(1)
            noise = unit_noise(target)

            def error(plan: Any, levels: tuple[Level, ...], noise=noise, denoise=denoise, due=due) -> float:  # type: ignore[no-untyped-def]
                end = plan.run(denoise, levels[0].sigma * noise).flatten(1)
                return float(((end - due).norm(dim=1) / due.norm(dim=1)).median())

            grids: dict[str, Any] = {"uniform-lam": UniformLam(), "uniform-lam 3": UniformLam(lam_max=3.0)}
            grids |= {"karras": Karras(), "karras .05": Karras(sigma_min=0.05), "spectral": SpectralGrid(data)}
            plans: dict[str, Callable[..., Any]] = {
                solver: lambda levels, solver=solver: trace(SOLVERS[solver], levels) for solver in SOLVERS
            }
            plans["spectral one"] = lambda levels, v=data.std**2: trace(Spectral(v), levels)
            plans["spectral"] = lambda levels, data=data: spectral(data, levels)
            plans["spectral 1"] = lambda levels, data=data: spectral(data, levels, order=1)
            plans["spectral -c"] = lambda levels, data=data: spectral(data, levels, corrector=False)
            print(f"\n{target.name} on {name}: median relative error at {NFE} evaluations")
            best = dict.fromkeys(SOLVERS, (math.inf,) * len(NFE))
            for grid in grids:
                for solver, make in plans.items():
                    all_levels = [grids[grid](schedule, n) for n in NFE]
                    errors = [error(make(levels), levels) for levels in all_levels]
                    print(f"  {grid:14} {solver:13}" + "".join(f"{e:8.4f}" for e in errors), flush=True)
                    if solver in best and grid != "spectral":
                        best[solver] = tuple(map(min, best[solver], errors))
            for solver, errors in best.items():
                print(f"  {'best of these':14} {solver:13}" + "".join(f"{e:8.4f}" for e in errors))


if __name__ == "__main__":
    main(sys.argv[1:])
