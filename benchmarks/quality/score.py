"""How good samples of Fashion-MNIST are, by the project's own classifier: used for every library alike."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from undiffuse.data import materialise, open_source
from undiffuse.evals.classifier import Classifier, load_classifier
from undiffuse.evals.metrics import METRICS

NAME, CLASSES = "fashion-mnist", 10
ROOT = Path(__file__).parents[2] / "runs" / "quality"


@cache
def _judge() -> Classifier:
    return load_classifier(NAME)


def features(x: Tensor) -> Tensor:
    """Features (n, 64) of samples (n, 1, 28, 28), clipped to [-1, 1]."""
    with torch.no_grad():
        return torch.cat([_judge().features(part) for part in x.clamp(-1, 1).split(500)])


@cache
def real() -> Tensor:
    """Features of the 10,000 test pictures in a fixed random order; kept in a file, since every score needs them."""
    file = ROOT / "real.pt"
    if not file.is_file():
        test = open_source(NAME).test
        assert test is not None
        x = materialise(test).x
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(features(x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))]), file)
    found: Tensor = torch.load(file)
    return found


def accuracy(fake: Tensor, labels: Tensor) -> float:
    """The share of samples with these features that the classifier reads as the class that was asked for."""
    return float((_judge().head(fake).argmax(1) == labels).float().mean())


def scores(x: Tensor, labels: Tensor) -> dict[str, float]:
    """Frechet distance to the whole test set, 1000 x kernel distance (KID), precision and recall against as many test
    pictures as samples, and accuracy."""
    fake = features(x)
    found = {name: METRICS[name].measure(real(), fake, 0).value for name in ("frechet", "kernel")}
    found["kernel"] *= 1000
    found |= {name: METRICS[name].measure(real()[: len(fake)], fake, 0).value for name in ("precision", "recall")}
    return found | {"accuracy": accuracy(fake, labels)}


def labels(n: int) -> Tensor:
    """Every class in turn."""
    return torch.arange(n) % CLASSES
