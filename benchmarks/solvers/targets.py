"""Data distributions whose denoiser is known exactly: a ring, digits (also guided) and photo patches."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from undiffuse import CFG, Denoise, Discrete, Flow, Label, Level, Mixture, Spectrum
from undiffuse.schedule import EDM, Schedule

CACHE = Path(__file__).with_name(".cache")
SCHEDULES: dict[str, Schedule] = {
    "vp-linear": Discrete.linear(),
    "scaled-linear": Discrete.scaled_linear(),
    "cosine": Discrete.cosine(),
    "edm": EDM(),
    "flow-1": Flow(1.0),
    "flow-3": Flow(3.0),
}


class Mean(Mixture):
    """A `Mixture` that computes the mean alone and skips components of weight below 1e-18: the same, in less time."""

    def forward(self, x: Tensor, level: Level, cond: Any = None) -> Tensor:
        """E[x0 | x]; levels per row take the longer way."""
        if level.alpha.ndim:
            return super().forward(x, level, cond)
        a, s2, flat = level.alpha, level.sigma**2, x.reshape(x.shape[0], -1)
        off = flat - a * self.means[:, None]
        coords = off if self.bases is None else off @ self.bases.mT
        total, rest = a**2 * self.variances + s2, a**2 * self.rest + s2
        log_p = total.log().sum(1, keepdim=True) + (coords.square() / total[:, None]).sum(-1)
        extra = flat.shape[1] - self.variances.shape[1]
        if extra:
            beyond = off.square().sum(-1) - coords.square().sum(-1)
            log_p = log_p + extra * rest.log() + beyond / rest
        resp = torch.softmax(self._log_weights(cond, x.shape[0], self.log_w).T - log_p / 2, 0)
        keep = (resp > 1e-18).any(1).nonzero()[:, 0]
        gain, gain_rest = a * self.variances[keep] / total[keep], a * self.rest[keep] / rest[keep]
        coords = coords[keep]
        if self.bases is None:
            mean = gain[:, None] * coords
        elif extra:
            mean = ((gain - gain_rest)[:, None] * coords) @ self.bases[keep] + gain_rest[..., None] * off[keep]
        else:
            mean = (gain[:, None] * coords) @ self.bases[keep]
        return (resp[keep][..., None] * (self.means[keep][:, None] + mean)).sum(0).reshape(x.shape)


@dataclass(frozen=True)
class Target:
    """A mixture with a guidance weight w (None: unguided), compared over `seeds` samples whose classes cycle."""

    name: str
    build: Callable[[], Mixture] = field(repr=False)
    shape: tuple[int, ...]
    w: float | None = None
    seeds: int = 32

    @cached_property
    def mixture(self) -> Mixture:
        """The exact denoiser, once checked against `Mixture`."""
        mixture = self.build()
        x = 2 * torch.randn(10, *self.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        cond = None if self.w is None else Label(10)(range(10))
        for sigma in (0.02, 0.5, 20.0):
            gap = mixture(x, Level(0.7, sigma), cond) - Mixture.forward(mixture, x, Level(0.7, sigma), cond)
            assert float(gap.abs().max()) < 1e-10
        return mixture

    @property
    def dim(self) -> int:
        """Elements of a sample."""
        return math.prod(self.shape)

    def denoise(self, b: int) -> Denoise:
        """The denoiser for b rows, with class k % 10 bound to row k where guided."""
        mixture = self.mixture
        if self.w is None:
            return lambda x, level, /: mixture(x, level)
        return CFG(self.w)(mixture, Label(10)([k % 10 for k in range(b)]))

    def samples(self, n: int, seed: int) -> Tensor:
        """Exact draws (n, *shape) of the data, unguided."""
        g, m = torch.Generator().manual_seed(seed), self.mixture
        k = torch.multinomial(m.log_w.exp(), n, replacement=True, generator=g)
        z = torch.randn(n, m.variances.shape[1], generator=g, dtype=torch.float64) * m.variances[k].sqrt()
        if m.bases is None:
            return (m.means[k] + z).reshape(n, *self.shape)
        x = torch.einsum("nr,nrd->nd", z, m.bases[k])
        if m.bases.shape[1] < m.bases.shape[2]:
            rest = torch.randn(n, self.dim, generator=g, dtype=torch.float64) * m.rest[k].sqrt()
            x = x + rest - torch.einsum("nr,nrd->nd", torch.einsum("nd,nrd->nr", rest, m.bases[k]), m.bases[k])
        return (m.means[k] + x).reshape(n, *self.shape)


def cached(name: str, make: Callable[[], dict[str, np.ndarray]]) -> dict[str, Tensor]:
    """The arrays of `make`, kept in the cache folder under this name."""
    path = CACHE / f"{name}.npz"
    if not path.exists():
        CACHE.mkdir(exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}.npz")
        np.savez(part, **make())
        part.replace(path)
    with np.load(path) as arrays:
        return {k: torch.from_numpy(arrays[k]) for k in arrays}


def ring() -> Mixture:
    """Eight Gaussians of std 0.05 to 0.1 on the unit circle."""
    angle = torch.arange(8, dtype=torch.float64) * math.pi / 4
    means, std = torch.stack([angle.cos(), angle.sin()], 1), torch.linspace(0.05, 0.1, 8, dtype=torch.float64)
    return Mean([Spectrum(m, s.square().expand(2)) for m, s in zip(means, std, strict=True)])


def _fit_digits() -> dict[str, np.ndarray]:
    from sklearn.cluster import KMeans
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    x, parts = x / 8 - 1, []
    for label in range(10):
        of = x[y == label]
        group = KMeans(4, n_init=10, random_state=0).fit_predict(of)
        for k in range(4):
            rows = of[group == k]
            cov = np.cov(rows.T, bias=True)
            cov = 0.8 * cov + 0.2 * np.trace(cov) / 64 * np.eye(64)
            values, vectors = np.linalg.eigh(cov)
            parts.append((rows.mean(0), values[::-1], vectors.T[::-1], len(rows), label))
    names = ("mean", "variances", "basis", "weight", "label")
    return {name: np.stack([np.asarray(p[i]) for p in parts]) for i, name in enumerate(names)}


def digits() -> Mixture:
    """Handwritten digits in [-1, 1]: four Gaussians a class with covariances shrunk by a fifth."""
    a = cached("digits", _fit_digits)
    components = [Spectrum(a["mean"][k], a["variances"][k], a["basis"][k]) for k in range(40)]
    return Mean(components, a["weight"].double(), a["label"])


def _fit_patches() -> dict[str, np.ndarray]:
    from sklearn.cluster import KMeans
    from sklearn.datasets import load_sample_images

    patches = []
    for image in load_sample_images().images:
        view = np.lib.stride_tricks.sliding_window_view(image, (32, 32), (0, 1))[::12, ::12]
        patches.append(view.reshape(-1, 3072) / 127.5 - 1)
    x = np.concatenate(patches)
    group = KMeans(6, n_init=2, random_state=0).fit_predict(x)
    names: dict[str, list[np.ndarray]] = {"mean": [], "variances": [], "basis": [], "rest": [], "weight": []}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for k in range(6):
            s = Spectrum.measure(torch.from_numpy(x[group == k]), rank=48)
            assert s.basis is not None
            basis = torch.linalg.qr(s.basis.T)[0].T
            values = (s.mean, s.variances, basis, torch.tensor(s.rest), torch.tensor(int((group == k).sum())))
            for name, value in zip(names, values, strict=True):
                names[name].append(value.numpy())
    return {name: np.stack(values) for name, values in names.items()}


def patches() -> Mixture:
    """32 x 32 colour patches of two photos in [-1, 1]: six Gaussians of 48 principal components and an equal rest."""
    a = cached("patches", _fit_patches)
    parts = [Spectrum(a["mean"][k], a["variances"][k], a["basis"][k], float(a["rest"][k])) for k in range(6)]
    return Mean(parts, a["weight"].double())


def gaussian() -> Mixture:
    """Independent elements of std 1, 0.25 and 0.05 about 0.2."""
    std = torch.tensor([1.0, 0.25, 0.05], dtype=torch.float64)
    return Mean([Spectrum(torch.full((3,), 0.2, dtype=torch.float64), std**2)])


BUDGETS = (3, 4, 5, 6, 8, 10, 15, 20, 30, 50)
NFE = (5, 10, 20, 50)  # of the tables
TARGETS: dict[str, Target] = {
    t.name: t
    for t in (
        Target("ring", ring, (2,)),
        Target("digits", digits, (64,)),
        Target("digits-w3", digits, (64,), 3.0),
        Target("digits-w7.5", digits, (64,), 7.5),
        Target("patches", patches, (3072,), seeds=4),
    )
}
GAUSSIAN = Target("gaussian", gaussian, (3,))
