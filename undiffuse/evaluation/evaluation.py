"""`evaluate`: all scores of a model, with the floor of each and the provenance that makes it comparable."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from undiffuse.data import Data
from undiffuse.evals import extract, open_features
from undiffuse.evals.features import Pixels, check_features, hash_of
from undiffuse.evals.memory import Suspects, suspects
from undiffuse.evaluation.density import check_density, likelihoods
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
from undiffuse.modal import Modal
from undiffuse.model import Model
from undiffuse.runlog import plain
from undiffuse.tableau import Tableau
from undiffuse.train import Processes
from undiffuse.types import InputError

FORMAT = "undiffuse-evaluation-1"
MOST, FEWEST = 5000, 10  # samples, where no number is asked for, and at all
CURVES = ("frechet-unbiased", "kernel", "precision", "recall")


@dataclass(frozen=True)
class Choices:
    """What to measure: `n` samples (0: as many as there are held-out ones, at most 5,000) on `features`, curves over
    numbers of steps and guidance weights, bits per dimension of `likelihood` held-out samples (0: none).

    None stands for 5, 10, 20, 50 steps, for w = 1, 1.5, 2, 3, 5 and for 64 samples, each where it is possible. `seed`
    is that of metrics and likelihoods; samples have the model's own, sample.seed.
    """

    n: int = 0
    features: str = "auto"
    over_steps: tuple[int, ...] | None = None
    over_w: tuple[float, ...] | None = None
    likelihood: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value in {"n": self.n, "likelihood": self.likelihood or 0, "seed": self.seed}.items():
            if not isinstance(value, int):
                raise InputError(f"{name} must be a whole number, got {value!r}")
        if not isinstance(self.features, str):
            raise InputError(f"features are words such as 'auto' or 'digits,pca=32', got {self.features!r}")
        check_features(self.features)
        if self.n and self.n < FEWEST:
            raise InputError(f"scores need n >= {FEWEST} samples (0: as many as are held out), got {self.n}")
        if self.likelihood is not None and (self.likelihood < 0 or self.likelihood == 1):
            raise InputError(f"likelihood must be >= 2 samples (0: none), got {self.likelihood}")
        if not 0 <= self.seed < 2**63:
            raise InputError(f"seed must be a number from 0 to 2^63 - 1, got {self.seed}")
        steps, ws = (() if v is None else v for v in (self.over_steps, self.over_w))
        if not isinstance(steps, tuple) or not all(isinstance(k, int) and k >= 1 for k in steps):
            raise InputError(f"a curve over steps needs numbers >= 1 such as (5, 10), got {steps!r}")
        if not isinstance(ws, tuple) or not all(isinstance(w, int | float) and -100 <= w <= 100 for w in ws):
            raise InputError(f"a curve over w needs guidance weights such as (1.0, 2.0), got {ws!r}")

    def over(self, sampler: Sampler) -> dict[str, Sequence[float]]:
        """What the curves go over; InputError for what this sampler does not have."""
        fixed = ""
        if sampler.plan is not None:
            fixed = "a plan has its own steps"
        elif getattr(sampler.model.config.build("solver"), "adaptive", False):
            fixed = "an adaptive solver chooses its steps by its tolerance"
        guided = sampler.told is not None and isinstance(sampler.model.config.values["guidance"].get("w"), float)
        if fixed and self.over_steps:
            raise InputError(f"no curve over steps: {fixed}")
        if not guided and self.over_w:
            raise InputError("no curve over w: this model is not guided by one weight, or has no conditions")
        steps = (5, 10, 20, 50) if self.over_steps is None and not fixed else self.over_steps or ()
        ws = (1.0, 1.5, 2.0, 3.0, 5.0) if self.over_w is None and guided else self.over_w or ()
        return {key: values for key, values in {"steps": steps, "w": ws}.items() if values}


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
                "copies": self.copies.rows(), "classes": self.classes, "likelihood": self.likelihood,
                "curves": self.curves,
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
    plan: Tableau | Modal | None = None,
    weights: str = "as given",
    run: str = "",
    processes: Processes | None = None,
    progress: Progress = lambda what, done, n: None,
) -> Evaluation:
    """Score a model on samples of its configuration (or of `plan`) against `held_out`, real data that it has not seen;
    `train` is what it was trained on, or a part. Both as the model reads them (see `Model.scale`).

    Of a conditional model, samples have the conditions of the first n of `train`, as real samples of the floor have:
    both are independent of the held-out ones, which unbiased distances count on. `weights` says which weights these
    are, `run` where they come from. In several processes all call it and get the same. Raises InputError for data that
    do not fit, NonFinite for broken samples.
    """
    choices, processes = choices or Choices(), processes or Processes()
    if model.denoiser.training and model.parameters:
        raise InputError("the model is in training mode, where dropout is on: call model.denoiser.eval() first")
    density, missing = choices.likelihood, list[str]()
    if density != 0:
        try:
            check_density(model, train, held_out)
        except InputError as error:
            if density is not None:
                raise
            density, missing = 0, [f"no likelihood: {error}"]
    if (choices.likelihood or 0) > min(len(held_out), len(train)):
        raise InputError(
            f"the likelihood of {choices.likelihood} samples was asked for: there are {len(held_out)} held-out and "
            f"{len(train)} training samples"
        )
    shape = tuple(model.restore(torch.zeros(1, *model.shape, device=model.device)).shape[1:])
    n = _count(shape, train, held_out, choices)
    for part in (train, held_out):
        if model.classes and model.encoders is None and part.labels is None:
            raise InputError(f"{part.name} has no labels, and this model was trained with {model.classes} classes")
        if part.classes > model.classes > 0:
            raise InputError(f"{part.name} has label {part.classes - 1}; this model knows {model.classes} classes")
    train, held_out = _mixed(train), _mixed(held_out)
    first = train.rows(slice(n))
    told = model.told(first)
    labels = None if told is None else first.labels
    sampler = Sampler(model, told, int(model.config.values["sample"]["seed"]), processes, plan)
    over, view = choices.over(sampler), View.of(train, model)
    scoring = _Scoring(view, view.data(held_out, n), view.data(train, len(train)), choices, processes, progress)
    x = sampler.draw(n, lambda i, k: progress(f"{n} samples", i, k))
    found = scoring.of(x, labels, sampler.about(weights, run), model.names or tuple(map(str, range(model.classes))))
    k = min(64, len(held_out), len(train)) if density is None else density
    likelihood = likelihoods(model, train, held_out, k, choices.seed, processes, progress)
    warnings = (*found.warnings, *missing)
    return replace(found, curves=_curves(sampler, over, scoring, labels), likelihood=likelihood, warnings=warnings)


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
    for part in (samples, train, held_out):
        if not isinstance(part, Data):
            raise InputError(f"samples, train and held_out are undiffuse.data.Data, got a {type(part).__name__}")
    if choices.over_steps or choices.over_w or choices.likelihood:
        raise InputError("curves and likelihoods need a model: these are samples, which are made by now")
    choices = replace(choices, n=choices.n or min(len(samples), len(train), len(held_out), MOST))
    n = _count(tuple(samples.x.shape[1:]), train, held_out, choices)
    if n > len(samples):
        raise InputError(f"-n {n}: there are {len(samples)} samples in {samples.name}")
    known = max(train.classes, held_out.classes)
    if samples.labels is not None and known and samples.classes > known:
        raise InputError(f"{samples.name} has label {samples.classes - 1}; {train.name} knows {known} classes")
    samples, train, held_out = _mixed(samples), _mixed(train), _mixed(held_out)
    view = View.of(train)
    scoring = _Scoring(view, view.data(held_out, n), view.data(train, len(train)), choices, processes, progress)
    labels = None if samples.labels is None else samples.labels[:n]
    about = {"samples": samples.name, "of": len(samples), "sha256": hash_of(samples.x[:n]), "tuned on": []}
    return scoring.of(samples.x[:n], labels, about, ())


def _mixed(data: Data) -> Data:
    """In a fixed random order: the first n of data that are sorted by class would be of one class."""
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))
    return replace(data, x=data.x.detach()).rows(order)


def _count(shape: tuple[int, ...], train: Data, held_out: Data, choices: Choices) -> int:
    """The number of samples; InputError where the data do not allow it."""
    for part in (train, held_out):
        if tuple(part.x.shape[1:]) != shape:
            raise InputError(
                f"{part.name}: samples of shape {tuple(part.x.shape[1:])}, those to be judged have {shape}"
            )
    most = min(len(held_out), len(train))
    if most < FEWEST:
        raise InputError(
            f"scores need >= {FEWEST} samples; there are {len(held_out)} held-out, {len(train)} training ones"
        )
    if hash_of(train.x) == hash_of(held_out.x):
        raise InputError(f"{held_out.name} is the training data itself: hold some out, else every score flatters")
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
        n, self.warnings = len(held), list[str]()
        fitted = known.x[n:]  # components of the very samples that give the floor would flatter it
        if len(fitted) < 40:
            fitted = known.x
            if any(kind in ("auto", "pca") for kind, _ in check_features(choices.features)):
                self.warnings.append("there are too few training samples to fit pca on others than those of the floor")
        self.features = open_features(choices.features, fitted, held.name.split(" (")[0])
        self.reals = [Real(f, held.x, known.x[: len(held)], processes) for f in self.features]
        self.judge = judge_of(self.features, held, known)
        progress("features of real samples", 1, 1)

    def of(self, x: Tensor, labels: Tensor | None, sampler: dict[str, Any], names: Sequence[str]) -> Evaluation:
        """All scores of samples x in the data's range, asked for as `labels`."""
        warnings = [*self.warnings, *self._tuned(sampler), *self._of_data(x)]
        seed, held, known, asked = self.choices.seed, self.held, self.known, dict[str, Score]()
        x = self.view(x)
        classes = max(held.classes, known.classes)
        scores = {}
        for i, real in enumerate(self.reals):
            self.progress("scores", i, len(self.reals) + 1)
            scores[real.features.name] = real.score(x, seed)
        self.progress("scores", len(self.reals), len(self.reals) + 1)
        if labels is not None:
            asked = {"class": adherence(self.judge, x, labels)} if self.judge else {}
            asked |= clip_scores(self.features, x, held.x, labels, names) if names else {}
        found = {} if self.judge is None else histogram(self.judge, x, names or tuple(map(str, range(classes))))
        trained = {"name": known.name, "n": len(known), "sha256": hash_of(known.x)}
        made, seen, unseen = (extract(Pixels(), part) for part in (x, known.x, held.x))
        memory, copies = memorisation(made, seen, unseen, str(trained["sha256"]), seed), suspects(made, seen, 10)
        self.progress("scores", 1, 1)
        sampler = {**sampler, "trained on": trained}
        warnings += [*_of_copies(memory, len(x), len(held)), *self._of_judge()]
        return Evaluation(
            self._measure(), sampler, scores, asked, memory, found, {}, {}, tuple(warnings), x, copies, known.x
        )  # fmt: skip

    def _tuned(self, sampler: dict[str, Any]) -> list[str]:
        return [
            f"the sampler was tuned on the features {f.name}: its scores on them are flattered; judge it by others"
            for f in self.features if f.hash in sampler["tuned on"]
        ]  # fmt: skip

    def _of_data(self, x: Tensor) -> list[str]:
        """What is odd about samples (before they are held within a range) and real data."""
        out, plain = [], View(False, self.view.model)(x)
        seen, held = _rows(self.known.x), _rows(self.held.x)
        if both := len(seen & held):
            out.append(f"{both} of the {len(self.held)} held-out samples are training samples as well")
        made = _rows(self.view(x))
        if len(x) - len(made) > len(self.held) - len(held):
            out.append(f"{len(x) - len(made)} of {len(x)} samples repeat another, bit for bit")
        if same := len(made & held):
            out.append(f"{same} of the samples are held-out samples, bit for bit: distances to these mean nothing")
        real, spread = self.known.x, float(self.known.x.std())
        if spread == 0:
            raise InputError(f"{self.known.name}: all values are the same; there is nothing to compare with")
        if not 0.55 < float(plain.std()) / spread < 1.8 or abs(float(plain.mean() - real.mean())) > spread:
            ends = (f"[{float(part.min()):.4g}, {float(part.max()):.4g}]" for part in (plain, real))
            out.append("the samples' values lie in {}, those of the real data in {}: have they one unit?".format(*ends))
        return out

    def _of_judge(self) -> list[str]:
        if self.judge is None or self.judge.known.value >= 0.9:
            return []
        return [
            f"{self.judge.name} reads only {100 * self.judge.known.value:.0f} % of real samples right: what it reads "
            "of generated ones says little"
        ]

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
    """How samples are looked at: in the data's own range; pictures in [-1, 1], where `clamp` holds them."""

    clamp: bool
    model: Model | None = None

    @staticmethod
    def of(train: Data, model: Model | None = None) -> View:
        """Samples are held within [-1, 1] where the data are pictures that lie there."""
        shown = View(False, model).data(train, len(train)).x
        return View(shown.ndim == 4 and float(shown.abs().max()) <= 1 + 1e-4, model)

    def __call__(self, x: Tensor) -> Tensor:
        """Samples in the data's range (n, *data)."""
        x = x.float() if self.model is None or x.ndim != 4 else self.model.shown(x.float())
        return x.clamp(-1, 1) if self.clamp else x

    def data(self, data: Data, n: int) -> Data:
        """The first n samples of data as the model reads them."""
        part, as_read = data.rows(slice(n)), self.model is not None and self.model.decode is None
        return replace(part, x=self(self.model.restore(part.x) if as_read else part.x))  # type: ignore[union-attr]


