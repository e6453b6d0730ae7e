"""Tableaux that act in an orthonormal basis, a table for each group of directions; the spectral solver is one."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from undiffuse.grid import Levels
from undiffuse.level import Level
from undiffuse.schedule import Schedule
from undiffuse.solvers.spectral import Spectral
from undiffuse.spectrum import Spectrum
from undiffuse.tableau import FORMAT as TABLEAU
from undiffuse.tableau import Tableau, made_tableau, read, trace, write
from undiffuse.types import Denoise, InputError, Noise

FORMAT = "undiffuse-modal-1"
FLOOR = 1e-12  # of the mean variance: `Spectral` has a limit as variance vanishes, and this is near it
SHARED = ("alpha", "sigma", "start", "end")


class Frame:
    """Mean, basis, each coordinate's group and the coefficients in the dtype and on the device of the samples x."""

    def __init__(self, spectrum: Spectrum, group: Tensor, coefficients: Tensor, x: Tensor) -> None:
        k, d = len(spectrum.variances), len(spectrum.mean)
        self.mean = spectrum.mean.to(x)
        self.rows = None if spectrum.basis is None else spectrum.basis.to(x).contiguous()
        self.k, self.complete, self.coefficients = k, k == d, coefficients.to(x)
        self.group = (group if k == d else torch.cat([group[:k], group[k:].expand(d)])).to(x.device)

    def there(self, x: Tensor, alpha: float) -> Tensor:
        """x (b, *data) less alpha times the mean, as coefficients (b, k), then what lies outside the basis (b, d)."""
        x = x.reshape(len(x), -1).to(self.mean.dtype) - alpha * self.mean
        if self.rows is None:
            return x
        inside = x @ self.rows.T
        return inside if self.complete else torch.cat([inside, x.addmm_(inside, self.rows, alpha=-1)], 1)

    def back(self, c: Tensor, alpha: float) -> Tensor:
        """The flat samples with these coordinates."""
        if self.rows is None:
            return c + alpha * self.mean
        x = c[:, : self.k] @ self.rows
        return (x if self.complete else x.add_(c[:, self.k :])).add_(self.mean, alpha=alpha)


class Plan(NamedTuple):
    """Rows as (column, place of its coefficients), column -1 being the point before; `coefficients` (places, groups);
    the columns that can be forgotten after each row."""

    rows: list[list[tuple[int, int]]]
    coefficients: Tensor
    done: list[list[int]]


