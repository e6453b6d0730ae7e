"""Gauss-Legendre quadrature."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


@cache
def gauss_legendre(n: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights of the n-point rule on [0, 1], from the eigenvectors of its Jacobi matrix (Golub, Welsch)."""
    k = torch.arange(1, n, dtype=torch.float64)
    off = k / (4 * k**2 - 1).sqrt()
    nodes, vectors = torch.linalg.eigh(torch.diag(off, 1) + torch.diag(off, -1))
    return (1 + nodes) / 2, vectors[0] ** 2
