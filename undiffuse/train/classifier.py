"""The objective of a classifier: the cross-entropy of labels given noisy data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from undiffuse.classify import Classifier
from undiffuse.cond import Cond
from undiffuse.level import Level
from undiffuse.schedule import Schedule
from undiffuse.train.coupling import Coupling, IndependentCoupling
from undiffuse.train.draws import Drawer, Draws, Stratified
from undiffuse.train.objective import Drawn, LevelDistribution, Loss, UniformInLam, draw_levels
from undiffuse.types import InputError


@dataclass(frozen=True)
class ClassifierObjective:
    """E -log p(label | x) in nats over levels, data and noise, for a `Classifier` (Dhariwal and Nichol 2021, section
    4.1); labels are `Cond.vector` (b, classes), the mean over those of a sample that has several."""

    schedule: Schedule
    levels: LevelDistribution = UniformInLam(-4.0, 3.0)  # noqa: RUF009 (it is immutable)
    draws: Draws = Stratified()  # noqa: RUF009
    coupling: ClassVar[Coupling] = IndependentCoupling()

    def check(self, model: Classifier) -> None:
        """InputError for a module that is no classifier, and for levels that the schedule lacks."""
        if not isinstance(model, Classifier):
            raise InputError(
                f"ClassifierObjective trains a Classifier, got {type(model).__name__}: Objective trains denoisers"
            )
        self.levels(torch.tensor([0.5], dtype=torch.float64), self.schedule)

    def draw(self, b: int, seed: int = 0, step: int = 1, drawer: Drawer | None = None) -> Drawn:
        """The levels of a step's b samples, as those of `Objective`."""
        return draw_levels(self.levels, self.schedule, b, seed, step, drawer or self.draws.start())

    def dropped(self, cond: Any, seed: int, index: Tensor, p: float) -> Any:
        """The labels, all of them: they are what is learned."""
        return cond

    def __call__(self, model: Classifier, x0: Tensor, eps: Tensor, level: Level, cond: Any = None) -> Loss:
        """The cross-entropy at x = alpha x0 + sigma eps, and where another class is the likeliest; InputError without
        labels, and for those of other classes."""
        labels = getattr(cond, "vector", None)
        if labels is None or labels.shape[1:] != (model.classes,):
            got = "none" if labels is None else f"those of {labels.shape[1]}"
            raise InputError(
                f"a classifier learns from labels of its {model.classes} classes, got {got}: every sample needs one, "
                f"such as cond=Label({model.classes})(labels)"
            )
        wide = level.reshape(-1, *[1] * (x0.ndim - 1)).to(x0.device)
        told = None if cond.augment is None else Cond(augment=cond.augment)
        logits = model(wide.diffuse(x0, eps), wide, told)
        loss = cross_entropy(logits, labels / labels.sum(1, keepdim=True).clamp(min=1), reduction="none")
        right = labels.gather(1, logits.argmax(1, keepdim=True))[:, 0] > 0
        return Loss(loss, 1 - right.to(loss), level.lam)
