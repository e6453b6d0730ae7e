"""Image to image: noise a picture to a level, then denoise (SDEdit; Meng et al. 2021, arXiv 2108.01073)."""

from __future__ import annotations

from torch import Tensor

from undiffuse.grid import Grid
from undiffuse.restore.strength import levels_from, walk
from undiffuse.sample import Noise
from undiffuse.schedule import Schedule
from undiffuse.solvers import DPMpp2M, Solver
from undiffuse.types import Denoise


def img2img(
    denoise: Denoise,
    x0: Tensor,
    schedule: Schedule,
    strength: float = 0.6,
    *,
    steps: int = 20,
    solver: Solver | None = None,
    grid: Grid | None = None,
    seed: int = 0,
    first: int = 0,
) -> Tensor:
    """Pictures x0 (b, *data) noised to `strength` in (0, 1] and denoised by the rest of the grid: b others, which are
    the more like x0 the smaller it is.

    strength is sigma / (alpha + sigma) of the level, so 0.5 is where noise and data weigh the same: it means the same
    on every schedule and grid. 1 is `sample`, without x0. Row k depends on (seed, first + k) and x0[k] alone.
    InputError for a strength out of range.

    >>> import torch
    >>> from undiffuse import Gaussian, Spectrum, VP
    >>> model = Gaussian(Spectrum(torch.zeros(2), torch.ones(2)))
    >>> img2img(model, torch.ones(3, 2), VP(), 0.3).shape
    torch.Size([3, 2])
    """
    levels = levels_from(strength, schedule, steps, grid)
    noise = Noise(x0.shape, seed, range(first, first + len(x0)), x0.dtype, x0.device)
    start = levels[0].sigma * noise() if strength == 1 else levels[0].diffuse(x0, noise())
    return walk(denoise, start, levels, solver or DPMpp2M(), noise)
