"""Several conditions at once, each with a guidance weight of its own."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from undiffuse.guide.cfg import CFG
from undiffuse.guide.contrast import asked, check_interval, inside
from undiffuse.level import Level
from undiffuse.types import Denoise, InputError, Model


@dataclass(frozen=True)
class Composed:
    """Guidance by the conditions called `names` with the weights `w`, of which 1 is off; others are always there, and
    without names there is no guidance.

    nested (Brooks et al. 2023, InstructPix2Pix, arXiv 2211.09800, equation 3): D_0 + sum_i w_i (D_i - D_(i-1)), where
    D_i has the first i conditions, so the weight sharpens p(c_i | x, c_1 ... c_(i-1)). Weights of 1 are no guidance at
    one row a sample, equal ones are `CFG`, and 0 after the others leaves a condition out. sum (Liu et al. 2022, arXiv
    2206.01714, equation 11): D_0 + sum_i w_i (D_i - D_0), where D_i has condition i alone: it takes conditions to be
    independent given x, and in any order, and is the same then. Denoisers are asked in one call, each for a row that
    its weight needs. D_0 has what stands in the place of the null conditions (`Given.against`).

    Guidance acts for lam_min <= lam <= lam_max only. InputError for weights that are not finite, and for names that
    are not as many.

    >>> Composed(("depth", "text"), (1.0, 3.0)).terms()
    {('depth',): -2.0, ('depth', 'text'): 3.0}
    """

    names: tuple[str, ...] = ()
    w: tuple[float, ...] = ()
    form: Literal["nested", "sum"] = "nested"
    lam_min: float = -math.inf
    lam_max: float = math.inf

    def __post_init__(self) -> None:
        if len(self.names) != len(self.w) or len(set(self.names)) != len(self.names):
            raise InputError(f"guidance needs names, each once, and as many weights: got {self.names} and {self.w}")
        if not all(map(math.isfinite, self.w)):
            raise InputError(f"guidance weights must be finite numbers (1 is off), got {self.w}")
        if self.form not in ("nested", "sum"):
            raise InputError(f"the form of guidance must be nested or sum, got {self.form!r}")
        check_interval(self.lam_min, self.lam_max)

    def terms(self) -> dict[tuple[str, ...], float]:
        """The conditions that denoisers are asked with, and the factors of their answers, none of them 0; sum 1."""
        if self.form == "nested":
            w = (1.0, *self.w, 0.0)
            every = {self.names[:i]: w[i] - w[i + 1] for i in range(len(self.names) + 1)}
        else:
            every = {(): 1 - sum(self.w), **{(name,): w for name, w in zip(self.names, self.w, strict=True)}}
        return {names: factor for names, factor in every.items() if factor}

    def __call__(self, model: Model, cond: Any, /) -> Denoise:
        """The denoiser with `cond`, a `Given`, bound and guided; InputError for one that lacks a name."""
        if not self.names:
            return CFG()(model, cond)
        if not hasattr(cond, "only"):
            raise InputError(
                f"guidance by {', '.join(self.names)} needs conditions by name, as cond.NAME=ENCODER in training gives "
                f"them, got {type(cond).__name__}: a model that is told its classes alone takes guidance=cfg"
            )
        cond.only(self.names)
        always = [name for name in cond.reads if name not in self.names]
        told = [cond.only((*names, *always)) for names in self.terms()]
        return _Bound(model, cond, self, told, list(self.terms().values()))


@dataclass(frozen=True)
class _Bound:
    model: Any
    cond: Any
    guide: Composed
    asked: list[Any]
    factors: list[float]

    def __call__(self, x: Tensor, level: Level) -> Tensor:
        if not inside(level, self.guide.lam_min, self.guide.lam_max):
            return self.model(x, level, self.cond)  # type: ignore[no-any-return]
        if len(self.asked) == 1:  # with the factor 1
            return self.model(x, level, self.asked[0])  # type: ignore[no-any-return]
        answers = asked(self.model, x, level, self.asked)
        out: Tensor = sum(factor * answer for factor, answer in zip(self.factors, answers, strict=True))  # type: ignore[assignment]
        return out

    def reverse(self, x: Tensor, now: Level, then: Level) -> tuple[Tensor, Tensor]:
        """The guided mean with the conditional variance."""
        x0, variance = self.model.reverse(x, now, then, self.cond)
        return (self(x, now) if inside(now, self.guide.lam_min, self.guide.lam_max) else x0), variance
