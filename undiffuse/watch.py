"""Watching a run: what its averaged weights can do at a step, in numbers and in a picture."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from undiffuse import plot
from undiffuse.classifier_model import ClassifierModel
from undiffuse.data import Data
from undiffuse.evals import copy_ratio, distances
from undiffuse.level import Level
from undiffuse.model import Model
from undiffuse.sample import Noise, State

LAMS = torch.tensor([-3.0, -1.5, 0.0, 1.5, 3.0])
FEATURES = 64  # principal components: features for any data, until there are better ones
PICTURES = 64


@torch.no_grad()
def loss_by_level(model: Model, data: Data, lams: Tensor, seed: int = 0, batch: int = 256) -> list[dict[str, float]]:
    """x0 error on data at fixed levels and fixed noise (comparable between runs), beside the best linear denoiser's."""
    eps, device = Noise(data.x.shape, seed)(), model.device
    cond = model.told(data)
    rows = []
    for lam in lams.double():
        level, total = Level.at(lam, model.schedule.space), 0.0
        for i in range(0, len(data), batch):
            x0, part = data.x[i : i + batch], slice(i, i + batch)
            c = None if cond is None else cond[part].to(device)
            error = model.denoiser(level.diffuse(x0, eps[part]).to(device), level, c).cpu() - x0
            total += float(error.square().sum())
        linear = float(model.spectrum.linear_loss(level))
        rows.append({"lam": float(lam), "mse": total / data.x.numel(), "linear": linear})
    return rows


class Left(Exception):
    """The watch was asked to end."""


def _leaving(asked: Callable[[], int]) -> Callable[[State], None]:
    """What raises Left after the solver's step in which a signal came."""

    def leave(state: State) -> None:
        if asked():
            raise Left

    return leave


class Watch:
    """Measures a model on held-out data with fixed seeds: equal weights give equal numbers and an equal picture.

    The error per level on at most 256 held-out samples; and for n samples at w = 1, of held-out conditions: Frechet and
    kernel distance to n held-out samples on the data's first 64 principal components, with the same between real
    training and held-out samples as the floor; and the nearest-neighbour ratio (see `copy_ratio`).
    """

    def __init__(self, model: Model, train: Data, held_out: Data, n: int) -> None:
        self.model, self.n = model, min(n, len(train), len(held_out))
        self.train, self.held_out = train.rows(slice(self.n)), held_out.rows(slice(self.n))
        self.levels = held_out.rows(slice(256))
        self.floor = distances(self._features(self.train.x), self._features(self.held_out.x))

    def _features(self, x: Tensor) -> Tensor:
        spectrum = self.model.spectrum
        centred = x.double().flatten(1) - spectrum.mean
        return centred if spectrum.basis is None else centred @ spectrum.basis[:FEATURES].T

    def measure(self, asked: Callable[[], int] = lambda: 0) -> dict[str, Any]:
        """The row's numbers; raises Left when `asked()` gives a signal."""
        told, leave = self.model.told(self.held_out), _leaving(asked)
        x = self.model.sample(self.n, given=told, guidance=1.0, seed=1, progress=leave).cpu()
        x = x if self.model.scale is None else self.model.scale.apply(x)
        found = distances(self._features(x), self._features(self.held_out.x)) if bool(torch.isfinite(x).all()) else None
        return {
            "n": self.n,
            "frechet": found.frechet if found else math.nan,
            "kernel": found.kernel if found else math.nan,
            "frechet_floor": self.floor.frechet,
            "kernel_floor": self.floor.kernel,
            "nearest_ratio": copy_ratio(x, self.train.x, self.held_out.x),
            "levels": loss_by_level(self.model, self.levels, LAMS),
        }

    def picture(self, path: Path | None, asked: Callable[[], int] = lambda: 0) -> None:
        """Write a grid of samples with the run's own settings, a class a column or of held-out conditions, unguided
        where guidance asks other networks; nothing for data that are no images, nor where `path` is None."""
        if len(self.model.shape) != 3:
            return
        columns = plot.columns_for(PICTURES, self.model.classes)
        n = columns * (PICTURES // columns)
        told = self.model.examples(range(n)) if self.model.conditional else None
        # other networks, such as this run's own earlier ones, are asked when it is trained
        guidance = 1.0 if hasattr(self.model.config.build("guidance"), "found") else None
        x = self.model.sample(n, given=told, guidance=guidance, seed=2, progress=_leaving(asked))
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        plot.save_png(self.model.shown(x), path, columns)


class ClassifierWatch:
    """Measures a classifier on held-out data with fixed noise (see `ClassifierModel.judged`)."""

    def __init__(self, model: ClassifierModel, held_out: Data) -> None:
        self.model, self.held_out = model, held_out

    def measure(self, asked: Callable[[], int] = lambda: 0) -> dict[str, Any]:
        """The row's numbers, means and a row a level; raises Left when `asked()` gives a signal."""

        def leave() -> None:
            if asked():
                raise Left

        rows = self.model.judged(self.held_out, leave).scores
        means = {name: sum(row[name] for row in rows) / len(rows) for name in ("loss", "accuracy")}
        return {**means, "levels": list(rows)}

    def picture(self, path: Path | None, asked: Callable[[], int] = lambda: 0) -> None:
        """Nothing: a classifier draws none."""
