"""Multistep consistency sampling: Song et al. 2023 (arXiv 2303.01469), algorithm 1; LCM (arXiv 2310.04378)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from undiffuse.level import Level
from undiffuse.solvers.base import Eval, combine
from undiffuse.types import Denoise, Noise


@dataclass(frozen=True)
class Consistency:
    """x' = alpha' x0 + sigma' z: forget the noise of x, add fresh noise at the next level.

    For consistency models, whose answer x0 is the end of the path from x: one step is already exact, further ones mend
    the model's errors. With a plain denoiser it blurs, as E[x0 | x] is not the end of the path. One evaluation a step.
    """

    global_order: ClassVar[int] = 0
    calls: ClassVar[int] = 1
    history: ClassVar[int] = 0

    def step(
        self, denoise: Denoise, x: Tensor, now: Level, then: Level, past: Sequence[Eval], noise: Noise
    ) -> tuple[Tensor, Eval]:
        x0 = denoise(x, now)
        terms = [(then.alpha, x0)]
        if not then.is_clean:
            terms.append((then.sigma, noise()))
        return combine(*terms), Eval(now, x, x0)
