"""DiffPIR: Zhu et al. 2023 (arXiv 2305.08995)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from undiffuse.level import Level
from undiffuse.restore.problem import Problem
from undiffuse.types import Denoise, require


@dataclass(frozen=True)
class DiffPIR:
    """A proximal step on the data: x0 = argmin_z |y - A z|^2 / (2 std^2) + |z - D|^2 / (2 r^2) with
    r^2 = (sigma / alpha)^2 / `weight` (equation 13 there, where the weight is called lambda).

    No gradient of the network is needed, so it costs what the denoiser costs. How x0 is noised again is the solver's
    matter: DDIM(eta) is the paper's equation 15, whose zeta is the share of fresh noise. At std = 0 x0 agrees with y as
    far as A can. Linear operators; the minimum takes up to `iterations` of conjugate gradients.
    """

    weight: float = 7.0
    iterations: int = 100

    def __post_init__(self) -> None:
        require(self.weight > 0, "DiffPIR: weight", self.weight, "> 0")
        require(self.iterations >= 1, "DiffPIR: iterations", self.iterations, "a whole number >= 1")

    def __call__(self, denoise: Denoise, problem: Problem, /) -> Denoise:
        """The denoiser given the observations; InputError for operators that are not linear."""
        problem.linear_for(self)

        def restored(x: Tensor, level: Level) -> Tensor:
            x0 = denoise(x, level)
            variance = (level.sigma / level.alpha) ** 2 / self.weight
            return x0 + problem.gain(problem.residual(x0), variance, self.iterations)

        return restored
