"""What is tuned: the levels of a grid, and a solver's table on them, as differentiable functions of free parameters."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from undiffuse.grid import Levels, check_levels
from undiffuse.level import Level, Space
from undiffuse.modal import Modal, counted, grouped
from undiffuse.sample import trajectory
from undiffuse.schedule import Schedule
from undiffuse.solvers import Solver, Spectral
from undiffuse.spectrum import Spectrum
from undiffuse.tableau import Tableau
from undiffuse.types import InputError

ROOM = 5.0  # in lam, beyond the finite levels of a grid, where its schedule has no end
LEAST = 1e-4  # share of a spacing's range that two levels are apart


@dataclass(frozen=True, eq=False)
class Spacing:
    """Levels from parameters (n,): shares of lam in [low, high], by softmax, so that order and both ends hold.

    The first level and clean data stay. The shares lead from `low` to each level in between, and the last one on to
    `high`; where the first level is not pure noise it is `low`.
    """

    first: Level
    space: Space
    low: float
    high: float

    @staticmethod
    def around(schedule: Schedule, levels: Sequence[Level]) -> Spacing:
        """The range in which these levels may move: the schedule's own, or `ROOM` beyond them where that is infinite.

        Raises InputError for levels that rise, start elsewhere than the schedule or do not end at clean data.
        """
        levels, rises = check_levels(levels)
        first, inner = schedule.level(1.0), [float(level.lam) for level in levels[1:-1]]
        same = torch.allclose(torch.stack([first.alpha, first.sigma]), torch.stack([levels[0].alpha, levels[0].sigma]))
        if any(rises) or not levels[-1].is_clean or not same:
            raise InputError("a grid to tune must fall from the schedule's noisiest level to clean data (sigma = 0)")
        start, end = float(first.lam), float(schedule.level(0.0).lam)
        low = start if math.isfinite(start) else min([*inner, -ROOM]) - ROOM
        high = max([*inner, ROOM]) + ROOM if math.isinf(end) else max([end, *(lam + 1e-3 for lam in inner)])
        return Spacing(first, schedule.space, low, high)

    def parameters(self, levels: Sequence[Level]) -> Tensor:
        """The parameters of these levels."""
        lams = torch.tensor([self.low, *(float(level.lam) for level in levels[1:-1]), self.high], dtype=torch.float64)
        share = lams.diff() / (self.high - self.low)
        return ((share - LEAST) / (1 - len(share) * LEAST)).clamp(min=LEAST).log()

    def levels(self, parameters: Tensor) -> Levels:
        """The levels of parameters (n,), through which gradients flow."""
        share = LEAST + (1 - len(parameters) * LEAST) * torch.softmax(parameters, 0)
        lams = self.low + (self.high - self.low) * share.cumsum(0)[:-1]
        return (self.first, *(Level.at(lam, self.space) for lam in lams), Level.at(math.inf, self.space))


@dataclass(frozen=True, eq=False)
class Family:
    """A deterministic solver of one evaluation a step and its additively corrected tables.

    With a `spectrum` each group of its directions has a table (a `Modal`), else all elements share one (a `Tableau`).
    Corrections (groups or 1, n, n), lower triangular and 0 for the solver itself, are changes to the weights of step i,
    in units of the step. They leave exact what the solver integrates exactly: Gaussian data for `Spectral`, else
    constant predictions (so what a row says of its diagonal is not used there). Raises InputError for other solvers.
    """

    solver: Solver
    spectrum: Spectrum | None = None
    groups: int | None = 8
    name: str = ""

    def __post_init__(self) -> None:
        if self.solver.calls != 1 or getattr(self.solver, "adaptive", False):
            raise InputError(f"tuning needs a solver of one evaluation a step, got {self.solver}")
        if self.groups is not None and self.groups < 1:
            raise InputError(f"groups must be >= 1, or None for a table for each direction, got {self.groups}")

    @cached_property
    def _grouped(self) -> tuple[Tensor, Tensor]:
        """Each direction's group and the variance of each group."""
        if self.spectrum is None:
            v = self.solver.variance if isinstance(self.solver, Spectral) else 1.0
            return torch.zeros(1, dtype=torch.long), torch.tensor([v], dtype=torch.float64)
        return grouped(*counted(self.spectrum), self.groups)

    @property
    def group(self) -> Tensor:
        """The number of each direction's group, as in `Modal`."""
        return self._grouped[0]

    @property
    def variances(self) -> Tensor:
        """The variance of each group; 1 without a spectrum."""
        return self._grouped[1]

    @cached_property
    def unit(self) -> Solver:
        """The solver for data of unit variance: a direction of variance v at (alpha, sigma) is one of unit variance at
        (alpha sqrt(v), sigma)."""
        return replace(self.solver, variance=1.0) if isinstance(self.solver, Spectral) else self.solver

    def tables(self, levels: Sequence[Level], corrections: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(points (groups, n, 1 + n), out (groups, 1 + n)): coefficients of x_start and of each x0, differentiable."""
        n, root = len(levels) - 1, self.variances.sqrt()[:, None]
        scaled = [Level(level.alpha * root, level.sigma.expand(root.shape)) for level in levels]
        basis, asked = torch.eye(1 + n, dtype=torch.float64).expand(len(root), -1, -1), []

        def denoise(x: Tensor, level: Level, /) -> Tensor:
            asked.append(x)
            return basis[:, len(asked)]

        for state in trajectory(denoise, basis[:, 0], scaled, self.unit):
            x = state.x
        if len(asked) != n:
            raise InputError(f"tuning needs a solver of one evaluation a step; {self.solver} made {len(asked)} in {n}")
        rows = torch.stack([*asked[1:], x], 1)
        if corrections is not None:
            rows = rows + self._changes(scaled, corrections)
        rows = torch.cat([rows[..., :1], rows[..., 1:] / root[..., None]], -1)
        return torch.cat([basis[:, :1, :], rows[:, :-1]], 1), rows[:, -1]

    def corrections(self, plan: Tableau | Modal) -> Tensor | None:
        """The corrections with which this family on the plan's levels is the plan; None where there are none.

        All deterministic plans that integrate exactly what the family does have some, whatever their solver.
        """
        tables = plan.tables if isinstance(plan, Modal) else (plan,)
        if isinstance(plan, Modal) == (self.spectrum is None) or plan.draws or len(tables) != len(self.variances):
            return None
        if isinstance(plan, Modal) and not (
            torch.equal(plan.group, self.group) and plan.spectrum.shape == getattr(self.spectrum, "shape", None)
        ):
            return None
        levels, root = levels_of(plan), self.variances.sqrt()[:, None]
        try:
            points, out = self.tables(levels)
        except InputError:  # levels at which no step can be taken, as those of plans of two evaluations a step
            return None
        rows = torch.stack([torch.cat([table.points[1:], table.out[None]]) for table in tables])
        change = rows - torch.cat([points[:, 1:], out[:, None]], 1)
        change = torch.cat([change[..., :1], change[..., 1:] * root[..., None]], -1)
        scaled = [Level(level.alpha * root, level.sigma.expand(root.shape)) for level in levels]
        keep, scale, unit = self._scales(scaled)
        before = torch.cat([torch.zeros_like(change[:, :1]), keep[:, 1:, None] * change[:, :-1]], 1)
        found = ((change - before)[..., 1:] / scale[..., None] / unit).tril(self._diagonal)
        again = self.plan(levels, found)
        mine = again.tables if isinstance(again, Modal) else (again,)
        near = (
            torch.allclose(getattr(a, part), getattr(b, part), rtol=1e-6, atol=1e-8)
            for a, b in zip(mine, tables, strict=True)
            for part in ("points", "out")
        )
        return found if all(near) else None

    @property
    def _diagonal(self) -> int:
        """The last diagonal of corrections that has a meaning."""
        return 0 if isinstance(self.unit, Spectral) else -1

    def _scales(self, levels: list[Level]) -> tuple[Tensor, Tensor, Tensor]:
        """What a step keeps of its start (groups, n), its scale (groups, n), and what a correction of 1 is of it
        (groups, n, n), for data of unit variance."""
        alpha, sigma = (torch.stack([getattr(level, c)[:, 0] for level in levels], 1) for c in ("alpha", "sigma"))
        if isinstance(self.unit, Spectral):
            # on g at each evaluation, in angles
            std, phi = (alpha**2 + sigma**2).sqrt(), torch.atan2(alpha, sigma)
            unit = phi.diff(dim=1)[..., None] * (std / sigma.clamp(min=1e-300))[:, None, :-1]
            return std[:, 1:] / std[:, :-1], std[:, 1:], unit
        # in units of the whole weight of a step
        h = (alpha.log() - sigma.log()).diff(dim=1)
        scale = alpha[:, 1:] * -torch.expm1(-h)
        return sigma[:, 1:] / sigma[:, :-1], scale, torch.ones_like(scale)[..., None]

    def _changes(self, levels: list[Level], corrections: Tensor) -> Tensor:
        """What corrections add to the rows after the first (groups, n, 1 + n), for data of unit variance."""
        n = len(levels) - 1
        keep, scale, unit = self._scales(levels)
        on_x0 = corrections.tril(self._diagonal).expand(len(self.variances), n, n) * unit
        if isinstance(self.unit, Spectral):
            # x in g is that of the Gaussian's flow, so that g is 0 for its data
            alpha, sigma = (torch.stack([getattr(level, c)[:, 0] for level in levels], 1) for c in ("alpha", "sigma"))
            std = (alpha**2 + sigma**2).sqrt()
            on_x = -(on_x0 * (alpha / std)[:, None, :-1]).sum(-1, keepdim=True) / std[:, :1, None]
        else:
            # on x0 less the newest one: a constant x0 does not notice
            on_x0 = on_x0 - torch.diag_embed(on_x0.sum(-1))
            on_x = torch.zeros_like(on_x0[..., :1])
        fresh, rows = scale[..., None] * torch.cat([on_x, on_x0], -1), list[Tensor]()
        for i in range(n):  # a later step starts from what earlier ones changed
            rows.append(fresh[:, i] if not rows else keep[:, i, None] * rows[-1] + fresh[:, i])
        return torch.stack(rows, 1)

    def plan(self, levels: Sequence[Level], corrections: Tensor | None = None, name: str = "") -> Tableau | Modal:
        """The solver with these corrections on these levels, to run, show and save."""
        name = name or self.name or type(self.solver).__name__
        with torch.no_grad():
            points, out = self.tables(levels, corrections)
            tables = [assembled(levels, *table, name) for table in zip(points, out, strict=True)]
        return tables[0] if self.spectrum is None else Modal(self.spectrum, self.group, tuple(tables), name)


def assembled(levels: Sequence[Level], points: Tensor, out: Tensor, name: str = "") -> Tableau:
    """The tableau of these coefficients, an evaluation at each level but the last; gradients flow through all parts."""
    alpha, sigma = (torch.stack([getattr(level, c) for level in levels]) for c in ("alpha", "sigma"))
    start, end = (torch.stack([alpha[i], sigma[i]]) for i in (0, -1))
    return Tableau(alpha[:-1], sigma[:-1], points, out, start, end, name)


def levels_of(plan: Tableau | Modal) -> Levels:
    """The levels of a plan's evaluations, and that of its end."""
    return (*plan.levels, Level(*(plan.tables[0] if isinstance(plan, Modal) else plan).end))


def between(family: Family, schedule: Schedule, plans: Mapping[float, Tableau | Modal], w: float) -> Tableau | Modal:
    """The plan for guidance w from the family's `plans` by guidance: levels in lam and corrections linear in w.

    What the family integrates exactly, so does this plan, as no mean of coefficients would. Tune the plans one from
    another (`first` of the ladder), so that they are near enough. Raises InputError for w outside their range, and for
    plans that are not of the family or have different numbers of evaluations.
    """
    below, above = max((v for v in plans if v <= w), default=None), min((v for v in plans if v >= w), default=None)
    if below is None or above is None:
        known = ", ".join(map(str, sorted(plans))) or "no guidance at all"
        raise InputError(f"plans for w = {known} say nothing of w = {w}: tune one for it")
    a, b = (family.corrections(plans[v]) for v in (below, above))
    if a is None or b is None or a.shape != b.shape:
        raise InputError("plans to interpolate must be of the family and have as many evaluations as each other")
    share = (w - below) / (above - below) if above > below else 0.0
    first, *inner, clean = zip(*(levels_of(plans[v]) for v in (below, above)), strict=True)
    levels = (Level.at(torch.lerp(low.lam, high.lam, share), schedule.space) for low, high in inner)
    return family.plan((first[0], *levels, clean[0]), torch.lerp(a, b, share), f"{plans[below].name}, w = {w:g}")
