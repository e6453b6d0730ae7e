"""DDPM: Ho et al. 2020 (arXiv 2006.11239); learned variance: Nichol and Dhariwal 2021 (arXiv 2102.09672)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from undiffuse.level import Level, reverse_bounds, reverse_transition
from undiffuse.solvers.base import Eval, combine
from undiffuse.types import Denoise, InputError, Noise


@dataclass(frozen=True)
class DDPM:
    """The reverse chain p(x_then | x) = N(c_x x + c_x0 x0_hat, variance). Order 1, one evaluation a step.

    variance: "small" is beta-tilde, exact for a single data point; "large" is beta, exact for unit-variance data;
    "learned" asks the denoiser's `reverse` (a network with learned variance, or the exact posterior) and runs in the
    driver only. No noise is added in the last step. Ho et al. 2020, algorithm 2 and section 3.2.
    """

    variance: Literal["small", "large", "learned"] = "small"
    global_order: ClassVar[int] = 1
    calls: ClassVar[int] = 1
    history: ClassVar[int] = 0

    def __post_init__(self) -> None:
        if self.variance not in ("small", "large", "learned"):
            raise InputError(f"DDPM variance must be 'small', 'large' or 'learned', got {self.variance!r}")

    def step(
        self, denoise: Denoise, x: Tensor, now: Level, then: Level, past: Sequence[Eval], noise: Noise
    ) -> tuple[Tensor, Eval]:
        c_x, c_x0, std = reverse_transition(now, then)
        if self.variance == "learned":
            x0, variance = _reverse(denoise, x, now, then)
            std = variance.sqrt()
        else:
            x0 = denoise(x, now)
            if self.variance == "large":
                std = reverse_bounds(now, then)[1].sqrt()
        terms = [(c_x, x), (c_x0, x0)]
        if not then.is_clean:
            terms.append((std, noise()))
        return combine(*terms), Eval(now, x, x0)


def _reverse(denoise: Any, x: Tensor, now: Level, then: Level) -> tuple[Tensor, Tensor]:
    if not hasattr(denoise, "reverse"):
        raise InputError(
            "DDPM(variance='learned') depends on the data through the denoiser's `reverse`, which this one lacks: it "
            "cannot be traced into a tableau, and a plain function cannot serve it"
        )
    x0, variance = denoise.reverse(x, now, then)
    return x0, variance
