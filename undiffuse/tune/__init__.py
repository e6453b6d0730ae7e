"""A sampler that fits the model: chosen by `auto`, or tuned: levels and coefficients for one budget and guidance."""

from undiffuse.tune.auto import Choice, Trial, auto, reference
from undiffuse.tune.coefficients import Ends, Errors
from undiffuse.tune.ladder import Report, Result, Rung, ladder
from undiffuse.tune.score import Candidate, Scored, by_score, drawing, intervals, noisy, ways

__all__ = [
    "Candidate",
    "Choice",
    "Ends",
    "Errors",
    "Report",
    "Result",
    "Rung",
    "Scored",
    "Trial",
    "auto",
    "by_score",
    "drawing",
    "intervals",
    "ladder",
    "noisy",
    "reference",
    "ways",
]
