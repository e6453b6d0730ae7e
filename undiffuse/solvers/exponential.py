"""Integrals of a polynomial in lam against the exponential kernel of the diffusion equations."""

from __future__ import annotations

import torch
from torch import Tensor


def moments(z: Tensor, count: int) -> Tensor:
    """J_p = z int_0^1 e^(-z (1 - s)) s^p ds for p = 0 ... count - 1, stacked last: a series at small z, else the
    recurrence J_p = 1 - p J_(p-1) / z."""
    small, out = z < 1, [-torch.expm1(-z)]
    for p in range(1, count):
        zs = torch.where(small, z, 0.0)
        term = total = zs / (p + 1)
        for j in range(1, 18):
            term = -term * zs / (p + 1 + j)
            total = total + term
        out.append(torch.where(small, total, 1 - p * out[-1] / z))
    return torch.stack(out, -1)


def weights(nodes: list[Tensor], h: Tensor, kappa: float) -> Tensor:
    """Weights w_j of the nodes (offsets in lam from the step's start), stacked last, such that sum_j w_j D(node_j) =
    kappa int_0^h e^(-kappa (h - u)) D(u) du for every polynomial D of lower degree than there are nodes."""
    if len(nodes) == 1:  # also where h is infinite
        return -torch.expm1(-kappa * h)[..., None]
    powers = torch.arange(len(nodes), dtype=torch.float64)[:, None]
    vandermonde = torch.stack([n / h for n in nodes], -1)[..., None, :].pow(powers)
    w: Tensor = torch.linalg.solve(vandermonde, moments(kappa * h, len(nodes)))
    return w
