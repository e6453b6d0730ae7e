"""Tableaux: a solver on a grid as a table of float64 coefficients, traced from the solver's own code."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from undiffuse.grid import check_levels
from undiffuse.level import Level
from undiffuse.sample import trajectory
from undiffuse.solvers import Solver
from undiffuse.types import Denoise, InputError, Noise

FORMAT = "undiffuse-tableau-1"
T = TypeVar("T")


class Moments(NamedTuple):
    """Mean and variance per mode."""

    mean: Tensor
    variance: Tensor


class Parallel(NamedTuple):
    """What `Tableau.parallel` found: x, and its cost: `sweeps` calls of `window` points each instead of `nfe` calls."""

    x: Tensor
    sweeps: int
    nfe: int
    window: int

    def __str__(self) -> str:
        saved, rows = 1 - self.sweeps / self.nfe, self.sweeps * self.window
        return (
            f"{self.sweeps} sweeps instead of {self.nfe} evaluations in a row ({saved:.0%} of the depth saved), "
            f"{rows} rows a sample instead of {self.nfe}"
        )


class Row(NamedTuple):
    """A row as c * previous point + sum of coefficients * columns."""

    keep: float
    terms: list[tuple[int, float]]
    newest: int


@dataclass(frozen=True, eq=False)
class Tableau:
    """n evaluations and m noise draws as coefficients over (x_start, x0_1 ... x0_n, z_1 ... z_m).

    `alpha`, `sigma` (n,): the levels of the evaluations; `points` (n, 1 + n + m): where they are made, lower
    triangular; `out` (1 + n + m): the result; `start`, `end`: (alpha, sigma) of the first and last level. `name` is a
    label, `tuned_on` the hashes of the features on which its coefficients were tuned, whose scores it therefore
    flatters. Raises InputError if the parts do not fit.
    """

    alpha: Tensor
    sigma: Tensor
    points: Tensor
    out: Tensor
    start: Tensor
    end: Tensor
    name: str = ""
    tuned_on: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        n, width = self.points.shape if self.points.ndim == 2 else (0, 0)
        ok = n >= 1 and self.alpha.shape == self.sigma.shape == (n,) and self.out.shape == (width,) and width > n
        if not (ok and self.start.shape == self.end.shape == (2,)):
            raise InputError(
                f"a tableau of points {tuple(self.points.shape)} and out {tuple(self.out.shape)} is broken"
            )
        if not bool(torch.isfinite(self.points).all() and torch.isfinite(self.out).all()):
            raise InputError(f"the coefficients of {self.name or 'a tableau'} must be finite: another grid may help")
        if bool(self.points[:, 1 : 1 + n].triu().any()):
            raise InputError("a tableau's evaluations may only use earlier ones: points must be lower triangular")

    @property
    def nfe(self) -> int:
        """Denoiser evaluations."""
        return len(self.alpha)

    @property
    def draws(self) -> int:
        """Noise draws."""
        return len(self.out) - 1 - self.nfe

    @cached_property
    def levels(self) -> list[Level]:
        """The levels of the evaluations."""
        return [Level(a, s) for a, s in zip(self.alpha, self.sigma, strict=True)]

    @cached_property
    def plan(self) -> tuple[list[Row], list[list[int]]]:
        """Short rows, and the columns that can be forgotten after each."""
        rows = [*self.points, self.out]
        plan, before = [], torch.zeros_like(self.out)
        for row in rows:
            keep = float(row[0] / before[0]) if before[0] != 0 else 0.0
            rest = row - keep * before
            rest[rest.abs() <= 1e-13 * (row.abs() + (keep * before).abs())] = 0
            if keep == 0 or int((rest != 0).sum()) >= int((row != 0).sum()):
                keep, rest = 0.0, row
            terms = [(int(j), float(rest[j])) for j in rest.nonzero()[:, 0]]
            plan.append(Row(keep, terms, max((j for j, _ in terms), default=0)))
            before = row
        last = {j: i for i, row in enumerate(plan) for j, _ in row.terms}
        return plan, [[j for j in last if last[j] == i] for i in range(len(plan))]

    @staticmethod
    def _point(row: Row, before: Tensor, known: dict[int, Tensor]) -> Tensor:
        """One in-place combination of the point before and of predictions and noise."""
        fresh = before * row.keep if row.keep else None
        for j, c in row.terms:
            fresh = known[j] * c if fresh is None else fresh.add_(known[j], alpha=c)
        return torch.zeros_like(before) if fresh is None else fresh

    def run(self, denoise: Denoise, x: Tensor, noise: Noise | None = None) -> Tensor:
        """The result from x at the start level, equal to the driver's to rounding.

        Each point is one in-place combination of the point before it, the newest predictions and noise; predictions
        are forgotten after their last use. Raises InputError if noise is needed and not given.
        """
        n, (plan, done) = self.nfe, self.plan
        if self.draws and noise is None:
            raise InputError(f"this tableau draws noise {self.draws} times: pass noise=Noise(x.shape, seed=...)")
        known: dict[int, Tensor] = {0: x}
        point, drawn = x, 1 + n
        for i, row in enumerate(plan):
            while noise is not None and drawn <= row.newest:  # in the order in which the driver draws
                known[drawn] = noise()
                drawn += 1
            point = self._point(row, point, known)
            for j in done[i]:
                known.pop(j, None)
            if i < n:
                known[1 + i] = denoise(point, self.levels[i])
        return point

    def parallel(
        self, denoise: Denoise, x: Tensor, noise: Noise | None = None, window: int | None = None, tol: float = 1e-7
    ) -> Parallel:
        """What `run` gives, by Picard iteration in time (Shih et al. 2023, arXiv 2305.16317): fewer calls in a row.

        All points of a sliding `window` (default: all) are evaluated in one call and made anew from the answers, until
        each prediction moves by less than `tol` (root mean square over every sample, relative to 1 + that of the
        prediction). The first point of the window is exact in every sweep, so there are at most as many sweeps as
        evaluations. `denoise` sees window * b rows, sample j in rows j, b + j, ...: bind a condition as
        `cond[torch.arange(b).repeat(window)]`. Raises InputError for a bad window or tol and missing noise.
        """
        n, b, (plan, _) = self.nfe, x.shape[0], self.plan
        window = n if window is None else window
        if not (1 <= window <= n and tol > 0):
            raise InputError(f"parallel needs 1 <= window <= {n} (the evaluations) and tol > 0, got {window} and {tol}")
        if self.draws and noise is None:
            raise InputError(f"this tableau draws noise {self.draws} times: pass noise=Noise(x.shape, seed=...)")
        known = {0: x} | {1 + n + k: noise() for k in range(self.draws) if noise is not None}
        lo, sweeps, base = 0, 0, x
        while lo < n:
            at = [min(lo + k, n - 1) for k in range(window)]
            for i in at:  # a new point starts from the prediction before it, or from x itself
                known.setdefault(1 + i, known[i])
            points, point = [], base
            for i in dict.fromkeys(at):
                point = self._point(plan[i], point, known)
                points.append(point)
            rows = torch.cat([points[i - lo] for i in at])
            level = Level(
                *(c[at].repeat_interleave(b).reshape(-1, *(1 for _ in x.shape[1:])) for c in (self.alpha, self.sigma))
            )
            answers = denoise(rows, level.to(x.device)).reshape(window, *x.shape)
            exact = True
            for k, i in enumerate(dict.fromkeys(at)):
                new = answers[k]
                moved = (new - known[1 + i]).flatten(1).square().mean(1).sqrt()
                small = bool((moved <= tol * (1 + new.flatten(1).square().mean(1).sqrt())).all())
                known[1 + i] = new
                if exact and (k == 0 or small):
                    lo, base = i + 1, points[k]
                else:
                    exact = False
            sweeps += 1
        return Parallel(self._point(plan[n], base, known), sweeps, n, window)

    def inverse(self, denoise: Denoise, x: Tensor, tol: float = 1e-9, sweeps: int = 400, share: float = 0.8) -> Tensor:
        """The start from which `run` arrives at x: the exact inverse of a deterministic tableau, not of the ODE.

        Fixed-point iteration on the noise predictions, from the end backwards, each moved by `share` of its change,
        until the start moves by less than `tol` per element, or the rounding of x's dtype. Raises InputError for
        tableaux that draw noise, start at pure noise or end at clean data (both forget x), for a bad share or sweeps,
        and where `sweeps` do not suffice: take smaller steps, less guidance, or a smaller share.

        >>> from undiffuse import DDIM, Gaussian, Spectrum, VP, UniformLam, trace
        >>> model, levels = Gaussian(Spectrum(torch.zeros(1), torch.ones(1))), UniformLam()(VP(), 8)[:-1]
        >>> plan, x = trace(DDIM(), levels), torch.tensor([[0.5]]).double()
        >>> bool((plan.run(model, plan.inverse(model, x)) - x).abs() < 1e-8)
        True
        """
        if not (0 < share <= 1 and sweeps >= 1):
            raise InputError(f"inverse needs 0 < share <= 1 and sweeps >= 1, got {share} and {sweeps}")
        if self.draws:
            raise InputError(f"this tableau draws noise {self.draws} times: only deterministic ones have an inverse")
        heads = torch.cat([self.points[:, 0], self.out[:1]])
        if not bool((heads.abs() > 1e-12).all() and (self.alpha > 0).all()):
            raise InputError("the inverse needs levels with alpha > 0 and sigma > 0, start and end included")
        tol = max(tol, 16 * torch.finfo(x.dtype).eps * float(x.abs().max()))
        keep, table = heads[1:] / heads[:-1], torch.cat([self.points, self.out[None]])
        rest = table[1:, 1:] - keep[:, None] * table[:-1, 1:]
        x0 = {i: denoise(x, level) for i, level in enumerate(self.levels)}
        eps = {i: (x - level.alpha * x0[i]) / level.sigma for i, level in enumerate(self.levels)}
        start = x
        for _ in range(sweeps):
            point, last = x, start
            for i in reversed(range(self.nfe)):
                level, own = self.levels[i], float(rest[i, i])
                point = point - sum(float(rest[i, j]) * x0[j] for j in range(i) if rest[i, j] != 0)
                point = (point + own * level.sigma / level.alpha * eps[i]) / (keep[i] + own / level.alpha)
                x0[i] = denoise(point, level)
                eps[i] = torch.lerp(eps[i], (point - level.alpha * x0[i]) / level.sigma, share)
            start, moved = point, float((point - last).abs().max())
            if moved <= tol * share:
                return start / heads[0]
        raise InputError(
            f"the inverse did not settle in {sweeps} sweeps: take more steps, less guidance or a smaller share"
        )

    def gaussian(self, variances: Tensor, means: Tensor | None = None, exact_start: bool = False) -> Moments:
        """Exact output mean and variance per mode for Gaussian data with these variances (k,) and means (default 0).

        The denoiser is the exact one; x starts at N(0, sigma^2) as samplers do, or at the data's true marginal with
        `exact_start`. No network and no sampling.

        >>> from undiffuse import DDIM, VP, UniformT, trace
        >>> round(float(trace(DDIM(), UniformT()(VP(), 1000)).gaussian(torch.tensor([0.25])).variance), 3)
        0.248
        """
        variances = torch.as_tensor(variances, dtype=torch.float64).reshape(-1)
        means = torch.as_tensor(0.0 if means is None else means, dtype=torch.float64).expand(variances.shape)
        chunk = max(1, 2**22 // self.nfe**2)  # modes at once: their systems stay small
        pairs = zip(torch.split(variances, chunk), torch.split(means, chunk), strict=True)
        found = [self._gaussian(v[:, None], m[:, None], exact_start) for v, m in pairs]
        return Moments(torch.cat([f.mean for f in found]), torch.cat([f.variance for f in found]))

    def _gaussian(self, v: Tensor, m: Tensor, exact_start: bool) -> Moments:
        n = self.nfe
        gain = self.alpha * v / (self.alpha**2 * v + self.sigma**2)
        # x0 = gain x + shift at every point; solve the triangular system for the effect of each x0 on the output
        lower = torch.eye(n, dtype=torch.float64) - self.points[:, 1 : 1 + n] * gain[:, None]
        effect = torch.linalg.solve_triangular(lower.mT, (self.out[1 : 1 + n] * gain)[..., None], upper=True)[..., 0]
        drawn = torch.cat([self.points[:, :1], self.points[:, 1 + n :]], 1)
        row = torch.cat([self.out[:1], self.out[1 + n :]]) + effect @ drawn
        shift = (1 - gain * self.alpha) * m
        prior = self.start[1] ** 2 + (self.start[0] ** 2 * v[:, 0] if exact_start else 0)
        mean = (shift * (self.out[1 : 1 + n] + effect @ self.points[:, 1 : 1 + n])).sum(1)
        if exact_start:
            mean = mean + row[:, 0] * self.start[0] * m[:, 0]
        return Moments(mean, row[:, 0] ** 2 * prior + row[:, 1:].square().sum(1))

    def show(self, digits: int = 4) -> str:
        """The table as text: one line an evaluation, with its level and its non-zero coefficients."""
        n = self.nfe
        names = ["x", *(f"D{i + 1}" for i in range(n)), *(f"z{i + 1}" for i in range(self.draws))]
        lines = [f"{self.name or 'tableau'}: {n} evaluations, {self.draws} noise draws"]
        for i, row in enumerate([*self.points, self.out]):
            terms = [f"{float(row[int(j)]):+.{digits}f} {names[int(j)]}" for j in row.nonzero()[:, 0]]
            lam = f"lam {float(self.levels[i].lam):+.3f}" if i < n else "result"
            lines.append(f"{f'D{i + 1} at' if i < n else 'x_end':>7} {lam:>12} : {' '.join(terms) or '0'}")
        return "\n".join(lines)

    def save(self, path: str | Path, made_for: Mapping[str, Any] | None = None) -> None:
        """Write as safetensors with a JSON header, which says what it was `made_for`; exact."""
        names = ("alpha", "sigma", "points", "out", "start", "end")
        header = {"format": FORMAT, "name": self.name, "tuned_on": self.tuned_on}
        write(path, {k: getattr(self, k) for k in names}, header, made_for)

    @staticmethod
    def load(path: str | Path) -> Tableau:
        """Read what `save` wrote; raises InputError for any other or a damaged file."""
        return read(path, {FORMAT: made_tableau})


def made_tableau(parts: dict[str, Tensor], header: dict[str, Any]) -> Tableau:
    """The tableau of a file's tensors and header."""
    named = {k: parts[k].double() for k in ("alpha", "sigma", "points", "out", "start", "end")}
    return Tableau(**named, name=str(header["name"]), tuned_on=tuple(map(str, header.get("tuned_on", ()))))


