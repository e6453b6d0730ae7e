"""Scores of a set of samples, each with its interval and its floor: what real samples in their place would score."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from undiffuse.data import Data
from undiffuse.evals import Estimate, Features, Pretrained, Reader, Reading, extract
from undiffuse.evals.estimate import mean, share
from undiffuse.evals.features import hash_of
from undiffuse.evals.metrics import MEMORY, METRICS
from undiffuse.evals.support import classes
from undiffuse.train import Processes
from undiffuse.types import InputError


@dataclass(frozen=True)
class Score:
    """An estimate, its `floor` (nan where there is none), which way is better, and why it could not be had."""

    found: Estimate
    floor: Estimate
    better: str
    title: str
    settings: Mapping[str, Any]
    why: str = ""

    def json(self) -> dict[str, Any]:
        """As plain data."""
        return {
            **self.found._asdict(), "floor": self.floor._asdict(), "better": self.better,
            "settings": dict(self.settings), **({"why": self.why} if self.why else {}),
        }  # fmt: skip


NOTHING = Estimate(float("nan"), float("nan"), float("nan"))


class Real:
    """Real samples as `features` see them: `held_out` (n, width), against which samples are scored, and as many of
    `train`, which give the floor."""

    def __init__(self, features: Features, held_out: Tensor, train: Tensor, processes: Processes) -> None:
        self.features, self.processes = features, processes
        self.held_out, self.train = self.of(held_out), self.of(train)
        self.floors: dict[str, Estimate] = {}

    def of(self, x: Tensor) -> Tensor:
        """Features of samples, each process extracting its part."""
        device = self.processes.device
        return self.processes.divide(len(x), lambda k: extract(self.features, x[k.start : k.stop], device=device))

    def score(self, x: Tensor, seed: int, names: Sequence[str] = tuple(METRICS)) -> dict[str, Score]:
        """The named metrics of samples x (n, *data)."""
        fake, out = self.of(x), {}
        for name in names:
            metric = METRICS[name]
            found, why = measured(metric.measure, self.held_out, fake, seed)
            if name not in self.floors:
                self.floors[name] = measured(metric.measure, self.held_out, self.train, seed)[0]
            out[name] = Score(found, self.floors[name], metric.better, metric.title, metric.settings, why)
        return out


def measured(measure: Callable[..., Estimate], *given: Any) -> tuple[Estimate, str]:
    """What it gives, or why there is nothing."""
    try:
        found = measure(*given)
    except InputError as error:
        return NOTHING, str(error)
    if not math.isfinite(found.value):
        return NOTHING, "it has no finite value: samples coincide with real ones"
    return found, "" if math.isfinite(found.low) else "too few samples for an interval"


def memorisation(x: Tensor, train: Tensor, held_out: Tensor, known: str, seed: int) -> dict[str, Score]:
    """The metrics of copying between features, of training samples of the hash `known`; the floor is one half of the
    held-out samples, judged by the other, or all where only training samples judge."""
    half, out = len(held_out) // 2, {}
    for name, metric in MEMORY.items():
        found, why = measured(metric.measure, x, train, held_out, seed)
        real = (held_out, held_out) if metric.alone else (held_out[:half], held_out[half:])
        floor, _ = measured(metric.measure, real[0], train, real[1], seed)
        out[name] = Score(
            found, floor, metric.better, metric.title, {**metric.settings, "training samples": known}, why
        )
    return out


class Judge(Protocol):
    """Reads the class of a sample; `known` is the share of the real samples `unseen`, on which it was not fitted, that
    it reads right."""

    name: str
    hash: str
    known: Estimate
    unseen: Tensor

    def read(self, x: Tensor, /) -> Tensor: ...


class ClassifierJudge:
    """A built-in classifier."""

    def __init__(self, reading: Reading, held_out: Tensor, labels: Tensor) -> None:
        self.reading, self.name, self.hash = reading, f"the classifier {reading.name}", reading.hash
        self.unseen = held_out
        self.known = share(self.read(held_out) == labels)

    def read(self, x: Tensor) -> Tensor:
        return self.reading.read(x).argmax(1)


class SupportVectors:
    """A support vector machine on the pixels of the held-out samples, which the denoiser has never seen."""

    def __init__(self, held_out: Data, train: Data) -> None:
        self.reader = Reader(held_out)
        self.name, self.hash = "a support vector machine fitted on the held-out samples", hash_of(held_out.x)
        assert train.labels is not None
        self.unseen = train.x[: len(held_out)]
        self.known = share(self.read(train.x) == train.labels)

    def read(self, x: Tensor) -> Tensor:
        return torch.from_numpy(np.asarray(self.reader.read(x))).long()


def judge_of(features: Sequence[Features], held_out: Data, train: Data) -> Judge | None:
    """What reads the classes of this data: its classifier among the features, else one fitted on held-out samples."""
    if held_out.labels is None or train.labels is None or int(held_out.labels.min()) == int(held_out.labels.max()):
        return None
    classes = max(held_out.classes, train.classes)
    for reading in features:
        if isinstance(reading, Reading) and len(reading.names) == classes:
            judge = ClassifierJudge(reading, held_out.x, held_out.labels)
            if judge.known.value > 0.5:  # else it reads other classes than these
                return judge
    return SupportVectors(held_out, train)


def adherence(judge: Judge, x: Tensor, labels: Tensor) -> Score:
    """The share of samples that the judge reads as the class they were asked for."""
    right = judge.read(x) == labels
    return Score(share(right), judge.known, "higher", "read as the class asked for", {"judge": judge.hash})


def clip_scores(
    features: Sequence[Features], x: Tensor, real: Tensor, labels: Tensor, names: Sequence[str]
) -> dict[str, Score]:
    """The CLIP score of every text-reading network among the features, for the class names as captions."""
    texts = [f"a photo of a {names[k]}" for k in labels.tolist()]
    return {
        f"clip score ({f.name})": Score(
            mean(f.score(x, texts)), mean(f.score(real, texts)), "higher", "CLIP score of the class's name",
            {"network": f.hash, "caption": "a photo of a NAME"},
        )
        for f in features if isinstance(f, Pretrained) and f.reads_text
    }  # fmt: skip


def histogram(judge: Judge, x: Tensor, names: Sequence[str]) -> dict[str, Any]:
    """How often each class is read among samples and among real ones, and how likely such a difference is by chance."""
    found = [judge.read(part) for part in (judge.unseen, x)]
    told = classes(*found)
    counts = [torch.bincount(read, minlength=len(names)).tolist() for read in found]
    return {
        "names": list(names), "real": counts[0], "samples": counts[1], "variation": told.distance, "p": told.p_value
    }  # fmt: skip
