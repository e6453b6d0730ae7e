"""Scores: features, distances between sets of them, what is copied, and likelihoods."""

from undiffuse.evals.calibration import Calibration, calibration
from undiffuse.evals.digits import Reader
from undiffuse.evals.distances import (
    Distances,
    distances,
    frechet,
    frechet_estimate,
    frechet_unbiased,
    kernel,
    kernel_estimate,
    sliced,
    sliced_estimate,
    sliced_unbiased,
)
from undiffuse.evals.estimate import Estimate
from undiffuse.evals.features import FEATURES, Features, Pretrained, Reading, extract, open_features
from undiffuse.evals.memory import (
    Suspects,
    authentic,
    copy_ratio,
    copy_ratio_estimate,
    ct,
    near_copies,
    suspects,
)
from undiffuse.evals.metrics import MEMORY, METRICS, Metric
from undiffuse.evals.retrieval import retrieval
from undiffuse.evals.support import Classes, classes, coverage, density, precision, recall, vendi, vendi_ratio

__all__ = [
    "FEATURES",
    "MEMORY",
    "METRICS",
    "Calibration",
    "Classes",
    "Distances",
    "Estimate",
    "Features",
    "Metric",
    "Pretrained",
    "Reader",
    "Reading",
    "Suspects",
    "authentic",
    "calibration",
    "classes",
    "copy_ratio",
    "copy_ratio_estimate",
    "coverage",
    "ct",
    "density",
    "distances",
    "extract",
    "frechet",
    "frechet_estimate",
    "frechet_unbiased",
    "kernel",
    "kernel_estimate",
    "near_copies",
    "open_features",
    "precision",
    "recall",
    "retrieval",
    "sliced",
    "sliced_estimate",
    "sliced_unbiased",
    "suspects",
    "vendi",
    "vendi_ratio",
]
