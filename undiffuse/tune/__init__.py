"""A sampler that fits the model: chosen by `auto`, or tuned: levels and coefficients for one budget and guidance."""

from undiffuse.tune.auto import Choice, Trial, auto, reference
from undiffuse.tune.coefficients import Ends, Errors
from undiffuse.tune.family import Family, between
from undiffuse.tune.gaussian import tune_gaussian, tune_kept
from undiffuse.tune.ladder import STEPS, Report, Result, Rung, ladder
from undiffuse.tune.score import Candidate, Scored, by_score, drawing, intervals, noisy, ways

__all__ = [
    "STEPS",
    "Candidate",
    "Choice",
    "Ends",
    "Errors",
    "Family",
    "Report",
    "Result",
    "Rung",
    "Scored",
    "Trial",
    "auto",
    "between",
    "by_score",
    "drawing",
    "intervals",
    "ladder",
    "noisy",
    "reference",
    "tune_gaussian",
    "tune_kept",
    "ways",
]
