"""Particle steering: Singhal et al. 2025 (FK steering, arXiv 2501.06848), Wu et al. 2023 (TDS, arXiv 2306.17775)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from undiffuse.grid import check_levels
from undiffuse.level import Level, transition
from undiffuse.seeds import seed_of, uniform
from undiffuse.solvers import Eval, Solver
from undiffuse.tableau import trace
from undiffuse.types import Denoise, InputError, require
from undiffuse.types import Noise as NoiseLike

Reward = Callable[[Tensor], Tensor]


class Steered(NamedTuple):
    """What `steer` found for n groups of K particles.

    `x` (n, K, *data); `log_weights` (n, K), of weights that sum to 1 in each group; `log_norm` (n,), whose exponential
    is an unbiased estimate of E[exp(reward(x0))] over the solver's samples; `ess` (steps + 1, n), the effective number
    of particles before each step and at the end; `resampled` (steps + 1, n), whether they were resampled there.
    """

    x: Tensor
    log_weights: Tensor
    log_norm: Tensor
    ess: Tensor
    resampled: Tensor

    def drawn(self, seed: int = 0, first: int = 0) -> Tensor:
        """One particle of each group (n, *data), drawn by weight: a sample of the tilted distribution as K grows."""
        u = uniform(seed_of(seed, -1), torch.arange(first, first + len(self.x)))
        return self.x[torch.arange(len(self.x)), _found(self.log_weights.exp(), u[:, None])[:, 0].to(self.x.device)]

    def best(self, reward: Reward) -> Tensor:
        """The particle of highest reward of each group (n, *data)."""
        values = reward(self.x.flatten(0, 1)).reshape(self.x.shape[:2])
        return self.x[torch.arange(len(self.x)), values.argmax(1)]


def systematic(weights: Tensor, u: Tensor) -> Tensor:
    """Systematic resampling of groups: ancestors (n, K) by weights (n, K) of sum 1 and one uniform u (n,) a group.

    Particle k has weight_k K copies on average, rounded up or down (Kitagawa 1996).

    >>> systematic(torch.tensor([[0.5, 0.0, 0.25, 0.25]]), torch.tensor([0.5])).tolist()
    [[0, 0, 2, 3]]
    """
    k = weights.shape[1]
    return _found(weights, (torch.arange(k, dtype=torch.float64) + u.double()[:, None]) / k)


def _found(weights: Tensor, places: Tensor) -> Tensor:
    """The particles at `places` (n, m) in [0, 1) of the weights' running sums; none of weight 0."""
    edges = weights.double().cumsum(1)
    last = (weights > 0).long().mul(torch.arange(1, weights.shape[1] + 1)).amax(1, keepdim=True) - 1
    return torch.minimum(torch.searchsorted(edges, places, right=True), last)


