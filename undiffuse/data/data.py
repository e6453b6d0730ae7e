"""`Data`: samples in memory, in [-1, 1], with optional labels and conditions."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from undiffuse.types import InputError


@dataclass(frozen=True, eq=False)
class Data:
    """x (n, channels, *size) in float32, images in [-1, 1]; labels (n,) or None; `classes` is their number. `cond` has
    n rows of what a network is told, a `Given` as encoders read it, or is None.

    Raises InputError for fewer than 2 samples, fewer than 3 axes, NaN or infinite values, and labels or conditions that
    do not fit.
    """

    x: Tensor
    labels: Tensor | None = None
    name: str = "data"
    cond: Any = None

    def __post_init__(self) -> None:
        if self.x.ndim < 3 or self.x.shape[0] < 2 or 0 in self.x.shape:
            raise InputError(
                f"{self.name}: samples of shape {tuple(self.x.shape)}; expected (n, channels, side, ...) with n >= 2"
            )
        if not self.x.is_floating_point():
            raise InputError(
                f"{self.name}: samples of type {self.x.dtype}; expected floats in [-1, 1] (files: or uint8)"
            )
        x = self.x.float()
        bad = ~torch.isfinite(x.flatten(1)).all(1)
        if bool(bad.any()):
            first = int(bad.nonzero()[0])
            raise InputError(f"{self.name}: {int(bad.sum())} samples have NaN or infinite values, the first is {first}")
        object.__setattr__(self, "x", x)
        if self.labels is not None:
            labels = torch.as_tensor(self.labels)
            whole = labels.dtype in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
            if not whole or labels.shape != (len(x),) or int(labels.min()) < 0:
                raise InputError(f"{self.name}: labels must be {len(x)} whole numbers >= 0")
            object.__setattr__(self, "labels", labels.long())
        if self.cond is not None and len(self.cond) != len(x):
            raise InputError(f"{self.name}: {len(self.cond)} conditions for {len(x)} samples")

    def __repr__(self) -> str:
        return f"Data({self.name}: {len(self)} samples of shape {tuple(self.x.shape[1:])}, {self.classes} classes)"

    @property
    def classes(self) -> int:
        """The number of classes; 0 without labels."""
        return 0 if self.labels is None else int(self.labels.max()) + 1

    def __len__(self) -> int:
        return len(self.x)

    def split(self, held_out: int, seed: int = 0) -> tuple[Data, Data]:
        """(train, held out): a fixed random split with `held_out` samples in the second part."""
        check_held_out(self.name, held_out, len(self))
        order = torch.from_numpy(np.random.default_rng(seed).permutation(len(self)))
        parts = {f"{self.name} (train)": order[held_out:], f"{self.name} (held out)": order[:held_out]}
        train, held = (replace(self.rows(index), name=name) for name, index in parts.items())
        return train, held

    def rows(self, index: slice | Tensor) -> Data:
        """These samples, with what belongs to them."""
        labels, cond = (None if v is None else v[index] for v in (self.labels, self.cond))
        return Data(self.x[index], labels, self.name, cond)


def check_held_out(name: str, held_out: int, n: int) -> None:
    """InputError unless two samples at least are held out, to measure by, and two are left to train on."""
    if not 2 <= held_out <= n - 2:
        raise InputError(
            f"{name}: cannot hold out {held_out} of {n} samples: at least 2 are needed to measure by, and 2 to train on"
        )
