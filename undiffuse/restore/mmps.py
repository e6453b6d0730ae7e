"""MMPS: Rozet et al. 2024 (arXiv 2405.13712)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from undiffuse.level import Level
from undiffuse.restore.krylov import gmres
from undiffuse.restore.problem import Problem
from undiffuse.restore.tangent import tangent
from undiffuse.types import Denoise, require


@dataclass(frozen=True)
class MMPS:
    """Moment matching: p(y | x) = N(A D, std^2 + A V A^T) with the denoiser's own covariance V = (sigma^2 / alpha) J_D.

    x0 = D + V A^T (std^2 + A V A^T)^-1 (y - A D) (section 3 there, in x0), exact for Gaussian data. The system
    is solved by GMRES with `iterations` products, since a network's J_D is not quite symmetric; as many as there are
    observations make it exact. Linear operators. An evaluation and iterations + 1 backward passes a call.
    """

    iterations: int = 5

    def __post_init__(self) -> None:
        require(self.iterations >= 1, "MMPS: iterations", self.iterations, "a whole number >= 1")

    def __call__(self, denoise: Denoise, problem: Problem, /) -> Denoise:
        """The denoiser given the observations; InputError for operators that are not linear."""
        problem.linear_for(self)

        def restored(x: Tensor, level: Level) -> Tensor:
            x0, spread = tangent(denoise, x, level)

            def covariance(u: Tensor) -> Tensor:
                return problem.std**2 * u + problem.operator(spread(problem.adjoint(u)))

            u = gmres(covariance, problem.residual(x0), self.iterations)
            return x0 + spread(problem.adjoint(u))

        return restored
