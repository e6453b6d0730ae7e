"""Guidance by two predictions, one of which is led away from: the kind that nearly all methods are."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from undiffuse.level import Level
from undiffuse.types import Denoise, InputError, Model, Plan


def check_interval(lam_min: float, lam_max: float) -> None:
    """InputError for an interval of levels without any."""
    if not lam_min < lam_max:
        raise InputError(f"the guidance interval needs lam_min < lam_max, got {lam_min} and {lam_max}")


def check_weight(w: float) -> None:
    """InputError for a weight that is no finite number."""
    if not isinstance(w, int | float) or not math.isfinite(w):
        raise InputError(f"the guidance weight w must be a finite number (1 is off), got {w}")


def one_level(level: Level, what: str) -> float:
    """The lam of a batch; InputError for levels per sample, which `what` cannot have."""
    if level.alpha.ndim and bool((level.lam != level.lam.flatten()[0]).any()):
        raise InputError(
            f"{what} needs one level for the batch; Adaptive, Tableau.parallel and levels per sample give every row "
            "its own: use another solver with it, or plain CFG with them"
        )
    return float(level.lam.flatten()[0])


def inside(level: Level, lam_min: float, lam_max: float) -> bool:
    """Whether lam_min <= lam <= lam_max; InputError for levels of a batch of which only some are."""
    if math.isinf(lam_min) and math.isinf(lam_max):
        return True
    there = (level.lam >= lam_min) & (level.lam <= lam_max)
    if bool(there.any()) != bool(there.all()):
        one_level(level, "a guidance interval (lam_min, lam_max)")
    return bool(there.all())


def asked(model: Model, x: Tensor, level: Level, conds: Sequence[Any]) -> tuple[Tensor, ...]:
    """The model's predictions at x with each of these conditions, from one call."""
    n = len(conds)
    if n == 1:
        return (model(x, level, conds[0]),)
    if level.alpha.ndim:
        level = Level(torch.cat([level.alpha] * n), torch.cat([level.sigma] * n))
    return model(torch.cat([x] * n), level, type(conds[0]).cat(conds)).chunk(n)


def dot(a: Tensor, b: Tensor) -> Tensor:
    """The inner product of each sample's elements, (b, 1, ..., 1) to meet them."""
    return (a * b).flatten(1).sum(1).reshape(-1, *(1 for _ in a.shape[1:]))


def inner(a: Tensor, b: Tensor) -> Tensor:
    """`dot` in float64."""
    return dot(a.double(), b.double())


def prepared(guide: Any, walk: Sequence[Level] | Plan, rows: int = 0) -> Any:
    """The guidance for a walk along these levels, or a plan's, with network calls of `rows` rows each, if any: kinds
    that go by the steps, or ask other networks, have a method of this name. Every evaluation of a plan is a step."""
    own: Callable[[Sequence[Level], int], Any] | None = getattr(guide, "prepared", None)
    if own is None:
        return guide
    return own(walk if isinstance(walk, Sequence) else [*walk.levels, Level(*walk.end)], rows)


class Contrast(ABC):
    """x0 = `blend` of the predictions with the condition and with the null condition, at the weight of the level.

    A kind of guidance is a frozen dataclass with a `weight_at` and, where it does not blend as CFG does, a `blend`; or
    with its own `pair`, where it leads away from something else. A weight of 1 is the prediction with the condition
    alone and 0 the other one, bit for bit and at one row a sample.
    """

    unconditional: ClassVar[bool] = False  # whether it guides samples without a condition, too

    @abstractmethod
    def weight_at(self, level: Level) -> float:
        """The weight at a level."""

    def blend(self, x: Tensor, level: Level, w: float, cond: Tensor, uncond: Tensor) -> Tensor:
        """x0 from both predictions of it."""
        return uncond + w * (cond - uncond)

    def pair(self, model: Model, x: Tensor, level: Level, cond: Any) -> tuple[Tensor, Tensor]:
        """The prediction that guidance leads to, and the one that it leads away from."""
        first, second = asked(model, x, level, [cond, cond.null()])
        return first, second

    def alone(self, model: Model, x: Tensor, level: Level, cond: Any) -> Tensor:
        """The prediction that guidance leads away from."""
        return model(x, level, cond.null())

    def __call__(self, model: Model, cond: Any, /) -> Denoise:
        """The denoiser with `cond`, a `Cond` or `Given`, bound and guided; InputError without one, unless guidance is
        off or `unconditional`."""
        if cond is None and not self.unconditional:
            w = f" with w = {self.w}" if hasattr(self, "w") else ""
            raise InputError(f"guidance{w} needs a condition: give one, such as a label, or leave guidance out")
        return Bound(model, cond, self)


@dataclass
class Bound:
    """A model with its condition and guidance."""

    model: Any
    cond: Any
    guide: Contrast

    def __call__(self, x: Tensor, level: Level) -> Tensor:
        w = self.guide.weight_at(level)
        if w == 1:
            return self.model(x, level, self.cond)  # type: ignore[no-any-return]
        if w == 0:
            return self.guide.alone(self.model, x, level, self.cond)
        return self.guide.blend(x, level, w, *self.guide.pair(self.model, x, level, self.cond))

    def reverse(self, x: Tensor, now: Level, then: Level) -> tuple[Tensor, Tensor]:
        """The guided mean with the conditional variance."""
        x0, variance = self.model.reverse(x, now, then, self.cond)
        return (x0 if self.guide.weight_at(now) == 1 else self(x, now)), variance
