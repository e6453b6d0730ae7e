"""Restoration: samples of p(x0 | y) for y = A(x0) + noise, and of p(x0) exp(reward(x0))."""

from __future__ import annotations

from undiffuse.restore.mmps import MMPS
from undiffuse.restore.operators import OPERATORS, Blur, Downsample, Gray, Mask, Matrix, Operator
from undiffuse.restore.problem import Problem, simulate

__all__ = ["MMPS", "OPERATORS", "Blur", "Downsample", "Gray", "Mask", "Matrix", "Operator", "Problem", "simulate"]
