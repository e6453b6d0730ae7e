"""Conditions by mechanism: a vector, tokens, or a spatial map; and the encoders that make them."""

from undiffuse.cond.cond import Cond
from undiffuse.cond.label import Label

__all__ = ["Cond", "Label"]
