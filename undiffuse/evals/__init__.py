"""Scores: distances between sets of features, and a reader for the digits."""

from undiffuse.evals.digits import Reader
from undiffuse.evals.distances import Distances, distances, frechet, kernel

__all__ = ["Distances", "Reader", "distances", "frechet", "kernel"]
