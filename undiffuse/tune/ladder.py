"""The ladder: the plan to beat, grids from the spectrum and from paths, then gradients; each kept where it wins."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from undiffuse.grid import Levels
from undiffuse.modal import SpectralGrid, spectral
from undiffuse.schedule import Schedule
from undiffuse.solvers import DPMpp2M, Spectral
from undiffuse.spectrum import Spectrum
from undiffuse.tune.auto import Plan
from undiffuse.tune.auto import reference as accurate
from undiffuse.tune.coefficients import Bind, Ends, Errors, Run, Tuned, check_effort, tune_coefficients
from undiffuse.tune.family import Family, Spacing, levels_of
from undiffuse.tune.gaussian import tune_gaussian
from undiffuse.tune.trajectory import Paths, jump_costs, shortest
from undiffuse.types import InputError

VARIANCE = 0.02  # by which the variance kept may be off where that of the plan to beat is nearer
PATHS, STEPS = 16, 60  # of the teacher of the grid
PROBE = 0.15  # of the evaluations of the loss, for each kind of family, before the better one has the rest


def refusal(new: Errors, first: Errors, best: Errors) -> str:
    """Why held-out errors do not win over those of the plan to beat and of the best so far; empty where they do.

    They must have a lower median than `first`, no higher RMS or 90th percentile, and a variance kept, on which nothing
    is tuned, as near to 1 or within `VARIANCE`; and a lower product of the three errors than `best`.
    """
    if not new.median < first.median:
        return "its median error is not lower"
    for name, a, b in (("RMS error", new.rms, first.rms), ("90th percentile", new.high, first.high)):
        if not a <= b:
            return f"its {name} is higher"
    if not abs(new.kept - 1) <= max(abs(first.kept - 1), VARIANCE):
        verb = "adds" if new.kept > 1 else "loses"
        return f"it {verb} variance: {new.kept:.3f} of the reference's against {first.kept:.3f}"
    return "" if best == first or merit(new) < merit(best) else "a rung below is better"


def merit(errors: Errors) -> float:
    """The product of median, RMS and 90th percentile: one of them alone would be too noisy, or miss the tail."""
    return errors.median * errors.rms * errors.high


class Rung(NamedTuple):
    """One rung: errors on the noise that it was tuned on and on held-out noise, `why` it is not kept ("" where it is).

    A rung that is worse on the noise that it was tuned on is not measured on other noise.
    """

    family: str
    name: str
    tuned: Errors
    held_out: Errors | None
    why: str
    seconds: float

    @property
    def kept(self) -> bool:
        """Whether it won over the rungs below."""
        return not self.why

    def __str__(self) -> str:
        held_out = "" if self.held_out is None else f", held out {self.held_out}"
        verdict = "kept" if self.kept else f"not kept: {self.why}"
        return f"  {self.family:24} {self.name:9} tuned {self.tuned}{held_out}, {self.seconds:.1f} s  {verdict}"


@dataclass(frozen=True, eq=False)
class Result:
    """The chosen `plan` for one budget, its `rungs` in order, and the plan to beat, `first`.

    `start` and `chosen` are the errors of `first` and `plan` on noise which neither tuning nor choosing has seen. The
    `family` on `levels` with `corrections` is the plan; all None where it is `first`.
    """

    plan: Plan
    first: Plan
    rungs: tuple[Rung, ...]
    start: Errors
    chosen: Errors
    family: str | None = None
    levels: Levels | None = None
    corrections: Tensor | None = None

    def __str__(self) -> str:
        gain = self.chosen.median / max(self.start.median, 1e-300)
        head = f"{self.plan.nfe} evaluations: {self.plan.name}, median error on fresh noise {gain:.2f} of the first's"
        return "\n".join([head, *map(str, self.rungs), f"  on fresh noise: first {self.start}, chosen {self.chosen}"])


@dataclass(frozen=True, eq=False)
class Report:
    """`results` by number of evaluations, the `fresh` noise on which they were measured, and the seconds spent in all.

    Errors are printed as median, RMS, 90th percentile and variance kept.
    """

    results: dict[int, Result]
    fresh: Ends
    seconds: float = 0.0

    def __str__(self) -> str:
        return "\n".join([*map(str, self.results.values()), f"{self.seconds:.0f} s in all"])


def families(spectrum: Spectrum) -> dict[str, Family]:
    """The families tried by default; gradients start from the best of a kind and go on in the first of it.

    With corrections it holds all the others. From order 1, whose tables depend on the levels least, gradients come
    further than from order 3.
    """
    return {
        "spectral 1": Family(Spectral(order=1), spectrum),
        "spectral 3": Family(Spectral(order=3), spectrum),
        "dpmpp-2m": Family(DPMpp2M()),
    }


class Start(NamedTuple):
    """Where gradients may start: a family's levels and corrections, and the median error on the noise to tune on."""

    name: str
    family: Family
    levels: Levels
    corrections: Tensor | None
    median: float


