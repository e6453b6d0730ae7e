"""Memorisation: whether samples lie nearer to the training data than to data that training has not seen."""

from __future__ import annotations

import torch
from torch import Tensor


def copy_ratio(x: Tensor, train: Tensor, held_out: Tensor) -> float:
    """Median distance to the nearest training sample over that to the nearest held-out one, from equally many of each;
    far below 1 means copying.

    >>> a, b = torch.zeros(1, 2), torch.ones(1, 2)
    >>> copy_ratio(torch.full((4, 2), 0.25), a, b) < 0.5
    True
    """
    n = min(len(train), len(held_out))
    near = [torch.cdist(x.flatten(1), part[:n].flatten(1)).amin(1) for part in (train, held_out)]
    return float(near[0].median() / near[1].median())