@dataclass(frozen=True, eq=False)
class Modal:
    """One `Tableau` a group of directions of a spectrum, acting on what x and the predictions have there.

    `group` holds the number of each direction's table, and last that of the complement where the basis is not complete.
    The tables share their levels and act on centred coordinates: x - alpha mean and x0 - mean. Raises InputError if the
    parts do not fit.
    """

    spectrum: Spectrum
    group: Tensor
    tables: tuple[Tableau, ...]
    name: str = ""

    def __post_init__(self) -> None:
        k, d = len(self.spectrum.variances), len(self.spectrum.mean)
        object.__setattr__(self, "tables", tuple(self.tables))
        object.__setattr__(self, "group", self.group.long())
        if self.group.shape != (k + (k < d),) or not self.tables:
            raise InputError(f"{k} directions of {d} need {k + (k < d)} group numbers, got {tuple(self.group.shape)}")
        if not bool(((self.group >= 0) & (self.group < len(self.tables))).all()):
            raise InputError(f"groups must be numbers of the {len(self.tables)} tables, 0 to {len(self.tables) - 1}")
        for table in self.tables:
            first = self.tables[0]
            same = all(torch.equal(getattr(table, part), getattr(first, part)) for part in SHARED)
            if not (same and table.out.shape == first.out.shape):
                raise InputError("the tables of all groups must have the same levels, evaluations and noise draws")

    @property
    def nfe(self) -> int:
        """Denoiser evaluations."""
        return self.tables[0].nfe

    @property
    def draws(self) -> int:
        """Noise draws."""
        return self.tables[0].draws

    @property
    def levels(self) -> list[Level]:
        """The levels of the evaluations."""
        return self.tables[0].levels

    @property
    def start(self) -> Tensor:
        """(alpha, sigma) of the first level."""
        return self.tables[0].start

    @property
    def end(self) -> Tensor:
        """(alpha, sigma) of the last level."""
        return self.tables[0].end

    @property
    def tuned_on(self) -> tuple[str, ...]:
        """The hashes of the features on which any of the tables was tuned."""
        return tuple(dict.fromkeys(feature for table in self.tables for feature in table.tuned_on))

    @cached_property
    def _plan(self) -> Plan:
        rows: list[list[tuple[int, int]]] = []
        coefficients: list[list[float]] = []
        for parts in zip(*(table.plan[0] for table in self.tables), strict=True):
            of_groups = [{-1: part.keep, **dict(part.terms)} for part in parts]
            rows.append([])
            for j in sorted(set().union(*of_groups)):
                if any(values := [of_group.get(j, 0.0) for of_group in of_groups]):
                    rows[-1].append((j, len(coefficients)))
                    coefficients.append(values)
        last = {j: i for i, row in enumerate(rows) for j, _ in row if j >= 0}
        done = [[j for j in last if last[j] == i] for i in range(len(rows))]
        return Plan(rows, torch.tensor(coefficients, dtype=torch.float64).reshape(-1, len(self.tables)), done)

    @cached_property
    def _frames(self) -> dict[tuple[torch.dtype, torch.device], Frame]:
        return {}

    def _frame(self, x: Tensor) -> Frame:
        key = (x.dtype, x.device)
        if key not in self._frames:
            self._frames[key] = Frame(self.spectrum, self.group, self._plan.coefficients, x)
        return self._frames[key]

    def run(self, denoise: Denoise, x: Tensor, noise: Noise | None = None) -> Tensor:
        """The result from x (b, *data) at the start level, in x's dtype and on its device.

        Every evaluation and draw is carried to the basis, and every point back, once. Raises InputError if noise is
        needed and not given, and for samples of another size than the spectrum's.
        """
        if self.draws and noise is None:
            raise InputError(f"this plan draws noise {self.draws} times: pass noise=Noise(x.shape, seed=...)")
        if x[0].numel() != len(self.spectrum.mean):
            raise InputError(f"samples of {x[0].numel()} elements for a spectrum of {len(self.spectrum.mean)}")
        kind = x.to(torch.promote_types(x.dtype, torch.float32))  # coefficients of half precision would be rounded
        frame, plan, n, table = self._frame(kind), self._plan, self.nfe, self.tables[0]
        alphas = [*table.alpha.tolist(), float(table.end[0])]
        known, drawn, point = {0: frame.there(kind, float(table.start[0]))}, 1 + n, x
        before = known[0]
        for i, row in enumerate(plan.rows):
            while noise is not None and drawn <= max((j for j, _ in row), default=0):  # in the driver's order
                known[drawn] = frame.there(noise(), 0.0)
                drawn += 1
            now = torch.zeros_like(before)
            for j, place in row:
                now.addcmul_(before if j < 0 else known[j], frame.coefficients[place][frame.group])
            for j in plan.done[i]:
                known.pop(j, None)
            before, point = now, frame.back(now, alphas[i]).reshape(x.shape).to(x.dtype)
            if i < n:
                known[1 + i] = frame.there(denoise(point, table.levels[i]), 1.0)
        return point

    def gaussian(self, spectrum: Spectrum | None = None, exact_start: bool = False) -> Spectrum:
        """The exact distribution of the output for Gaussian data of a spectrum in this basis (default: this one).

        As `Tableau.gaussian`, for every direction and the complement. Raises InputError for another basis.
        """
        data = self.spectrum if spectrum is None else spectrum
        mine, other = self.spectrum.basis, data.basis
        same = mine is other or (mine is not None and other is not None and torch.equal(mine, other))
        if data.mean.shape != self.spectrum.mean.shape or not same:
            raise InputError(
                "the Gaussian's spectrum must be in the basis of this plan: build it with the same `basis`"
            )
        k, frame = len(data.variances), self._frame(data.mean)
        values, _ = counted(data)
        cold, warm, variance = torch.zeros(3, len(values), dtype=torch.float64)
        for g in sorted(set(self.group.tolist())):
            of, table = self.group == g, self.tables[g]
            found = [table.gaussian(values[of], torch.ones_like(values[of]), exact) for exact in (False, True)]
            cold[of], warm[of], variance[of] = found[0].mean, found[1].mean, found[exact_start].variance
        # both are per unit of the data's distance from the mean; their difference is what the start's adds
        cold, warm = (torch.cat([m[:k], m[k:].expand(len(frame.group) - k)]) for m in (cold, warm))
        off, origin = frame.there(data.mean[None], 1.0), frame.there(self.spectrum.mean[None], 0.0)
        mean = frame.back(warm * off if exact_start else cold * off - (warm - cold) * origin, float(table.end[0]))
        rest = float(variance[k]) if len(variance) > k else 0.0
        return Spectrum(mean[0], variance[:k], mine, rest, self.spectrum.shape)

    def show(self, digits: int = 4) -> str:
        """The tables as text, each under the number of its directions and their standard deviations."""
        variances, count = counted(self.spectrum)
        std = variances.sqrt()
        lines = [f"{self.name or 'modal'}: {self.nfe} evaluations, {self.draws} noise draws, {len(self.tables)} groups"]
        for g, table in enumerate(self.tables):
            of = (self.group == g).nonzero()[:, 0]
            if len(of):
                ends = f"std {float(std[of].min()):.3g} to {float(std[of].max()):.3g}"
                lines.append(f"group {g}, {int(count[of].sum())} directions, {ends}: {table.show(digits)}")
        return "\n".join(lines)

    def save(self, path: str | Path, made_for: Mapping[str, Any] | None = None) -> None:
        """Write as safetensors with a JSON header, which says what it was `made_for`; exact."""
        first, s = self.tables[0], self.spectrum
        parts = {name: getattr(first, name) for name in SHARED} | {"group": self.group}
        parts |= {name: torch.stack([getattr(table, name) for table in self.tables]) for name in ("points", "out")}
        parts |= {"mean": s.mean, "variances": s.variances, "rest": torch.tensor(s.rest, dtype=torch.float64)}
        parts |= {"shape": torch.tensor(s.shape)} | ({} if s.basis is None else {"basis": s.basis})
        names = {"names": [t.name for t in self.tables], "tuned_on": [t.tuned_on for t in self.tables]}
        write(path, parts, {"format": FORMAT, "name": self.name} | names, made_for)

    @staticmethod
    def load(path: str | Path) -> Modal:
        """Read what `save` wrote; raises InputError for any other or a damaged file."""
        return read(path, {FORMAT: made_modal})


