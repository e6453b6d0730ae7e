"""A sampler that fits the model: chosen by `auto`, or tuned: levels and coefficients for one budget and guidance."""

from undiffuse.tune.auto import Choice, Trial, auto, reference
from undiffuse.tune.coefficients import Ends, Errors
from undiffuse.tune.ladder import Report, Result, Rung, ladder

__all__ = ["Choice", "Ends", "Errors", "Report", "Result", "Rung", "Trial", "auto", "ladder", "reference"]
