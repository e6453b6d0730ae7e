"""What every solver is: a frozen dataclass of hyperparameters with one pure function, `step`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from undiffuse.level import Level
from undiffuse.types import Denoise, Noise


class Eval(NamedTuple):
    """One evaluation of the denoiser: x0 = E[x0 | x] at a level."""

    level: Level
    x: Tensor
    x0: Tensor

    @property
    def eps(self) -> Tensor:
        """The noise that x and x0 imply: (x - alpha x0) / sigma."""
        level = self.level
        return combine((1 / level.sigma, self.x), (-level.alpha / level.sigma, self.x0))


def combine(*terms: tuple[Tensor, Tensor]) -> Tensor:
    """The sum of coefficient * tensor: one pass over memory a term where the coefficients are numbers."""
    total: Tensor | None = None
    for c, x in terms:
        number = c.ndim == 0 and not c.requires_grad
        if total is None:
            total = x * (float(c) if number else c)
        elif number:
            total.add_(x, alpha=float(c))
        else:
            total = total + c * x
    assert total is not None
    return total


def exponential_euler(x: Tensor, x0: Tensor, now: Level, then: Level) -> Tensor:
    """x at `then` if the prediction stays x0: sigma'/sigma x + alpha' (1 - e^-h) x0; finite at both ends."""
    return combine((then.sigma / now.sigma, x), (-then.alpha * torch.expm1(now.lam - then.lam), x0))


class Solver(Protocol):
    """Maps x at level `now` to x at level `then`.

    `global_order`: order of convergence on the probability-flow solution, for stochastic settings that of the output's
    distribution at least, and 0 where more steps leave an error; `calls`: denoiser evaluations a step; `history`: how
    many past evaluations it reads. One that chooses its steps from the data has `adaptive = True`.
    """

    @property
    def global_order(self) -> int: ...
    @property
    def calls(self) -> int: ...
    @property
    def history(self) -> int: ...

    def step(
        self, denoise: Denoise, x: Tensor, now: Level, then: Level, past: Sequence[Eval], noise: Noise
    ) -> tuple[Tensor, Eval]:
        """x at `then`, and the evaluation made at `now`; `past` has the earlier ones, newest first."""
        ...