def made_modal(t: dict[str, Tensor], header: dict[str, Any]) -> Modal:
    """The modal plan of a file's tensors and header."""
    shape = tuple(int(n) for n in t["shape"])
    spectrum = Spectrum(t["mean"], t["variances"], t.get("basis"), float(t["rest"]), shape)
    parts = zip(t["points"], t["out"], header["names"], header["tuned_on"], strict=True)
    tables = [
        Tableau(t["alpha"], t["sigma"], points, out, t["start"], t["end"], str(name), tuple(map(str, tuned)))
        for points, out, name, tuned in parts
    ]
    return Modal(spectrum, t["group"], tuple(tables), str(header["name"]))


def read_plan(path: str | Path) -> Tableau | Modal:
    """The `Tableau` or `Modal` that was saved there; raises InputError for any other or a damaged file."""
    formats: dict[str, Callable[..., Tableau | Modal]] = {TABLEAU: made_tableau, FORMAT: made_modal}
    return read(path, formats)


def grouped(variances: Tensor, count: Tensor, groups: int | None) -> tuple[Tensor, Tensor]:
    """The group of each variance, that of `count` directions, and the variance of each group.

    By k-means in log variance, in which a direction weighs as its standard deviation, begun at equal intervals above a
    millionth of the mean variance. A group has the mean log variance of its directions. `FLOOR` bounds all from below.
    """
    mean = float((variances * count).sum() / count.sum()) or 1.0
    v = variances.clamp(min=FLOOR * mean)
    if groups is None:
        centres, group = torch.unique(v, return_inverse=True)
        return group, centres
    u, weight = v.log(), v.sqrt() * count
    low = u.min().clamp(min=math.log(1e-6 * mean))
    centres = low + (u.max() - low) * (torch.arange(groups, dtype=u.dtype) + 0.5) / groups
    for _ in range(100):
        _, group = torch.unique((u[:, None] - centres).abs().argmin(1), return_inverse=True)  # empty groups go
        total = torch.zeros(int(group.max()) + 1, dtype=u.dtype).index_add(0, group, weight)
        centres = torch.zeros_like(total).index_add(0, group, weight * u) / total
    return group, centres.exp()


