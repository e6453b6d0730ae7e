"""Levels and coefficients by gradient through the whole run, against accurate ends from the same noise.

The class of LD3 (arXiv 2405.15506: levels), BNS (2403.01329: coefficients), S4S (2502.17423) and GS (2510.17699:
corrections around the theory's coefficients at the current levels, which is what `Family` has).
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from undiffuse.grid import Levels
from undiffuse.level import Level
from undiffuse.modal import Frame
from undiffuse.sample import Noise
from undiffuse.schedule import Schedule
from undiffuse.tune.family import Family, Spacing
from undiffuse.types import Denoise, InputError

Bind = Callable[[Sequence[int]], Denoise]
Run = Callable[[Denoise, Tensor], Tensor]
RUNAWAY = 1e3  # the loss of a line search's points where it is not finite
SCALE = 0.3  # of corrections against levels in the search: it brings L-BFGS as far in 30 evaluations as 1 does in 60


class Errors(NamedTuple):
    """Over samples, of |x_end - reference| / |reference|: the median, the root mean square, the 90th percentile; and
    the variance `kept`: the total variance of the ends over that of the reference's."""

    median: float
    rms: float
    high: float
    kept: float

    @staticmethod
    def of(relative: Tensor, kept: float = 1.0) -> Errors:
        """Of relative errors (b,); an error that is not a number counts as infinite."""
        r = torch.nan_to_num(relative.double(), nan=math.inf)
        high = r.sort().values[min(len(r) - 1, math.ceil(0.9 * len(r)) - 1)]
        return Errors(float(r.median()), float(r.square().mean().sqrt()), float(high), kept)

    def __str__(self) -> str:
        return f"{self.median:.4f} {self.rms:.4f} {self.high:.4f} {self.kept:.3f}"


@dataclass(frozen=True, eq=False)
class Ends:
    """Unit noise and accurate ends (b, *data) of samples with these `indices`; `bind(indices)` is their denoiser."""

    bind: Bind
    indices: tuple[int, ...]
    noise: Tensor
    end: Tensor

    @staticmethod
    def draw(
        bind: Bind,
        indices: Sequence[int],
        shape: Sequence[int],
        reference: Run,
        sigma: float,
        seed: int = 0,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str = "cpu",
    ) -> Ends:
        """The ends of `reference(denoise, x)` from x = sigma z, z as `sample` draws it for (seed, index)."""
        noise = Noise((len(indices), *shape), seed, indices, dtype, device)()
        with torch.no_grad():
            return Ends(bind, tuple(indices), noise, reference(bind(indices), sigma * noise))

    def part(self, rows: Sequence[int]) -> Ends:
        """Those in these rows."""
        return Ends(self.bind, tuple(self.indices[k] for k in rows), self.noise[list(rows)], self.end[list(rows)])

    def relative(self, x: Tensor) -> Tensor:
        """|x - end| / |end| of each sample (b,)."""
        off, size = (x - self.end).flatten(1).double(), self.end.flatten(1).double().norm(dim=1)
        relative: Tensor = off.square().sum(1).clamp(min=1e-300).sqrt() / size.clamp(min=1e-300)
        return relative

    def errors(self, run: Run, first: Level) -> Errors:
        """Errors of a plan's `run` from this noise at its first level."""
        with torch.no_grad():
            x = run(self.bind(self.indices), first.sigma * self.noise)
        new, due = (float(ends.flatten(1).double().var(0).sum()) for ends in (x, self.end))
        return Errors.of(self.relative(x), new / max(due, 1e-300))


