"""Frechet and kernel distance between two sets of features (n, d)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from undiffuse.types import InputError


class Distances(NamedTuple):
    """`frechet` and `kernel` distance; both are 0 for equal distributions, up to the bias and noise of finite sets."""

    frechet: float
    kernel: float


def _features(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    if a.ndim < 2 or b.ndim < 2:
        raise InputError(f"distances need features (n, width), got {tuple(a.shape)} and {tuple(b.shape)}")
    a, b = a.double().flatten(1), b.double().flatten(1)
    if len(a) < 2 or len(b) < 2 or a.shape[1] != b.shape[1]:
        raise InputError(
            f"distances need two sets of >= 2 features of one width, got {tuple(a.shape)}, {tuple(b.shape)}"
        )
    if not bool(torch.isfinite(a).all() and torch.isfinite(b).all()):
        raise InputError("distances: the features have NaN or infinite values")
    return a, b


def _root(c: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(c)
    root: Tensor = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    return root


def frechet(a: Tensor, b: Tensor) -> float:
    """|mu_a - mu_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) (Heusel et al. 2017); biased upwards by about 1 / n.

    >>> x = torch.randn(50, 3)
    >>> round(frechet(x, x + 1), 6)
    3.0
    """
    a, b = _features(a, b)
    cov_a, cov_b = (torch.cov(x.T).reshape(x.shape[1], x.shape[1]) for x in (a, b))
    root = _root(cov_a)
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    value = (a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross
    return float(value.clamp(min=0))


def kernel(a: Tensor, b: Tensor) -> float:
    """Unbiased squared maximum mean discrepancy with the kernel (x y / d + 1)^3 (Binkowski et al. 2018, KID); may be
    negative for equal distributions."""
    a, b = _features(a, b)
    d, n, m = a.shape[1], len(a), len(b)
    aa, bb, ab = ((x @ y.T / d + 1) ** 3 for x, y in ((a, a), (b, b), (a, b)))
    within = (aa.sum() - aa.diagonal().sum()) / (n * (n - 1)) + (bb.sum() - bb.diagonal().sum()) / (m * (m - 1))
    return float(within - 2 * ab.mean())


def distances(a: Tensor, b: Tensor) -> Distances:
    """Both, between samples or features (n, ...)."""
    return Distances(frechet(a, b), kernel(a, b))
