"""DDIM inversion (Song et al. 2021, arXiv 2010.02502, section 4.3): the noise whose sample is a picture."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from undiffuse.grid import Grid, Levels
from undiffuse.restore.strength import levels_from, walk
from undiffuse.schedule import Schedule
from undiffuse.solvers import DDIM, Solver
from undiffuse.solvers.base import exponential_euler
from undiffuse.tableau import trace
from undiffuse.types import Denoise, InputError


def invertible(strength: float, schedule: Schedule, steps: int, grid: Grid | None = None) -> Levels:
    """The levels of a grid from this strength on between which nothing is forgotten: without pure noise and clean data.

    InputError where fewer than two are left.
    """
    levels = [v for v in levels_from(strength, schedule, steps, grid) if bool((v.alpha > 0) & (v.sigma > 0))]
    if len(levels) < 2:
        raise InputError(
            f"{steps} steps have fewer than two levels to invert from strength {strength} on: take more steps"
        )
    return tuple(levels)


def invert(
    denoise: Denoise,
    x0: Tensor,
    schedule: Schedule,
    *,
    strength: float = 1.0,
    steps: int = 50,
    solver: Solver | None = None,
    grid: Grid | None = None,
    exact: bool = True,
) -> Tensor:
    """The x (b, *data), at the level of `strength` or the grid's noisiest, from which `reconstruct` arrives at x0.

    x0 is taken as the data at the grid's cleanest level with sigma > 0. The solver's own inverse is sought (see
    `Tableau.inverse`); `exact=False` is the papers' single pass of DDIM, which takes each step's noise from its wrong
    end and so is right for small steps only. Guidance with w > 1 may have no inverse: invert at w = 1. InputError for
    solvers that draw noise, and where the search does not settle.

    >>> from undiffuse import Gaussian, Spectrum, VP
    >>> model, x0 = Gaussian(Spectrum(torch.zeros(2), torch.ones(2))), torch.ones(1, 2).double()
    >>> bool((reconstruct(model, invert(model, x0, VP()), VP()) - x0).abs().max() < 1e-7)
    True
    """
    levels = invertible(strength, schedule, steps, grid)
    x = (levels[-1].alpha * x0).to(x0.dtype)
    with torch.no_grad():
        if exact:
            solver = solver or DDIM()
            # a step that knows nothing of earlier ones has an inverse of its own, which is found the faster
            parts = [levels] if solver.history else [*pairwise(levels)]
            for part in reversed(parts):
                x = trace(solver, part).inverse(denoise, x)
            return x
        for now, then in zip(levels[:0:-1], levels[-2::-1], strict=True):
            x = exponential_euler(x, denoise(x, now), now, then)
    return x


def reconstruct(
    denoise: Denoise,
    x: Tensor,
    schedule: Schedule,
    *,
    strength: float = 1.0,
    steps: int = 50,
    solver: Solver | None = None,
    grid: Grid | None = None,
) -> Tensor:
    """The picture that sampling from x, which `invert` gave with the same settings, arrives at: with another condition
    bound to `denoise`, the picture changed accordingly."""
    levels = invertible(strength, schedule, steps, grid)
    return (walk(denoise, x, levels, solver or DDIM()) / levels[-1].alpha).to(x.dtype)
