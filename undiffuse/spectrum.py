"""The data's mean and covariance in an orthonormal basis: what a Gaussian knows about the data, measured once."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from undiffuse.level import Level
from undiffuse.types import InputError


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Mean (d,), variances (k,) along the rows of an orthonormal `basis` (k, d), and `rest`, the variance elsewhere.

    `basis=None` means that the covariance is diagonal (k = d). `shape` is the shape of one sample, with d elements.
    """

    mean: Tensor
    variances: Tensor
    basis: Tensor | None = None
    rest: float = 0.0
    shape: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        shape = self.shape or tuple(self.mean.shape)
        object.__setattr__(self, "shape", shape)
        object.__setattr__(self, "mean", self.mean.double().reshape(-1))
        object.__setattr__(self, "variances", self.variances.double().reshape(-1))
        d, k = self.mean.numel(), self.variances.numel()
        if math.prod(shape) != d or (k != d if self.basis is None else self.basis.shape != (k, d)):
            got = None if self.basis is None else tuple(self.basis.shape)
            raise InputError(f"Spectrum: shape {shape}, mean of {d}, {k} variances and a basis of {got} do not fit")
        if bool((self.variances < 0).any()) or self.rest < 0:
            raise InputError("Spectrum: variances must be >= 0")

    @staticmethod
    def measure(x: Tensor, rank: int | None = None) -> Spectrum:
        """Principal components of data x (n, *shape), all of them or the first `rank`; the others share `rest`.

        Raises InputError for fewer than two samples and for NaN or infinite values.

        >>> s = Spectrum.measure(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
        >>> s.variances.tolist()
        [1.0, 0.0]
        """
        if x.shape[0] < 2 or not bool(torch.isfinite(x).all()):
            raise InputError(f"a spectrum needs at least 2 finite samples; got {x.shape[0]}, or NaN among them")
        flat = x.double().reshape(x.shape[0], -1)
        mean, (n, d) = flat.mean(0), flat.shape
        rank = min(d, rank or (d if d <= 2048 else min(256, n)))
        if d <= 2048:
            values, vectors = torch.linalg.eigh((flat - mean).T @ (flat - mean) / n)
            values, basis = values.flip(0)[:rank].clamp(min=0), vectors.T.flip(0)[:rank]
        else:
            _, singular, v = torch.pca_lowrank(flat, q=rank, niter=4)
            values, basis = singular**2 / n, v.T
        total = flat.var(0, correction=0).sum()
        rest = float((total - values.sum()).clamp(min=0)) / (d - rank) if rank < d else 0.0
        return Spectrum(mean, values, basis.contiguous(), rest, tuple(x.shape[1:]))

    def leading(self, rank: int) -> Spectrum:
        """The first `rank` directions alone; the others share the mean of their variances as `rest`.

        The same as `measure(x, rank)` of the same data, at a fraction of the memory. Raises InputError for rank < 1.
        """
        if rank < 1:
            raise InputError(f"rank must be >= 1, got {rank}")
        if self.basis is None or rank >= len(self.variances):
            return self
        others = self.mean.numel() - rank
        beyond = float(self.variances[rank:].sum()) + self.rest * (self.mean.numel() - len(self.variances))
        return Spectrum(self.mean, self.variances[:rank], self.basis[:rank].contiguous(), beyond / others, self.shape)

    @property
    def std(self) -> float:
        """The root of the mean variance of an element: what EDM calls sigma_data."""
        d, k = self.mean.numel(), self.variances.numel()
        return math.sqrt((float(self.variances.sum()) + (d - k) * self.rest) / d)

    def linear_loss(self, level: Level) -> Tensor:
        """Mean squared error per element, E |x0 - x0_hat|^2 / d, of the best linear denoiser at the level(s).

        A trained network that does not beat this at some lam has learned nothing there beyond the covariance.
        """
        a2, s2 = torch.square(level.alpha).reshape(-1, 1), torch.square(level.sigma).reshape(-1, 1)
        d, k = self.mean.numel(), self.variances.numel()
        known = (self.variances * s2 / (a2 * self.variances + s2)).sum(-1)
        other = (d - k) * self.rest * s2 / (a2 * self.rest + s2)
        return ((known + other[:, 0]) / d).reshape(level.alpha.shape)

    def save(self, path: str | Path) -> None:
        """Write as safetensors."""
        Path(path).write_bytes(self.to_bytes())

    def to_bytes(self) -> bytes:
        """As safetensors."""
        from safetensors.torch import save

        tensors = {"mean": self.mean, "variances": self.variances, "shape": torch.tensor(self.shape)}
        tensors["rest"] = torch.tensor(self.rest, dtype=torch.float64)
        if self.basis is not None:
            tensors["basis"] = self.basis
        return save({k: v.contiguous() for k, v in tensors.items()})  # type: ignore[no-any-return]

    @staticmethod
    def load(path: str | Path) -> Spectrum:
        """Read what `save` wrote."""
        from safetensors.torch import load_file

        t = load_file(path)
        shape = tuple(int(n) for n in t["shape"])
        return Spectrum(t["mean"], t["variances"], t.get("basis"), float(t["rest"]), shape)
