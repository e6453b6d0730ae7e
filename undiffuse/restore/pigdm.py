"""Pi-GDM: Song et al., ICLR 2023 (openreview 9_gsMA8MRKQ)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from undiffuse.level import Level
from undiffuse.restore.problem import Problem
from undiffuse.restore.tangent import tangent
from undiffuse.types import Denoise, require


@dataclass(frozen=True)
class PiGDM:
    """Pseudo-inverse guidance: the score of p(y | x) = N(A D, std^2 + r^2 A A^T), r^2 in the place of the covariance.

    x0 = D + (sigma^2 / alpha) J_D^T A^T (std^2 + r^2 A A^T)^-1 (y - A D) (section 3 there, in x0), where
    r^2 = sigma^2 / (alpha^2 + sigma^2 / prior_std^2) is the posterior variance of independent elements of std
    `prior_std`, 1 in the paper: for such data it is exact. The paper's weights by r^2 are left out. At std = 0 the
    inverse is the pseudo-inverse. Linear operators. An evaluation and a backward pass a call, and up to `iterations` of
    conjugate gradients.
    """

    prior_std: float = 1.0
    iterations: int = 100

    def __post_init__(self) -> None:
        require(self.prior_std > 0, "PiGDM: prior_std", self.prior_std, "> 0")
        require(self.iterations >= 1, "PiGDM: iterations", self.iterations, "a whole number >= 1")

    def __call__(self, denoise: Denoise, problem: Problem, /) -> Denoise:
        """The denoiser given the observations; InputError for operators that are not linear."""
        problem.linear_for(self)

        def restored(x: Tensor, level: Level) -> Tensor:
            x0, spread = tangent(denoise, x, level)
            variance = level.sigma**2 / (level.alpha**2 + level.sigma**2 / self.prior_std**2)
            pulled = problem.gain(problem.residual(x0), variance, self.iterations) / variance
            return x0 + spread(pulled.to(x0.dtype))

        return restored
