"""`auto`: the sampler for those who do not choose one, found by a closed form and then by a few trials."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from undiffuse.denoise import Counter
from undiffuse.grid import Grid, Karras, Levels, Quadratic, UniformLam, UniformT, check_levels
from undiffuse.guide import Guidance, guide_of, prepared
from undiffuse.modal import Modal, SpectralGrid, spectral
from undiffuse.sample import Noise
from undiffuse.schedule import Schedule
from undiffuse.seeds import seed_of
from undiffuse.solvers import DEIS, IPNDM, Adams, DPMpp2M, Solver, UniPC
from undiffuse.spectrum import Spectrum
from undiffuse.tableau import Tableau, trace
from undiffuse.tune.gaussian import mismatch
from undiffuse.types import InputError, Model

Plan = Tableau | Modal

# the simpler comes first: it wins ties
CLASSIC: dict[str, Callable[[Schedule], Solver]] = {
    "dpmpp-2m": lambda schedule: DPMpp2M(),
    "unipc-2": lambda schedule: UniPC(2),
    "unipc-3": lambda schedule: UniPC(3),
    "adams-2-eps": lambda schedule: Adams(2, prediction="eps"),
    "adams-3-eps": lambda schedule: Adams(3, prediction="eps"),
    "ipndm-3": lambda schedule: IPNDM(3),
    "ipndm-4": lambda schedule: IPNDM(4),
    "deis-3": lambda schedule: DEIS(3, schedule=schedule),
}
SPECTRAL: dict[str, tuple[int, bool]] = {  # order, corrector
    "spectral-1": (1, False),
    "spectral-1c": (1, True),
    "spectral-2": (2, False),
    "spectral-2c": (2, True),
    "spectral-3": (3, False),
    "spectral-3c": (3, True),
}
ALSO = ("spectral", "uniform-lam-4", "karras-0.02")  # the grids of spectral solvers, whose tables take longer
GRIDS: dict[str, Callable[[Spectrum], Grid]] = {
    "spectral": SpectralGrid,
    "uniform-lam-2": lambda data: UniformLam(lam_max=2.0),
    "uniform-lam-3": lambda data: UniformLam(lam_max=3.0),
    "uniform-lam-4": lambda data: UniformLam(lam_max=4.0),
    "uniform-lam-5": lambda data: UniformLam(lam_max=5.0),
    "karras-0.1": lambda data: Karras(sigma_min=0.1),
    "karras-0.05": lambda data: Karras(sigma_min=0.05),
    "karras-0.02": lambda data: Karras(sigma_min=0.02),
    "karras-0.002": lambda data: Karras(),
    "uniform-t": lambda data: UniformT(),
    "quadratic": lambda data: Quadratic(),
}
WORST = 1 / 3  # of the plans that the closed form discards
SHOWN = 6  # plans in a printed choice
FEW, SOME = 4, 12  # noises of the first and the second round; the third has all
KEPT, LAST = 16, 5  # plans in the second and the third
FINE = 8  # evaluations of the reference for each of a plan's, and at least LEAST
LEAST = 40
TIE = 0.02  # errors this near to the least are equal, and the simpler plan is taken
STRONG = 5.0  # guidance from which extrapolation runs away with few evaluations
UNKNOWN = Spectrum(torch.zeros(9), 10.0 ** -torch.arange(0, 4.5, 0.5, dtype=torch.float64))  # data of all scales


class Trial(NamedTuple):
    """What a plan was found to do: its error on Gaussian data of the data's covariance, in closed form, and the median
    and 90th percentile (`tail`) over `noises` of its relative error at the end, nan where it was not tried."""

    name: str
    gaussian: float
    error: float = math.nan
    tail: float = math.nan
    noises: int = 0


@dataclass(frozen=True, eq=False)
class Choice:
    """The chosen `plan`, what was considered (best first), and the network rows that it cost."""

    plan: Plan
    trials: tuple[Trial, ...] = ()
    rows: int = 0

    def __str__(self) -> str:
        tried = [trial for trial in self.trials if trial.noises]
        lines = [f"{self.plan.name}: {self.plan.nfe} evaluations, chosen " + ("by rule" if not tried else "by trial")]
        if tried:
            lines[0] += f" of {len(tried)} of {len(self.trials)} plans, {self.rows:,} network rows"
            lines.append(f"{'plan':28} {'Gaussian error':>14} {'median error':>13} {'of 90 %':>9} {'noises':>7}")
        best = tried[:SHOWN]
        lines += [f"{t.name:28} {t.gaussian:14.4f} {t.error:13.4f} {t.tail:9.4f} {t.noises:7}" for t in best]
        return "\n".join(lines)


def auto(
    model: Model,
    shape: Sequence[int],
    schedule: Schedule,
    nfe: int,
    *,
    spectrum: Spectrum | None = None,
    noises: int = 32,
    cond: Any = None,
    guidance: Guidance | float = 1.0,
    seed: int = 0,
    batch: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> Choice:
    """The plan of `nfe` evaluations that is nearest to the exact probability flow, of all those in the tables here.

    A closed form, the error on Gaussian data of the data's `spectrum`, discards a third of all solvers on all levels;
    the others are run from 4 noises, the best 16 of them from 12 and the best 5 from all `noises`, beside a solution in
    8 times as many evaluations, which together costs what 800 samples do. The least median of |x - reference| /
    |reference| wins, ties go to the simpler. With noises=0 the choice is by rule and costs no call; without a spectrum
    it is among multistep solvers.

    `shape` is that of one sample; `cond` has `noises` rows, `guidance` is as in `sample`: a plan holds for one w.
    `batch` bounds the noises in memory, `progress` sees (runs done, runs to do). Deterministic in `seed`, whose noises
    are none that `sample` draws. Raises InputError for bad input, and where no plan gives finite samples.

    >>> from undiffuse import VP, Gaussian
    >>> data = Spectrum(torch.zeros(2), torch.tensor([1.0, 0.01]))
    >>> auto(Gaussian(data), (2,), VP(), 5, spectrum=data, noises=0).plan.name
    'spectral-3c on spectral'
    """
    guide = guide_of(guidance)
    _check(shape, nfe, spectrum, noises, cond, batch)
    if not noises:
        return Choice(_made(*rule(nfe, spectrum, getattr(guide, "w", 1.0)), schedule, nfe, spectrum))
    plans, gaussian = shortlist(schedule, nfe, spectrum)
    counter, few = Counter(model), min(FEW, noises)
    z = Noise((noises, *shape), seed_of(seed, noises), dtype=dtype, device=device)()
    names, errors = list(plans), {name: torch.empty(0, dtype=torch.float64) for name in plans}
    rounds = [(range(0, few), len(names))]  # the noises of each round and how many plans see them
    for upto, keep in ((min(SOME, noises), KEPT), (noises, LAST)):
        if upto > rounds[-1][0].stop:
            rounds.append((range(rounds[-1][0].stop, upto), min(keep, rounds[-1][1])))
    total = 1 + sum(keep for _, keep in rounds)

    @torch.no_grad()
    def run(plan: Plan, rows: range) -> Tensor:
        out = []
        for start in range(rows.start, rows.stop, batch or noises):
            part = slice(start, min(rows.stop, start + (batch or noises)))
            denoise = prepared(guide, plan)(counter, None if cond is None else cond[part].to(device))
            out.append(plan.run(denoise, plan.start[1] * z[part]))
        return torch.cat(out).flatten(1).double().cpu()

    def tell(done: int) -> None:
        if progress is not None:
            progress(done, total)

    def median(name: str) -> float:
        return float(errors[name].median())

    tell(0)
    due = run(reference(schedule, nfe, spectrum), range(noises))
    if not bool(torch.isfinite(due).all()):
        raise InputError("the model's samples are NaN or infinite even in many evaluations: no sampler can mend that")
    done, size = 1, due.norm(dim=1).clamp(min=torch.finfo(dtype).tiny)
    for rows, keep in rounds:
        names = sorted(names, key=median)[:keep] if done > 1 else names
        for name in names:
            tell(done)
            x = run(plans[name], rows)
            off = ((x - due[rows.start : rows.stop]).norm(dim=1) / size[rows.start : rows.stop]).nan_to_num(math.inf)
            errors[name], done = torch.cat([errors[name], off]), done + 1
    tell(total)
    least = min(map(median, names))
    if math.isinf(least):
        raise InputError(f"no sampler of {nfe} evaluations gives finite samples: take more, or less guidance")
    floor = 10 * torch.finfo(dtype).eps  # what lies below is rounding
    equal = [name for name in plans if name in names and median(name) <= max((1 + TIE) * least, floor)]
    tails = {name: float(off.sort().values[math.ceil(0.9 * len(off)) - 1]) for name, off in errors.items()}
    tried = [Trial(name, gaussian[name], median(name), tails[name], len(errors[name])) for name in plans]
    tried.sort(key=lambda trial: (-trial.noises, trial.error))
    others = sorted((Trial(n, g) for n, g in gaussian.items() if n not in plans), key=lambda t: t.gaussian)
    return Choice(plans[equal[0]], (*tried, *others), counter.rows)


def rule(nfe: int, spectrum: Spectrum | None, w: float) -> tuple[str, str]:
    """(solver, grid) without a trial: spectral where there is a spectrum, of order 1 under strong guidance with few
    evaluations; else DPM-Solver++(2M), the safest of multistep solvers."""
    if spectrum is None:
        return "dpmpp-2m", "uniform-lam-3"
    return ("spectral-1c" if abs(w) >= STRONG and nfe <= 6 else "spectral-3c"), "spectral"


def shortlist(schedule: Schedule, nfe: int, spectrum: Spectrum | None) -> tuple[dict[str, Plan], dict[str, float]]:
    """The plans to try by name, simpler ones first, and the closed form's error of all that were considered.

    The worst third by the closed form is left out: where it is large a plan is bad, but among the others it does not
    tell the best. So are levels that are impossible on this schedule, or the same as others, and tables that are not
    finite.
    """
    data, levels = spectrum or UNKNOWN, dict[str, Levels]()
    for name, make in GRIDS.items():
        try:
            found = check_levels(make(data)(schedule, nfe)).levels
        except InputError:
            continue
        if not any(_same(found, known) for known in levels.values()):
            levels[name] = found
    solvers = [*CLASSIC, *(SPECTRAL if spectrum is not None else ())]
    plans: dict[str, Plan] = {}
    gaussian: dict[str, float] = {}
    for solver in solvers:
        for grid in levels if solver in CLASSIC else (g for g in ALSO if g in levels):
            try:
                plan = _table(solver, grid, levels[grid], schedule, spectrum)
            except InputError:
                continue
            if plan.nfe == nfe and math.isfinite(off := mismatch(plan, data)):
                plans[plan.name], gaussian[plan.name] = plan, off
    if not plans:
        raise InputError(f"no plan of {nfe} evaluations is possible on {schedule}: take a schedule that falls in noise")
    last = sorted(gaussian.values())[-int(WORST * len(gaussian)) - 1]
    return {name: plan for name, plan in plans.items() if gaussian[name] <= last}, gaussian


def reference(schedule: Schedule, nfe: int, spectrum: Spectrum | None) -> Plan:
    """A plan of so many more evaluations that its error is small beside that of one of `nfe`."""
    steps = max(LEAST, FINE * nfe)
    if spectrum is None:
        return trace(UniPC(3), UniformLam(lam_max=10.0)(schedule, steps), "reference")
    return spectral(spectrum, SpectralGrid(spectrum)(schedule, steps))


def _made(solver: str, grid: str, schedule: Schedule, nfe: int, spectrum: Spectrum | None) -> Plan:
    return _table(solver, grid, GRIDS[grid](spectrum or UNKNOWN)(schedule, nfe), schedule, spectrum)


def _table(solver: str, grid: str, levels: Levels, schedule: Schedule, spectrum: Spectrum | None) -> Plan:
    name = f"{solver} on {grid}"
    if spectrum is not None and solver in SPECTRAL:
        order, corrector = SPECTRAL[solver]
        return replace(spectral(spectrum, levels, order, corrector), name=name)
    return trace(CLASSIC[solver](schedule), levels, name)


def _same(a: Levels, b: Levels) -> bool:
    return len(a) == len(b) and all(math.isclose(p.lam, q.lam, abs_tol=1e-6) for p, q in zip(a, b, strict=True))


def _check(
    shape: Sequence[int], nfe: int, spectrum: Spectrum | None, noises: int, cond: Any, batch: int | None
) -> None:
    for name, value, low in (("nfe", nfe, 1), ("noises", noises, 0), ("batch", 1 if batch is None else batch, 1)):
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise InputError(f"{name} must be a whole number >= {low}, got {value!r}")
    if spectrum is not None and tuple(shape) != spectrum.shape:
        raise InputError(f"samples of shape {tuple(shape)} and a spectrum of samples of shape {spectrum.shape}")
    if cond is not None and noises and len(cond) != noises:
        raise InputError(f"the condition has {len(cond)} rows for {noises} noises: give one row a noise")
