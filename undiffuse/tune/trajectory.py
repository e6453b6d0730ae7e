"""A grid from teacher paths, by dynamic programming over the local errors of a solver's steps between their points.

The idea of GITS (arXiv 2405.11326: the deviation of an Euler step from the teacher's path) and OSS (arXiv 2503.21774:
optimal sub-steps of a teacher's grid), with two differences. The cost of a jump is that of the solver which will be
run, with one evaluation behind it, on the teacher's own points; and it is carried to the end by the flow of Gaussian
data, instead of by a fixed factor a step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from undiffuse.grid import Grid, Levels, UniformLam, check_levels
from undiffuse.level import Level
from undiffuse.modal import Frame
from undiffuse.sample import trajectory
from undiffuse.schedule import Schedule
from undiffuse.solvers import Eval, Solver, UniPC
from undiffuse.tune.family import Family
from undiffuse.types import Denoise, InputError


@dataclass(frozen=True, eq=False)
class Paths:
    """A teacher's points `x` (m + 1, b, *data) at all levels and predictions `x0` (m, b, *data) at all but the last."""

    levels: Levels
    x: Tensor
    x0: Tensor

    @staticmethod
    def walk(denoise: Denoise, start: Tensor, levels: Sequence[Level], teacher: Solver | None = None) -> Paths:
        """The paths of a teacher (default: UniPC of order 3) from x at levels[0], one evaluation a step."""
        levels = check_levels(levels).levels
        with torch.no_grad():
            states = list(trajectory(denoise, start, levels, teacher or UniPC(3)))
        if states[-1].nfe != len(states):
            raise InputError(f"a teacher needs one evaluation a step, {teacher} made {states[-1].nfe} in {len(states)}")
        return Paths(levels, torch.stack([start, *(s.x for s in states)]), torch.stack([state.x0 for state in states]))


def jump_costs(family: Family, paths: Paths) -> Tensor:
    """(m + 1, m + 1, m + 1): the cost of the jump i -> j when the evaluation before i was at h; infinite but h < i < j.

    A jump is one step of the solver without corrector from the teacher's x_i with the teacher's predictions at i and h;
    [i, i, j] is a jump without one before, from i = 0. Its cost is the root mean square over paths of the distance from
    the teacher's x_j, in each direction times std(x_end) / std(x_j), by which the flow of Gaussian data of that
    direction's variance (without a spectrum: the mean square of the paths' ends) carries it to the end.
    """
    levels, m = paths.levels, len(paths.levels) - 1
    x, x0 = paths.x.flatten(2).double().cpu(), paths.x0.flatten(2).double().cpu()
    d = x.shape[2]
    group = torch.zeros(d, dtype=torch.long)
    variance = x[-1].square().mean()[None]
    if family.spectrum is not None:
        frame = Frame(family.spectrum, family.group, torch.zeros(1), x)
        x = torch.stack([frame.there(c, float(level.alpha)) for c, level in zip(x, levels, strict=True)])
        x0 = torch.stack([frame.there(c, 1.0) for c in x0])
        group, variance = frame.group, family.variances
    # inner products of all points and predictions, in each group, as mean squares over elements and paths
    both = torch.cat([x, x0])
    gram = torch.stack(
        [torch.einsum("abi,cbi->ac", p, p) for p in (both[..., group == g] for g in range(len(variance)))]
    )
    gram /= x.shape[1] * d
    alpha, sigma = (torch.stack([getattr(level, c) for level in levels]) for c in ("alpha", "sigma"))
    std = (alpha**2 * variance[:, None] + sigma**2).sqrt()
    carried = std[:, -1:] / std
    solver = replace(family.unit, corrector=False) if hasattr(family.unit, "corrector") else family.unit  # type: ignore[type-var, call-arg]
    root, cost = family.variances.sqrt(), torch.full((m + 1, m + 1, m + 1), math.inf, dtype=torch.float64)

    def measure(h: int, i: Tensor, j: Tensor) -> None:
        """Fill in cost[h, i, j] for pairs (i, j), all of them with h behind (h < i), or with none (h == i)."""
        behind, k, size = bool(h < int(i[0])), len(i), len(root)

        def at(index: Tensor) -> Level:
            scaled = (alpha[index] * root[:, None]).reshape(-1, 1)
            return Level(scaled, sigma[index].expand(size, k).reshape(-1, 1))

        basis = torch.eye(4 if behind else 2, dtype=torch.float64).expand(size * k, -1, -1)
        past = [Eval(at(torch.full_like(i, h)), basis[:, 2], basis[:, 3])] if behind else []
        end, _ = solver.step(lambda x, level, /: basis[:, 1], basis[:, 0], at(i), at(j), past, _no_noise)
        c = end.reshape(size, k, -1).clone()
        c[..., 1::2] /= root[:, None, None]
        c = torch.cat([c, -torch.ones(size, k, 1, dtype=c.dtype)], -1)
        names = [i, m + 1 + i, *([torch.full_like(i, h), torch.full_like(i, m + 1 + h)] if behind else []), j]
        of = torch.stack(names, -1)
        square = torch.einsum("gka,gkab,gkb->gk", c, gram[:, of[:, :, None], of[:, None, :]], c)
        cost[h, i, j] = (square.clamp(min=0) * carried[:, j] ** 2).sum(0).sqrt()

    rows = torch.arange(m + 1)
    # the step to clean data and those from the start have other formulas: not in one batch with the others
    for h in range(m):
        i = rows[h + 1 : m]
        inner = torch.combinations(i, 2)
        if len(inner):
            measure(h, inner[:, 0], inner[:, 1])
        if len(i):
            measure(h, i, torch.full_like(i, m))
    for j in (rows[1:m], rows[m:]):
        if len(j):
            measure(0, torch.zeros_like(j), j)
    return cost