def write(
    path: str | Path, parts: dict[str, Tensor], header: dict[str, Any], made_for: Mapping[str, Any] | None
) -> None:
    """Write a plan's tensors and header, with their hash."""
    from safetensors.torch import save

    parts = {k: v.detach().cpu().clone(memory_format=torch.contiguous_format) for k, v in parts.items()}
    header = json.loads(json.dumps(header | {"made_for": dict(made_for or {})}))
    header["sha256"] = _digest(parts, header)
    Path(path).write_bytes(save(parts, metadata={"undiffuse": json.dumps(header)}))


def _digest(parts: dict[str, Tensor], header: dict[str, Any]) -> str:
    """The hash of all that a plan's file says."""
    found = hashlib.sha256(json.dumps({k: v for k, v in header.items() if k != "sha256"}, sort_keys=True).encode())
    for name in sorted(parts):
        found.update(name.encode() + parts[name].numpy().tobytes())
    return found.hexdigest()


def made_for(path: str | Path) -> dict[str, Any]:
    """What the plan in a file was made for, as `save` was told; InputError for what is no plan's file."""
    return dict(contents(path)[1].get("made_for", {}))


def read(path: str | Path, formats: Mapping[str, Callable[[dict[str, Tensor], dict[str, Any]], T]]) -> T:
    """What the format of a file makes of its tensors and its JSON header; InputError for a file of no such format."""
    parts, header = contents(path)
    try:
        return formats[header["format"]](parts, header)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} is not a readable plan ({' or '.join(formats)}): {error}") from error


