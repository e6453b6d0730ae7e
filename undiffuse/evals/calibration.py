"""How right, and how sure of itself, a classifier is."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from undiffuse.types import InputError


class Calibration(NamedTuple):
    """`accuracy`; `loss`, the mean of -log p(label) in nats; `ece`, the mean distance of confidence from accuracy."""

    accuracy: float
    loss: float
    ece: float


def calibration(log_p: Tensor, labels: Tensor, bins: int = 15) -> Calibration:
    """Of log-probabilities (n, classes) and labels (n,), with the expected calibration error in equal bins of the
    likeliest class's probability (Guo et al. 2017, arXiv 1706.04599, equation 3). Raises InputError for other shapes.

    >>> round(calibration(torch.tensor([[0.75, 0.25]] * 4).log(), torch.tensor([0, 0, 1, 1])).ece, 6)
    0.25
    """
    if log_p.ndim != 2 or labels.shape != log_p.shape[:1] or not len(labels):
        raise InputError(
            f"calibration takes (n, classes) and labels (n,), got {tuple(log_p.shape)}, {tuple(labels.shape)}"
        )
    log_p = log_p.double()
    confidence, read = log_p.max(1)
    confidence, right = confidence.exp(), (read == labels).double()
    index = (confidence * bins).ceil().long().clamp(1, bins) - 1
    gaps = torch.zeros(bins, dtype=torch.float64).index_add_(0, index, right - confidence)
    loss = -log_p.gather(1, labels[:, None]).mean()
    return Calibration(float(right.mean()), float(loss), float(gaps.abs().sum() / len(labels)))
