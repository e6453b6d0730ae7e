"""Stochasticity and guidance interval by score: what is best for a model, and no habit is right for all, is tried."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from undiffuse.grid import Grid
from undiffuse.guide import CFG, Contrast, Guidance, guide_of, prepared
from undiffuse.sample import Noise
from undiffuse.schedule import Schedule
from undiffuse.seeds import seed_of
from undiffuse.solvers import DDIM, Adams, SASolver, Solver
from undiffuse.spectrum import Spectrum
from undiffuse.tableau import trace
from undiffuse.tune.auto import GRIDS, UNKNOWN, Plan
from undiffuse.tune.gaussian import mismatch
from undiffuse.types import InputError, Model

BLOCKS = 16  # of samples, each left out once
SURE = 2.131  # the 97.5 % point of Student's distribution with BLOCKS - 1 degrees of freedom
NOISY: dict[str, Callable[[float], Solver]] = {
    "ddim": lambda eta: DDIM(eta),
    "adams-2": lambda eta: Adams(2, eta),
    "sa-solver": lambda eta: SASolver(2, eta),
}
ENDS = {  # of guidance: sigma / alpha in units of the data's std; most of the paper's best begin at 3 to 6
    "": (0.0, math.inf),
    " below 6 std": (0.0, 6.0),
    " below 3 std": (0.0, 3.0),
    " below 1.5 std": (0.0, 1.5),
    " below 0.75 std": (0.0, 0.75),
    " from 0.3 to 3 std": (0.3, 3.0),
}


class Candidate(NamedTuple):
    """A way to sample: a plan and a guidance, or its weight."""

    plan: Plan
    guidance: Guidance | float = 1.0

    @property
    def rows(self) -> int:
        """Network rows of a sample: an evaluation that is guided, w being neither 0 nor 1, has two."""
        guide = prepared(guide_of(self.guidance), self.plan)
        if not isinstance(guide, Contrast):
            raise InputError(f"the rows of guidance {guide} are not known: take a weight or CFG")
        return sum(1 if guide.weight_at(level) in (0, 1) else 2 for level in self.plan.levels)


Draw = Callable[[Candidate, range], Tensor]
Score = Callable[[Tensor], float]


class Gain(NamedTuple):
    """By how much one score is below another, and the standard error of this."""

    value: float
    error: float

    @property
    def sure(self) -> bool:
        """Whether it is a gain, with an error of 2.5 %."""
        return self.value > SURE * self.error

    def __str__(self) -> str:
        return f"{self.value:+.4g} +/- {self.error:.2g}"


class Tried(NamedTuple):
    """A candidate's score on the last round's `samples` that it saw, and its gain over the incumbent on the same."""

    name: str
    score: float
    gain: Gain
    samples: int
    rows: int


@dataclass(frozen=True, eq=False)
class Scored:
    """The `chosen` candidate's name; `tried` in rounds, best first; the best one's gain on `fresh` samples, None where
    it was the incumbent."""

    chosen: str
    tried: tuple[Tried, ...]
    best: str
    gain: Gain | None
    fresh: int

    def __str__(self) -> str:
        wide = max(len("candidate"), *(len(t.name) for t in self.tried))
        lines = [f"{'candidate':{wide}} {'rows':>5} {'samples':>8} {'score':>10}  gain over the first, same noise"]
        for t in self.tried:
            mark = "  <- kept" if t.name == self.chosen else ""
            lines.append(f"{t.name:{wide}} {t.rows:5} {t.samples:8} {t.score:10.4g}  {t.gain}{mark}")
        if self.gain is not None:
            verdict = "taken" if self.gain.sure else "not taken: within what chance may give"
            lines.append(f"{self.best} on {self.fresh} fresh samples: {self.gain}, {verdict}")
        return "\n".join(lines)


def gain(score: Score, first: Tensor, other: Tensor) -> Gain:
    """The gain of `other` over `first`, samples of the same noise in the same order, freed of bias of order 1 / n.

    Scores of finite sets, such as the Frechet distance, are biased: both are taken of equally many samples, and the
    jackknife extrapolates the difference to many. Its error is that of leaving out each of `BLOCKS` blocks of rows, the
    same rows of both (Efron and Stein 1981: never too small in expectation). Raises InputError for sets of other sizes.
    """
    n = len(first)
    if len(other) != n or n < 2 * BLOCKS:
        raise InputError(f"a gain needs two sets of one size, >= {2 * BLOCKS}, got {n} and {len(other)} samples")
    block = torch.arange(n) * BLOCKS // n  # neighbours: labels that cycle are as frequent in all
    off = torch.tensor(
        [score(first[block != j]) - score(other[block != j]) for j in range(BLOCKS)], dtype=torch.float64
    )
    whole = score(first) - score(other)
    error = math.sqrt((BLOCKS - 1) / BLOCKS * float((off - off.mean()).square().sum()))
    return Gain(BLOCKS * whole - (BLOCKS - 1) * float(off.mean()), error)


def by_score(
    candidates: Mapping[str, Candidate],
    draw: Draw,
    score: Score,
    *,
    rounds: Sequence[int] = (128, 512),
    fresh: int = 1024,
    first: int = 0,
) -> Scored:
    """The candidate of least `score`, or the first of them where none is surely better.

    `draw(candidate, indices)` gives the samples with these numbers, or their features, of which `score` makes a number,
    lower being better, such as a Frechet distance from held-out data. All candidates see the same noise: those numbered
    `first` on, up to the first of `rounds`, the better half of them up to the second, and so on. Rounds are a choice
    among many, which flatters: so the best is measured once more against the first on `fresh` others, and taken only
    where its `gain` there is sure. Raises InputError for fewer than two candidates, rounds that do not grow, and a
    score that is no number.

    >>> from undiffuse import DDIM, Gaussian, Spectrum, VP, UniformLam
    >>> model = Gaussian(Spectrum(torch.zeros(1), torch.ones(1)))
    >>> ways = {name: Candidate(trace(DDIM(), UniformLam()(VP(), n))) for name, n in (("two", 2), ("ten", 10))}
    >>> found = by_score(ways, drawing(model, (1,)), lambda x: float((x.var() - 1).abs()), rounds=(64,), fresh=256)
    >>> found.chosen
    'ten'
    """
    names = list(candidates)
    sizes = [*rounds]
    if len(names) < 2 or not sizes or sizes != sorted(set(sizes)) or min(*sizes, fresh) < 2 * BLOCKS:
        raise InputError(
            f"by_score needs 2 candidates or more, and rounds that grow, of {2 * BLOCKS} samples or more, "
            f"got {len(names)}, rounds = {tuple(rounds)} and fresh = {fresh}"
        )

    def checked(x: Tensor) -> float:
        value = float(score(x))
        if math.isnan(value):
            raise InputError("the score of samples is NaN: check the samples, or the score")
        return value

    incumbent, seen, tried = names[0], dict[str, Tensor](), dict[str, Tried]()
    left, done = names, 0
    for size in sizes:
        for name in left:
            new = draw(candidates[name], range(first + done, first + size))
            seen[name] = torch.cat([seen[name], new]) if name in seen else new
        for name in left:
            of = gain(checked, seen[incumbent], seen[name])
            tried[name] = Tried(name, checked(seen[name]), of, size, candidates[name].rows)
        order = sorted(left, key=lambda name: -tried[name].gain.value)  # ties stay in the order given
        better = order[: max(2, math.ceil(len(order) / 2))]
        left, done = [name for name in left if name in better or name == incumbent], size
    best, found = order[0], None
    if best != incumbent:
        numbers = range(first + done, first + done + fresh)
        found = gain(checked, *(draw(candidates[name], numbers) for name in (incumbent, best)))
    rows = sorted(tried.values(), key=lambda t: (-t.samples, -t.gain.value))
    return Scored(best if found is not None and found.sure else incumbent, tuple(rows), best, found, fresh)


def drawing(
    model: Model,
    shape: Sequence[int],
    cond: Callable[[range], Any] | None = None,
    *,
    seed: int = 0,
    batch: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Draw:
    """How `by_score` draws samples of `shape` from a model, with the condition `cond(indices)`.

    Sample k has the same noise for every candidate, none that `sample` draws for this seed; `batch` bounds the samples
    in memory.
    """

    @torch.no_grad()
    def draw(candidate: Candidate, indices: range) -> Tensor:
        out, guide = [], prepared(guide_of(candidate.guidance), candidate.plan)
        for start in range(0, len(indices), batch or len(indices)):
            part = indices[start : start + (batch or len(indices))]
            noise = Noise((len(part), *shape), seed_of(seed, 4), part, dtype, device)
            denoise = guide(model, None if cond is None else cond(part).to(device))
            out.append(candidate.plan.run(denoise, candidate.plan.start[1] * noise(), noise))
        return torch.cat(out)

    return draw


def noisy(
    schedule: Schedule,
    nfe: int,
    *,
    spectrum: Spectrum | None = None,
    strengths: Sequence[float] = (0.3, 0.6, 1.0),
    grid: Grid | None = None,
) -> dict[str, Plan]:
    """Stochastic plans of `nfe` evaluations by name, each solver of `NOISY` at these strengths eta in (0, 1].

    Each is on `grid`, or else on the grid of `auto` on which it samples Gaussian data of the `spectrum` best, in closed
    form: noise asks for other levels than the probability flow. Raises InputError for impossible strengths.
    """
    if not all(0 < eta <= 1 for eta in strengths):
        raise InputError(f"strengths of noise must be in (0, 1], got {tuple(strengths)}")
    data, plans = spectrum or UNKNOWN, dict[str, Plan]()
    grids = {"": grid} if grid is not None else {f" on {name}": make(data) for name, make in GRIDS.items()}
    for solver, make in NOISY.items():
        for eta in strengths:
            fits: list[tuple[float, Plan]] = []
            for on, levels in grids.items():
                try:
                    plan = trace(make(eta), levels(schedule, nfe), f"{solver} eta {eta:g}{on}")
                except InputError:  # levels that this schedule does not have
                    continue
                if plan.draws:  # SA-Solver's range of noise may lie between two levels
                    fits.append((mismatch(plan, data), plan))
            if fits:
                best = min(fits, key=lambda fit: fit[0])[1]
                plans[best.name] = best
    return plans


def intervals(w: float, std: float, schedule: Schedule | None = None) -> dict[str, CFG]:
    """CFG of weight w everywhere, and within the intervals `ENDS` of sigma / alpha in units of the data's `std`, by
    name (Kynkaanniemi et al. 2024, arXiv 2404.07724: guidance harms at high noise and does nothing at low noise).

    With a schedule those that it never leaves, or never meets, are left out. Raises InputError for std <= 0.

    >>> intervals(3.0, 0.5)["w 3 below 3 std"]
    CFG(w=3.0, lam_min=-0.405, lam_max=inf)
    """
    if not 0 < std < math.inf:
        raise InputError(f"an interval of guidance needs the data's std > 0, got {std}")
    out = dict[str, CFG]()
    top, bottom = (math.inf, 0.0) if schedule is None else (math.exp(-float(schedule.level(t).lam)) for t in (1.0, 0.0))
    for name, (low, high) in ENDS.items():
        if not name or (high * std < top and high * std > bottom):
            out[f"w {w:g}{name}"] = CFG(w, _lam(high * std), _lam(low * std))
    return out


def _lam(sigma: float) -> float:
    """-log sigma to three decimals, at the ends, too."""
    return -math.inf if sigma == math.inf else math.inf if sigma == 0 else -round(math.log(sigma), 3)


def ways(plans: Mapping[str, Plan], guidances: Mapping[str, Guidance]) -> dict[str, Candidate]:
    """Every plan with every guidance, the first of each being the incumbent."""
    return {f"{p}, {g}": Candidate(plan, guide) for p, plan in plans.items() for g, guide in guidances.items()}
