"""The exact probability-flow solution, by extrapolated midpoint steps of adaptive size in flow coordinates."""

from __future__ import annotations

import hashlib

import torch
from targets import Target, cached
from torch import Tensor

from undiffuse import Denoise, Level, Noise
from undiffuse.schedule import Schedule

COUNTS = (2, 4, 6, 8, 10, 12, 14)


def unit_noise(target: Target) -> Tensor:
    """The noise z (seeds, *shape) of which every run starts from the same point x / alpha = sigma / alpha z."""
    return Noise((target.seeds, *target.shape), seed=0, dtype=torch.float64)()


def velocity(denoise: Denoise, x: Tensor, t: float) -> Tensor:
    """dx/dt = (x - x0) / t at x = (1 - t) x0 + t eps, regular at both ends: z - mean at t = 1, -x at t = 0."""
    return -x if t == 0 else (x - denoise(x, Level(1 - t, t))) / t


def _midpoint(denoise: Denoise, x: Tensor, slope: Tensor, t: float, end: float, count: int) -> Tensor:
    """Gragg's modified midpoint rule with `count` substeps; its error is even in their size."""
    h = (end - t) / count
    before, now = x, x + h * slope
    for i in range(1, count):
        before, now = now, before + 2 * h * velocity(denoise, now, t + i * h)
    return (before + now + h * velocity(denoise, now, end)) / 2


def integrate(denoise: Denoise, x: Tensor, start: float, tolerance: float) -> Tensor:
    """x at t = 0 from x at t = start (flow coordinates), the estimated error of each step below tolerance."""
    t, step = start, 0.02
    while t > 0:
        end = t - step if t > 1.5 * step else 0.0
        slope, rows = velocity(denoise, x, t), []
        for j, count in enumerate(COUNTS):
            row = [_midpoint(denoise, x, slope, t, end, count)]
            for k in range(j):
                row.append(row[k] + (row[k] - rows[-1][k]) / ((count / COUNTS[j - k - 1]) ** 2 - 1))
            rows.append(row)
        scale = float(x.square().mean().sqrt().clamp(min=1e-3))
        error = float((rows[-1][-1] - rows[-1][-2]).abs().max()) / scale
        if error < tolerance or step < 1e-6:
            t, x = end, rows[-1][-1]
        step = min(0.25, step * min(3.0, max(0.2, 0.8 * (tolerance / max(error, 1e-300)) ** (1 / 13))))
    return x


def solve(denoise: Denoise, z: Tensor, schedule: Schedule) -> tuple[Tensor, float]:
    """(the solution at sigma = 0 from x / alpha = sigma / alpha z, its relative difference to one of fewer steps)."""
    first = schedule.level(1.0)
    start = float(first.sigma / (first.alpha + first.sigma))
    rough, fine = (integrate(denoise, start * z, start, tolerance) for tolerance in (1e-10, 1e-12))
    gap = (rough - fine).flatten(1).norm(dim=1) / fine.flatten(1).norm(dim=1)
    return fine, float(gap.max())


def reference(target: Target, name: str, schedule: Schedule) -> Tensor:
    """The solution (seeds, *shape) for a target on a schedule, checked to 1e-8 relative and kept on disk."""
    mixture = target.mixture
    digest = hashlib.sha256(str((target.w, target.seeds, COUNTS, schedule.level(1.0))).encode())
    for part in (mixture.means, mixture.variances, mixture.log_w):
        digest.update(part.numpy().tobytes())

    def make() -> dict:  # type: ignore[type-arg]
        x, gap = solve(target.denoise(target.seeds), unit_noise(target), schedule)
        assert gap < 1e-8, f"{target.name} on {name}: halving the steps moves the solution by {gap:.1e}"
        return {"x": x.numpy()}

    return cached(f"reference-{target.name}-{name}-{digest.hexdigest()[:12]}", make)["x"]
