"""Levels and coefficients from the data's spectrum alone, in closed form: no call of the network."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from undiffuse.grid import Grid, Levels, UniformLam
from undiffuse.level import Level
from undiffuse.modal import Modal, counted, grouped
from undiffuse.schedule import Schedule
from undiffuse.spectrum import Spectrum
from undiffuse.tableau import Tableau
from undiffuse.tune.family import Family, Spacing, assembled
from undiffuse.types import InputError

MODES = 48  # groups of directions of similar variance in which an error is summed


class Modes(NamedTuple):
    """Variances (k,), the number of directions of each (k,), and the sum of their squared means (k,)."""

    variance: Tensor
    number: Tensor
    square: Tensor

    @staticmethod
    def of(spectrum: Spectrum, groups: int | None = MODES, only: Tensor | None = None) -> Modes:
        """The directions of a spectrum (all, or where the mask `only` holds) in groups of similar variance, or one by
        one."""
        values, count = counted(spectrum)
        inside = spectrum.mean if spectrum.basis is None else spectrum.basis @ spectrum.mean
        square = inside.square()
        if len(count) > len(square):
            square = torch.cat([square, (spectrum.mean.square().sum() - square.sum()).clamp(min=0)[None]])
        if only is not None:
            values, count, square = values[only], count[only], square[only]
        group, variance = grouped(values, count, groups)
        sums = [torch.zeros_like(variance).index_add(0, group, part) for part in (count, square)]
        return Modes(variance, *sums)


def gaussian_error(table: Tableau, modes: Modes) -> Tensor:
    """Squared 2-Wasserstein distance of the table's output from Gaussian data at its last level, per direction.

    Sum over modes of (std_out - std_true)^2 + (mean_out - mean_true)^2, both from `Tableau.gaussian`, over the number
    of directions; differentiable in the table's coefficients and levels.

    >>> from undiffuse import DDIM, VP, UniformLam, trace
    >>> modes = Modes.of(Spectrum(torch.zeros(1), torch.tensor([0.25])))
    >>> [round(float(gaussian_error(trace(DDIM(), UniformLam()(VP(), n)), modes)), 6) for n in (5, 50)]
    [0.056103, 0.000624]
    """
    alpha, sigma = table.end
    unit = table.gaussian(modes.variance, torch.ones_like(modes.variance))
    std = (alpha**2 * modes.variance + sigma**2).sqrt()
    off = modes.number * (unit.variance.sqrt() - std) ** 2 + modes.square * (unit.mean - alpha) ** 2
    error: Tensor = off.sum() / modes.number.sum()
    return error


def mismatch(plan: Tableau | Modal, spectrum: Spectrum) -> float:
    """The 2-Wasserstein distance of a plan's output from Gaussian data of this spectrum, over the data's std."""
    values, count = counted(spectrum)
    off = 0.0
    if isinstance(plan, Modal):  # it acts about the mean
        for g, table in enumerate(plan.tables):
            if bool((only := plan.group == g).any()):
                modes = Modes.of(spectrum, 16, only)
                modes = modes._replace(square=torch.zeros_like(modes.square))
                off += float(gaussian_error(table, modes) * modes.number.sum())
    else:
        off = float(gaussian_error(plan, Modes.of(spectrum)) * count.sum())
    return math.sqrt(off / (float((count * values).sum()) or 1.0))


class Closed(NamedTuple):
    """What `tune_gaussian` found: levels, corrections (None if not asked for) and the errors before and after."""

    levels: Levels
    corrections: Tensor | None
    before: float
    after: float


def tune_gaussian(
    family: Family,
    schedule: Schedule,
    steps: int,
    spectrum: Spectrum,
    grid: Grid | Sequence[Level] | None = None,
    coefficients: bool = False,
    iterations: int = 100,
) -> Closed:
    """The levels (and corrections) at which a plain solver samples Gaussian data of this spectrum best.

    L-BFGS on `gaussian_error` from `grid` (default: uniform in lam), which it can only better. `family` has no spectrum
    of its own: with one, `Spectral` is exact on Gaussian data whatever the levels. Raises InputError otherwise, and for
    a grid that does not fall from the schedule's noisiest level to clean data.
    """
    if family.spectrum is not None:
        raise InputError("tune_gaussian fits plain tables: give the family no spectrum, and the spectrum to this call")
    start = grid if isinstance(grid, Sequence) else (grid or UniformLam())(schedule, steps)
    if len(start) != steps + 1:
        raise InputError(f"{steps} steps need {steps + 1} levels, got {len(start)}")
    spacing, modes = Spacing.around(schedule, start), Modes.of(spectrum)
    place = spacing.parameters(start).requires_grad_()
    change = torch.zeros(1, steps, steps, dtype=torch.float64, requires_grad=coefficients)

    def error() -> Tensor:
        levels = spacing.levels(place)
        points, out = family.tables(levels, change)
        return gaussian_error(assembled(levels, points[0], out[0]), modes)

    free = [place, change] if coefficients else [place]
    optimiser = torch.optim.LBFGS(free, max_iter=iterations, tolerance_grad=0, line_search_fn="strong_wolfe")
    before = best = float(error().detach())
    kept = [p.detach().clone() for p in free]

    def closure() -> Tensor:
        nonlocal best, kept
        optimiser.zero_grad()
        loss = error()
        loss.log().backward()  # type: ignore[no-untyped-call]
        now = loss.detach()
        if float(now) < best:
            best, kept = float(now), [p.detach().clone() for p in free]
        return now.log()

    if steps > 1:
        optimiser.step(closure)  # type: ignore[no-untyped-call]
    levels = spacing.levels(kept[0]) if steps > 1 else tuple(start)
    return Closed(levels, kept[1] if coefficients else None, before, best)
