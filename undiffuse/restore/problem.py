"""Inverse problems: y = A(x0) + std noise."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from undiffuse.restore.krylov import ridge
from undiffuse.types import InputError


@dataclass(frozen=True, eq=False)
class Problem:
    """Observations y (b, ...) = operator(x0) + std * noise of b samples, noise standard normal and std >= 0.

    `operator` is one of `OPERATORS` or any differentiable function of x0 (b, *data); a function that is not linear says
    so by `linear=False`, which some methods refuse. `shape` is that of one sample (*data), as the operator knows it or
    that of y by default. Rows are selected by `problem[rows]`. InputError for parts that do not fit.

    >>> from undiffuse.restore import Mask
    >>> problem = Problem(Mask(torch.tensor([1, 0])), torch.tensor([[3.0, 9.0], [4.0, 9.0]]), std=0.1)
    >>> len(problem), problem[1:].y, problem.shape
    (2, tensor([[4., 0.]]), (2,))
    """

    operator: Callable[[Tensor], Tensor]
    y: Tensor
    std: float = 0.0
    shape: tuple[int, ...] = ()
    linear: bool = True

    def __post_init__(self) -> None:
        if not (math.isfinite(self.std) and self.std >= 0):
            raise InputError(f"std of the observations' noise must be a finite number >= 0, got {self.std}")
        operator: Any = self.operator
        if isinstance(operator, type) or not callable(operator):
            raise InputError(f"operator must be an operator's instance such as Mask(mask), or a function: {operator!r}")
        if hasattr(operator, "observed"):
            object.__setattr__(self, "y", operator.observed(self.y))
        if not isinstance(self.y, Tensor) or not self.y.is_floating_point():
            was = getattr(self.y, "dtype", type(self.y).__name__)
            raise InputError(f"y must be a tensor of floats (b, ...), got {was}")
        if self.y.ndim < 2 or len(self.y) == 0 or not bool(torch.isfinite(self.y).all()):
            raise InputError(f"y must be finite and of shape (b, ...), got shape {tuple(self.y.shape)}, or NaN in it")
        y = tuple(self.y.shape[1:])
        shape = tuple(self.shape) or tuple(operator.shape(y) if hasattr(operator, "shape") else y)
        object.__setattr__(self, "shape", shape)
        try:
            with torch.no_grad():
                found = tuple(operator(torch.zeros(1, *shape, dtype=self.y.dtype, device=self.y.device)).shape)
        except RuntimeError as error:
            raise InputError(
                f"the operator does not take samples of shape {shape} and {self.y.dtype}: give `shape`, that of one "
                f"sample, and y of the operator's type ({error})"
            ) from error
        if found != (1, *y):
            raise InputError(f"the operator makes {found[1:]} of samples of shape {shape}, and y has {y}: give `shape`")

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, rows: slice | Sequence[int] | Tensor) -> Problem:
        return replace(self, y=self.y[rows])

    def to(self, device: torch.device | str) -> Problem:
        """The same problem with y on another device; operators follow their input."""
        return replace(self, y=self.y.to(device))

    def repeat(self, times: int) -> Problem:
        """Every observation `times` times, copies next to each other: as many samples of each posterior."""
        return replace(self, y=self.y.repeat_interleave(times, 0))

    @staticmethod
    def cat(problems: Sequence[Problem]) -> Problem:
        """The rows of several problems, which share operator, std and shape; InputError otherwise."""
        first = problems[0]
        if any((p.operator, p.std, p.shape) != (first.operator, first.std, first.shape) for p in problems):
            raise InputError("problems that are put together must have the same operator, std and shape")
        return replace(first, y=torch.cat([p.y for p in problems]))

    def linear_for(self, method: object) -> Problem:
        """Itself; InputError, naming the method, where the operator is said or found not to be linear."""
        name = type(method).__name__
        hint = f"{name} needs a linear operator: take DPS or DAPS, which do not"
        if not self.linear:
            raise InputError(hint)
        a, b = torch.randn(2, 1, *self.shape, generator=torch.Generator().manual_seed(0)).to(self.y)
        with torch.no_grad():
            gap = self.operator(a + 2 * b) - self.operator(a) - 2 * self.operator(b)
            ok = bool(gap.abs().max() <= 1e-3 * (1 + self.operator(a).abs().max()))
        if not ok:
            raise InputError(
                f"the operator is not linear, A(a + 2 b) is not A(a) + 2 A(b). {hint}, and say linear=False"
            )
        return self

    def residual(self, x0: Tensor) -> Tensor:
        """y - A(x0)."""
        return self.y.to(x0) - self.operator(x0)

    def adjoint(self, r: Tensor) -> Tensor:
        """A^T r (b, *data) of a linear operator, r being of y's shape: its derivative's."""
        with torch.enable_grad():
            x0 = torch.zeros(len(r), *self.shape, dtype=r.dtype, device=r.device, requires_grad=True)
            (out,) = torch.autograd.grad(self.operator(x0), x0, r)
        return out

    def gain(self, r: Tensor, variance: Tensor, iterations: int = 100, tol: float = 0.0) -> Tensor:
        """g A^T (std^2 + g A A^T)^-1 r, the update of x0 by a residual r where x0 has the covariance g times identity.

        g is the `variance`, one number or (b, 1, ...) of them, and may be infinite; at std = 0 this is A^+ r, by the
        pseudo-inverse. By at most `iterations` of conjugate gradients, fewer where `tol` is reached (see `ridge`).
        """
        damping = self.std**2 / variance.double().clamp(min=1e-30)
        return ridge(self.operator, self.adjoint, r, damping, iterations, tol)


def simulate(
    operator: Callable[[Tensor], Tensor], x0: Tensor, std: float, noise: Tensor, linear: bool = True
) -> Problem:
    """The problem of x0 (b, *data) that was observed with standard normal `noise` of y's shape.

    >>> simulate(lambda x0: x0, torch.ones(1, 2), 0.5, torch.ones(1, 2)).y
    tensor([[1.5000, 1.5000]])
    """
    with torch.no_grad():
        y = operator(x0)
    return Problem(operator, y + std * noise.to(y), std, tuple(x0.shape[1:]), linear)
