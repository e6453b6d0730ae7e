"""The training error per noise level, beside the best linear denoiser's at the very same levels."""

from __future__ import annotations

import torch
from torch import Tensor

from undiffuse.level import Level
from undiffuse.spectrum import Spectrum


class LevelBins:
    """Mean x0 error per bin of lam; a network that does not beat `linear` has learned nothing there but the covariance.

    >>> bins = LevelBins(Spectrum(torch.zeros(1), torch.ones(1)))
    >>> bins.add(torch.zeros(4).double(), torch.full((4,), 0.3))
    >>> [(row["count"], round(row["mse"], 2), row["linear"]) for row in bins.rows()]
    [(4, 0.3, 0.5)]
    """

    def __init__(self, spectrum: Spectrum, lo: float = -4.5, hi: float = 4.5, bins: int = 9) -> None:
        self.spectrum, self.edges = spectrum, torch.linspace(lo, hi, bins + 1, dtype=torch.float64)
        self.sums = torch.zeros(3, bins, dtype=torch.float64)

    def add(self, lam: Tensor, mse: Tensor) -> None:
        """Take in errors (b,) at levels lam (b,); levels beyond the outer edges count in the outer bins."""
        index = (torch.bucketize(lam, self.edges) - 1).clamp(0, len(self.edges) - 2)
        rows = torch.stack([torch.ones_like(lam), mse.double(), self.spectrum.linear_loss(Level.at(lam))])
        self.sums.index_add_(1, index, rows)

    def clear(self) -> None:
        """Start anew, in place."""
        self.sums.zero_()

    def rows(self) -> list[dict[str, float]]:
        """One row a non-empty bin: `lam` of its middle, `count`, `mse`, `linear`."""
        middle = (self.edges[1:] + self.edges[:-1]) / 2
        return [
            {"lam": float(m), "count": int(n), "mse": float(mse / n), "linear": float(linear / n)}
            for m, n, mse, linear in zip(middle, *self.sums, strict=True)
            if n > 0
        ]
