"""How much of a picture is made anew: the level that a strength means, and what is left of a grid from there on."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from undiffuse.grid import Grid, Levels, UniformLam, check_levels
from undiffuse.level import Level
from undiffuse.sample import trajectory
from undiffuse.schedule import Schedule
from undiffuse.solvers import Solver
from undiffuse.types import Denoise, Noise, require


def lam_of(strength: float) -> float:
    """The lam of the level at which sigma / (alpha + sigma) is this strength in (0, 1]: log((1 - s) / s), whatever the
    schedule, its time and the grid; for flows it is the time. InputError for others.

    >>> lam_of(0.5), round(lam_of(0.8), 3), lam_of(1.0)
    (0.0, -1.386, -inf)
    """
    require(0 < strength <= 1, "strength", strength, "above 0 (nothing changes) and up to 1 (plain sampling)")
    return -math.inf if strength == 1 else math.log1p(-strength) - math.log(strength)


def strength_of(level: Level) -> Tensor:
    """sigma / (alpha + sigma): 1 for pure noise, 0 for clean data."""
    return level.sigma / (level.alpha + level.sigma)


def levels_from(strength: float, schedule: Schedule, steps: int, grid: Grid | None = None) -> Levels:
    """The levels of a grid (default `UniformLam`) from this strength on: it and the cleaner ones, so that less strength
    takes fewer steps. A grid that rises again rises no further than that.

    >>> from undiffuse import Flow
    >>> [round(float(level.sigma), 2) for level in levels_from(0.5, Flow(), 4, UniformLam(-3.0, 3.0))]
    [0.5, 0.05, 0.0]
    """
    lam, levels = lam_of(strength), check_levels((grid or UniformLam())(schedule, steps)).levels
    if lam <= float(levels[0].lam):
        return levels
    start, out = Level.at(lam, schedule.space), list[Level]()
    for level in levels:
        level = start if float(level.lam) <= lam + 1e-9 else level
        if not out or out[-1] is not level:
            out.append(level)
    return tuple(out)


def walk(
    denoise: Denoise,
    x: Tensor,
    levels: Levels,
    solver: Solver,
    noise: Noise | None = None,
    project: Callable[[Tensor, Level], Tensor] | None = None,
) -> Tensor:
    """x at the last level of a `trajectory`."""
    with torch.no_grad():
        for state in trajectory(denoise, x, levels, solver, noise, project):
            x = state.x
    return x
