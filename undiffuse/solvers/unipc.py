"""UniPC: Zhao et al. 2023 (arXiv 2302.04867)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from undiffuse.solvers.adams import Adams
from undiffuse.solvers.exponential import halved, weights
from undiffuse.types import InputError


@dataclass(frozen=True)
class UniPC(Adams):
    """UniP-`order` predictor and UniC-`order` corrector, equations 3 and 9; the ODE only, one evaluation a step.

    variant: "bh1" (B(h) = h) and "bh2" (B(h) = e^h - 1) differ from the exact weights where two evaluations meet, as
    B cancels from every larger system; "vary" is exact everywhere, i.e. `Adams`. Order as `Adams`.
    """

    order: int = 3
    corrector: bool = True
    variant: Literal["bh1", "bh2", "vary"] = "bh2"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.variant not in ("bh1", "bh2", "vary"):
            raise InputError(f"UniPC variant must be 'bh1', 'bh2' or 'vary', got {self.variant!r}")
        if self.eta:
            raise InputError(f"UniPC solves the ODE: eta must be 0, got {self.eta}; Adams and SASolver take eta")

    def weigh(self, nodes: list[Tensor], h: Tensor, kappa: float | Tensor) -> Tensor:
        if self.variant == "vary":
            return weights(nodes, h, kappa)
        return halved(nodes, h, kappa, kappa * h if self.variant == "bh1" else None)
