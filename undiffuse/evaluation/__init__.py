"""Evaluation: scores with floors and provenance, their report, and comparisons of what was measured alike."""

from undiffuse.evaluation.compare import Comparison, compare, read
from undiffuse.evaluation.evaluation import Choices, Evaluation, evaluate, evaluate_samples
from undiffuse.evaluation.report import write

__all__ = ["Choices", "Comparison", "Evaluation", "compare", "evaluate", "evaluate_samples", "read", "write"]