@torch.no_grad()
def steer(
    denoise: Denoise,
    x: Tensor,
    levels: Sequence[Level],
    solver: Solver,
    noise: NoiseLike,
    reward: Reward,
    *,
    particles: int,
    threshold: float = 0.5,
    every: int = 1,
    scale: float = 1.0,
    proposal: Denoise | None = None,
    potential: Callable[[Tensor, Level], Tensor] | None = None,
    seed: int = 0,
    first: int = 0,
) -> Steered:
    """Samples of p(x0) exp(scale reward(x0)) in the limit of many particles, p being what the solver samples; without
    gradients of the reward.

    x (n K, *data) starts n groups of K = `particles` neighbouring rows at levels[0], and `noise` draws for all of them;
    conditions, observations and levels are the same for all rows of a group.
    `reward` (b, *data) -> (b,) is read at D(x): a particle's weight takes exp of its change from level to level, and
    of its change to the final x at last, so that weights amount to exp(reward(x0)) whatever D is. A `potential` (D(x),
    level) -> (b,) takes the reward's place before the end, such as a likelihood that knows how uncertain D(x) is. If a
    denoiser `proposal` is given, such as a restorer's, steps follow it and weights are corrected for that (algorithm 1
    of TDS): the limit stays, and takes fewer particles; for solvers of one evaluation a step. Where a group's
    effective number of particles is below threshold K, at every `every`-th step, they are resampled systematically
    before they move on; threshold 0 only weighs. What is drawn for group g depends on (seed, first + g) and on its
    noise alone. The solver's first evaluation in a step is remembered: rewards cost none if it is made at x.

    Raises InputError for bad settings, rewards of the wrong shape or not finite (for a forbidden x0 say -1e6), and for
    solvers that draw no noise, whose copies would stay copies, with a threshold above 0.

    >>> from undiffuse import DDPM, Gaussian, Noise, Spectrum, UniformLam, VP
    >>> model, noise = Gaussian(Spectrum(torch.zeros(1), torch.ones(1))), Noise((800, 1))
    >>> found = steer(model, noise(), UniformLam()(VP(), 20), DDPM("large"), noise, lambda x0: x0[:, 0], particles=800)
    >>> bool((found.log_norm - 0.5).abs() < 0.1)  # log E[exp(x0)]
    True
    """
    require(particles >= 1, "steer: particles", particles, "a whole number >= 1")
    require(0 <= threshold <= 1, "steer: threshold", threshold, "between 0 and 1")
    require(every >= 1, "steer: every", every, "a whole number >= 1")
    require(math.isfinite(scale), "steer: scale", scale, "a finite number")
    if len(x) == 0 or len(x) % particles:
        raise InputError(f"steer: {len(x)} rows are not whole groups of {particles} particles")
    levels, rises = check_levels(levels)
    if threshold and not _draws(solver, levels):
        raise InputError(
            "steering needs a solver that draws noise, such as DDPM() or DDIM(eta=1), else copies of particles stay "
            f"copies; {solver} draws none: take another, or threshold=0"
        )
    n, k, dtype = len(x) // particles, particles, x.dtype
    if proposal is not None and (solver.calls != 1 or getattr(solver, "adaptive", False)):
        raise InputError(f"a proposal needs a solver of one evaluation a step such as DPMpp2M(eta=1.0), got {solver}")
    weights, past, past_guided = _Weights(n, k, threshold), list[Eval](), list[Eval]()
    for i, up in enumerate(rises):
        now, then = levels[i], levels[i + 1]
        if up:
            keep, std = transition(now, then)
            x, past, past_guided = (keep * x + std * noise()).to(dtype), [], []
            continue
        known = denoise(x, now)
        u = uniform(seed_of(seed, i), torch.arange(first, first + n))
        value = _value(known, reward(known) if potential is None else potential(known, now))
        rows = weights.update(scale * value, u if i % every == 0 else None)
        if rows is not None:
            rows = rows.to(x.device)
            x, known, past, past_guided = x[rows], known[rows], _picked(past, rows), _picked(past_guided, rows)
        if proposal is None or then.is_clean:
            x_then, new = solver.step(_Remembered(denoise, x, now, known), x, now, then, past, noise)
        else:
            guided, z, zero = proposal(x, now), noise(), torch.zeros_like(x)
            mean, new = solver.step(lambda *_: known, x, now, then, past, lambda: zero)  # noqa: B023
            meant, drawn = solver.step(lambda *_: guided, x, now, then, past_guided, lambda: zero)  # noqa: B023
            std = _noise_gain(solver, now, then, past)
            away = ((meant - mean) / std).double()  # log of N(x_then; mean, std^2) / N(x_then; meant, std^2)
            weights.correct(-(away * z + away**2 / 2).flatten(1).sum(1).cpu())
            x_then, past_guided = meant + std * z, [drawn, *past_guided][: solver.history]
        x, past = x_then.to(dtype), [new, *past][: solver.history]
    weights.update(scale * _value(x, reward(x)), None)
    return weights.result(x.reshape(n, k, *x.shape[1:]))