@dataclass(eq=False)
class _Climb:
    """One budget: what is kept so far, the rungs, and where gradients may start."""

    first: Plan
    tuning: Ends
    held_out: Ends
    levels: Levels
    kept: Start | None = None
    rungs: list[Rung] = field(default_factory=list)
    starts: list[Start] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.tuned, self.zero = (ends.errors(self.first.run, self.levels[0]) for ends in (self.tuning, self.held_out))
        self.best = self.zero
        self.rungs.append(Rung(self.first.name, "first", self.tuned, self.zero, "", 0.0))

    def attempt(
        self, name: str, rung: str, family: Family, levels: Levels, corrections: Tensor | None, seconds: float = 0.0
    ) -> None:
        """Measure a rung, keep it where it wins over the rung below and over the first, and note it as a start."""
        run, held_out, why = family.plan(levels, corrections).run, None, "it is worse on the noise to tune on"
        tuned = self.tuning.errors(run, levels[0])
        start = Start(name, family, levels, corrections, tuned.median)
        if tuned.median < self.tuned.median:
            held_out = self.held_out.errors(run, levels[0])
            why = refusal(held_out, self.zero, self.best)
            if not why:
                self.kept, self.best = start, held_out
        self.rungs.append(Rung(name, rung, tuned, held_out, why, seconds))
        self.starts.append(start)


def ladder(
    bind: Bind,
    shape: Sequence[int],
    schedule: Schedule,
    nfe: Sequence[int],
    spectrum: Spectrum,
    *,
    first: Callable[[int], Plan] | None = None,
    tried: dict[str, Family] | None = None,
    reference: Run | None = None,
    tuning: int = 48,
    held_out: int = 64,
    fresh: int = 64,
    seconds: float = 90.0,
    iterations: int = 400,
    seed: int = 0,
    save: bool = True,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
    progress: Callable[[int, Result], None] | None = None,
) -> Report:
    """The best plan for each number of evaluations in `nfe`, in about `seconds` of gradient steps for each of them.

    `bind(indices)` is the denoiser of samples of `shape` with these numbers, condition and guidance bound. `first`
    gives the plan that must be beaten (default: `spectral` on `SpectralGrid`). Rungs start from its levels, and from
    its coefficients in a family that has them: levels from the spectrum in closed form, levels from the paths of
    `PATHS` noises, then levels and corrections by gradient on `tuning` noises from the best so far with a spectrum and
    the best without; both see half of the noises, and the one that comes further has the rest of the time on all. A
    rung is kept where it wins (see `refusal`) on `held_out` other noises over the first plan and over the rungs below;
    `fresh` others measure what was chosen. `reference` (default: that of `auto`) gives the ends. Raises InputError for
    budgets < 1, fewer than 2 noises, and a first plan of another budget.
    """
    if isinstance(nfe, int) or not all(isinstance(n, int) for n in nfe):
        raise InputError(f"nfe is a list of whole numbers such as [4, 6, 8], got {nfe!r}")
    if not isinstance(spectrum, Spectrum):
        raise InputError(f"tuning needs the data's Spectrum, such as Spectrum.measure(x), got {spectrum!r}")
    if not nfe or min(nfe) < 1 or max(nfe) > STEPS or min(tuning, held_out, fresh) < 2:
        raise InputError(
            f"the ladder needs budgets of 1 to {STEPS} evaluations and at least 2 noises to tune on, 2 to hold out and "
            f"2 fresh ones, got {tuple(nfe)}, {tuning}, {held_out} and {fresh}"
        )
    check_effort(seconds, iterations)
    begun, grid = time.monotonic(), SpectralGrid(spectrum)
    tried = families(spectrum) if tried is None else tried
    first = first or (lambda n: spectral(spectrum, grid(schedule, n)))
    reference = reference or accurate(schedule, max(nfe), spectrum).run
    sigma = float(schedule.level(1.0).sigma)
    train, test, new = (
        Ends.draw(bind, range(start, start + count), shape, reference, sigma, seed, dtype, device)
        for start, count in ((0, tuning), (tuning, held_out), (tuning + held_out, fresh))
    )
    few = train.part(range(min(PATHS, tuning)))
    paths = Paths.walk(few.bind(few.indices), sigma * few.noise, grid(schedule, STEPS), Spectral(spectrum.std**2))
    ways = {name: shortest(jump_costs(family, paths), max(nfe)) for name, family in tried.items()}
    results: dict[int, Result] = {}
    for n in nfe:
        plan = first(n)
        if plan.nfe != n:
            raise InputError(f"the first plan of {n} evaluations has {plan.nfe}")
        levels = levels_of(plan)
        fits = _fits(schedule, levels)
        climb = _Climb(plan, train, test, levels if fits else grid(schedule, n))
        for name, family in tried.items():
            corrections = family.corrections(plan) if fits else None
            if corrections is not None:
                climb.starts.append(Start(name, family, levels, corrections, climb.tuned.median))
            else:
                climb.attempt(name, "levels", family, climb.levels, None)
            clock = time.monotonic()
            if family.spectrum is None:
                closed = tune_gaussian(family, schedule, n, spectrum, climb.levels).levels
            else:
                closed = grid(schedule, n)
            climb.attempt(name, "spectrum", family, closed, None, time.monotonic() - clock)
            climb.attempt(name, "paths", family, tuple(paths.levels[i] for i in ways[name][n]), None)
        _gradients(climb, tried, schedule, seconds, iterations, save)
        results[n] = _result(climb, new)
        if progress is not None:
            progress(n, results[n])
    return Report(results, new, time.monotonic() - begun)


