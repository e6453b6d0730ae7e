"""Autoguidance (Karras et al. 2024, arXiv 2406.02507)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor

from undiffuse.denoise import FixedRows
from undiffuse.guide.cfg import CFG
from undiffuse.level import Level
from undiffuse.types import InputError, Model, require


@dataclass(frozen=True)
class Autoguidance(CFG):
    """x0 = x0_weak + w (x0_cond - x0_weak), where `weak` is a worse version of the same model with the same condition:
    smaller, less trained, or averaged over an earlier part of the training. Without a condition, too.

    In a configuration the weak version is that of a `run` (by default the run itself), with the average of length `ema`
    (0: that of the run) after `until`, a share of the training in (0, 1]: train.snapshots keep both at no cost.
    """

    w: float = 2.0
    run: str = ""
    ema: float = 0.0
    until: float = 0.25
    weak: Any = None
    unconditional: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weak is not None and not callable(self.weak):
            raise InputError(
                f"weak is a denoiser, such as undiffuse.load(RUN).denoiser, got {type(self.weak).__name__}"
            )
        require(0 <= self.ema < 0.2887, "guidance.ema", self.ema, "a length from 0 (the run's own) to 0.2887")
        require(0 < self.until <= 1, "guidance.until", self.until, "a share of the training above 0 and at most 1")

    def found(self, model: Any) -> Autoguidance:
        """The same with the weak version that an `undiffuse.model.Model` finds."""
        return self if self.weak is not None else replace(self, weak=model.weaker(self.run, self.ema, self.until))

    def prepared(self, levels: Sequence[Level], rows: int = 0) -> Autoguidance:
        """The same with calls of the weak version of `rows` rows each, if any."""
        return replace(self, weak=FixedRows(self.weak, rows)) if rows and self.weak is not None else self

    def pair(self, model: Model, x: Tensor, level: Level, cond: Any) -> tuple[Tensor, Tensor]:
        """Both versions' predictions."""
        return model(x, level, cond), self.alone(model, x, level, cond)

    def alone(self, model: Model, x: Tensor, level: Level, cond: Any) -> Tensor:
        """That of the weak version."""
        if self.weak is None:
            raise InputError("autoguidance needs a weak version of the model: Autoguidance(w, weak=...), or a run's")
        return self.weak(x, level, cond)  # type: ignore[no-any-return]
