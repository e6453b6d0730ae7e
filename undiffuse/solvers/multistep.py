"""Adams-Bashforth methods on the noise prediction, which differ in their weights alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from undiffuse.level import Level
from undiffuse.solvers.base import Eval, combine, exponential_euler
from undiffuse.solvers.exponential import finite
from undiffuse.types import Denoise, InputError, Noise


@dataclass(frozen=True)
class EpsMultistep:
    """x'/alpha' = x/alpha + sum of w_j eps_j over the newest `order` predictions, w from `weights`.

    One evaluation a step; the first step has one prediction, which limits the global order to 2. A step from pure noise
    (alpha = 0) is DDIM's. Raises InputError unless 1 <= order <= max_order.
    """

    max_order: ClassVar[int] = 5
    calls: ClassVar[int] = 1
    order: int = 4

    def __post_init__(self) -> None:
        if not (isinstance(self.order, int) and 1 <= self.order <= self.max_order):
            raise InputError(f"{type(self).__name__} needs 1 <= order <= {self.max_order}, got {self.order}")

    @property
    def global_order(self) -> int:
        return min(self.order, 2)

    @property
    def history(self) -> int:
        return self.order - 1

    def usable(self, evals: list[Eval]) -> list[Eval]:
        """Those that the weights can tell apart."""
        return evals

    def weights(self, nodes: list[Level], now: Level, then: Level) -> Tensor:
        """The weight of the prediction at each of these levels, newest first, stacked last."""
        raise NotImplementedError

    def step(
        self, denoise: Denoise, x: Tensor, now: Level, then: Level, past: Sequence[Eval], noise: Noise
    ) -> tuple[Tensor, Eval]:
        new = Eval(now, x, denoise(x, now))
        if not bool((now.alpha > 0).all()):
            return exponential_euler(x, new.x0, now, then), new
        evals = self.usable([new, *finite(past)])[: self.order]
        w = then.alpha[..., None] * self.weights([e.level for e in evals], now, then)
        return combine((then.alpha / now.alpha, x), *((w[..., j], e.eps) for j, e in enumerate(evals))), new