def counted(spectrum: Spectrum) -> tuple[Tensor, Tensor]:
    """The variances of all directions, that of the complement last where there is one, and the number of each."""
    k, d = len(spectrum.variances), len(spectrum.mean)
    values = torch.cat([spectrum.variances, torch.tensor([spectrum.rest], dtype=torch.float64)])[: k + (k < d)]
    count = torch.ones_like(values)
    count[k:] = d - k
    return values, count


def spectral(
    spectrum: Spectrum, levels: Sequence[Level], order: int = 3, corrector: bool = True, groups: int | None = 8
) -> Modal:
    """The `Spectral` solver on these levels with the variances of the data's own directions, in `groups` tables.

    Directions of similar variance share a table (see `grouped`); with groups=None each has its own, and Gaussian data
    of this spectrum are sampled exactly, in any number of steps. `SpectralGrid` gives the levels that suit it. Take
    order=1 under strong guidance at few evaluations. Raises InputError for groups < 1 and bad levels.

    >>> from undiffuse import VP, UniformLam
    >>> data = Spectrum(torch.tensor([1.0, 2.0]), torch.tensor([0.5, 0.01]))
    >>> plan = spectral(data, UniformLam()(VP(), 3), groups=None)
    >>> [round(float(v), 6) for v in plan.gaussian(exact_start=True).variances]
    [0.5, 0.01]
    """
    if groups is not None and groups < 1:
        raise InputError(f"groups must be >= 1, or None for a table for each direction, got {groups}")
    group, centres = grouped(*counted(spectrum), groups)
    tables = [trace(Spectral(float(v), order, corrector), levels, f"spectral {v**0.5:.3g}") for v in centres]
    return Modal(spectrum, group, tuple(tables), f"spectral {order}")


@dataclass(frozen=True, eq=False)
class SpectralGrid:
    """Levels for `spectral`, a grid: equal shares of a density in lam that is high where much variance turns.

    In direction i the angle of `Spectral` turns by sech(lam - lam_i) / 2 per lam, lam_i = -log(std_i). The density is
    (sum_i v_i^(3/4) sech(lam - lam_i)^6)^(1/6): v_i and 6 give every step of second order the same local error in all,
    and the lower power leaves more steps to the weak directions. The last level lies within the schedule's range.

    >>> from undiffuse import EDM
    >>> levels = SpectralGrid(Spectrum(torch.zeros(2), torch.tensor([1.0, 0.01])))(EDM(), 4)
    >>> [round(float(level.sigma), 2) for level in levels]
    [80.0, 1.8, 0.64, 0.13, 0.0]
    """

    spectrum: Spectrum

    def __call__(self, schedule: Schedule, steps: int) -> Levels:
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise InputError(f"steps must be a whole number >= 1, got {steps!r}")
        values, count = counted(self.spectrum)
        group, v = grouped(values, count, 64)
        weight = torch.zeros_like(v).index_add(0, group, count) * v**0.75
        first, clean = schedule.level(1.0), Level.at(math.inf, schedule.space)
        place = -v.log() / 2
        low = first.lam if bool(first.alpha > 0) else place.min() - 20
        high = torch.minimum(schedule.level(0.0).lam, place.max() + 20)
        lam = torch.linspace(float(low), float(high), 8193, dtype=torch.float64)
        density = (weight / torch.cosh(lam[:, None] - place) ** 6).sum(1) ** (1 / 6)
        share = torch.cat([torch.zeros(1, dtype=lam.dtype), torch.cumsum(density[1:] + density[:-1], 0)])
        wanted = share[-1] * torch.arange(1, steps, dtype=lam.dtype) / steps
        after = torch.searchsorted(share, wanted)
        part = (wanted - share[after - 1]) / (share[after] - share[after - 1])
        lams = torch.lerp(lam[after - 1], lam[after], part)
        return (first, *(Level.at(at, schedule.space) for at in lams), clean)
