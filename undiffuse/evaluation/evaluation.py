"""`evaluate`: all scores of a model, with the floor of each and the provenance that makes it comparable."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from undiffuse.data import Data
from undiffuse.evals import Features, extract, open_features
from undiffuse.evals.features import Pixels, hash_of
from undiffuse.evals.memory import Suspects, suspects
from undiffuse.evaluation.density import likelihoods, needs_data
from undiffuse.evaluation.drawn import Progress, Sampler
from undiffuse.evaluation.scores import (
    Real,
    Score,
    adherence,
    clip_scores,
    histogram,
    judge_of,
    memorisation,
)
from undiffuse.model import Model
from undiffuse.runlog import plain
from undiffuse.tableau import Tableau
from undiffuse.train import Processes
from undiffuse.types import InputError

FORMAT = "undiffuse-evaluation-1"
MOST = 5000  # samples, where no number is asked for
CURVES = ("frechet-unbiased", "kernel", "precision", "recall")


@dataclass(frozen=True)
class Choices:
    """What to measure: `n` samples (0: as many as there are held-out ones, at most 5,000) on `features`, curves over
    numbers of steps and guidance weights, bits per dimension of `likelihood` held-out samples (0: none)."""

    n: int = 0
    features: str = "auto"
    over_steps: tuple[int, ...] = (5, 10, 20, 50)
    over_w: tuple[float, ...] = (1.0, 1.5, 2.0, 3.0, 5.0)
    likelihood: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        if self.n < 0 or self.n == 1 or self.likelihood < 0 or self.likelihood == 1:
            raise InputError(f"numbers of samples must be >= 2 (0: as they come), got {self.n} and {self.likelihood}")
        if any(steps < 1 for steps in self.over_steps):
            raise InputError(f"a curve over steps needs numbers >= 1, got {list(self.over_steps)}")
        if any(not -100 <= w <= 100 for w in self.over_w):
            raise InputError(f"a curve over w needs guidance weights such as 1,2,3, got {list(self.over_w)}")


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Scores by features and metric; what they were `measure`d by and what the `sampler` was; and what the report
    shows: samples, their likeliest copies with the nearest training samples, curves."""

    measure: dict[str, Any]
    sampler: dict[str, Any]
    scores: dict[str, dict[str, Score]]
    adherence: dict[str, Score]
    memory: dict[str, Score]
    classes: dict[str, Any]
    likelihood: dict[str, Any]
    curves: dict[str, list[dict[str, Any]]]
    warnings: tuple[str, ...]
    x: Tensor = field(repr=False)
    copies: Suspects = field(repr=False)
    train: Tensor = field(repr=False)

    def json(self) -> dict[str, Any]:
        """As plain data, with None for what could not be had."""
        groups = {**self.scores, "adherence": self.adherence, "memory": self.memory}
        scores = {group: {name: s.json() for name, s in found.items()} for group, found in groups.items()}
        out: dict[str, Any] = plain(
            {
                "format": FORMAT, "measure": self.measure, "sampler": self.sampler, "scores": scores,
                "classes": self.classes, "likelihood": self.likelihood, "curves": self.curves,
                "warnings": list(self.warnings),
            }
        )  # fmt: skip
        return out


