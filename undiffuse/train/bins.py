"""What is trained per noise level, beside what is had there without a network."""

from __future__ import annotations

import torch
from torch import Tensor

from undiffuse.level import Level
from undiffuse.spectrum import Spectrum
from undiffuse.train.loop import TrainState


class _Bins:
    """Sums over bins of lam: the count, then `columns` others."""

    def __init__(self, columns: int, lo: float, hi: float, bins: int) -> None:
        self.edges = torch.linspace(lo, hi, bins + 1, dtype=torch.float64)
        self.sums = torch.zeros(1 + columns, bins, dtype=torch.float64)

    def _add(self, lam: Tensor, *columns: Tensor) -> None:
        index = (torch.bucketize(lam, self.edges) - 1).clamp(0, len(self.edges) - 2)
        self.sums.index_add_(1, index, torch.stack([torch.ones_like(lam), *(c.double() for c in columns)]))

    def clear(self) -> None:
        """Start anew, in place."""
        self.sums.zero_()

    def _means(self, *names: str) -> list[dict[str, float]]:
        middle = (self.edges[1:] + self.edges[:-1]) / 2
        return [
            {"lam": float(m), "count": int(n), **{k: float(v / n) for k, v in zip(names, sums, strict=True)}}
            for m, n, *sums in zip(middle, *self.sums, strict=True)
            if n > 0
        ]


class LevelBins(_Bins):
    """Mean x0 error per bin of lam; a network that does not beat `linear` has learned nothing there but the covariance.

    >>> bins = LevelBins(Spectrum(torch.zeros(1), torch.ones(1)))
    >>> bins.add(torch.zeros(4).double(), torch.full((4,), 0.3))
    >>> [(row["count"], round(row["mse"], 2), row["linear"]) for row in bins.rows()]
    [(4, 0.3, 0.5)]
    """

    def __init__(self, spectrum: Spectrum, lo: float = -4.5, hi: float = 4.5, bins: int = 9) -> None:
        super().__init__(2, lo, hi, bins)
        self.spectrum = spectrum

    def add(self, lam: Tensor, mse: Tensor) -> None:
        """Take in errors (b,) at levels lam (b,); levels beyond the outer edges count in the outer bins."""
        self._add(lam, mse, self.spectrum.linear_loss(Level.at(lam)))

    def take(self, state: TrainState) -> None:
        """Take in what a step says."""
        self.add(state.lam, state.error)

    def rows(self) -> list[dict[str, float]]:
        """One row a non-empty bin: `lam` of its middle, `count`, `mse`, `linear`."""
        return self._means("mse", "linear")


class ClassifierBins(_Bins):
    """A classifier's mean loss per bin of lam beside `prior`, that of the `prior` (classes,) alone, and its accuracy.

    >>> bins = ClassifierBins(torch.tensor([0.5, 0.5]))
    >>> bins.add(torch.zeros(4).double(), torch.full((4,), 0.3), torch.tensor([0, 0, 0, 1]))
    >>> [(row["count"], round(row["loss"], 2), row["accuracy"], round(row["prior"], 2)) for row in bins.rows()]
    [(4, 0.3, 0.75, 0.69)]
    """

    def __init__(self, prior: Tensor, lo: float = -4.5, hi: float = 4.5, bins: int = 9) -> None:
        super().__init__(2, lo, hi, bins)
        self.prior = float(torch.special.entr(prior.double()).sum())

    def add(self, lam: Tensor, loss: Tensor, error: Tensor) -> None:
        """Take in losses (b,) in nats, and 1 where the classifier was wrong, at levels lam (b,)."""
        self._add(lam, loss, 1 - error)

    def take(self, state: TrainState) -> None:
        """Take in what a step says."""
        self.add(state.lam, state.losses, state.error)

    def rows(self) -> list[dict[str, float]]:
        """One row a non-empty bin: `lam` of its middle, `count`, `loss`, `accuracy`, `prior`."""
        return [{**row, "prior": self.prior} for row in self._means("loss", "accuracy")]
