"""Exponential Adams methods in lam, of any order, with corrector and noise.

The multistep family behind DPM-Solver++ (arXiv 2211.01095), UniPC (2302.04867) and SA-Solver (2309.05019), with the
weights computed instead of expanded by hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from undiffuse.level import Level
from undiffuse.solvers.base import Eval, combine
from undiffuse.solvers.exponential import Prediction, check_prediction, finite, integral, linear, weights
from undiffuse.types import Denoise, InputError, Noise


@dataclass(frozen=True)
class Adams:
    """The newest `order` predictions of x0 (or eps) as a polynomial in lam, integrated exactly (see `exponential`).

    With `corrector` each step is redone once the evaluation at its end is known, at no further cost. One evaluation a
    step. A step has order `order`, one more with corrector, once enough evaluations lie behind it; the first step of a
    run has only one, which limits the global order to 2, or 3 with corrector (`Start` lifts this). With eta > 0 the
    noise limits it to 1. Steps from pure noise and to clean data use one prediction of x0. Needs 1 <= order <= 6 and
    0 <= eta <= 1 (0 probability-flow ODE, 1 reverse SDE).
    """

    max_order: ClassVar[int] = 6
    calls: ClassVar[int] = 1
    order: int = 2
    eta: float = 0.0
    corrector: bool = False
    prediction: Prediction = "x0"

    def __post_init__(self) -> None:
        if not (isinstance(self.order, int) and 1 <= self.order <= self.max_order):
            raise InputError(f"{type(self).__name__} needs 1 <= order <= {self.max_order}, got {self.order}")
        check_prediction(self.prediction, self.eta)

    @property
    def full_order(self) -> int:
        """The order once all evaluations are there."""
        return self.order + self.corrector if self.eta == 0 else 1

    @property
    def global_order(self) -> int:
        return min(self.full_order, 2 + self.corrector)

    @property
    def history(self) -> int:
        return self.order - 1 + self.corrector

    def weigh(self, nodes: list[Tensor], h: Tensor, kappa: float | Tensor) -> Tensor:
        """The weights of evaluations at these offsets from the start of a step of length h."""
        return weights(nodes, h, kappa)

    def eta_of(self, now: Level, then: Level) -> float | Tensor:
        """The stochasticity of this step."""
        return self.eta

    def step(
        self, denoise: Denoise, x: Tensor, now: Level, then: Level, past: Sequence[Eval], noise: Noise
    ) -> tuple[Tensor, Eval]:
        new, known = Eval(now, x, denoise(x, now)), finite(past)
        if self.corrector and known and known[0] is past[0]:
            start = past[0].level
            last = start, now, self.eta_of(start, now), self.prediction, self.weigh
            better, used = integral([new, *known[: self.order]], *last), integral(known[: self.order], *last)
            x = combine((torch.ones_like(now.alpha), x), *better, *((-c, v) for c, v in used))
        evals, eta, prediction = [new, *known][: self.order], self.eta_of(now, then), self.prediction
        if not bool(torch.isfinite(then.lam - now.lam).all()):
            evals, prediction = [new], "x0"
        decay, std = linear(now, then, eta, prediction)
        terms = [(decay, x), *integral(evals, now, then, eta, prediction, self.weigh)]
        if std is not None and not then.is_clean:
            terms.append((std, noise()))
        return combine(*terms), new
