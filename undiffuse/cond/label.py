"""Class labels -> `Cond.vector`, one-hot; several labels at once are several ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from undiffuse.cond.cond import Cond
from undiffuse.types import InputError


@dataclass(frozen=True)
class Label:
    """Encodes labels 0 ... classes - 1 as one-hot vectors; the null condition is the zero vector.

    Raises InputError for labels out of range.

    >>> Label(3)([2, 0]).vector.tolist()
    [[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]
    """

    classes: int

    @property
    def dim(self) -> int:
        """The width of `Cond.vector`."""
        return self.classes

    def __call__(self, labels: Tensor | Sequence[int]) -> Cond:
        labels = torch.as_tensor(labels)
        if labels.is_floating_point() or labels.dtype == torch.bool:
            raise InputError(f"labels must be whole numbers 0 ... {self.classes - 1}, got {labels.dtype}")
        if bool(((labels < 0) | (labels >= self.classes)).any()):
            bad = labels[(labels < 0) | (labels >= self.classes)][0]
            raise InputError(f"label {int(bad)} is out of range: this model knows the classes 0 ... {self.classes - 1}")
        return Cond(vector=torch.nn.functional.one_hot(labels.long(), self.classes).float())
