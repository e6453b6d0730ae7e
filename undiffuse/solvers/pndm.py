"""PNDM: Liu et al. 2022 (arXiv 2202.09778), and iPNDM, which starts without Runge-Kutta (arXiv 2204.13902)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from undiffuse.level import Level, between
from undiffuse.schedule import Schedule
from undiffuse.solvers.base import Eval, combine, exponential_euler
from undiffuse.solvers.deis import LINEAR
from undiffuse.solvers.multistep import EpsMultistep
from undiffuse.solvers.start import Start
from undiffuse.types import Denoise, Noise

EQUAL_STEPS = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


def transfer(x: Tensor, now: Level, then: Level, terms: Iterable[tuple[float, Eval]]) -> Tensor:
    """DDIM's step with a combination of noise predictions (equation 11): x'/alpha' = x/alpha + (s' - s) sum w eps."""
    change = then.sigma - then.alpha / now.alpha * now.sigma
    return combine((then.alpha / now.alpha, x), *((w * change, e.eps) for w, e in terms))


@dataclass(frozen=True)
class IPNDM(EpsMultistep):
    """Adams-Bashforth weights of equal steps on eps, in DDIM's step (PLMS), whatever the levels: the published method.

    As the steps in sigma / alpha are not equal, its global order is at most 2 for every `order` from 2 to 4;
    `LMS` has the weights for unequal steps. One evaluation a step; DDIM's step from pure noise.
    """

    max_order: ClassVar[int] = 4

    def weights(self, nodes: list[Level], now: Level, then: Level) -> Tensor:
        change = then.sigma / then.alpha - now.sigma / now.alpha
        return change[..., None] * torch.tensor(EQUAL_STEPS[len(nodes) - 1], dtype=torch.float64, device=change.device)


@dataclass(frozen=True)
class PseudoRungeKutta:
    """PNDM's first steps (equation 12): Runge-Kutta's four predictions, the middle two at half the time of `schedule`.

    Four evaluations a step, order 2; 1 evaluation and DDIM's step from pure noise or to clean data.
    """

    schedule: Schedule = LINEAR
    global_order: ClassVar[int] = 2
    calls: ClassVar[int] = 4
    history: ClassVar[int] = 0

    def step(
        self, denoise: Denoise, x: Tensor, now: Level, then: Level, past: Sequence[Eval], noise: Noise
    ) -> tuple[Tensor, Eval]:
        new = Eval(now, x, denoise(x, now))
        if not bool(torch.isfinite(then.lam - now.lam).all()):
            return exponential_euler(x, new.x0, now, then), new
        time = (self.schedule.time(now.lam) + self.schedule.time(then.lam)) / 2
        middle, stages = between(now, then, self.schedule.level(time).lam), [new]
        for end in (middle, middle, then):
            point = transfer(x, now, end, [(1.0, stages[-1])])
            stages.append(Eval(end, point, denoise(point, end)))
        return transfer(x, now, then, zip((1 / 6, 1 / 3, 1 / 3, 1 / 6), stages, strict=True)), new


def PNDM() -> Start:
    """PNDM (algorithm 2): three pseudo Runge-Kutta steps, then PLMS, which is `IPNDM(4)`."""
    return Start(PseudoRungeKutta(), IPNDM(4))
