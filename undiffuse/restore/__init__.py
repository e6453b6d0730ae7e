"""Restoration: samples of p(x0 | y) for y = A(x0) + noise, and of p(x0) exp(reward(x0))."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from undiffuse.restore.daps import DAPS
from undiffuse.restore.diffpir import DiffPIR
from undiffuse.restore.dps import DPS
from undiffuse.restore.mmps import MMPS
from undiffuse.restore.operators import OPERATORS, Blur, Downsample, Gray, Mask, Matrix, Operator
from undiffuse.restore.pigdm import PiGDM
from undiffuse.restore.problem import Problem, simulate
from undiffuse.restore.solve import Restorer, restore
from undiffuse.restore.steer import Steered, steer
from undiffuse.restore.tmpd import TMPD

RESTORERS: dict[str, Callable[..., Any]] = {
    "mmps": MMPS,
    "tmpd": TMPD,
    "pigdm": PiGDM,
    "dps": DPS,
    "diffpir": DiffPIR,
    "daps": DAPS,
}

__all__ = [
    "DAPS",
    "DPS",
    "MMPS",
    "OPERATORS",
    "RESTORERS",
    "TMPD",
    "Blur",
    "DiffPIR",
    "Downsample",
    "Gray",
    "Mask",
    "Matrix",
    "Operator",
    "PiGDM",
    "Problem",
    "Restorer",
    "Steered",
    "restore",
    "simulate",
    "steer",
]