def contents(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A plan file's tensors and header; InputError for any other file, and where a bit has changed."""
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise InputError(f"{path} is not a readable plan: there is no such file")
    try:
        with safe_open(path, "pt") as f:
            header = json.loads((f.metadata() or {}).get("undiffuse", "{}"))
            parts = {key: f.get_tensor(key) for key in f.keys()}  # noqa: SIM118 (it is no dict)
        if "format" not in header:
            raise ValueError("it is a file of another kind")
        if header["sha256"] != _digest(parts, header):
            raise ValueError("it is damaged, what it holds is not what was written")
        if not all(bool(torch.isfinite(part).all()) for part in parts.values()):
            raise ValueError("it has coefficients that are NaN or infinite")
    except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
        raise InputError(f"{path} is not a readable plan: {error}") from error
    return parts, header


def trace(solver: Solver, levels: Sequence[Level], name: str = "") -> Tableau:
    """The tableau of a solver on a grid: its `step` is run on basis vectors, so the table is the code.

    Raises InputError for solvers that depend on the data (learned variance, adaptive steps) and for levels per sample.

    >>> from undiffuse import DDIM, VP, UniformT
    >>> print(trace(DDIM(), UniformT()(VP(), 1)).show())
    tableau: 1 evaluations, 0 noise draws
      D1 at   lam -5.025 : +1.0000 x
      x_end       result : +1.0000 D1
    """
    levels = check_levels(levels).levels
    if getattr(solver, "adaptive", False):
        raise InputError(
            f"{type(solver).__name__} chooses its steps from the data: it cannot be traced, use trajectory"
        )
    if any(level.alpha.ndim for level in levels):
        raise InputError("a tableau has one grid for all samples: levels must be 0-dim")
    width, n, m = 0, 0, 0  # a first pass counts, the second records
    for _ in range(2):
        basis = torch.eye(width, dtype=torch.float64) if width else torch.zeros(1, 1, dtype=torch.float64)
        asked: list[tuple[Level, Tensor]] = []
        drawn: list[int] = []

        def denoise(x: Tensor, level: Level, /, asked=asked, basis=basis, width=width) -> Tensor:  # type: ignore[no-untyped-def]
            asked.append((level, x))
            return basis[len(asked)] if width else x * 0  # type: ignore[no-any-return]

        def noise(drawn=drawn, basis=basis, n=n, width=width) -> Tensor:  # type: ignore[no-untyped-def]
            drawn.append(1)
            return basis[n + len(drawn)] if width else basis[0] * 0  # type: ignore[no-any-return]

        x = basis[0]
        for state in trajectory(denoise, x, levels, solver, noise):
            x = state.x
        n, m = len(asked), len(drawn)
        width = 1 + n + m
    return Tableau(
        torch.stack([level.alpha for level, _ in asked]),
        torch.stack([level.sigma for level, _ in asked]),
        torch.stack([point for _, point in asked]),
        x,
        torch.stack([levels[0].alpha, levels[0].sigma]),
        torch.stack([levels[-1].alpha, levels[-1].sigma]),
        name,
    )