def _curves(
    sampler: Sampler, over: dict[str, Sequence[float]], scoring: _Scoring, labels: Tensor | None
) -> dict[str, list[dict[str, Any]]]:
    """The curves' metrics over numbers of steps and over w; a point repeats the seed of the scores."""
    choices, n, judge = scoring.choices, len(scoring.held), scoring.judge
    todo = [(key, value) for key, values in over.items() for value in values]
    curves: dict[str, list[dict[str, Any]]] = {key: [] for key in over}
    for i, (key, value) in enumerate(todo):
        scoring.progress(f"curves of {n} samples", i, len(todo))
        at = sampler.at(steps=int(value)) if key == "steps" else sampler.at(w=value)
        x = scoring.view(at.draw(n))
        found = scoring.reals[0].score(x, choices.seed, CURVES)
        if judge is not None and labels is not None:
            found["adherence"] = adherence(judge, x, labels)
        row = {name: {**s.found._asdict(), "floor": s.floor._asdict()} for name, s in found.items()}
        curves[key].append({key: value, **row})
    if todo:
        scoring.progress(f"curves of {n} samples", len(todo), len(todo))
    return curves


def _rows(x: Tensor) -> set[bytes]:
    """Each sample's bytes."""
    return {row.contiguous().numpy().tobytes() for row in x}


def _of_copies(memory: dict[str, Score], n: int, held: int) -> list[str]:
    """Whether the tests for copies find any: more near copies than held-out data have by more than chance (Fisher's
    exact test at 1 %), or C_T far below 0."""
    from scipy.stats import fisher_exact

    out, near, test = [], memory["near-copies"], memory["ct"]
    some, real = (0 if math.isnan(part.value) else part.value for part in (near.found, near.floor))
    k, others = round(some * n), round(real * held)
    if k and fisher_exact([[k, n - k], [others, held - others]], alternative="greater").pvalue < 0.01:
        out.append(
            f"{k} of {n} samples lie {near.settings['times']:g} times nearer to a training sample than that one to its "
            f"neighbours (of held-out ones {others} of {held}): they are copies"
        )
    if test.found.high < -3:
        out.append(f"samples lie nearer to training samples than held-out data do: C_T = {test.found.value:.1f}")
    return out
