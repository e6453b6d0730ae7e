"""The table of scores of `undiffuse evaluate`: a new score is one function and one line here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Generic, Literal, Protocol, TypeVar

from torch import Tensor

from undiffuse.evals.distances import (
    frechet_estimate,
    frechet_unbiased,
    kernel_estimate,
    sliced_estimate,
    sliced_unbiased,
)
from undiffuse.evals.estimate import Estimate
from undiffuse.evals.memory import authentic, copy_ratio_estimate, ct, near_copies
from undiffuse.evals.support import coverage, density, precision, recall, vendi_ratio

Better = Literal["lower", "higher", "one", "zero", "floor"]
Settings = Mapping[str, int | float | str]


class Measure(Protocol):
    """Real features (n, d), features of samples (m, d), seed -> score."""

    def __call__(self, real: Tensor, fake: Tensor, seed: int, /) -> Estimate: ...


class MemoryMeasure(Protocol):
    """Features of samples (k, d), of training data (n, d) and of held-out data (m, d), seed -> score."""

    def __call__(self, fake: Tensor, train: Tensor, held_out: Tensor, seed: int, /) -> Estimate: ...


M = TypeVar("M", Measure, MemoryMeasure)


@dataclass(frozen=True)
class Metric(Generic[M]):
    """A score of samples against real data: how it is measured, which way is better, its name for people, its paper,
    and the settings that a number must be quoted with. `alone`: it does not look at held-out data, so that all of these
    give its floor."""

    measure: M
    better: Better
    title: str
    paper: str
    settings: Settings = field(default_factory=dict)
    alone: bool = False


_HEUSEL, _CHONG = "Heusel et al. 2017, arXiv 1706.08500", "Chong and Forsyth 2020, arXiv 1911.07023"
_BINKOWSKI, _SLICED = "Binkowski et al. 2018, arXiv 1801.01401", "Berthet et al. 2026, arXiv 2605.06797"
_KYNKAANNIEMI, _NAEEM = "Kynkaanniemi et al. 2019, arXiv 1904.06991", "Naeem et al. 2020, arXiv 2002.09797"
_VENDI, _ALAA = "Friedman and Dieng 2023, arXiv 2210.02410", "Alaa et al. 2022, arXiv 2102.08921"
_MEEHAN = "Meehan et al. 2020, arXiv 2004.05675"
_K, _BALLS, _DIRECTIONS, _CELLS, _FEWEST, _TIMES = 3, 5, 512, 5, 20, 3.0  # as in the papers, where these fix them

METRICS: dict[str, Metric[Measure]] = {
    "frechet": Metric(frechet_estimate, "lower", "Fréchet, with its bias", _HEUSEL),
    "frechet-unbiased": Metric(frechet_unbiased, "lower", "Fréchet, unbiased", _CHONG, {"bias": "jackknife"}),
    "kernel": Metric(lambda a, b, s: kernel_estimate(a, b), "lower", "Kernel (KID)", _BINKOWSKI, {"degree": 3}),
    "sliced": Metric(
        lambda a, b, s: sliced_estimate(a, b, _DIRECTIONS, s),
        "lower",
        "Sliced Wasserstein",
        _SLICED,
        {"directions": _DIRECTIONS},
    ),
    "sliced-unbiased": Metric(
        lambda a, b, s: sliced_unbiased(a, b, _DIRECTIONS, s),
        "lower",
        "Sliced Wasserstein, unbiased",
        _SLICED,
        {"directions": _DIRECTIONS, "bias": "jackknife"},
    ),
    "precision": Metric(lambda a, b, s: precision(a, b, _K), "higher", "Precision", _KYNKAANNIEMI, {"k": _K}),
    "recall": Metric(lambda a, b, s: recall(a, b, _K), "higher", "Recall", _KYNKAANNIEMI, {"k": _K}),
    "density": Metric(lambda a, b, s: density(a, b, _BALLS), "one", "Density", _NAEEM, {"k": _BALLS}),
    "coverage": Metric(lambda a, b, s: coverage(a, b, _BALLS), "higher", "Coverage", _NAEEM, {"k": _BALLS}),
    "vendi": Metric(vendi_ratio, "one", "Vendi over real data's", _VENDI, {"kernel": "cosine"}),
}


def _copying_test(x: Tensor, train: Tensor, held_out: Tensor, seed: int) -> Estimate:
    cells = min(_CELLS, max(1, min(len(x), len(held_out)) // 60), max(1, len(train)))
    return ct(x, train, held_out, cells, _FEWEST, seed)


MEMORY: dict[str, Metric[MemoryMeasure]] = {
    "copy-ratio": Metric(copy_ratio_estimate, "one", "Nearest training / held-out", ""),
    "near-copies": Metric(
        lambda x, a, b, s: near_copies(x, a, _TIMES), "floor", "Near copies, share", "", {"times": _TIMES}, alone=True
    ),
    "authentic": Metric(lambda x, a, b, s: authentic(x, a), "floor", "Authentic samples, share", _ALAA, alone=True),
    "ct": Metric(
        _copying_test,
        "zero",
        "C_T, copying test",
        _MEEHAN,
        {"cells": f"{_CELLS}, or one for 60 samples", "fewest": _FEWEST},
    ),
}
