"""The posterior covariance of x0 by Tweedie's second formula, through products with the denoiser's Jacobian."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from undiffuse.level import Level
from undiffuse.types import Denoise, InputError

NOISIEST = -5.0  # lam that stands for pure noise, where the covariance is no derivative


class Tangent(NamedTuple):
    """x0 = D(x), and v -> V^T v with V = (sigma^2 / alpha) J_D(x), which is Cov[x0 | x] for the exact denoiser."""

    x0: Tensor
    spread: Callable[[Tensor], Tensor]


def linearised(denoise: Denoise, x: Tensor, level: Level) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """D(x), and v -> J_D(x)^T v; also where gradients are off. InputError for a denoiser without a derivative."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        x0 = denoise(x, level)
    if not x0.requires_grad:
        raise InputError("this method differentiates the denoiser, which detaches its output or runs under no_grad")

    def pull(v: Tensor) -> Tensor:
        (out,) = torch.autograd.grad(x0, x, v.to(x0.dtype), retain_graph=True)
        return out

    return x0.detach(), pull


def tangent(denoise: Denoise, x: Tensor, level: Level) -> Tangent:
    """The denoiser at x with its posterior covariance; one evaluation, and a backward pass for each product.

    At alpha = 0 x0 is independent of x and V is its prior covariance, of which D(x) knows nothing: V is taken at
    lam = -5 then, with an evaluation more; for a Gaussian it is right within 5e-5 of the prior variance.
    """
    pure = level.alpha == 0
    near = Level(torch.where(pure, math.exp(NOISIEST) * level.sigma, level.alpha), level.sigma)
    x0, pull = linearised(denoise, x, near)
    if bool(pure.any()):
        x0 = denoise(x, level)
    ratio = near.sigma**2 / near.alpha
    return Tangent(x0, lambda v: (ratio * pull(v)).to(x.dtype))
