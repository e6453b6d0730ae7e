"""`fit`: training by configuration into a run folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from undiffuse.cond import Cond, Label
from undiffuse.config import Config
from undiffuse.data import Data, load_data
from undiffuse.denoise import Denoiser
from undiffuse.level import Level
from undiffuse.model import Model, assemble
from undiffuse.sample import Noise
from undiffuse.spectrum import Spectrum
from undiffuse.train import (
    EMA,
    Checkpoints,
    LevelBins,
    Objective,
    TrainState,
    is_sound,
    replace_text,
    same_settings,
    train,
)
from undiffuse.types import InputError

NOT_TRAINING = {"out", "solver", "grid", "guidance", "sample"}  # settings that may differ when a run goes on


class Fitted(NamedTuple):
    """A finished run: the model, the data that trained it, and the data held out from it."""

    model: Model
    train: Data
    held_out: Data


def split(config: Config) -> tuple[Data, Data]:
    """The two parts of the configured data; InputError if it is too small for `held_out`."""
    data = load_data(config.values["data"])
    held_out = config.values["held_out"]
    if "held_out" not in config.given and config.values["data"] != "digits":  # the default suits the digits
        held_out = min(held_out, len(data) // 5)
    return data.split(held_out)


def _identity(config: Config) -> dict[str, Any]:
    """The settings that must be the same when a run goes on."""
    return {k: v for k, v in config.values.items() if k not in NOT_TRAINING}


def _resume_log(path: Path, step: int) -> None:
    """Keep the log's lines up to the step from which training goes on."""
    if path.exists():
        lines = path.read_bytes().decode(errors="replace").splitlines()
        replace_text(path, "".join(line + "\n" for line in lines if _step(line) <= step))


def _step(line: str) -> float:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):  # torn by a full disk
        return float("inf")


def fit(
    config: Config,
    progress: Callable[[TrainState, int], None] | None = None,
    log_every: int = 50,
) -> Fitted:
    """Train by configuration into the run folder `out`, or go on where that run stopped.

    Writes config.toml, metrics.jsonl (loss per lam bin beside the best linear denoiser), checkpoints/ and model/.
    `progress(state, steps)` is called after every step. Raises InputError for impossible combinations and for a run
    folder with other settings, NonFinite if training diverges.
    """
    train_part, held_out = split(config)
    spectrum, seed, out = Spectrum.measure(train_part.x), config.values["seed"], Path(config.values["out"])
    if spectrum.std == 0:
        raise InputError(f"{train_part.name}: all samples are the same; there is nothing to learn")
    config = config.measured(float(f"{spectrum.std:.4g}"), len(held_out))
    plan = config.section("train")
    digest = hashlib.sha256(train_part.x.numpy().tobytes())
    if train_part.labels is not None:
        digest.update(train_part.labels.numpy().tobytes())
    fingerprint = digest.hexdigest()
    identity = _identity(config)
    if (out / "config.toml").is_file():
        same_settings(_identity(Config.resolve(Config.read(out / "config.toml"))), identity, out)
        if (out / "data.sha256").is_file() and (out / "data.sha256").read_text().strip() != fingerprint:
            raise InputError(f"{out} was trained on other data of the same name: give another `out` or delete that run")
        if is_sound(out / "model"):
            return Fitted(replace(Model.load(out), config=config), train_part, held_out)
    torch.manual_seed(seed)
    classes = max(train_part.classes, held_out.classes)
    model = assemble(config, spectrum, classes)
    objective = Objective(model.schedule, config.build("levels"), config.build("weight"), spectrum.std)
    objective.check(model.denoiser)
    cond = None if train_part.labels is None else Label(classes)(train_part.labels)
    checkpoints, log = Checkpoints(out / "checkpoints"), out / "metrics.jsonl"
    ema, bins = EMA(model.denoiser, plan.ema_gamma), LevelBins(spectrum)
    first = True
    for state in train(
        model.denoiser, train_part.x, objective, plan, cond=cond, seed=seed, checkpoints=checkpoints,
        identity=identity, ema=ema,
    ):  # fmt: skip
        if first:
            out.mkdir(parents=True, exist_ok=True)
            replace_text(out / "config.toml", config.toml())
            replace_text(out / "data.sha256", fingerprint + "\n")
            _resume_log(log, state.step - 1)
            first = False
        bins.add(state.lam, state.mse)
        saved = plan.every and state.step % plan.every == 0  # so that no line of the log spans a checkpoint
        if state.step % log_every == 0 or saved or state.step == plan.steps:
            row = {"step": state.step, "loss": state.loss, "grad_norm": state.grad_norm, "lr": state.lr}
            with open(log, "a") as f:
                f.write(json.dumps({**row, "bins": bins.rows()}) + "\n")
            bins = LevelBins(spectrum)
        if progress is not None:
            progress(state, plan.steps)
    average = ema.average
    assert isinstance(average, Denoiser)
    model = replace(model, denoiser=average)
    model.save(out / "model")
    return Fitted(model, train_part, held_out)


@torch.no_grad()
def loss_by_level(model: Model, data: Data, lams: Tensor, seed: int = 0, batch: int = 256) -> list[dict[str, float]]:
    """x0 error on data at fixed levels and fixed noise (comparable between runs), beside the best linear denoiser's."""
    eps = Noise(data.x.shape, seed)()
    cond = None if data.labels is None else Label(model.classes)(data.labels)
    rows = []
    for lam in lams.double():
        level, total = Level.at(lam, model.schedule.space), 0.0
        for i in range(0, len(data), batch):
            x0, part = data.x[i : i + batch], slice(i, i + batch)
            c: Cond | None = None if cond is None else cond[part]
            error = model.denoiser(level.diffuse(x0, eps[part]), level, c) - x0
            total += float(error.square().sum())
        linear = float(model.spectrum.linear_loss(level))
        rows.append({"lam": float(lam), "mse": total / data.x.numel(), "linear": linear})
    return rows
