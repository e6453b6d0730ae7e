"""Class labels -> `Cond.vector`, one-hot; several labels at once are several ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from undiffuse.cond.cond import Cond
from undiffuse.types import InputError


@dataclass(frozen=True)
class Label:
    """Encodes labels 0 ... classes - 1 as one-hot vectors; the null condition is the zero vector.

    A sample with several labels is a list of them, or a row (classes,) of True and False; it has a one for each, and
    one without any is null. Raises InputError for labels out of range.

    >>> Label(3)([2, 0]).vector.tolist()
    [[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]
    >>> Label(3)([[0, 2], []]).vector.tolist()
    [[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]]
    """

    classes: int
    tokens = spatial = 0
    reads = "label"

    @property
    def vector(self) -> int:
        """The width of `Cond.vector`."""
        return self.classes

    def __call__(self, labels: Tensor | Sequence[int] | Sequence[Sequence[int]]) -> Cond:
        return Cond(**self.read(labels))

    def build(self) -> nn.Module:
        """Nothing to train."""
        return AsRead()

    def read(self, labels: Any) -> dict[str, Tensor]:
        """The vectors (b, classes)."""
        if isinstance(labels, Tensor) and labels.dtype == torch.bool and labels.shape[1:] == (self.classes,):
            return {"vector": labels.float()}
        if isinstance(labels, list | tuple) and any(isinstance(k, list | tuple | Set) for k in labels):
            labels = [list(k) if isinstance(k, list | tuple | Set) else [k] for k in labels]
            several = [self._ones(k).sum(0).clamp(max=1) for k in labels]
            return {"vector": torch.stack(several)}
        return {"vector": self._ones(labels)}

    def _ones(self, labels: Any) -> Tensor:
        """(n, classes): the one-hot vector of each label."""
        labels = torch.as_tensor(labels) if len(labels) else torch.zeros(0, dtype=torch.long)
        if labels.is_floating_point() or labels.dtype == torch.bool:
            raise InputError(f"labels must be whole numbers 0 ... {self.classes - 1}, got {labels.dtype}")
        if bool(((labels < 0) | (labels >= self.classes)).any()):
            bad = labels[(labels < 0) | (labels >= self.classes)][0]
            raise InputError(f"label {int(bad)} is out of range: this model knows the classes 0 ... {self.classes - 1}")
        return torch.nn.functional.one_hot(labels.long(), self.classes).float()


class AsRead(nn.Module):
    """The module of an encoder without parameters, whose `read` gives the parts of a `Cond` themselves."""

    def forward(self, tensors: Mapping[str, Tensor], size: Sequence[int]) -> Cond:
        """These parts."""
        return Cond(**tensors)
