"""A sampler that fits the model: chosen by `auto`, or tuned: levels and coefficients for one budget and guidance."""

from undiffuse.tune.auto import Choice, Trial, auto

__all__ = ["Choice", "Trial", "auto"]