def _no_noise() -> Tensor:
    raise InputError("a grid from teacher paths needs a deterministic solver")


def shortest(cost: Tensor, most: int) -> dict[int, list[int]]:
    """For every number of jumps up to `most` the indices 0 ... m of least total cost, from costs as of `jump_costs`.

    One pass: the least cost of having come to i from h in n jumps is that of n - 1 jumps to h, plus the last. Raises
    InputError where `most` exceeds m.
    """
    m = len(cost) - 1
    if not 1 <= most <= m:
        raise InputError(f"paths of {m} steps have grids of 1 to {m} jumps; got {most}")
    index = torch.arange(m + 1)
    falls = index[:, None] < index
    onward = torch.where(falls[:, :, None] & falls, cost, math.inf)
    best = torch.full((m + 1, m + 1), math.inf, dtype=cost.dtype)  # [h, i]: come to i from h
    best[0, 1:] = cost[0, 0, 1:]
    before: list[Tensor] = []
    found = {1: [0, m]}
    for n in range(2, most + 1):
        best, source = (best[:, :, None] + onward).min(0)
        before.append(source)
        way = [m, int(best[:, m].argmin())]
        for back in reversed(before):
            way.append(int(back[way[-1], way[-2]]))
        found[n] = way[::-1]
    return found


def tune_trajectory(
    family: Family,
    denoise: Denoise,
    start: Tensor,
    schedule: Schedule,
    most: int,
    grid: Grid | None = None,
    teacher_steps: int = 60,
    teacher: Solver | None = None,
) -> dict[int, Levels]:
    """Levels for every number of steps up to `most`, from `teacher_steps` evaluations on noise x / sigma = `start`.

    They are levels of the teacher's grid (default: uniform in lam). Raises InputError for most > teacher_steps.
    """
    levels = (grid or UniformLam())(schedule, teacher_steps)
    if most > teacher_steps:
        raise InputError(f"a teacher of {teacher_steps} steps has no {most} levels to choose: give it more steps")
    paths = Paths.walk(denoise, levels[0].sigma * start, levels, teacher)
    ways = shortest(jump_costs(family, paths), most)
    return {n: tuple(levels[i] for i in way) for n, way in ways.items()}
