"""undiffuse: the reverse process of diffusion models, exact and readable."""

from undiffuse.classify import Classifier
from undiffuse.cond import Cond, Conditioned, Encoders, Given, Label, prompt
from undiffuse.denoise import AnalyticStart, Counter, Dataset, Denoiser, FixedRows, Gaussian, Mixture
from undiffuse.grid import (
    AYS,
    GRIDS,
    Beta,
    Explicit,
    Exponential,
    Indexed,
    Karras,
    Polynomial,
    Quadratic,
    Restart,
    UniformLam,
    UniformT,
)
from undiffuse.guide import (
    APG,
    CFG,
    GUIDES,
    Autoguidance,
    CFGpp,
    CFGZero,
    ClassifierGuidance,
    Composed,
    PerLevel,
    Rescale,
    Thresholded,
    effective_scale,
)
from undiffuse.level import Level, from_x0, reverse_transition, to_x0, transition
from undiffuse.modal import Modal, SpectralGrid, read_plan, spectral
from undiffuse.precond import HEADS, X0, EDMPrecond, Eps, FlowVelocity, Index, LogNSR, Score, V
from undiffuse.sample import Noise, State, sample, trajectory
from undiffuse.schedule import (
    EDM,
    SCHEDULES,
    VE,
    VP,
    Cosine,
    Discrete,
    Flow,
    ScaledLinear,
    Sigmoid,
    zero_terminal_snr,
)
from undiffuse.solvers import (
    DDIM,
    DDPM,
    DEIS,
    IPNDM,
    LMS,
    PNDM,
    SOLVERS,
    Adams,
    Adaptive,
    Ancestral,
    Butcher,
    Consistency,
    DPM2Ancestral,
    DPMpp2M,
    DPMpp2S,
    DPMpp2SAncestral,
    DPMpp3M,
    DPMSolver,
    Euler,
    EulerAncestral,
    Eval,
    Heun,
    PredictorCorrector,
    RungeKutta,
    SASolver,
    Spectral,
    Start,
    UniPC,
)
from undiffuse.spectrum import Spectrum
from undiffuse.tableau import Tableau, trace
from undiffuse.tune import auto
from undiffuse.types import Denoise, InputError
from undiffuse.version import __version__ as __version__


def __getattr__(name: str) -> object:
    """`load`, `Model`, `ClassifierModel` and `fit` come with the configuration's libraries: brought in when first asked
    for."""
    if name in ("Model", "load"):
        from undiffuse.model import Model

        return Model if name == "Model" else Model.load
    if name == "ClassifierModel":
        from undiffuse.classifier_model import ClassifierModel

        return ClassifierModel
    if name == "fit":
        from undiffuse.fit import fit

        return fit
    raise AttributeError(f"module 'undiffuse' has no attribute {name!r}")
