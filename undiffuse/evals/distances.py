"""Frechet, kernel and sliced Wasserstein distance between two sets of features (n, d)."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from undiffuse.evals.estimate import Estimate, blocks, features, interval, jackknife, left_out
from undiffuse.types import InputError

_CHUNK = 2**19  # numbers held at once: 4 MiB in float64, which caches hold


class Distances(NamedTuple):
    """`frechet` and `kernel` distance; both are 0 for equal distributions, up to the bias and noise of finite sets."""

    frechet: float
    kernel: float


def _root(c: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(c)
    root: Tensor = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    return root


def _frechet(a: Tensor, b: Tensor) -> float:
    n, m, d = len(a), len(b), a.shape[1]
    x, y = (a - a.mean(0)) / math.sqrt(n - 1), (b - b.mean(0)) / math.sqrt(m - 1)
    if min(n, m) > d:
        root = _root(x.T @ x)
        found = torch.linalg.eigvalsh(root @ (y.T @ y) @ root)
        # below rounding, whose square root would be eight digits of noise
        cross = found.clamp(min=0).where(found > d * torch.finfo(found.dtype).eps * found[-1], 0).sqrt().sum()
    else:  # with C = X^T X the trace of (C_a C_b)^(1/2) is the nuclear norm of X_a X_b^T
        cross = torch.linalg.svdvals(x @ y.T).sum()
    value = (a.mean(0) - b.mean(0)).square().sum() + x.square().sum() + y.square().sum() - 2 * cross
    return float(value)


def frechet(a: Tensor, b: Tensor) -> float:
    """|mu_a - mu_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) (Heusel et al. 2017, Eq. 6); biased upwards by about 1 / n.

    >>> x = torch.randn(50, 3)
    >>> round(frechet(x, x + 1), 6)
    3.0
    """
    a, b = features(a, b)
    return max(0.0, _frechet(a, b))


def frechet_estimate(a: Tensor, b: Tensor, seed: int = 0) -> Estimate:
    """`frechet` and the 95 % interval of its mean over sets of these sizes, bias included: for repeats of one
    measurement, not for the distance of the distributions, which is `frechet_unbiased`.

    >>> found = frechet_estimate(torch.randn(99, 2), torch.randn(99, 2))
    >>> found.low < found.value < found.high
    True
    """
    found = jackknife(_frechet, *features(a, b), seed=seed)
    return interval(max(0.0, found.whole), found.error, found.freedom)


def frechet_unbiased(a: Tensor, b: Tensor, seed: int = 0) -> Estimate:
    """The Frechet distance of the distributions that the sets (n, d) and (m, d) came from: the plain one grows by
    about k / n (Chong and Forsyth 2020), which the jackknife over blocks of rows extrapolates to 0.

    About 0, often below, for equal distributions; the 95 % interval is the jackknife's, there up to 1.4 times too
    wide. `seed` draws the blocks. Raises `InputError` for sets of fewer than 2 d rows, where the bias has no such law.

    >>> draw = torch.Generator().manual_seed(0)
    >>> a, b = (torch.randn(500, 8, generator=draw) for _ in range(2))
    >>> found = frechet_unbiased(a, b)
    >>> frechet(a, b) > 2 * found.value, found.low < 0 < found.high
    (True, True)
    """
    a, b = features(a, b)
    if min(len(a), len(b)) < 2 * a.shape[1]:
        raise InputError(
            f"{min(len(a), len(b))} samples are too few for {a.shape[1]} features: take {2 * a.shape[1]}, or fewer "
            "features (pca=...), or the kernel distance"
        )
    found = jackknife(_frechet, a, b, seed=seed)
    return interval(found.unbiased, found.error, found.freedom)


def _sums(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The sums of the kernel over all pairs with each row of x, and with each row of y."""
    rows, columns = [], torch.zeros(len(y), dtype=y.dtype)
    for part in torch.split(x, max(1, _CHUNK // len(y))):
        base = (part @ y.T).div_(x.shape[1]).add_(1)
        values = base.square().mul_(base)
        rows.append(values.sum(1))
        columns += values.sum(0)
    return torch.cat(rows), columns


def kernel_estimate(a: Tensor, b: Tensor) -> Estimate:
    """`kernel` with the 95 % interval of the jackknife that leaves out one row at a time (nan with 2 rows).

    >>> draw = torch.Generator().manual_seed(0)
    >>> a, b = (torch.randn(200, 8, generator=draw) for _ in range(2))
    >>> found, other = kernel_estimate(a, b), kernel_estimate(a, b + 1)
    >>> found.low < 0 < found.high, other.low > 0
    (True, True)
    """
    a, b = features(a, b)
    aa, bb = (_sums(x, x)[0] - (x.square().sum(1) / x.shape[1] + 1) ** 3 for x in (a, b))
    ab, ba = _sums(a, b)
    within = [float(s.sum()) / (len(s) * (len(s) - 1)) for s in (aa, bb)]
    value = sum(within) - 2 * float(ab.mean()) / len(b)
    if min(len(a), len(b)) < 3:
        return Estimate(value)
    variance = 0.0
    for own, other, m in ((aa, ab, len(b)), (bb, ba, len(a))):
        n = len(own)
        # what depends on the row left out: its pairs within leave twice, those across once
        without = -2 * own / ((n - 1) * (n - 2)) + 2 * other / ((n - 1) * m)
        variance += (n - 1) / n * float((without - without.mean()).square().sum())
    return interval(value, math.sqrt(variance))


def kernel(a: Tensor, b: Tensor) -> float:
    """Unbiased squared maximum mean discrepancy with the kernel (x y / d + 1)^3 (Binkowski et al. 2018, KID); may be
    negative for equal distributions.

    >>> x = torch.arange(4.0)[:, None]
    >>> kernel(x, x + 1) > kernel(x, x)
    True
    """
    return kernel_estimate(a, b).value


def _directions(d: int, count: int, seed: int) -> Tensor:
    drawn = torch.randn(d, count, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    unit: Tensor = drawn / torch.linalg.vector_norm(drawn, dim=0)
    return unit


def _line(x: Tensor, y: Tensor) -> Tensor:
    """Squared W2 of each pair of sorted rows (c, n) and (c, m): the integral of their quantile functions' squared
    difference, exact as both are constant between multiples of 1 / n and 1 / m."""
    n, m = x.shape[1], y.shape[1]
    if n == m:
        return (x - y).square().mean(1)
    ends = torch.unique(torch.cat([torch.arange(n + 1) * m, torch.arange(m + 1) * n]))
    start, width = ends[:-1], ends.diff().double() / (n * m)
    return torch.mv((x[:, start // m] - y[:, start // n]).square(), width)


def _slices(a: Tensor, b: Tensor, directions: int, seed: int, *, blockwise: bool) -> tuple[float, list[float]]:
    """The mean over directions of the squared W2 of all rows, and without each block of rows: sorted but once."""
    if directions < 1:
        raise InputError(f"the sliced distance needs >= 1 direction, got {directions}")
    block = blocks(a, b, seed=seed) if blockwise else []
    total = torch.zeros(int(block[0].max()) + 2 if blockwise else 1, dtype=torch.float64)
    for part in torch.split(_directions(a.shape[1], directions, seed), max(1, _CHUNK // max(len(a), len(b))), dim=1):
        (x, i), (y, j) = ((z @ part).T.contiguous().sort(dim=1) for z in (a, b))
        total[0] += _line(x, y).sum()
        for k in range(len(total) - 1):
            kept = ((v[c[w] != k].reshape(len(v), -1)) for v, w, c in ((x, i, block[0]), (y, j, block[1])))
            total[k + 1] += _line(*kept).sum()
    mean = (total / directions).tolist()
    return mean[0], mean[1:]


def sliced(a: Tensor, b: Tensor, directions: int = 512, seed: int = 0) -> float:
    """Sliced Wasserstein distance of order 2, squared (Rabin et al. 2012): the mean, over random unit directions, of
    the squared Wasserstein distance of the projections; MIND (arXiv 2605.06797) is this on Inception's features, up
    to its scale.

    In units of features squared: a translation by m makes |m|^2 / d in expectation, so d times it compares with
    `frechet`. Biased upwards by about 1 / n.

    >>> x = torch.randn(20, 1)
    >>> round(sliced(x, x + 2), 6), round(sliced(x, torch.cat([x, x])), 6)
    (4.0, 0.0)
    """
    a, b = features(a, b)
    return _slices(a, b, directions, seed, blockwise=False)[0]


def sliced_estimate(a: Tensor, b: Tensor, directions: int = 512, seed: int = 0) -> Estimate:
    """`sliced` and the 95 % interval of its mean over sets of these sizes, bias included.

    >>> found = sliced_estimate(torch.randn(99, 2), torch.randn(99, 2), directions=9)
    >>> found.low < found.value < found.high
    True
    """
    a, b = features(a, b)
    found = left_out(*_slices(a, b, directions, seed, blockwise=True))
    return interval(found.whole, found.error, found.freedom)


def sliced_unbiased(a: Tensor, b: Tensor, directions: int = 512, seed: int = 0) -> Estimate:
    """The sliced distance of the distributions behind the sets: `sliced` freed by the jackknife of its bias of about
    1 / n, with a 95 % interval; about 0, often below, for equal distributions.

    >>> draw = torch.Generator().manual_seed(0)
    >>> a, b = (torch.randn(200, 8, generator=draw) for _ in range(2))
    >>> found = sliced_unbiased(a, b, directions=64)
    >>> found.low < 0 < found.high
    True
    """
    a, b = features(a, b)
    found = left_out(*_slices(a, b, directions, seed, blockwise=True))
    return interval(found.unbiased, found.error, found.freedom)


def distances(a: Tensor, b: Tensor) -> Distances:
    """Both, between samples or features (n, ...)."""
    return Distances(frechet(a, b), kernel(a, b))
