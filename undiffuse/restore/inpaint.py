"""Inpainting by replacement (Song et al. 2021, arXiv 2011.13456, appendix I.2), with RePaint's returns (Lugmayr et al.
2022, arXiv 2201.09865), and soft masks as strengths of each pixel (Levin and Fried 2023, arXiv 2306.00950)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from undiffuse.grid import Grid, Levels, UniformLam
from undiffuse.level import Level
from undiffuse.restore.strength import strength_of, walk
from undiffuse.sample import Noise
from undiffuse.schedule import Schedule
from undiffuse.solvers import DPMpp2M, Solver
from undiffuse.types import Denoise, InputError, require
from undiffuse.types import Noise as NoiseLike


def check_known(known: Tensor, x0: Tensor) -> Tensor:
    """How far each pixel of x0 (b, *data) is known, in x0's dtype; InputError unless it is in [0, 1] and meets x0."""
    known = known.to(x0)
    try:
        fits = torch.broadcast_tensors(known, x0)[0].shape == x0.shape  # type: ignore[no-untyped-call]
    except RuntimeError:
        fits = False
    require(fits, "known", f"the shape {tuple(known.shape)}", f"a mask that meets pictures {tuple(x0.shape)}")
    if not bool(((known >= 0) & (known <= 1)).all()):
        raise InputError(f"known must be from 0 (made anew) to 1 (kept), got {float(known.min())} to {known.max()}")
    return known


def composite(x: Tensor, x0: Tensor, known: Tensor) -> Tensor:
    """x, and x0 itself where it is known for certain (1)."""
    return torch.where(check_known(known, x0) == 1, x0, x)


@dataclass(frozen=True, eq=False)
class Replace:
    """A `project` hook of `trajectory`: at each level what is known of x0 (b, *data) is a fresh draw of q(x_t | x0),
    and x0 itself in the end.

    `known` is 1 where x0 is kept and 0 where it is made anew; a pixel between is kept down to the level of strength 1 -
    known, and is free from there on, as if `img2img` had that strength there.
    """

    x0: Tensor
    known: Tensor
    noise: NoiseLike

    def __call__(self, x: Tensor, level: Level) -> Tensor:
        held = (self.known > 1 - float(strength_of(level))) | (self.known == 1)
        return torch.where(held, level.diffuse(self.x0, self.noise()), x)


@dataclass(frozen=True)
class Returning:
    """Another grid that returns `jump` steps and takes them again until it has taken them `times` times, at every
    `jump`-th level (RePaint's schedule): what is made anew agrees with what is known the better, at `times` the cost.

    Needs jump >= 1 and times >= 1; times = 1 is the grid itself.

    >>> from undiffuse import Explicit, Flow
    >>> levels = Returning(Explicit((-2.0, -1.0, 0.0, 1.0)), jump=1, times=2)(Flow(), 3)
    >>> [round(float(level.lam)) for level in levels]
    [-2, -1, -2, -1, 0, -1, 0, 1]
    """

    grid: Grid = field(default_factory=UniformLam)
    jump: int = 10
    times: int = 10

    def __post_init__(self) -> None:
        require(self.jump >= 1, "jump", self.jump, ">= 1 (steps of a return)")
        require(self.times >= 1, "times", self.times, ">= 1 (1 is without returns)")

    def __call__(self, schedule: Schedule, steps: int) -> Levels:
        levels, out = self.grid(schedule, steps), list[Level]()
        last = len(levels) - 2  # as in RePaint, not from clean data
        for i, level in enumerate(levels):
            out.append(level)
            if self.jump <= i <= last and (last - i) % self.jump == 0:
                out += levels[i - self.jump : i + 1] * (self.times - 1)
        return tuple(out)


def inpaint(
    denoise: Denoise,
    x0: Tensor,
    known: Tensor,
    schedule: Schedule,
    *,
    steps: int = 20,
    solver: Solver | None = None,
    grid: Grid | None = None,
    seed: int = 0,
    first: int = 0,
) -> Tensor:
    """Pictures x0 (b, *data) with what is not `known` of them made anew; `known` meets x0, from 0 (anew) to 1 (kept).

    Replacement alone does not see what is known when it starts, and errs; with `grid=Returning(jump=5, times=5)` it is
    RePaint, which errs less. Pixels with known = 1 come back bit for bit. Row k depends on (seed, first + k) and x0[k]
    alone. InputError for masks out of range or of other shapes.

    >>> from undiffuse import Gaussian, Spectrum, VP
    >>> model = Gaussian(Spectrum(torch.zeros(2), torch.ones(2)))
    >>> inpaint(model, torch.tensor([[3.0, 0.0]]), torch.tensor([1.0, 0.0]), VP())[0, 0]
    tensor(3.)
    """
    known, levels = check_known(known, x0), (grid or UniformLam())(schedule, steps)
    noise = Noise(x0.shape, seed, range(first, first + len(x0)), x0.dtype, x0.device)
    project = Replace(x0, known, noise)
    start = project((levels[0].sigma * noise()).to(x0.dtype), levels[0])
    return composite(walk(denoise, start, levels, solver or DPMpp2M(), noise, project), x0, known)