def evaluate(
    model: Model,
    train: Data,
    held_out: Data,
    choices: Choices | None = None,
    *,
    plan: Tableau | None = None,
    weights: str = "as given",
    processes: Processes | None = None,
    progress: Progress = lambda what, done, n: None,
) -> Evaluation:
    """Score a model on samples of its configuration (or of `plan`) against `held_out`, real data that it has not seen;
    `train` is what it was trained on, or a part. Both as the model reads them (see `Model.scale`).

    Of a model with classes, samples have the labels of the first n of `train`, as the real samples of the floor have:
    both are independent of the held-out ones, which unbiased distances count on. `weights` says which weights these
    are. In several processes all call it and get the same. Raises InputError for data that do not fit, NonFinite for
    broken samples.
    """
    choices, processes = choices or Choices(), processes or Processes()
    if model.denoiser.training and model.parameters:
        raise InputError("the model is in training mode, where dropout is on: call model.denoiser.eval() first")
    if choices.likelihood:
        needs_data(model)
    shape = tuple(model.restore(torch.zeros(1, *model.shape, device=model.device)).shape[1:])
    n = _count(shape, train, held_out, choices)
    for part in (train, held_out):
        if model.classes and part.labels is None:
            raise InputError(f"{part.name} has no labels, and this model was trained with {model.classes} classes")
        if part.classes > model.classes > 0:
            raise InputError(f"{part.name} has label {part.classes - 1}; this model knows {model.classes} classes")
    view = View.of(train, model)
    scoring = _Scoring(view, view.data(held_out, n), view.data(train, len(train)), choices, processes, progress)
    labels = train.labels[:n] if model.classes and train.labels is not None else None
    sampler = Sampler(model, labels, choices.seed, processes, plan)
    x = view(sampler.draw(n, lambda i, k: progress(f"{n} samples", i, k)))
    about = sampler.about(weights)
    found = scoring.of(x, sampler.labels, about, model.names or tuple(map(str, range(model.classes))))
    curves = _curves(sampler, scoring)
    likelihood = likelihoods(model, train, held_out, choices.likelihood, choices.seed, processes, progress)
    return replace(found, curves=curves, likelihood=likelihood)


def evaluate_samples(
    samples: Data,
    train: Data,
    held_out: Data,
    choices: Choices | None = None,
    *,
    processes: Processes | None = None,
    progress: Progress = lambda what, done, n: None,
) -> Evaluation:
    """Score samples of any origin like those of a model: no curves and no likelihood. Labels, if they have any, are the
    classes that were asked for. Raises InputError for data that do not fit."""
    choices, processes = choices or Choices(), processes or Processes()
    choices = replace(choices, n=choices.n or min(len(samples), len(train), len(held_out), MOST))
    n = _count(tuple(samples.x.shape[1:]), train, held_out, choices)
    if n > len(samples):
        raise InputError(f"-n {n}: there are {len(samples)} samples in {samples.name}")
    view = View.of(train)
    scoring = _Scoring(view, view.data(held_out, n), view.data(train, len(train)), choices, processes, progress)
    found = view.data(samples, n)
    about = {"samples": samples.name, "of": len(samples), "sha256": hash_of(found.x), "tuned on": []}
    return scoring.of(found.x, found.labels, about, ())


def _count(shape: tuple[int, ...], train: Data, held_out: Data, choices: Choices) -> int:
    """The number of samples; InputError where the data do not allow it."""
    for part in (train, held_out):
        if tuple(part.x.shape[1:]) != shape:
            raise InputError(
                f"{part.name}: samples of shape {tuple(part.x.shape[1:])}, those to be judged have {shape}"
            )
    most = min(len(held_out), len(train))
    if choices.n > most:
        raise InputError(
            f"{choices.n} samples were asked for, but there are {len(held_out)} held-out and {len(train)} training "
            f"samples to compare them with: ask for at most {most}"
        )
    return choices.n or min(most, MOST)


