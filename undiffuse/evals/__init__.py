"""Scores: distances between sets of features, and a reader for the digits."""

from undiffuse.evals.digits import Reader
from undiffuse.evals.distances import Distances, distances, frechet, kernel
from undiffuse.evals.memory import copy_ratio

__all__ = ["Distances", "Reader", "copy_ratio", "distances", "frechet", "kernel"]
