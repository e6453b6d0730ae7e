"""What many ranks cost each other: slow steps, late batches and failures, by formula and by simulation."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import numpy as np

_erf = np.vectorize(math.erf, otypes=[float])


def lognormal(cv: float) -> tuple[float, float]:
    """(mu, s) of the lognormal distribution with mean 1 and coefficient of variation `cv`."""
    s = math.sqrt(math.log1p(cv * cv))
    return -s * s / 2, s


def step_cdf(cv: float, share: float = 0.0, slow: float = 1.0) -> Callable[[np.ndarray], np.ndarray]:
    """P(step time <= t) of a rank: lognormal with mean 1, and `slow` times that on a `share` of the ranks."""
    mu, s = lognormal(cv)

    def one(t: np.ndarray) -> np.ndarray:
        return 0.5 + 0.5 * _erf((np.log(np.maximum(t, 1e-300)) - mu) / (s * math.sqrt(2)))

    return lambda t: (1 - share) * one(t) + share * one(t / slow)


def expected_maximum(cdf: Callable[[np.ndarray], np.ndarray], n: int, points: int = 20_001) -> float:
    """E[max of n independent draws >= 0] = integral of 1 - F(t)^n over t >= 0."""
    top = 1.0
    while n * (1 - float(cdf(np.array([top]))[0])) > 1e-9:
        top *= 1.5
    t = np.linspace(0, top, points)
    return float(np.trapezoid(1 - cdf(t) ** n, t))


def inflation(n: int, cv: float, share: float = 0.0, slow: float = 1.0) -> float:
    """Mean time of a synchronous step of n ranks over that of one ordinary rank."""
    if cv == 0:
        return 1 + (slow - 1) * (1 - (1 - share) ** n)
    return expected_maximum(step_cdf(cv, share, slow), n)


def simulated_inflation(
    n: int, cv: float, share: float = 0.0, slow: float = 1.0, steps: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """(mean, standard error) of the slowest rank's time, with the slow ranks drawn anew for every step."""
    g, (mu, s) = np.random.default_rng(seed), lognormal(cv)
    worst = np.array([
        (g.lognormal(mu, s, n) * np.where(g.random(n) < share, slow, 1.0)).max() for _ in range(steps)
    ])  # fmt: skip
    return float(worst.mean()), float(worst.std() / math.sqrt(steps))


def paced(loads: Iterable[np.ndarray], work: float, depth: int) -> float:
    """Mean time of a synchronous step of `work` seconds whose rank r needs loads[k][r] seconds to read batch k.

    Each rank's reader is one server that holds at most `depth` finished or begun batches ahead; with depth 0 it reads
    only when the step before has ended.
    """
    taken: list[float] = []  # when the batch of step k was taken by all
    free, end = 0.0, 0.0
    ready: np.ndarray | float = 0.0
    for k, load in enumerate(loads):
        if depth:
            free = taken[k - depth] if k >= depth else 0.0
            ready = np.maximum(ready, free) + load
        else:
            ready = end + load
        start = max(end, float(np.max(ready)))
        taken.append(start)
        end = start + work
    return end / len(taken)


def stalls(n: int, steps: int, usual: float, stall: float, share: float, seed: int = 0) -> Iterable[np.ndarray]:
    """Loads of `usual` seconds that take `stall` more with probability `share`, independently."""
    g = np.random.default_rng(seed)
    for _ in range(steps):
        yield usual + stall * (g.random(n) < share)


def paced_exactly(n: int, work: float, usual: float, stall: float, share: float, depth: int) -> float:
    """What `paced` tends to under `stalls`, for depth 0, depth 1, and any depth large enough."""
    some = 1 - (1 - share) ** n  # that at least one rank stalls
    if depth == 0:
        return work + usual + stall * some
    if depth == 1:  # the batch is begun when the one before is taken: no stall of earlier steps is left over
        return (1 - some) * max(work, usual) + some * max(work, usual + stall)
    return max(work, usual + share * stall)


def boundaries(
    n: int, steps: int, period: int, usual: float, stall: float, spread: float, seed: int = 0
) -> Iterable[np.ndarray]:
    """Loads with one stall a rank every `period` steps, its moment drawn once a rank from a `spread` share of it."""
    offset = (np.random.default_rng(seed).random(n) * spread * period).astype(int)
    for k in range(steps):
        yield usual + stall * ((k - offset - period // 2) % period == 0)


def young(cost: float, mtbf: float) -> float:
    """The first-order optimum of the checkpoint interval (Young 1974)."""
    return math.sqrt(2 * cost * mtbf)


def best_interval(cost: float, mtbf: float) -> float:
    """The interval of most useful work under exponential failures: M (1 + W(-exp(-1 - C/M))), by Newton steps."""
    c = cost / mtbf
    x = min(0.99, math.sqrt(2 * c))  # x = tau / M solves e^(x + c) (x - 1) + 1 = 0
    for _ in range(60):
        value, slope = math.exp(x + c) * (x - 1) + 1, math.exp(x + c) * x
        x -= value / slope
    return x * mtbf


def goodput(interval: float, cost: float, restart: float, mtbf: float) -> float:
    """Useful share of time: T over Daly's (2006) expected M e^(R/M) (e^((tau + C)/M) - 1) T / tau."""
    exponent = (interval + cost) / mtbf
    if exponent + restart / mtbf > 600:
        return 0.0
    return interval / (mtbf * math.exp(restart / mtbf) * math.expm1(exponent))


def simulated_goodput(
    interval: float, cost: float, restart: float, mtbf: float, pieces: int = 20_000, seed: int = 0
) -> float:
    """The same by drawing failures: each piece of work is tried until it and its checkpoint are done.

    A try that follows a failure begins with the restart, in which another failure may fall.
    """
    g = np.random.default_rng(seed)
    total, left, needed = 0.0, pieces, interval + cost
    while left:
        failure = g.exponential(mtbf, left)
        done = failure > needed
        total += float(np.where(done, needed, failure).sum())
        left, needed = int((~done).sum()), interval + cost + restart
    return pieces * interval / total


def shards_mixed(rows: int, window: int, samples: int) -> float:
    """Expected number of shards among `rows` drawn without replacement from a window of equal shards."""
    pool, rest = window * samples, (window - 1) * samples
    if rows > rest:
        return float(window)
    missed = math.lgamma(rest + 1) - math.lgamma(rest - rows + 1) - math.lgamma(pool + 1) + math.lgamma(pool - rows + 1)
    return window * -math.expm1(missed)


def same_shard(batch: int, lanes: int, window: int, samples: int) -> float:
    """P(two rows of a batch come from one shard) under `Windowed`, within a window; lanes divide the batch."""
    rows = batch // lanes
    return (rows - 1) / (batch - 1) * (samples - 1) / (window * samples - 1)
