"""The ladder: the spectrum's grid, the paths' grid, then gradients, each kept only where held-out noise agrees."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from undiffuse.grid import Levels
from undiffuse.modal import Modal, SpectralGrid, spectral
from undiffuse.schedule import Schedule
from undiffuse.solvers import DPMpp2M, Spectral
from undiffuse.spectrum import Spectrum
from undiffuse.tableau import Tableau
from undiffuse.tune.coefficients import Bind, Ends, Errors, Run, tune_coefficients
from undiffuse.tune.family import Family
from undiffuse.tune.gaussian import tune_gaussian
from undiffuse.tune.trajectory import Paths, jump_costs, shortest
from undiffuse.types import InputError

SLACK = 1.1  # by which RMS and 90th percentile, which few samples rule, may exceed those of the rung below
PATHS, STEPS = 16, 60  # of the teacher of the grid


class Rung(NamedTuple):
    """One rung of a family: errors on the noise that it was tuned on and on held-out noise, and whether it is kept."""

    family: str
    name: str
    tuned: Errors
    held_out: Errors
    kept: bool
    seconds: float

    def __str__(self) -> str:
        verdict = "kept" if self.kept else "not kept: the rung below is better on held-out noise"
        numbers = f"tuned {self.tuned}, held out {self.held_out}, {self.seconds:.1f} s"
        return f"  {self.family:12} {self.name:10} {numbers}  {verdict}"


@dataclass(frozen=True, eq=False)
class Result:
    """The chosen plan for one budget, its rungs in order, and the held-out errors of the first and the chosen one."""

    plan: Tableau | Modal
    rungs: tuple[Rung, ...]
    start: Errors
    chosen: Errors

    def __str__(self) -> str:
        gain = self.chosen.median / max(self.start.median, 1e-300)
        head = f"{self.plan.nfe} evaluations: {self.plan.name}, median held-out error {gain:.2f} of the start's"
        return "\n".join([head, *map(str, self.rungs)])


@dataclass(frozen=True, eq=False)
class Report:
    """`results` by number of evaluations, and the seconds spent in all. Errors are printed as median, RMS, 90 %."""

    results: dict[int, Result] = field(default_factory=dict)
    seconds: float = 0.0

    def __str__(self) -> str:
        return "\n".join([*map(str, self.results.values()), f"{self.seconds:.0f} s in all"])


def wins(new: Errors, old: Errors) -> bool:
    """Whether held-out errors are better: a lower median, RMS and 90th percentile at most `SLACK` times as high."""
    return new.median < old.median and new.rms <= SLACK * old.rms and new.high <= SLACK * old.high


def families(spectrum: Spectrum) -> dict[str, Family]:
    """The families tried by default, the first one being the start that others must beat."""
    return {
        "spectral 3": Family(Spectral(order=3), spectrum),
        "spectral 1": Family(Spectral(order=1), spectrum),
        "dpmpp-2m": Family(DPMpp2M()),
    }


@dataclass(eq=False)
class _Climb:
    """One family at one budget: what is kept so far, and its rungs."""

    family: Family
    name: str
    tuning: Ends
    held_out: Ends
    levels: Levels
    corrections: Tensor | None = None
    best: Errors | None = None
    rungs: list[Rung] = field(default_factory=list)

    def attempt(self, name: str, levels: Levels, corrections: Tensor | None, seconds: float) -> None:
        """Measure a rung and keep it where it wins."""
        plan = self.family.plan(levels, corrections)
        tuned, held_out = (ends.errors(plan.run, levels[0]) for ends in (self.tuning, self.held_out))
        kept = self.best is None or wins(held_out, self.best)
        self.rungs.append(Rung(self.name, name, tuned, held_out, kept, seconds))
        if kept:
            self.levels, self.corrections, self.best = levels, corrections, held_out


def ladder(
    bind: Bind,
    shape: Sequence[int],
    schedule: Schedule,
    nfe: Sequence[int],
    spectrum: Spectrum,
    *,
    tried: dict[str, Family] | None = None,
    reference: Run | None = None,
    tuning: int = 48,
    held_out: int = 64,
    seconds: float = 90.0,
    iterations: int = 400,
    seed: int = 0,
    save: bool = True,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
    progress: Callable[[str], None] | None = None,
) -> Report:
    """The best plan for each number of evaluations in `nfe`, in about `seconds` of gradient steps for each of them.

    `bind(indices)` is the denoiser of samples of `shape` with these numbers, condition and guidance bound. Each family
    climbs from `SpectralGrid`: levels in closed form (plain families), levels from the paths of `PATHS` noises, levels
    and corrections by gradient on `tuning` noises, whose loss is the mean log error. A rung is kept where it `wins` on
    `held_out` other noises, and so is a family over the first. `reference` (default: `spectral` in 150 steps) gives
    the ends. Raises InputError for budgets < 1 and fewer than 2 noises.
    """
    if not nfe or min(nfe) < 1 or max(nfe) > STEPS or min(tuning, held_out) < 2:
        raise InputError(
            f"the ladder needs budgets of 1 to {STEPS} evaluations and at least 2 noises to tune on and 2 to hold out, "
            f"got {tuple(nfe)}, {tuning} and {held_out}"
        )
    begun, first, grid = time.monotonic(), schedule.level(1.0), SpectralGrid(spectrum)
    tried = tried or families(spectrum)
    reference = reference or spectral(spectrum, grid(schedule, 150)).run
    sigma = float(first.sigma)
    train, test = (
        Ends.draw(bind, range(start, start + count), shape, reference, sigma, seed, dtype, device)
        for start, count in ((0, tuning), (tuning, held_out))
    )
    few = train.part(range(min(PATHS, tuning)))
    paths = Paths.walk(few.bind(few.indices), sigma * few.noise, grid(schedule, STEPS), Spectral(spectrum.std**2))
    ways = {}
    for name, family in tried.items():
        ways[name] = shortest(jump_costs(family, paths), max(nfe))
    results: dict[int, Result] = {}
    for n in nfe:
        climbs = []
        for name, family in tried.items():
            climb = _Climb(family, name, train, test, grid(schedule, n))
            climb.attempt("start", climb.levels, None, 0.0)
            if family.spectrum is None:
                clock = time.monotonic()
                closed = tune_gaussian(family, schedule, n, spectrum, climb.levels)
                climb.attempt("spectrum", closed.levels, None, time.monotonic() - clock)
            climb.attempt("paths", tuple(paths.levels[i] for i in ways[name][n]), None, 0.0)
            climbs.append(climb)
        # gradients for the best in the data's directions and the best plain one: where they start says little about
        # which of the two kinds will win
        climbs.sort(key=lambda climb: climb.best.median if climb.best else 0.0)
        kinds = {climb.family.spectrum is None: climb for climb in reversed(climbs)}
        hopeful = list(kinds.values())
        for climb in hopeful:
            found = tune_coefficients(
                climb.family,
                train,
                schedule,
                climb.levels,
                seconds=seconds / len(hopeful),
                iterations=iterations,
                save=save,
            )
            climb.attempt("gradient", found.levels, found.corrections, found.seconds)
        start = next(climb for climb in climbs if climb.name == next(iter(tried)))
        zero = start.rungs[0].held_out
        fit = [climb for climb in climbs if climb.best is not None and (climb is start or wins(climb.best, zero))]
        chosen = min(fit, key=lambda climb: climb.best.median if climb.best else 0.0)
        assert chosen.best is not None
        plan = chosen.family.plan(chosen.levels, chosen.corrections, f"{chosen.name}, tuned")
        ordered = [climb for name in tried for climb in climbs if climb.name == name]
        results[n] = Result(plan, tuple(rung for climb in ordered for rung in climb.rungs), zero, chosen.best)
        if progress is not None:
            progress(str(results[n]))
    return Report(results, time.monotonic() - begun)
