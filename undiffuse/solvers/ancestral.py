"""Ancestral sampling around any solver: Euler, DPM2 and 2S of k-diffusion (after Ho et al. 2020, arXiv 2006.11239)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from undiffuse.level import Level
from undiffuse.solvers.base import Eval, Solver, combine
from undiffuse.solvers.ddim import DDIM
from undiffuse.solvers.dpm import DPMSolver
from undiffuse.types import Denoise, InputError, Noise


@dataclass(frozen=True)
class Ancestral:
    """Each step of `inner` goes further down, and noise of std eta sigma' sqrt(1 - e^(-2 h)) brings x to its level.

    Around `DDIM` this is DDIM(eta); eta = 0 is `inner` itself, eta > 0 has order 1. Evaluations as `inner`.
    """

    inner: Solver
    eta: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.eta <= 1:
            raise InputError(f"Ancestral needs 0 <= eta <= 1, got {self.eta}")

    @property
    def global_order(self) -> int:
        return self.inner.global_order if self.eta == 0 else 1

    @property
    def adaptive(self) -> bool:
        """Whether steps are chosen from the data."""
        return bool(getattr(self.inner, "adaptive", False))

    @property
    def calls(self) -> int:
        return self.inner.calls

    @property
    def history(self) -> int:
        return self.inner.history

    def step(
        self, denoise: Denoise, x: Tensor, now: Level, then: Level, past: Sequence[Eval], noise: Noise
    ) -> tuple[Tensor, Eval]:
        if self.eta == 0 or then.is_clean:
            return self.inner.step(denoise, x, now, then, past, noise)
        fresh = -(self.eta**2) * torch.expm1(2 * (now.lam - then.lam))
        down = Level(then.alpha, then.sigma * (1 - fresh).sqrt())
        x, new = self.inner.step(denoise, x, now, down, past, noise)
        return combine((torch.ones_like(fresh), x), (then.sigma * fresh.sqrt(), noise())), new


def EulerAncestral(eta: float = 1.0) -> Ancestral:
    """Ancestral Euler, which is DDIM(eta)."""
    return Ancestral(DDIM(), eta)


def DPM2Ancestral(eta: float = 1.0) -> Ancestral:
    """Ancestral DPM2: the middle of each step in lam decides, as in DPM-Solver-2."""
    return Ancestral(DPMSolver(2), eta)


def DPMpp2SAncestral(eta: float = 1.0) -> Ancestral:
    """Ancestral DPM-Solver++(2S)."""
    return Ancestral(DPMSolver(2, "x0"), eta)