def endpoint(
    family: Family, levels: Sequence[Level], corrections: Tensor | None, denoise: Denoise, x: Tensor, save: bool = True
) -> Tensor:
    """What `family.plan(levels, corrections).run(denoise, x)` gives, differentiable in levels and corrections.

    With `save` the evaluations are computed again in the backward pass, so that memory holds one at a time.
    """

    def again(x: Tensor, level: Level) -> Tensor:
        return denoise(x, Level(level.alpha, level.sigma))  # a level remembers its lam, which must be made again, too

    points, out = family.tables(levels, corrections)
    rows, n, shape = torch.cat([points, out[:, None]], 1).to(x.device), len(levels) - 1, x.shape
    frame = None if family.spectrum is None else Frame(family.spectrum, family.group, out, x)
    alphas = [float(level.alpha.detach()) for level in levels]
    known = [x if frame is None else frame.there(x, alphas[0])]
    for i in range(n + 1):
        if i == 0:
            point = x
        elif frame is None:
            point = sum((c * v for c, v in zip(rows[0, i], known, strict=False)), torch.zeros_like(x)).to(x.dtype)
        else:
            of = rows[:, i, : i + 1].to(known[0].dtype)[frame.group]
            coordinates = sum((of[:, j] * v for j, v in enumerate(known)), torch.zeros_like(known[0]))
            point = back(frame, coordinates, levels[i].alpha).reshape(shape).to(x.dtype)
        if i == n:
            return point
        x0 = checkpoint(again, point, levels[i], use_reentrant=False) if save else denoise(point, levels[i])
        known.append(x0 if frame is None else frame.there(x0, 1.0))
    raise AssertionError("unreachable")


def back(frame: Frame, coordinates: Tensor, alpha: Tensor) -> Tensor:
    """`Frame.back` with an alpha through which gradients flow."""
    return frame.back(coordinates, 0.0) + alpha * frame.mean


class Tuned(NamedTuple):
    """Levels and corrections, the mean relative error before and after, evaluations of the loss and seconds spent."""

    levels: Levels
    corrections: Tensor
    before: float
    after: float
    iterations: int
    seconds: float


class _TimeOut(Exception):
    pass


def check_effort(seconds: float, iterations: int) -> None:
    """InputError unless both are numbers above 0."""
    if not (isinstance(seconds, int | float) and seconds > 0 and iterations > 0):
        raise InputError(f"tuning needs seconds > 0 and iterations > 0, got {seconds} and {iterations}")


def tune_coefficients(
    family: Family,
    ends: Ends,
    schedule: Schedule,
    start: Sequence[Level],
    *,
    corrections: Tensor | None = None,
    shared: bool = False,
    seconds: float = 60.0,
    iterations: int = 400,
    save: bool = True,
) -> Tuned:
    """Levels and corrections by L-BFGS on the mean over samples of |x_end - end| / |end|, from the grid `start`.

    The mean of squares would be ruled by the few paths that end in another mode, and the mean logarithm has no slope
    out of many poor starts. `shared` gives the groups of a spectrum one table of corrections. Stops after `seconds`,
    `iterations` evaluations of the loss or where it no longer falls, with the best found. Raises InputError for
    seconds or iterations <= 0 and impossible grids.
    """
    check_effort(seconds, iterations)
    spacing, n, begun = Spacing.around(schedule, start), len(start) - 1, time.monotonic()
    tables = 1 if shared else len(family.variances)
    change = torch.zeros(tables, n, n, dtype=torch.float64) if corrections is None else corrections.expand(tables, n, n)
    place, change = spacing.parameters(start).requires_grad_(), (change / SCALE).requires_grad_()
    free, denoise = [place, change], ends.bind(ends.indices)
    optimiser = torch.optim.LBFGS(
        free, max_iter=iterations, max_eval=iterations, history_size=40, line_search_fn="strong_wolfe"
    )
    losses: list[float] = []
    kept = [p.detach().clone() for p in free]

    def closure() -> Tensor:
        nonlocal kept
        if time.monotonic() - begun > seconds:
            raise _TimeOut
        x = endpoint(family, spacing.levels(place), SCALE * change, denoise, spacing.first.sigma * ends.noise, save)
        loss = ends.relative(x).mean().log()
        slopes = torch.autograd.grad(loss, free, materialize_grads=True)  # one step has no level to move
        now = loss.detach()
        sound = all(bool(torch.isfinite(part).all()) for part in (now, *slopes))
        for parameter, slope in zip(free, slopes, strict=True):
            parameter.grad = slope if sound else torch.zeros_like(slope)
        if not sound:
            return torch.full_like(now, RUNAWAY)
        if float(now) < min(losses, default=math.inf):
            kept = [p.detach().clone() for p in free]
        losses.append(float(now))
        return now

    with contextlib.suppress(_TimeOut):
        optimiser.step(closure)  # type: ignore[no-untyped-call]
    before, after = (math.exp(losses[0]), math.exp(min(losses))) if losses else (math.inf, math.inf)
    return Tuned(spacing.levels(kept[0]), SCALE * kept[1], before, after, len(losses), time.monotonic() - begun)