def _fits(schedule: Schedule, levels: Levels) -> bool:
    """Whether gradients can start from these levels."""
    try:
        Spacing.around(schedule, levels)
    except InputError:
        return False
    return True


def _gradients(
    climb: _Climb, tried: dict[str, Family], schedule: Schedule, seconds: float, iterations: int, save: bool
) -> None:
    """The gradient rung: the best start of each kind, with a spectrum and without, on half of the noises; then the one
    that comes further on all of them."""
    kinds: dict[bool, Start] = {}
    for start in sorted(climb.starts, key=lambda start: start.median):
        kinds.setdefault(start.family.spectrum is None, start)
    for kind, start in kinds.items():  # the same plan in the first family of its kind
        name, family = next(item for item in tried.items() if (item[1].spectrum is None) == kind)
        corrections = family.corrections(start.family.plan(start.levels, start.corrections))
        if corrections is not None:
            kinds[kind] = start._replace(name=name, family=family, corrections=corrections)
    half = climb.tuning.part(range((len(climb.tuning.indices) + 1) // 2))

    def tuned(start: Start, ends: Ends, part: float) -> tuple[Start, Tuned]:
        evaluations = max(1, round(part * iterations))
        found = tune_coefficients(
            start.family, ends, schedule, start.levels,
            corrections=start.corrections, seconds=part * seconds, iterations=evaluations, save=save,
        )  # fmt: skip
        return start._replace(levels=found.levels, corrections=found.corrections), found

    probed = [tuned(start, half, PROBE) for start in kinds.values()]
    best, before = min(probed, key=lambda pair: pair[1].after)
    more, after = tuned(best, climb.tuning, 1 - PROBE * len(probed))
    for start, found in probed:
        if start is not best:
            climb.attempt(start.name, "gradient", start.family, start.levels, start.corrections, found.seconds)
    spent = before.seconds + after.seconds
    climb.attempt(more.name, "gradient", more.family, more.levels, more.corrections, spent)


def _result(climb: _Climb, fresh: Ends) -> Result:
    first, kept, level = climb.first, climb.kept, climb.levels[0]
    start = fresh.errors(first.run, level)
    if kept is None:
        return Result(first, first, tuple(climb.rungs), start, start)
    plan = kept.family.plan(kept.levels, kept.corrections, f"{kept.name}, tuned")
    found = fresh.errors(plan.run, level)
    return Result(plan, first, tuple(climb.rungs), start, found, kept.name, kept.levels, kept.corrections)
