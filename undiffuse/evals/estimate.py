"""Scores with their uncertainty: 95 % intervals of shares, means and smooth functions of samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from undiffuse.seeds import seed_of
from undiffuse.types import InputError


class Estimate(NamedTuple):
    """A score and the 95 % interval [low, high] of what it estimates; both ends are nan where there is none."""

    value: float
    low: float = math.nan
    high: float = math.nan


def features(*sets: Tensor, fewest: int = 2) -> tuple[Tensor, ...]:
    """The sets (n, ...) as float64 matrices (n, width) on the CPU.

    Raises `InputError` for fewer than `fewest` rows, different or zero widths, NaN and infinity.

    >>> a, b = features(torch.zeros(3, 2, 2), torch.ones(5, 4))
    >>> a.shape, b.dtype
    (torch.Size([3, 4]), torch.float64)
    """
    given = ", ".join(str(tuple(x.shape)) for x in sets)
    flat = tuple(x.detach().cpu().double().flatten(1) if x.ndim > 1 and len(x) else x for x in sets)
    if any(x.ndim < 2 or len(x) < fewest for x in flat) or len({x.shape[1] for x in flat}) > 1 or not flat[0].shape[1]:
        raise InputError(
            f"scores need sets (n, width) of >= {fewest} features of one width, got {given}: "
            "give more samples, or features of one extractor"
        )
    if not all(bool(torch.isfinite(x).all()) for x in flat):
        raise InputError(f"the features {given} have NaN or infinite values: leave those samples out and count them")
    return flat


def interval(value: float, error: float, freedom: float = math.inf) -> Estimate:
    """value +/- t * error, with t the 97.5 % point of Student's distribution of this many degrees of freedom.

    >>> [round(v, 2) for v in interval(1.0, 0.5)]
    [1.0, 0.02, 1.98]
    """
    half = t_quantile(freedom) * error
    return Estimate(value, value - half, value + half)


def t_quantile(freedom: float) -> float:
    """The 97.5 % point of Student's distribution with so many degrees of freedom.

    >>> round(t_quantile(10), 3)
    2.228
    """
    from scipy.stats import t

    return float(t.ppf(0.975, freedom))


def share(hits: Tensor) -> Estimate:
    """The share of True in `hits` (n,), independent draws, with the interval of Wilson (1927); it stays in [0, 1].

    >>> [round(v, 3) for v in share(torch.tensor([True, False] * 50))]
    [0.5, 0.404, 0.596]
    """
    n, z = len(hits), 1.959963984540054
    p = float(hits.double().mean())
    middle = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(p * (1 - p) / n + (z / (2 * n)) ** 2)
    return Estimate(p, max(0.0, min(p, middle - half)), min(1.0, max(p, middle + half)))


def mean(values: Tensor) -> Estimate:
    """The mean of independent `values` (n,) with the interval of a normal mean.

    >>> mean(torch.ones(5))
    Estimate(value=1.0, low=1.0, high=1.0)
    """
    return interval(float(values.mean()), float(values.std()) / math.sqrt(len(values)), len(values) - 1)


def canonical(x: Tensor, seed: int) -> Tensor:
    """Row numbers (n,) of features x (n, d) in an order that depends on the seed and the rows alone, not on how the
    rows were sorted: by their projections on a random direction.

    >>> x = torch.randn(9, 2)
    >>> bool((x[canonical(x, 1)] == x.flip(0)[canonical(x.flip(0), 1)]).all())
    True
    """
    direction = torch.randn(x.shape[1], 1, dtype=x.dtype, generator=torch.Generator().manual_seed(seed))
    return (x @ direction)[:, 0].argsort(stable=True)


def some(x: Tensor, n: int, seed: int) -> Tensor:
    """Numbers (n,) of n random rows of x, the same rows however x was sorted; all of them, in order, if it has n.

    >>> some(torch.randn(5, 2), 5, 0).tolist(), some(torch.randn(5, 2), 3, 0).shape
    ([0, 1, 2, 3, 4], torch.Size([3]))
    """
    if n >= len(x):
        return torch.arange(len(x))
    shuffled = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed_of(seed, 1)))
    return canonical(x, seed)[shuffled[:n]]


def blocks(*sets: Tensor, seed: int, count: int | None = None) -> list[Tensor]:
    """The block 0 .. count - 1 of each row of each set (n, d): random, of sizes that differ by one at most, the same
    however the rows were sorted; without `count` 32 blocks, or 8 for features wider than 512.

    >>> blocks(torch.randn(7, 2), seed=0, count=3)[0].bincount().tolist()
    [3, 2, 2]
    """
    count = min(count or (32 if sets[0].shape[1] <= 512 else 8), *(len(x) for x in sets))
    found = []
    for i, x in enumerate(sets):
        shuffled = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed_of(seed, i, 1)))
        block = torch.empty(len(x), dtype=torch.long)
        block[canonical(x, seed_of(seed, i))[shuffled]] = torch.arange(len(x)) % count
        found.append(block)
    return found


class Jackknife(NamedTuple):
    """A statistic of all rows, its standard error, its value freed of bias of order 1 / n, and the degrees of freedom
    of the error."""

    whole: float
    error: float
    unbiased: float
    freedom: int


def left_out(whole: float, without: Sequence[float]) -> Jackknife:
    """What a statistic's values without each of J blocks say of it (Quenouille 1956; Efron and Stein 1981: the error
    is never too small in expectation; its square is twice the variance where the linear term vanishes, as for
    distances between equal distributions).

    >>> left_out(2.0, [1.0, 2.0, 3.0, 2.0])
    Jackknife(whole=2.0, error=1.224744871391589, unbiased=2.0, freedom=3)
    """
    count, values = len(without), torch.tensor(without, dtype=torch.float64)
    error = math.sqrt((count - 1) / count * float((values - values.mean()).square().sum()))
    return Jackknife(whole, error, count * whole - (count - 1) * float(values.mean()), count - 1)


def jackknife(statistic: Callable[..., float], *sets: Tensor, seed: int, count: int | None = None) -> Jackknife:
    """`left_out` of `statistic(*sets)`, block j of every set left out together.

    >>> x = torch.randn(64, 1).double()
    >>> found = jackknife(lambda x: float(x.var(correction=0)), x, seed=0, count=64)
    >>> abs(found.unbiased - float(x.var())) < 1e-9
    True
    """
    block = blocks(*sets, seed=seed, count=count)
    kept = ([x[b != j] for x, b in zip(sets, block, strict=True)] for j in range(int(block[0].max()) + 1))
    return left_out(statistic(*sets), [statistic(*rows) for rows in kept])
