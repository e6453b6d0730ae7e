"""Bits per dimension: what every likelihood asks of its data, and how its rows are summarised."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from undiffuse.types import InputError

DISCRETE = "bits/dim of the discrete data"
DENSITY = "bits/dim of the density"


def per_dim(nats: Tensor, d: int) -> Tensor:
    """Nats of a whole sample as bits per dimension."""
    return nats / (d * math.log(2))


def standard_error(bits: Tensor) -> float | None:
    """Of the mean of rows (n,); None for a single row."""
    return float(bits.std() / math.sqrt(len(bits))) if len(bits) > 1 else None


def snapped(x0: Tensor, step: float, span: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """(x0 in float64 without the rounding of its own precision, all values that it may take).

    The values are span[0], span[0] + step, ..., span[1]. Raises InputError for values between or beyond them.

    >>> x0, values = snapped(torch.tensor([0.3334]), 2 / 3, (-1.0, 1.0))
    >>> [round(v, 4) for v in values.tolist()], round(float(x0), 6)
    ([-1.0, -0.3333, 0.3333, 1.0], 0.333333)
    """
    low, high = span
    if not 0 < step < math.inf:
        raise InputError(f"step is the spacing of quantised data and must be > 0, got {step}: leave it out otherwise")
    count = (high - low) / step
    if not (count > 0.5 and abs(count - round(count)) < 1e-3):
        raise InputError(f"span {span} is not a whole number of steps of {step}: give the lowest and highest value")
    k = (x0.double() - low) / step
    off = (k - k.round()).abs() > 0.01
    if bool((off | (k.round() < 0) | (k.round() > round(count))).any()):
        bad = x0[off | (k.round() < 0) | (k.round() > round(count))][0]
        raise InputError(
            f"x0 has the value {float(bad):g}, which is not one of {low:g}, {low:g} + {step:g}, ..., {high:g}: give "
            "the data's own step and span, and leave step out for continuous data"
        )
    step = (high - low) / round(count)
    return low + k.round() * step, low + step * torch.arange(round(count) + 1, dtype=torch.float64)


def check_data(x0: Tensor, cond: Any, batch: int) -> None:
    """Raises InputError unless x0 is finite floating-point data (n, *data) with a condition of n rows or none."""
    if not x0.is_floating_point() or x0.ndim < 2 or x0.numel() == 0:
        raise InputError(f"x0 must be floating-point data (n, *data) with n >= 1, got {tuple(x0.shape)} of {x0.dtype}")
    if not bool(torch.isfinite(x0).all()):
        raise InputError("x0 has NaN or infinite values")
    if cond is not None and len(cond) != len(x0):
        raise InputError(f"the condition has {len(cond)} rows for {len(x0)} samples: give one row a sample")
    if batch < 1:
        raise InputError(f"batch, the rows of a model call, must be >= 1, got {batch}")


def check_finite(nats: Tensor, first: int, what: str) -> None:
    """Raises InputError naming the first sample of the last axis without a finite value, numbered from `first`."""
    bad = (~torch.isfinite(nats)).reshape(-1, nats.shape[-1]).any(0)
    if bool(bad.any()):
        raise InputError(
            f"the {what} of sample {first + int(bad.nonzero()[0])} ({int(bad.sum())} of {len(bad)} in its batch) is "
            "not finite: the model answers with NaN or huge values there. Check its weights, and keep lam within the "
            "range that it was trained on"
        )


def check_same(parts: list[Any], names: tuple[str, ...]) -> None:
    """Raises InputError where results to be joined were not computed with the same settings."""
    if not parts:
        raise InputError("there are no results to join: give at least one")
    for name in names:
        found = {getattr(part, name) for part in parts}
        if len(found) > 1:
            raise InputError(f"results of different {name} cannot be joined: {', '.join(sorted(map(str, found)))}")
