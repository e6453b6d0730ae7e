"""Levels and coefficients from the data's spectrum alone, in closed form: no call of the network."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from undiffuse.grid import Grid, Levels, UniformLam
from undiffuse.level import Level
from undiffuse.modal import Modal, SpectralGrid, counted, grouped
from undiffuse.schedule import Schedule
from undiffuse.solvers import Spectral
from undiffuse.spectrum import Spectrum
from undiffuse.tableau import Tableau
from undiffuse.tune.family import Family, Spacing, assembled
from undiffuse.types import InputError

WIDTH = 1.0  # in log variance: how far from the fitted ones the variances of other data of this kind may lie
ORDERS = (4, 32)  # of the norms over variances: the second is near the maximum
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


def gains(levels: Sequence[Level], points: Tensor, out: Tensor, variance: Tensor) -> Tensor:
    """What deterministic tables (groups, ...) of a `Family` make of unit noise at the first level, for centred Gaussian
    data of each variance (groups, k): the std of the output, with its sign; differentiable."""
    known = [torch.ones_like(variance)]
    for i, level in enumerate(levels[:-1]):
        point = torch.stack([points[:, i, j, None] * known[j] for j in range(i + 1)]).sum(0)
        known.append(level.alpha * variance / (level.alpha**2 * variance + level.sigma**2) * point)
    std: Tensor = levels[0].sigma * (torch.stack(known, -1) * out[:, None]).sum(-1)
    return std


def tune_kept(
    family: Family,
    schedule: Schedule,
    steps: int,
    spectrum: Spectrum,
    grid: Grid | Sequence[Level] | None = None,
    *,
    least: float = 0.0,
    width: float = WIDTH,
    iterations: int = 150,
) -> Closed:
    """Levels and corrections of a plain solver that keep the variance of Gaussian data, for all spectra near this one.

    What a table keeps of a variance depends on the variance alone: so a table that keeps all in a range holds for every
    spectrum in it. The range of each group reaches from its least variance, that is at least `least` (below which
    nothing is seen, such as the rounding of the data), to its largest, and by `width` in log variance beyond; the
    errors in `Closed` are the largest |kept - 1| there. L-BFGS on norms of log kept, from `grid` (default:
    `SpectralGrid`). One table of n evaluations can approximate the root of the variance no better than a rational
    function can (Zolotarev): on a range of ratio K to about 8 exp(-2 pi^2 (n - 1) / log(16 K)), the first evaluation
    being of noise alone. Raises InputError for `Spectral`, which is exact on the fitted spectrum alone, and a grid that
    does not fall from the schedule's noisiest level to clean data.
    """
    if isinstance(family.solver, Spectral):
        raise InputError("tune_kept fits plain solvers, such as DPMpp2M: Spectral is made for one spectrum")
    start = grid if isinstance(grid, Sequence) else (grid or SpectralGrid(spectrum))(schedule, steps)
    if len(start) != steps + 1:
        raise InputError(f"{steps} steps need {steps + 1} levels, got {len(start)}")
    values, _ = counted(spectrum)
    floor = max(least, 1e-12 * float(values.max()))
    ranges = []
    for g, own in enumerate(family.variances):
        of = values if family.spectrum is None else torch.cat([values[family.group == g], own[None]])
        low, high = (float(end.clamp(min=floor).log()) for end in (of.min(), of.max()))
        ranges.append(torch.linspace(low - width, high + width, 96 if len(family.variances) == 1 else 24))
    variance = torch.stack(ranges).double().exp()
    spacing = Spacing.around(schedule, start)
    place = spacing.parameters(start).requires_grad_()
    change = torch.zeros(len(variance), steps, steps, dtype=torch.float64).requires_grad_()
    free, kept, best, before = [place, change], [place.detach(), change.detach()], math.inf, math.inf

    def off() -> Tensor:
        levels = spacing.levels(place)
        return gains(levels, *family.tables(levels, change), variance) / variance.sqrt() - 1

    for order in ORDERS:
        optimiser = torch.optim.LBFGS(
            free, max_iter=iterations, max_eval=iterations, history_size=60, tolerance_grad=0, tolerance_change=0,
            line_search_fn="strong_wolfe",
        )  # fmt: skip

        def closure(order: int = order) -> Tensor:
            nonlocal kept, best, before
            error = off()
            worst = float(((error.detach() + 1).square() - 1).abs().max())
            before = worst if math.isinf(before) else before
            if worst < best:
                best, kept = worst, [p.detach().clone() for p in free]
            scale = error.detach().abs().max()
            loss = (error.abs().clamp(min=1e-12) / scale).pow(order).mean().log() / order + scale.log()
            sound = bool(torch.isfinite(loss))
            slopes = torch.autograd.grad(loss, free) if sound else [torch.zeros_like(p) for p in free]
            for parameter, slope in zip(free, slopes, strict=True):
                parameter.grad = slope
            return loss.detach() if sound else torch.full_like(loss.detach(), 1e3)

        optimiser.step(closure)  # type: ignore[no-untyped-call]
    return Closed(spacing.levels(kept[0]), kept[1], before, best)