class _Scoring:
    """Real data as all scores see it: `held` (n samples) and `known`, those of training."""

    def __init__(
        self, view: View, held: Data, known: Data, choices: Choices, processes: Processes, progress: Progress
    ) -> None:
        progress("features of real samples", 0, 1)
        self.view, self.held, self.known, self.choices, self.progress = view, held, known, choices, progress
        self.features = open_features(choices.features, known.x, held.name.split(" (")[0])
        self.reals = [Real(f, held.x, known.x[: len(held)], processes) for f in self.features]
        self.judge = judge_of(self.features, held, known)
        progress("features of real samples", 1, 1)

    def of(self, x: Tensor, labels: Tensor | None, sampler: dict[str, Any], names: Sequence[str]) -> Evaluation:
        """All scores of samples x, asked for as `labels`."""
        seed, held, known, asked = self.choices.seed, self.held, self.known, dict[str, Score]()
        classes = max(held.classes, known.classes)
        scores = {}
        for i, real in enumerate(self.reals):
            self.progress("scores", i, len(self.reals) + 1)
            scores[real.features.name] = real.score(x, seed)
        self.progress("scores", len(self.reals), len(self.reals) + 1)
        if labels is not None:
            asked = {"class": adherence(self.judge, x, labels)} if self.judge else {}
            asked |= clip_scores(self.features, x, held.x, labels, names) if names else {}
        found = {} if self.judge is None else histogram(self.judge, x, held.x, names or tuple(map(str, range(classes))))
        memory = memorisation(x, known.x, held.x, seed)
        pixels = [extract(Pixels(), part) for part in (x, known.x, held.x)]
        copies = suspects(pixels[0], pixels[1], pixels[2], 10)
        self.progress("scores", 1, 1)
        sampler = {**sampler, "trained on": {"name": known.name, "n": len(known), "sha256": hash_of(known.x)}}
        return Evaluation(
            self._measure(), sampler, scores, asked, memory, found, {}, {}, tuple(_warnings(self.features, sampler)),
            x, copies, known.x,
        )  # fmt: skip

    def _measure(self) -> dict[str, Any]:
        """What must agree for two scores to be compared."""
        return {
            "samples": len(self.held),
            "held out": {"name": self.held.name, "n": len(self.held), "sha256": hash_of(self.held.x)},
            "features": {f.name: {"sha256": f.hash, "resize": f.resize} for f in self.features},
            "range": "held within [-1, 1]" if self.view.clamp else "as it is",
            "metrics seed": self.choices.seed,
        }


@dataclass(frozen=True)
class View:
    """How samples are looked at: in the data's own range, of pictures with values within [-1, 1] (which `clamp`s)."""

    clamp: bool
    model: Model | None = None

    @staticmethod
    def of(train: Data, model: Model | None = None) -> View:
        """Samples are held within [-1, 1] where the data are pictures that lie there."""
        shown = View(False, model).data(train, len(train)).x
        return View(shown.ndim == 4 and float(shown.abs().max()) <= 1 + 1e-4, model)

    def __call__(self, x: Tensor) -> Tensor:
        """Samples in the data's range (n, *data)."""
        x = x.float() if self.model is None else self.model.shown(x.float())
        return x.clamp(-1, 1) if self.clamp else x

    def data(self, data: Data, n: int) -> Data:
        """The first n samples of data as the model reads them."""
        x, labels = data.x[:n], None if data.labels is None else data.labels[:n]
        as_read = self.model is not None and self.model.decode is None
        return Data(self(self.model.restore(x) if as_read else x), labels, data.name)  # type: ignore[union-attr]


def _curves(sampler: Sampler, scoring: _Scoring) -> dict[str, list[dict[str, Any]]]:
    """The curves' metrics over numbers of steps and, with labels, over w; a point repeats the seed of the scores."""
    choices, n, judge = scoring.choices, len(scoring.held), scoring.judge
    guided = sampler.labels is not None and "w" in sampler.model.config.values["guidance"]
    over: dict[str, Sequence[float]] = {"steps": choices.over_steps, "w": choices.over_w if guided else ()}
    todo = [(key, value) for key, values in over.items() for value in values if sampler.plan is None]
    curves: dict[str, list[dict[str, Any]]] = {key: [] for key, _ in todo}
    for i, (key, value) in enumerate(todo):
        scoring.progress(f"{n} samples at {len(todo)} settings", i, len(todo))
        at = sampler.at(steps=int(value)) if key == "steps" else sampler.at(w=value)
        x = scoring.view(at.draw(n))
        found = scoring.reals[0].score(x, choices.seed, CURVES)
        if judge is not None and at.labels is not None:
            found["adherence"] = adherence(judge, x, at.labels)
        row = {name: {**s.found._asdict(), "floor": s.floor.value} for name, s in found.items()}
        curves[key].append({key: value, **row})
    scoring.progress(f"{n} samples at {len(todo)} settings", len(todo), max(1, len(todo)))
    return curves


def _warnings(features: Sequence[Features], sampler: dict[str, Any]) -> list[str]:
    """What makes a score say less than it seems to."""
    return [
        f"the sampler was tuned on the features {f.name}: its scores on them are flattered; judge it by others"
        for f in features if f.hash in sampler["tuned on"]
    ]  # fmt: skip
