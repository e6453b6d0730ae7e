"""Solvers, one paper a file; `SOLVERS` is the table from which tests, documentation and command line are made."""

from __future__ import annotations

from collections.abc import Callable

from undiffuse.solvers.adams import Adams
from undiffuse.solvers.base import Eval, Solver
from undiffuse.solvers.ddim import DDIM
from undiffuse.solvers.ddpm import DDPM
from undiffuse.solvers.dpmpp import DPMpp2M
from undiffuse.solvers.edm import Euler, Heun

SOLVERS: dict[str, Callable[..., Solver]] = {
    "ddpm": DDPM,
    "ddim": DDIM,
    "euler": Euler,
    "heun": Heun,
    "dpmpp-2m": DPMpp2M,
    "adams": Adams,
}

__all__ = ["DDIM", "DDPM", "SOLVERS", "Adams", "DPMpp2M", "Euler", "Eval", "Heun", "Solver"]
