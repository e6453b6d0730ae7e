"""Solvers, one paper a file; `SOLVERS` is the table from which tests, documentation and command line are made."""

from __future__ import annotations

from collections.abc import Callable

from undiffuse.solvers.adams import Adams
from undiffuse.solvers.adaptive import Adaptive
from undiffuse.solvers.ancestral import Ancestral, DPM2Ancestral, DPMpp2SAncestral, EulerAncestral
from undiffuse.solvers.base import Eval, Solver
from undiffuse.solvers.butcher import Butcher
from undiffuse.solvers.consistency import Consistency
from undiffuse.solvers.ddim import DDIM
from undiffuse.solvers.ddpm import DDPM
from undiffuse.solvers.deis import DEIS, LMS
from undiffuse.solvers.dpm import DPMSolver
from undiffuse.solvers.dpmpp import DPMpp2M, DPMpp2S, DPMpp3M
from undiffuse.solvers.edm import Euler, Heun
from undiffuse.solvers.langevin import PredictorCorrector
from undiffuse.solvers.pndm import IPNDM, PNDM
from undiffuse.solvers.rk import RungeKutta
from undiffuse.solvers.sa import SASolver
from undiffuse.solvers.spectral import Spectral
from undiffuse.solvers.start import Start
from undiffuse.solvers.unipc import UniPC

SOLVERS: dict[str, Callable[..., Solver]] = {
    "ddpm": DDPM,
    "ddim": DDIM,
    "euler": Euler,
    "heun": Heun,
    "dpm-solver": DPMSolver,
    "dpmpp-2s": DPMpp2S,
    "dpmpp-2m": DPMpp2M,
    "dpmpp-3m": DPMpp3M,
    "adams": Adams,
    "unipc": UniPC,
    "sa-solver": SASolver,
    "deis": DEIS,
    "lms": LMS,
    "ipndm": IPNDM,
    "pndm": PNDM,
    "spectral": Spectral,
    "runge-kutta": RungeKutta,
    "adaptive": Adaptive,
    "euler-ancestral": EulerAncestral,
    "dpm2-ancestral": DPM2Ancestral,
    "dpmpp-2s-ancestral": DPMpp2SAncestral,
    "langevin": PredictorCorrector,
    "consistency": Consistency,
}

__all__ = [
    "DDIM",
    "DDPM",
    "DEIS",
    "IPNDM",
    "LMS",
    "PNDM",
    "SOLVERS",
    "Adams",
    "Adaptive",
    "Ancestral",
    "Butcher",
    "Consistency",
    "DPM2Ancestral",
    "DPMSolver",
    "DPMpp2M",
    "DPMpp2S",
    "DPMpp2SAncestral",
    "DPMpp3M",
    "Euler",
    "EulerAncestral",
    "Eval",
    "Heun",
    "PredictorCorrector",
    "RungeKutta",
    "SASolver",
    "Solver",
    "Spectral",
    "Start",
    "UniPC",
]
