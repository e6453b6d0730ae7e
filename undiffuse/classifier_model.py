"""`ClassifierModel`: a trained classifier of noisy data with all that guidance needs, and its folder in a run."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from undiffuse.classify import Classifier, Held
from undiffuse.config import Config
from undiffuse.data import Data, Statistics
from undiffuse.evals import calibration
from undiffuse.level import Level
from undiffuse.precond import EDMPrecond
from undiffuse.runfolder import average_file, finished, take_average
from undiffuse.sample import Noise
from undiffuse.schedule import Schedule
from undiffuse.spectrum import Spectrum
from undiffuse.train import commit, load_weights, weights
from undiffuse.types import InputError

LAMS = (-4.0, -3.0, -2.0, -1.0, 0.0, 1.5, 3.0)  # where it is judged
JUDGED = 2048  # held-out samples by which it is, at most


@dataclass(frozen=True, eq=False)
class ClassifierModel:
    """A classifier (averaged weights, eval mode) of data with this spectrum, the schedule it was trained on, its
    configuration, the classes' `names`, the channels' `scale` where data were normalised, and `scores`, what it made of
    held-out data when its training was done (see `judged`)."""

    classifier: Classifier
    schedule: Schedule
    spectrum: Spectrum
    config: Config
    names: tuple[str, ...] = ()
    scale: Statistics | None = None
    scores: tuple[dict[str, float], ...] = ()

    def __repr__(self) -> str:
        return f"ClassifierModel({self.parameters:,} parameters, shape {self.shape}, {self.classes} classes)"

    @property
    def module(self) -> Classifier:
        """What is trained."""
        return self.classifier

    def having(self, module: Any) -> ClassifierModel:
        """The same with another module."""
        return replace(self, classifier=module)

    @property
    def classes(self) -> int:
        """The number of classes."""
        return self.classifier.classes

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one sample."""
        return self.spectrum.shape

    @property
    def parameters(self) -> int:
        """The number of the network's parameters."""
        return sum(p.numel() for p in self.classifier.parameters())

    @torch.no_grad()
    def judged(self, held_out: Data, before: Callable[[], None] = lambda: None, batch: int = 256) -> ClassifierModel:
        """The same with its `scores` on at most 2,048 labelled samples with fixed noise, a row a level: `lam`,
        `accuracy`, `loss` in nats beside `prior`, that of the training data's shares of classes, and `ece` (see
        `calibration`). `before()` is called before each level. InputError without labels."""
        if held_out.labels is None:
            raise InputError(f"{held_out.name} has no labels to judge a classifier by")
        data, rows = held_out.rows(slice(JUDGED)), []
        labels: Any = data.labels
        eps, shares = Noise(data.x.shape, 0)(), self.classifier.prior
        prior = float(-shares.cpu().double()[labels].mean())
        for lam in LAMS:
            before()
            level, parts = Level.at(lam, self.schedule.space), []
            for x0, noise in zip(torch.split(data.x, batch), torch.split(eps, batch), strict=True):
                x = level.diffuse(x0, noise).to(shares.device)
                parts.append(self.classifier(x, level).log_softmax(1).cpu())
            rows.append({"lam": lam, **calibration(torch.cat(parts), labels)._asdict(), "prior": prior})
        return replace(self, scores=tuple(rows))

    def save(self, folder: Path) -> None:
        """Write a model folder: complete, with hashes, or not at all."""

        def write(aside: Path) -> None:
            (aside / "config.toml").write_text(self.config.toml())
            about: dict[str, Any] = {"names": self.names, "scores": self.scores}
            scale = {} if self.scale is None else {"scale": json.loads(self.scale.to_json())}
            (aside / "model.json").write_text(json.dumps({**about, **scale, "classes": self.classes}))
            save_file(weights(self.classifier), aside / average_file(self.config))
            self.spectrum.save(aside / "spectrum.safetensors")

        commit(folder, write)

    @staticmethod
    def load(run: str | Path, ema: float | None = None) -> ClassifierModel:
        """The finished classifier of a run folder, or of a run's name in runs/, verified against its hashes; `ema` is
        as in `Model.load`, and has no scores. InputError says what is wrong with the folder, or that it holds a
        denoiser."""
        found, folder = finished(run)
        try:
            config = Config.resolve(Config.read(folder / "config.toml"))
            if not config.classifies:
                raise InputError(
                    f"{run} holds a denoiser; a classifier is trained by `undiffuse train kind=classifier`"
                )
            about = json.loads((folder / "model.json").read_text())
            scale = Statistics.from_json(json.dumps(about["scale"])) if "scale" in about else None
            model = assemble_classifier(
                config, Spectrum.load(folder / "spectrum.safetensors"), [1.0] * about["classes"]
            )
            names, scores = tuple(str(name) for name in about["names"]), tuple(about["scores"])
            model = replace(model, names=names, scores=scores, scale=scale)
            (average,) = folder.glob("ema-*.safetensors")
            load_weights(model.classifier, average)
        except InputError:
            raise
        except Exception as error:
            raise InputError(f"{folder} holds a model that does not fit its configuration: {error}") from error
        if ema is not None:
            take_average(model.classifier, found, config, ema)
            model = replace(model, scores=())
        model.classifier.eval().requires_grad_(False)
        return model


def holds_classifier(run: str | Path) -> bool:
    """Whether a finished run is one of kind=classifier; InputError where there is none."""
    return Config.read(finished(run)[1] / "config.toml").get("kind") == "classifier"


def assemble_classifier(config: Config, spectrum: Spectrum, prior: Tensor | Sequence[float]) -> ClassifierModel:
    """An untrained classifier of data of this spectrum (its shape and sigma_data) with these shares of classes."""
    channels, *size = spectrum.shape
    augment, schedule = config.build("augment").dim, config.build("schedule")
    net = config.build("net", channels=channels, dims=len(size), classes=len(prior), augment=augment)
    # but for a thousandth of the levels at either end, those that are trained
    low, high = config.build("levels")(torch.tensor([0.999, 0.001], dtype=torch.float64), schedule).lam.tolist()
    head = EDMPrecond(float(f"{spectrum.std:.4g}"), Held(low, high))
    return ClassifierModel(Classifier(net, head, prior), schedule, spectrum, config)
