"""How a batch's levels are drawn: quantiles u and the weights of their losses, blindly or by the losses seen so far."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from undiffuse.seeds import seed_of, uniform
from undiffuse.types import require


class Quantiles(NamedTuple):
    """`u` (b,) in [0, 1] and `weight` (b,), one over u's density, both float64: E[weight f(u)] is f's integral."""

    u: Tensor
    weight: Tensor


class Drawer(Protocol):
    """The draws of one run, a function of (seed, step) and of the losses learned so far."""

    def __call__(self, b: int, seed: int, step: int) -> Quantiles: ...

    def learn(self, u: Tensor, loss: Tensor) -> None:
        """Take in a batch's losses (b,) at u (b,), before their weights."""

    def state(self) -> dict[str, Tensor]:
        """What was learned, as tensors by name, to be saved and overwritten in place when a run goes on."""


class Draws(Protocol):
    """Settings, of which each run starts with a `Drawer` of its own."""

    def start(self) -> Drawer: ...


@dataclass(frozen=True)
class Independent:
    """Every sample's u by itself, a function of its global index: a run's levels are the same for every batch size."""

    def start(self) -> Drawer:
        """Itself: there is nothing to learn."""
        return self

    def __call__(self, b: int, seed: int, step: int) -> Quantiles:
        """The quantiles of a step's b samples, all of weight 1."""
        u = uniform(seed_of(seed, 4), torch.arange((step - 1) * b, step * b))
        return Quantiles(u, torch.ones_like(u))

    def learn(self, u: Tensor, loss: Tensor) -> None:
        """Nothing."""

    def state(self) -> dict[str, Tensor]:
        """Nothing."""
        return {}


@dataclass(frozen=True)
class Stratified(Independent):
    """One u from each of b equal slices of (0, 1), in random order: the same marginal with less variance (Kingma et
    al. 2021, appendix I)."""

    def __call__(self, b: int, seed: int, step: int) -> Quantiles:
        """The quantiles of a step's b samples, all of weight 1."""
        u, weight = super().__call__(b, seed, step)
        order = torch.randperm(b, generator=torch.Generator().manual_seed(seed_of(seed, 5, step)))
        return Quantiles((order + u) / b, weight)


@dataclass(frozen=True)
class Adaptive:
    """Stratified, but bin k of K = `bins` equal parts of (0, 1) has the share p_k, mostly sqrt(E[loss^2] within it),
    and a loss there the weight 1 / (K p_k) (Nichol and Dhariwal 2021, section 3.3, arXiv 2102.09672).

    A weighted loss keeps its expectation, with the least variance that shares of bins can give. p_k is at least
    `floor` / K, `floor` in (0, 1], so that no weight is above 1 / `floor`; the rest goes by the mean of loss^2 over
    about the last `memory` losses of the bin, once each bin has seen 0.7 `memory` of them. InputError for settings out
    of range.

    >>> drawer = Adaptive(bins=2, floor=0.2, memory=1).start()
    >>> drawer.learn(torch.tensor([0.1, 0.9]), torch.tensor([1.0, 3.0]))  # shares 0.3 and 0.7
    >>> drawer(10, seed=0, step=1).weight.unique()
    tensor([0.7143, 1.6667], dtype=torch.float64)
    """

    bins: int = 32
    floor: float = 0.1
    memory: int = 100

    def __post_init__(self) -> None:
        require(1 <= self.bins <= 10_000, "draws.bins", self.bins, "from 1 to 10000")
        require(0 < self.floor <= 1, "draws.floor", self.floor, "above 0 and at most 1")
        require(1 <= self.memory <= 1_000_000, "draws.memory", self.memory, "from 1 to 1000000")

    def start(self) -> Drawer:
        """A drawer that has seen nothing."""
        return _Learner(self)


class _Learner:
    """`moments` (2, bins): decayed sums of loss^2, and of ones; their ratio is a mean that weighs recent losses more.

    Everything but the sums is computed anew from them, so that they are the whole state.
    """

    def __init__(self, settings: Adaptive) -> None:
        self.settings, self.moments = settings, torch.zeros(2, settings.bins, dtype=torch.float64)

    def shares(self) -> Tensor:
        """p (bins,), above 0, with sum 1."""
        settings, (squares, seen) = self.settings, self.moments
        even = torch.full_like(seen, 1 / settings.bins)
        sizes = (squares / seen).sqrt()
        if bool((seen < settings.memory / 2).any()) or not bool(sizes.sum() > 0):
            return even
        learned: Tensor = settings.floor * even + (1 - settings.floor) * sizes / sizes.sum()
        return learned

    def __call__(self, b: int, seed: int, step: int) -> Quantiles:
        """The quantiles of a step's b samples."""
        return warp(Stratified()(b, seed, step).u, self.shares())

    def learn(self, u: Tensor, loss: Tensor) -> None:
        """Add loss^2 (b,) to the sums of u's bins, where what was there counts less by one loss for each."""
        bins = (u * self.settings.bins).long().clamp(0, self.settings.bins - 1)
        new = torch.zeros_like(self.moments).index_add_(1, bins, torch.stack([loss.double() ** 2, torch.ones_like(u)]))
        self.moments.mul_((1 - 1 / self.settings.memory) ** new[1]).add_(new)

    def state(self) -> dict[str, Tensor]:
        """The sums."""
        return {"draws.moments": self.moments}


def warp(v: Tensor, shares: Tensor) -> Quantiles:
    """The inverse CDF at v (b,) in (0, 1) of the density that is K p_k on bin k of K, with weight du/dv = 1 / (K p_k).

    `shares` p (K,) are above 0 with sum 1.
    """
    ends, bins = shares.cumsum(0), len(shares)
    k = torch.searchsorted(ends, v, right=True).clamp(max=bins - 1)
    within = (v - (ends - shares)[k]) / shares[k]
    return Quantiles((k + within.clamp(0, 1)) / bins, 1 / (bins * shares[k]))


DRAWS: dict[str, Callable[..., Draws]] = {"independent": Independent, "stratified": Stratified, "adaptive": Adaptive}
