"""DEIS: Zhang and Chen 2023 (arXiv 2204.13902); its rho form is the linear multistep method (LMS) of k-diffusion."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from undiffuse.level import Level
from undiffuse.schedule import VP, Schedule
from undiffuse.solvers.base import Eval
from undiffuse.solvers.multistep import EpsMultistep
from undiffuse.solvers.quadrature import gauss_legendre
from undiffuse.types import InputError

LINEAR = VP()


@dataclass(frozen=True)
class DEIS(EpsMultistep):
    """Adams-Bashforth on eps: x'/alpha' = x/alpha + int eps ds, s = sigma / alpha, over the newest `order` predictions.

    coordinate: eps is a polynomial in time t of `schedule` ("t": tAB, integrated by quadrature) or in s ("rho":
    rhoAB, in closed form; equation 15). The paper's tAB3 has degree 3, hence order = 4. One evaluation a step; the
    first step has one prediction, which limits the global order to 2. A step from pure noise (alpha = 0) is DDIM's.
    """

    coordinate: Literal["t", "rho"] = "t"
    schedule: Schedule = LINEAR

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.coordinate not in ("t", "rho"):
            raise InputError(f"DEIS coordinate must be 't' or 'rho', got {self.coordinate!r}")

    @property
    def full_order(self) -> int:
        """The order once all evaluations are there."""
        return self.order

    def usable(self, evals: list[Eval]) -> list[Eval]:
        """Without those whose time another one has: levels beyond the ends of `schedule` all have its end's."""
        if self.coordinate == "rho":
            return evals
        kept: list[Eval] = []
        for e in evals:
            t = self.schedule.time(e.level.lam)
            if all(bool(((t - self.schedule.time(k.level.lam)).abs() > 1e-9).all()) for k in kept):
                kept.append(e)
        return kept

    def weights(self, nodes: list[Level], now: Level, then: Level) -> Tensor:
        """int_s^s' of each node's Lagrange polynomial, stacked last."""
        s, end = now.sigma / now.alpha, then.sigma / then.alpha
        if self.coordinate == "rho":
            at = torch.stack([(n.sigma / n.alpha - s) / (end - s) for n in nodes], -1)
            powers = torch.arange(len(nodes), dtype=torch.float64)
            moments = (1 / (powers + 1)).expand(at.shape)
            w: Tensor = torch.linalg.solve(at[..., None, :].pow(powers[:, None]), moments)
            return (end - s)[..., None] * w
        u, du = gauss_legendre(48)
        clean = (end == 0)[..., None]
        ratio = torch.where(clean, 1.0, (end / s)[..., None])
        points = s[..., None] * torch.where(clean, 1 - u, ratio**u)  # even in lam where that is finite
        ds = du * torch.where(clean, -s[..., None], points * ratio.log())
        times = torch.stack([self.schedule.time(n.lam) for n in nodes], -1)
        t, out = self.schedule.time(-points.log()), []
        for j in range(len(nodes)):
            basis = ds
            for k in range(len(nodes)):
                if k != j:
                    basis = basis * (t - times[..., k, None]) / (times[..., j, None] - times[..., k, None])
            out.append(basis.sum(-1))
        return torch.stack(out, -1)


def LMS(order: int = 4) -> DEIS:
    """Linear multistep in sigma / alpha with weights for unequal steps: `DEIS` with coordinate "rho"."""
    return DEIS(order, "rho")
