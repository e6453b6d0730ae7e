"""Where samples lie and where they are missing: nearest neighbours, precision and recall, density and coverage, the
number of different samples, and shares of classes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from undiffuse.evals.estimate import Estimate, blocks, features, interval, left_out, mean, share, some
from undiffuse.types import InputError

_CHUNK = 2**24  # distances held at once: 128 MiB


def pairwise(x: Tensor, y: Tensor) -> Iterator[Tensor]:
    """The distances of the rows of x (n, d), some at a time, to all rows of y (m, d).

    >>> torch.cat(list(pairwise(torch.zeros(2, 1), torch.ones(3, 1)))).shape
    torch.Size([2, 3])
    """
    # as |x|^2 + |y|^2 - 2 x y, much faster for wide features, copies would lie at 1e-8 |x| rather than at 0
    mode = "donot_use_mm_for_euclid_dist" if x.shape[1] <= 256 else "use_mm_for_euclid_dist"
    centre = y.mean(0) if x.shape[1] > 256 else 0  # small numbers cancel better
    for rows in torch.split(x, max(1, _CHUNK // len(y))):
        yield torch.cdist(rows - centre, y - centre, compute_mode=mode)


def nearest(x: Tensor, y: Tensor, k: int = 1) -> tuple[Tensor, Tensor]:
    """For each row of x (n, d) the distance to the k-th nearest row of y (m, d), and that row's number.

    >>> distance, row = nearest(torch.tensor([[0.0], [4.0]]), torch.tensor([[1.0], [9.0]]))
    >>> distance.tolist(), row.tolist()
    ([1.0, 3.0], [0, 0])
    """
    found = [part.topk(k, largest=False) for part in pairwise(x, y)]
    return torch.cat([f.values[:, -1] for f in found]), torch.cat([f.indices[:, -1] for f in found])


def radii(x: Tensor, k: int) -> Tensor:
    """The distance (n,) of each row of x (n, d) to its k-th nearest other row.

    >>> radii(torch.tensor([[0.0], [1.0], [3.0]]), 1).tolist()
    [1.0, 1.0, 2.0]
    """
    return nearest(x, x, k + 1)[0]


def _sets(a: Tensor, b: Tensor, k: int) -> tuple[Tensor, Tensor]:
    if k < 1:
        raise InputError(f"the neighbourhood is the k-th nearest sample, k >= 1; got k = {k}")
    a, b = features(a, b, fewest=k + 1)
    return a, b


def _inside(x: Tensor, y: Tensor, k: int) -> Tensor:
    within = radii(y, k)
    return torch.cat([(part <= within).any(1) for part in pairwise(x, y)])


def precision(real: Tensor, fake: Tensor, k: int = 3) -> Estimate:
    """The share of samples (m, d) within the distance of some real one (n, d) to its k-th nearest real neighbour
    (Kynkaanniemi et al. 2019, Eq. 2): whether samples look real.

    The 95 % interval is over draws of samples, for the real set as it is. Raises `InputError` for sets of <= k rows.

    >>> x = torch.arange(8.0)[:, None]
    >>> precision(x, x / 2 + 2).value, precision(x, x + 50).value
    (1.0, 0.0)
    """
    real, fake = _sets(real, fake, k)
    return share(_inside(fake, real, k))


def recall(real: Tensor, fake: Tensor, k: int = 3) -> Estimate:
    """The share of real data within the distance of some sample to its k-th nearest sample (Kynkaanniemi et al. 2019,
    Eq. 2): whether samples reach all of it. The interval is over draws of real data.

    >>> x = torch.arange(8.0)[:, None]
    >>> recall(x, x).value, recall(x, x / 9).value
    (1.0, 0.25)
    """
    real, fake = _sets(real, fake, k)
    return share(_inside(real, fake, k))


def density(real: Tensor, fake: Tensor, k: int = 5) -> Estimate:
    """The mean number of real neighbourhoods, as of `precision`, that a sample lies in, over k (Naeem et al. 2020,
    Sec. 3); its expectation is exactly 1 for equal distributions, and it may be above. The interval is over draws of
    samples.

    >>> x = torch.arange(9.0)[:, None]
    >>> density(x, x + 0.5, k=2).value, density(x, x + 50, k=2).value
    (1.0555555555555556, 0.0)
    """
    real, fake = _sets(real, fake, k)
    within = radii(real, k)
    return mean(torch.cat([(part < within).sum(1) for part in pairwise(fake, real)]).double() / k)


def coverage(real: Tensor, fake: Tensor, k: int = 5) -> Estimate:
    """The share of real data with a sample nearer than its k-th nearest real neighbour (Naeem et al. 2020, Sec. 3):
    1 - 2^-k for equal distributions and equally many of both. The interval is over draws of real data.

    >>> x = torch.arange(8.0)[:, None]
    >>> coverage(x, x).value, coverage(x, x / 9).value
    (1.0, 0.5)
    """
    real, fake = _sets(real, fake, k)
    return share(nearest(real, fake)[0] < radii(real, k))


def _vendi(x: Tensor) -> float:
    gram = x @ x.T if len(x) <= x.shape[1] else x.T @ x  # the same eigenvalues, but for zeros
    share_of = (torch.linalg.eigvalsh(gram) / len(x)).clamp(min=0)
    return math.exp(-float(torch.special.xlogy(share_of, share_of).sum()))


def _unit(x: Tensor) -> Tensor:
    length = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    if not bool(length.all()):
        raise InputError(
            f"{int((length == 0).sum())} of {len(x)} features are 0 and have no direction, which the Vendi score "
            "compares: leave them out, or shift the features"
        )
    unit: Tensor = x / length
    return unit


def vendi(x: Tensor) -> float:
    """The effective number of different rows of x (n, d), 1 .. min(n, d): exp of the entropy of the eigenvalues of
    the matrix of their cosines over n (Friedman and Dieng 2023).

    >>> round(vendi(torch.eye(5)), 6), round(vendi(torch.ones(5, 3)), 6)
    (5.0, 1.0)
    """
    return _vendi(_unit(features(x, fewest=1)[0]))


def vendi_ratio(real: Tensor, fake: Tensor, seed: int = 0) -> Estimate:
    """The Vendi score of samples over that of as many real data, as it grows with their number: 1 where they are as
    various, below where samples repeat each other. `seed` draws the rows that are kept of the larger set.

    The 95 % interval is the jackknife's, over draws of both.

    >>> x = torch.randn(99, 8)
    >>> vendi_ratio(x, x).value, vendi_ratio(x, x[:1] + 0.1 * x).value < 0.5
    (1.0, True)
    """
    real, fake = (_unit(x) for x in features(real, fake))
    n = min(len(real), len(fake))
    real, fake = (x[some(x, n, seed)] for x in (real, fake))
    block, other = blocks(real, fake, seed=seed)
    without = [_vendi(fake[other != j]) / _vendi(real[block != j]) for j in range(int(block.max()) + 1)]
    found = left_out(_vendi(fake) / _vendi(real), without)
    return interval(found.whole, found.error, found.freedom)


class Classes(NamedTuple):
    """Shares of each class in real data and samples (classes,); `distance` is their total variation, 0 .. 1, and
    `p_value` how often equal shares would look as different by chance (chi-square test of homogeneity)."""

    real: Tensor
    fake: Tensor
    distance: float
    p_value: float


def classes(real: Tensor, fake: Tensor) -> Classes:
    """Compares the shares of classes 0, 1, ... read off real data (n,) and samples (m,).

    Raises `InputError` for anything but whole numbers >= 0.

    >>> found = classes(torch.tensor([0, 1] * 50), torch.tensor([0, 1, 1, 1] * 25))
    >>> found.fake.tolist(), found.distance, found.p_value < 0.01
    ([0.25, 0.75], 0.25, True)
    """
    from scipy.stats import chi2_contingency

    for x in (real, fake):
        if x.ndim != 1 or not len(x) or x.is_floating_point() or x.is_complex() or int(x.min()) < 0:
            raise InputError(f"classes are whole numbers >= 0 of shape (n,), got {tuple(x.shape)} of {x.dtype}")
    count = 1 + max(int(real.max()), int(fake.max()))
    table = torch.stack([x.cpu().long().bincount(minlength=count) for x in (real, fake)]).double()
    shares = table / table.sum(1, keepdim=True)
    met = table[:, table.sum(0) > 0]
    p_value = float(chi2_contingency(met.numpy(), correction=False).pvalue) if met.shape[1] > 1 else 1.0
    return Classes(shares[0], shares[1], float((shares[0] - shares[1]).abs().sum() / 2), p_value)
