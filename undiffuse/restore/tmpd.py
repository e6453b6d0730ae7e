"""TMPD: Boys et al. 2023 (arXiv 2310.06721)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from undiffuse.level import Level
from undiffuse.restore.problem import Problem
from undiffuse.restore.tangent import tangent
from undiffuse.types import Denoise


@dataclass(frozen=True)
class TMPD:
    """Tweedie moment projection: `MMPS` with A V A^T taken to be diagonal, the sums of its rows on the diagonal.

    x0 = D + V A^T diag(std^2 + A V A^T 1)^-1 (y - A D) (section 3 there, with their diagonal approximation), where sums
    below 0 count as 0. Exact for Gaussian data of independent elements of which some are seen. Linear operators. An
    evaluation and 2 backward passes a call.
    """

    def __call__(self, denoise: Denoise, problem: Problem, /) -> Denoise:
        """The denoiser given the observations; InputError for operators that are not linear."""
        problem.linear_for(self)

        def restored(x: Tensor, level: Level) -> Tensor:
            x0, spread = tangent(denoise, x, level)
            r = problem.residual(x0)
            rows = problem.operator(spread(problem.adjoint(torch.ones_like(r)))).clamp(min=0) + problem.std**2
            u = torch.where(rows > 0, r / torch.where(rows > 0, rows, 1.0), 0.0)
            return x0 + spread(problem.adjoint(u))

        return restored
