"""Memorisation: whether samples lie nearer to the training data than to data that training has not seen."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from undiffuse.evals.estimate import Estimate, blocks, canonical, features, interval, left_out, share, some
from undiffuse.evals.support import nearest, pairwise, radii
from undiffuse.types import InputError


def copy_ratio(x: Tensor, train: Tensor, held_out: Tensor) -> float:
    """Median distance to the nearest training sample over that to the nearest held-out one, from equally many of each;
    far below 1 means copying.

    >>> a, b = torch.zeros(1, 2), torch.ones(1, 2)
    >>> copy_ratio(torch.full((4, 2), 0.25), a, b) < 0.5
    True
    """
    n = min(len(train), len(held_out))
    near = [torch.cdist(x.flatten(1), part[:n].flatten(1)).amin(1) for part in (train, held_out)]
    return float(near[0].median() / near[1].median())


def _ratio(seen: Tensor, unseen: Tensor) -> Tensor:
    return torch.where(seen == unseen, 1.0, seen / unseen)  # a copy of both says nothing


def _block_minima(x: Tensor, y: Tensor, block: Tensor, count: int) -> Tensor:
    """The distance (n, count) of each row of x to the nearest row of each block of y."""
    found = []
    for part in pairwise(x, y):
        low = torch.full((len(part), count), math.inf, dtype=part.dtype)
        found.append(low.scatter_reduce(1, block.expand(len(part), -1), part, "amin"))
    return torch.cat(found)


def copy_ratio_estimate(x: Tensor, train: Tensor, held_out: Tensor, seed: int = 0) -> Estimate:
    """`copy_ratio` with the 95 % interval of the jackknife over draws of all three sets (each >= 2 rows): it holds 1
    for fresh draws. `seed` draws the blocks, and the rows kept of the larger set.

    >>> draw = torch.Generator().manual_seed(0)
    >>> a, b, x = (torch.randn(200, 4, generator=draw) for _ in range(3))
    >>> found, copies = copy_ratio_estimate(x, a, b), copy_ratio_estimate(a, a, b)
    >>> found.low < 1 < found.high, copies.value
    (True, 0.0)
    """
    x, train, held_out = features(x, train, held_out)
    n = min(len(train), len(held_out))
    sets = x, train[some(train, n, seed)], held_out[some(held_out, n, seed)]
    block = blocks(*sets, seed=seed)
    count = int(block[0].max()) + 1
    near = [_block_minima(x, y, b, count) for y, b in zip(sets[1:], block[1:], strict=True)]

    def ratio(rows: Tensor, columns: Tensor) -> float:
        seen, unseen = (part[rows][:, columns].amin(1).median() for part in near)
        return float(_ratio(seen, unseen))

    every = torch.arange(count)
    found = left_out(ratio(block[0] >= 0, every), [ratio(block[0] != j, every[every != j]) for j in range(count)])
    return interval(found.whole, found.error, found.freedom)


def _closeness(x: Tensor, train: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Distances to the nearest training rows, their numbers, and these distances over those of the training rows to
    their own nearest neighbours."""
    first: dict[bytes, int] = {}
    for i, sample in enumerate(train.numpy()):
        first.setdefault(sample.tobytes(), i)  # what is there twice would have itself as its neighbour
    kept = torch.tensor(list(first.values()))
    distinct = features(train[kept])[0]
    distance, row = nearest(x, distinct)
    return distance, kept[row], torch.where(distance == 0, 0.0, distance / radii(distinct, 1)[row])


def near_copies(x: Tensor, train: Tensor, times: float = 3.0) -> Estimate:
    """The share of samples (k, d) that lie at least `times` nearer to a training sample (n, d) than that one lies to
    its own nearest neighbour: as `authentic`, but it sees copies which averages over all samples hide.

    >>> draw = torch.Generator().manual_seed(0)
    >>> train, x = (torch.randn(100, 4, generator=draw) for _ in range(2))
    >>> x[:20] = train[:20] + 0.01
    >>> near_copies(x, train).value >= 0.2, near_copies(x[20:], train).value < 0.1
    (True, True)
    """
    x, train = features(x, train)
    if not times > 1:
        raise InputError(f"a near copy lies more than once nearer to a training sample: times > 1, got {times}")
    return share(_closeness(x, train)[2] <= 1 / times)


class Suspects(NamedTuple):
    """The samples most like copies: their numbers, those of their nearest training samples, the distances to these,
    and the ratios of these to the distances of the training samples to their own nearest neighbours, smallest first;
    all of shape (count,)."""

    sample: Tensor
    train: Tensor
    distance: Tensor
    ratio: Tensor

    def rows(self) -> list[dict[str, float]]:
        """As plain data."""
        return [
            dict(zip(self._fields, row, strict=True)) for row in zip(*(part.tolist() for part in self), strict=True)
        ]


