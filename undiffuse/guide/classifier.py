"""Guidance by a classifier of noisy data (Dhariwal and Nichol 2021, arXiv 2105.05233)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from undiffuse.cond import Cond
from undiffuse.denoise import FixedRows
from undiffuse.guide.cfg import CFG
from undiffuse.guide.contrast import inside
from undiffuse.level import Level
from undiffuse.types import Denoise, InputError, Model


@dataclass(frozen=True)
class ClassifierGuidance(CFG):
    """x0 = x0_base + g (sigma^2 / alpha) grad log p(c | x), by Tweedie's formula (their equation 14 in terms of x0).

    `base` is the prediction with the condition and g = w - 1, or the unconditional one and g = w. Both aim at p(x)
    p(c | x)^w, and 1 is off for the first alone; the second needs no training with labels. `classifier(x, level)` gives
    logits (b, classes); of several labels their log-probabilities add up. At alpha = 0 there is nothing to read in x,
    and the base is left as it is. In a configuration `run` is that of a classifier (`undiffuse train kind=classifier`).
    """

    w: float = 2.0
    run: str = ""
    base: Literal["conditional", "unconditional"] = "conditional"
    classifier: Any = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.classifier is not None and not callable(self.classifier):
            was = type(self.classifier).__name__
            raise InputError(
                f"classifier is a function (x, level) -> logits, such as that of a ClassifierModel: got {was}"
            )
        if self.base not in ("conditional", "unconditional"):
            raise InputError(f"guidance.base must be conditional or unconditional, got {self.base!r}")

    def weight_at(self, level: Level) -> float:
        """w inside the interval; outside, that of the base alone."""
        return self.w if inside(level, self.lam_min, self.lam_max) else self.off

    @property
    def off(self) -> float:
        """The weight at which the base is left alone."""
        return float(self.base == "conditional")

    def found(self, model: Any) -> ClassifierGuidance:
        """The same with the classifier that an `undiffuse.model.Model` finds."""
        return self if self.classifier is not None else replace(self, classifier=model.classifier(self.run))

    def prepared(self, levels: Sequence[Level], rows: int = 0) -> ClassifierGuidance:
        """The same with calls of the classifier of `rows` rows each, if any."""
        reads = self.classifier
        if not rows or reads is None:
            return self
        return replace(self, classifier=FixedRows(lambda x, level, cond: reads(x, level), rows))

    def __call__(self, model: Model, cond: Any, /) -> Denoise:
        """The denoiser with the classes of `cond` bound and guided; InputError without a classifier or classes."""
        if self.w == self.off:
            return CFG(self.w)(model, cond)
        if self.classifier is None:
            raise InputError(
                "classifier guidance needs a classifier of noisy data: guidance.run=RUN, a run that `undiffuse train "
                "kind=classifier` made, or ClassifierGuidance(classifier=...)"
            )
        return _Bound(model, cond, self, classes_of(cond))


def classes_of(cond: Any) -> Tensor:
    """The classes (b, classes) of a condition, 1 for those of a sample; InputError for one without any."""
    if isinstance(cond, Cond) and cond.vector is not None:
        return cond.vector
    read = getattr(cond, "reads", {}).get("label")
    if read is None:
        raise InputError("classifier guidance needs classes: a label, such as cond=Label(10)([3, 7])")
    return read.tensors["vector"] * read.there[:, None]  # type: ignore[no-any-return]


@dataclass(frozen=True)
class _Bound:
    model: Any
    cond: Any
    guide: ClassifierGuidance
    classes: Tensor

    def __call__(self, x: Tensor, level: Level) -> Tensor:
        base: Tensor = self.model(x, level, self.base)
        factor = self.guide.weight_at(level) - self.guide.off
        if factor == 0 or bool((level.alpha == 0).all()):
            return base
        return base + ((factor * level.sigma**2 / level.alpha) * self.slope(x, level)).to(base)

    @property
    def base(self) -> Any:
        """The condition that the model is asked with."""
        return self.cond if self.guide.base == "conditional" else self.cond.null()

    def slope(self, x: Tensor, level: Level) -> Tensor:
        """grad log p(c | x)."""
        with torch.enable_grad():
            at = x.detach().requires_grad_()
            logits = self.guide.classifier(at, level)
            if logits.shape != self.classes.shape:
                raise InputError(f"the classifier knows {logits.shape[1]} classes, the model {self.classes.shape[1]}")
            log_p = (logits.log_softmax(1) * self.classes.to(logits)).sum()
            return torch.autograd.grad(log_p, at)[0]

    def reverse(self, x: Tensor, now: Level, then: Level) -> tuple[Tensor, Tensor]:
        """The guided mean with the variance of the base."""
        return self(x, now), self.model.reverse(x, now, then, self.base)[1]
