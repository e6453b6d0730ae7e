"""FlowEdit (Kulikov et al. 2024, arXiv 2412.08629): from one condition's picture to another's, without inversion."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from undiffuse.grid import Grid
from undiffuse.restore.strength import levels_from, strength_of
from undiffuse.sample import Noise
from undiffuse.schedule import Schedule
from undiffuse.types import Denoise


@torch.no_grad()
def flowedit(
    source: Denoise,
    target: Denoise,
    x0: Tensor,
    schedule: Schedule,
    strength: float = 0.8,
    *,
    steps: int = 20,
    grid: Grid | None = None,
    average: int = 1,
    seed: int = 0,
    first: int = 0,
) -> Tensor:
    """x0 (b, *data), a picture of `source`'s, moved along the difference of the velocities of `target` and `source`
    (algorithm 1), each the mean over `average` draws of noise.

    Written in flow form, alpha + sigma = 1, and for denoisers of any form: with z = x / (alpha + sigma) the velocity is
    (z - x0) / strength. Row k depends on (seed, first + k) and x0[k] alone.

    >>> from undiffuse import Flow, Gaussian, Spectrum
    >>> one, two = (Gaussian(Spectrum(torch.full((2,), m), torch.ones(2))) for m in (0.0, 3.0))
    >>> bool(torch.allclose(flowedit(one, two, torch.zeros(4, 2), Flow(), 1.0, steps=200), torch.tensor(3.0), atol=0.1))
    True
    """
    levels = levels_from(strength, schedule, steps, grid)
    noise = Noise(x0.shape, seed, range(first, first + len(x0)), x0.dtype, x0.device)
    edited = x0
    for now, then in pairwise(levels):
        form, s = float(now.alpha + now.sigma), float(strength_of(now))
        total = torch.zeros_like(x0)
        for _ in range(average):
            before = (1 - s) * x0 + s * noise()
            after = edited + before - x0
            total += (after - target(form * after, now)) / s - (before - source(form * before, now)) / s
        edited = edited + (float(strength_of(then)) - s) / average * total
    return edited
