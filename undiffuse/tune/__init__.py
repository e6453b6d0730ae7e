"""Samplers chosen for one model: `auto`."""

from undiffuse.tune.auto import Choice, Trial, auto

__all__ = ["Choice", "Trial", "auto"]
