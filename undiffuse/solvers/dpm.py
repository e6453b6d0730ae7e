"""DPM-Solver: Lu et al. 2022 (arXiv 2206.00927), and its singlestep forms on x0 (arXiv 2211.01095)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from undiffuse.level import Level, between
from undiffuse.solvers.base import Eval, combine
from undiffuse.solvers.exponential import Prediction, Weigh, check_prediction, halved, integral, linear, weights
from undiffuse.types import Denoise, InputError, Noise


@dataclass(frozen=True)
class DPMSolver:
    """Singlestep DPM-Solver-`order` (algorithms 1 and 2): evaluations inside the step, at 1/2, or 1/3 and 2/3 of h.

    prediction: "eps" is DPM-Solver; "x0" is DPM-Solver++(2S) and its third-order form. With eta > 0 noise enters at
    every evaluation, along one path of the reverse SDE (order 1). `order` evaluations a step; 1 in a step from pure
    noise or to clean data. Needs 1 <= order <= 3 and 0 <= eta <= 1.
    """

    order: int = 2
    prediction: Prediction = "eps"
    eta: float = 0.0
    history: ClassVar[int] = 0

    def __post_init__(self) -> None:
        if self.order not in (1, 2, 3):
            raise InputError(f"DPMSolver needs order 1, 2 or 3, got {self.order}")
        check_prediction(self.prediction, self.eta)

    @property
    def global_order(self) -> int:
        return self.order if self.eta == 0 else 1

    @property
    def calls(self) -> int:
        return self.order

    def step(
        self, denoise: Denoise, x: Tensor, now: Level, then: Level, past: Sequence[Eval], noise: Noise
    ) -> tuple[Tensor, Eval]:
        h, prediction, order = then.lam - now.lam, self.prediction, self.order
        if not bool(torch.isfinite(h).all()):
            prediction, order = "x0", 1
        ends = [*(between(now, then, now.lam + i / order * h) for i in range(1, order)), then]
        evals, at, carried = [Eval(now, x, denoise(x, now))], now, x * 0 if self.eta else None
        for end in ends:
            decay, _ = linear(now, end, self.eta, prediction)
            weigh: Weigh = halved if order == 2 else weights
            # every point starts again from x with the first evaluation and the newest
            terms = [(decay, x), *integral([evals[0], *evals[1:][-1:]], now, end, self.eta, prediction, weigh)]
            if carried is not None:
                keep, std = linear(at, end, self.eta, prediction)
                fresh = [] if std is None or end.is_clean else [(std, noise())]
                carried = combine((keep, carried), *fresh)
                terms.append((torch.ones_like(keep), carried))
            point = combine(*terms)
            if end is not then:
                evals.append(Eval(end, point, denoise(point, end)))
            at = end
        return point, evals[0]
