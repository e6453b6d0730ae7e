"""Data sets: built in by name, or arrays from a file."""

from undiffuse.data.data import BUILT_IN, Data, load_data

__all__ = ["BUILT_IN", "Data", "load_data"]