def suspects(x: Tensor, train: Tensor, count: int = 8) -> Suspects:
    """The samples that are nearest to a training sample, in proportion to that one's distance to its own nearest
    neighbour (see `near_copies`).

    >>> draw = torch.Generator().manual_seed(0)
    >>> train, x = (torch.randn(50, 4, generator=draw) for _ in range(2))
    >>> x[7] = train[3]
    >>> [part.tolist() for part in suspects(x, train, count=1)]
    [[7], [3], [0.0], [0.0]]
    """
    x, train = features(x, train)
    distance, row, ratio = _closeness(x, train)
    first = ratio.argsort(stable=True)[: max(0, count)]
    return Suspects(first, row[first], distance[first], ratio[first])


def authentic(x: Tensor, train: Tensor) -> Estimate:
    """The share of samples (m, d) farther from their nearest training sample (n, d) than that one is from its own
    nearest training neighbour (AuthPct, Alaa et al. 2022), with the interval of a share.

    Copies have 0. Fresh draws have 1/3 in one dimension and 0.38 in two, whatever their density, and anything from
    1/2 in many, where few points are nearest to most others: it compares with that of held-out data.

    >>> train = torch.arange(9.0)[:, None]
    >>> authentic(train, train).value, authentic(train + 20, train).value
    (0.0, 1.0)
    """
    x, train = features(x, train)
    distance, row = nearest(x, train)
    return share(distance > radii(train, 1)[row])


def _z(x: Tensor, y: Tensor) -> float:
    """The Mann-Whitney statistic of how far x exceeds y, standard normal for equal distributions; ties count half."""
    n, m = len(x), len(y)
    _, inverse, ties = torch.unique(torch.cat([x, y]), return_inverse=True, return_counts=True)
    rank = (ties.cumsum(0) - (ties.double() - 1) / 2)[inverse]
    u = float(rank[:n].sum()) - n * (n + 1) / 2
    tied = float((ties.double() ** 3 - ties).sum()) / ((n + m) * (n + m - 1))
    variance = n * m / 12 * (n + m + 1 - tied)
    return (u - n * m / 2) / math.sqrt(variance) if variance > 0 else 0.0


def ct(x: Tensor, train: Tensor, held_out: Tensor, cells: int = 5, fewest: int = 20, seed: int = 0) -> Estimate:
    """The three-sample test C_T (Meehan et al. 2020): whether samples lie nearer to the training set than
    held-out data do, << 0 where they were copied from it, >> 0 where they miss it, ~ 0 for fresh draws.

    In each k-means cell of the training set (n, d) the Mann-Whitney statistic of distances to the nearest training
    sample, as a standard normal number; averaged with the held-out data's shares of the cells, those with fewer than
    `fewest` samples or held-out data left out. The 95 % interval holds 0 in 19 of 20 sets of fresh draws. Raises
    `InputError` where no cell is left.

    >>> draw = torch.Generator().manual_seed(0)
    >>> train, held_out, x = (torch.randn(300, 4, generator=draw) for _ in range(3))
    >>> found, copies = ct(x, train, held_out, cells=2), ct(train + 0.01, train, held_out, cells=2)
    >>> found.low < 0 < found.high, copies.value < -10
    (True, True)
    """
    from sklearn.cluster import KMeans

    x, train, held_out = features(x, train, held_out)
    if not 1 <= cells <= len(train) or fewest < 1:
        raise InputError(f"C_T needs 1 .. {len(train)} cells and fewest >= 1, got {cells} and {fewest}")
    means = KMeans(cells, n_init=4, random_state=seed % 2**32).fit(train[canonical(train, seed)].numpy())
    cell, cell_held = (torch.from_numpy(means.predict(part.numpy())) for part in (x, held_out))
    distance, distance_held = nearest(x, train)[0], nearest(held_out, train)[0]
    found = []
    for j in range(cells):
        own, held = distance[cell == j], distance_held[cell_held == j]
        if min(len(own), len(held)) >= fewest:
            found.append((len(held), _z(own, held)))
    if not found:
        raise InputError(
            f"no cell of {cells} has >= {fewest} of the {len(x)} samples and of the {len(held_out)} held-out data: "
            "give more of them, or fewer cells"
        )
    total = sum(w for w, _ in found)
    return interval(sum(w * z for w, z in found) / total, math.sqrt(sum(w * w for w, _ in found)) / total)