def _picked(past: list[Eval], rows: Tensor) -> list[Eval]:
    return [Eval(e.level, e.x[rows], e.x0[rows]) for e in past]


def _noise_gain(solver: Solver, now: Level, then: Level, past: list[Eval]) -> Tensor:
    """What a step adds to x' for its noise: the step of one from 0 with x0 = 0."""
    zero, one = torch.zeros_like(now.alpha), torch.ones_like(now.alpha)
    std, _ = solver.step(lambda *_: zero, zero, now, then, [Eval(e.level, zero, zero) for e in past], lambda: one)
    if not bool((std > 0).all()):
        raise InputError(f"a proposal needs a solver that draws noise in every step but the last: {solver} does not")
    return std


def _value(x0: Tensor, value: Tensor) -> Tensor:
    value = value.detach().double().cpu()
    if value.shape != (len(x0),) or not bool(torch.isfinite(value).all()):
        raise InputError(
            f"a reward makes ({len(x0)},) finite numbers of {len(x0)} samples, got shape {tuple(value.shape)}, or "
            "values that are NaN or infinite: for a forbidden x0 return a number such as -1e6"
        )
    return value


class _Weights:
    """Log weights (n, K) since the last resampling, and the products of their means until then."""

    def __init__(self, n: int, k: int, threshold: float) -> None:
        self.threshold, self.log_norm = threshold, torch.zeros(n, dtype=torch.float64)
        self.log_w, self.value = torch.zeros(n, k, dtype=torch.float64), torch.zeros(n, k, dtype=torch.float64)
        self.ess: list[Tensor] = []
        self.resampled: list[Tensor] = []

    def _log_mean(self) -> Tensor:
        return self.log_w.logsumexp(1) - math.log(self.log_w.shape[1])

    def update(self, value: Tensor, u: Tensor | None) -> Tensor | None:
        """Weigh by the change of the reward; the rows to go on with where groups are resampled, by uniforms u (n,)."""
        n, k = self.log_w.shape
        value = value.reshape(n, k)
        self.log_w, self.value = self.log_w + value - self.value, value
        weights = self.log_w.softmax(1)
        self.ess.append(1 / weights.square().sum(1))
        low = self.ess[-1] < self.threshold * k if u is not None else torch.zeros(n, dtype=torch.bool)
        self.resampled.append(low)
        if u is None or not bool(low.any()):
            return None
        ancestors = torch.where(low[:, None], systematic(weights, u), torch.arange(k))
        self.log_norm = self.log_norm + torch.where(low, self._log_mean(), 0.0)
        self.log_w, self.value = torch.where(low[:, None], 0.0, self.log_w), self.value.gather(1, ancestors)
        return (ancestors + k * torch.arange(n)[:, None]).flatten()

    def correct(self, log_ratio: Tensor) -> None:
        """Weigh by the ratio of what was meant to be drawn and what was (n K,)."""
        self.log_w = self.log_w + log_ratio.reshape(self.log_w.shape)

    def result(self, x: Tensor) -> Steered:
        log_norm = self.log_norm + self._log_mean()
        return Steered(x, self.log_w.log_softmax(1), log_norm, torch.stack(self.ess), torch.stack(self.resampled))


def _draws(solver: Solver, levels: Sequence[Level]) -> bool:
    """Whether a chain draws noise, as far as its table tells; those that have none are taken to."""
    try:
        return trace(solver, levels).draws > 0
    except InputError:
        return True


class _Remembered:
    """A denoiser that knows its answer at one x."""

    def __init__(self, denoise: Any, x: Tensor, level: Level, known: Tensor) -> None:
        self._denoise, self._x, self._level, self._known = denoise, x, level, known
        if hasattr(denoise, "reverse"):
            self.reverse = denoise.reverse

    def __call__(self, x: Tensor, level: Level, /) -> Tensor:
        if x is self._x and level is self._level:
            return self._known
        out: Tensor = self._denoise(x, level)
        return out
