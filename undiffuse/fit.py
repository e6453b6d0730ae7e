"""`fit`: training by configuration into a run folder."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from undiffuse.classifier_model import ClassifierModel, assemble_classifier
from undiffuse.cond import Encoder
from undiffuse.config import Config
from undiffuse.data import Data
from undiffuse.model import Model, assemble
from undiffuse.rundata import RunData, about_of
from undiffuse.runlog import Log
from undiffuse.spectrum import Spectrum
from undiffuse.train import (
    EMA,
    TRACKED,
    Aim,
    Checkpoints,
    ClassifierBins,
    ClassifierObjective,
    Engine,
    Flip,
    Geometric,
    Gradient,
    LevelBins,
    Lock,
    Objective,
    Plan,
    Power,
    Processes,
    Signals,
    Snapshots,
    TrainState,
    check_sharded,
    find_tracker,
    is_sound,
    made,
    out_of_memory,
    replace_bytes,
    replace_text,
    same_settings,
    train,
    weights,
)
from undiffuse.types import InputError
from undiffuse.watch import ClassifierWatch, Left, Watch

# what may differ when a run goes on
NOT_TRAINING = {"out", "track", "engine", "eval", "solver", "grid", "guidance", "sample"}
SHOWN = 64  # held-out conditions that are kept with a model
HOW = {"data": {"path", "bad_share", "memory_mb", "cache", "cache_gb"}, "train": {"every"}}


class _Opened(NamedTuple):
    """A run's complete configuration (its batch may be "auto" yet), its data, and the settings that it began with."""

    config: Config
    data: RunData
    spectrum: Spectrum
    before: Config | None


class Fitted(NamedTuple):
    """A finished run: the model (a `ClassifierModel` of kind=classifier), the data that trained it (of large data a
    part), and the data held out from it."""

    model: Any
    train: Data
    held_out: Data


def _identity(config: Config) -> dict[str, Any]:
    """The settings that must be the same when a run goes on."""
    values = {k: v for k, v in config.values.items() if k not in NOT_TRAINING}
    if not config.classifies:
        del values["kind"]  # as runs had it that know of no other
    for section, names in HOW.items():
        values[section] = {k: v for k, v in values[section].items() if k not in names}
    return values


def _before(out: Path) -> Config | None:
    """The settings of the run in `out` that has something to go on from."""
    begun = Checkpoints(out / "checkpoints").steps() or (out / "model").exists()
    if not (out / "config.toml").is_file():
        return None
    if not begun and not (out / "data.json").is_file():
        raise InputError(
            f"{out / 'config.toml'} was written by no run: to train with it, give it by --config and another `out`"
        )
    return Config.resolve(Config.read(out / "config.toml")) if begun else None


def fit(
    config: Config,
    progress: Callable[[TrainState, int], None] | None = None,
    log_every: int = 50,
    processes: Processes | None = None,
) -> Fitted:
    """Train by configuration into the run folder `out`, or go on where that run stopped.

    Writes config.toml, data.json, metrics.jsonl (per lam bin the loss beside the best linear denoiser's, or a
    classifier's accuracy, and loss beside the prior's; measurements),
    curves.png, samples/, logs/ (trackers), checkpoints/ and model/. `progress(state, steps)` is called after every
    step. In several processes (`accelerate launch`, `torchrun`) all call it. SIGTERM and Ctrl-C save the state first.
    Raises InputError for impossible combinations and for a run folder with other settings, NonFinite if training
    diverges, Preempted after SIGTERM.
    """
    engine: Engine = config.section("engine")
    processes = processes or Processes.start(engine.device)
    config, data, spectrum, before = _opened(config, processes)
    out = Path(config.values["out"])
    if before is not None and is_sound(out / "model"):
        load = ClassifierModel.load if config.classifies else Model.load
        return Fitted(replace(load(out), config=config), data.train, data.held_out)
    if config.section("train").batch == "auto":
        probe = config.measured(_sigma(spectrum), len(data.held_out), 64)
        batch = processes.share(lambda: largest_batch(probe, data, spectrum, processes.device))
        config = config.measured(_sigma(spectrum), len(data.held_out), batch * processes.world)
    for note in data.notes if processes.main else ():
        warnings.warn(note, stacklevel=2)
    return _fit(config, engine, data, spectrum, processes, out, progress, log_every)


def check(config: Config, processes: Processes) -> None:
    """InputError for what `fit` would refuse before its first step: all of it is made, and nothing is written."""
    config, data, spectrum, _ = _opened(config, processes)
    model, *_ = _built(config, data, spectrum)
    plan: Plan = config.section("train")
    made(config.build("optimiser"), model.module, plan.lr, plan.weight_decay)


def _opened(config: Config, processes: Processes) -> _Opened:
    """Open and measure the data; InputError for data that cannot be trained on, and for the folder of another run."""
    out = Path(config.values["out"])
    if out.exists() and not out.is_dir():
        raise InputError(f"out={out} is a file: give the name of a folder")
    data = RunData.of(config)
    # as one process sees the folder: it may write there before the slowest has looked
    before, spectrum = processes.share(lambda: (_before(out), _spectrum(data, out)))
    if spectrum.std == 0:
        raise InputError(f"{data.train.name}: all samples are the same; there is nothing to learn")
    batch = config.section("train").batch
    if batch == "auto" and before is not None:
        batch = before.section("train").batch
    config = config.measured(_sigma(spectrum), len(data.held_out), batch)
    if before is not None:
        same_name = before.values["data"]["name"] == config.values["data"]["name"]
        if same_name and (out / "data.json").is_file() and not about_of(out, data.fingerprint):
            raise InputError(f"{out} was trained on other data of the same name: give another `out` or delete that run")
        same_settings(_identity(before), _identity(config), out)
    return _Opened(config, data, spectrum, before)


def _sigma(spectrum: Spectrum) -> float:
    return float(f"{spectrum.std:.4g}")


def _assembled(config: Config, data: RunData, spectrum: Spectrum) -> Model | ClassifierModel:
    """The untrained model; InputError for data that cannot train a classifier."""
    if not config.classifies:
        return assemble(config, spectrum, data.classes, data.conditions.fresh())
    if data.train.labels is None or data.held_out.labels is None or data.classes < 2:
        found = "no labels" if data.train.labels is None or data.held_out.labels is None else "one class only"
        raise InputError(
            f"{data.source.name} has {found}, and kind=classifier learns two or more classes: give a folder with one "
            "folder a class, a .npz with `labels`, or files with a column `label` in which every sample has one"
        )
    counts = torch.bincount(data.train.labels, minlength=data.classes).clamp(min=1)  # a class may be held out whole
    return assemble_classifier(config, spectrum, counts / counts.sum())


def _built(config: Config, data: RunData, spectrum: Spectrum) -> tuple[Model | ClassifierModel, Aim, EMA]:
    """The untrained model, what trains it, and its averages; InputError for what cannot be trained together."""
    plan, engine, augment = config.section("train"), config.section("engine"), config.build("augment")
    torch.manual_seed(config.values["seed"])
    try:
        model = _assembled(config, data, spectrum)
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        raise InputError(f"this network does not fit in memory: {config.values['net']}; make it smaller") from error
    model = replace(model, names=tuple(data.source.classes), scale=data.prepare.statistics)
    if isinstance(model, Model) and data.held_out.cond is not None:
        model = replace(model, shown_with=data.held_out.cond[:SHOWN])
    objective = _aim(config, spectrum.std)
    objective.check(model.module)
    if engine.sharding == "fsdp":
        check_sharded(config.build("optimiser"), plan.precision)
    mirrors = isinstance(augment, Flip) or (isinstance(augment, Geometric) and augment.x_flip)
    if config.values["data"]["flip"] and mirrors:
        raise InputError(
            "data.flip=true mirrors every second picture without telling the network, so that samples show it, which "
            f"augment={config.values['augment']['kind']} is there to prevent: leave one of them out"
        )
    if config.values["augment"]["kind"] != "none" and (
        maps := [name for name, e in _encoders(data).items() if e.spatial]
    ):
        raise InputError(
            f"augment={config.values['augment']['kind']} moves pictures and not the maps that belong to them "
            f"({', '.join(maps)}): leave it out, or take data.flip=true, which mirrors both"
        )
    augment(data.train.x[:1], 0, torch.zeros(1, dtype=torch.long))
    find_tracker(config.values["track"])
    profiles = [config.build("ema")]
    profiles += [p for p in map(Power, TRACKED) if plan.snapshots and p not in profiles]
    return model, objective, EMA(model.module, *profiles)


def _encoders(data: RunData) -> Mapping[str, Encoder]:
    return {} if data.conditions.encoders is None else data.conditions.encoders.encoders


def _spectrum(data: RunData, out: Path) -> Spectrum:
    """Measured once: of a run that goes on, the one in its folder."""
    if about_of(out, data.fingerprint).get("prepare") == repr(data.prepare) and not data.complete:
        return Spectrum.load(out / "spectrum.safetensors")
    return Spectrum.measure(data.train.x)


def _fit(
    config: Config,
    engine: Engine,
    data: RunData,
    spectrum: Spectrum,
    processes: Processes,
    out: Path,
    progress: Callable[[TrainState, int], None] | None,
    log_every: int,
) -> Fitted:
    plan, seed = config.section("train"), config.values["seed"]
    model, objective, ema = _built(config, data, spectrum)
    average, use = ema.average, config.section("eval")
    averaged = model.having(average)
    log, asked = Log(out, config, processes.main), Signals()
    bins = ClassifierBins(model.classifier.prior.exp()) if isinstance(model, ClassifierModel) else LevelBins(spectrum)
    watch = _watch(averaged, data, use.n) if use.every else None
    sharded = processes.shards(engine.sharding)
    watching = Signals() if sharded else asked  # none may leave while others gather

    def look(step: int) -> None:
        if watch is None or not (step % use.every == 0 or step == plan.steps):
            return
        if processes.share(lambda: log.watched(step)):
            return
        try:
            row = {"step": step, "eval": watch.measure(watching)}
            if processes.main or sharded:  # shards are gathered by all
                watch.picture(out / "samples" / f"step-{step:06d}.png" if processes.main else None, watching)
            log.add(row)
            log.draw(every=60)
        except Left:
            pass  # done when the run goes on

    def begin(step: int) -> None:
        log.begin(step)
        if step:
            look(step)

    first, lock = True, Lock(out)
    if processes.main and out.is_dir():
        lock.take()
    with asked, lock:
        for state in train(
            model.module, data.feed(config.section("data"), engine, seed, out / "bad.jsonl"), objective, plan,
            seed=seed, checkpoints=Checkpoints(out / "checkpoints"), identity=_identity(config), ema=ema, engine=engine,
            processes=processes, also={"bins": bins.sums}, asked=asked, started=begin, augment=config.build("augment"),
            optimiser=config.build("optimiser"),
            snapshots=Snapshots(out / "averages", plan.snapshots) if plan.snapshots else None,
        ):  # fmt: skip
            if first and processes.main:
                out.mkdir(parents=True, exist_ok=True)
                lock.take()
                replace_bytes(out / "spectrum.safetensors", spectrum.to_bytes())
                replace_text(out / "config.toml", config.toml())
                replace_text(out / "data.json", json.dumps(data.about(config.section("data"))) + "\n")
            first = False
            bins.take(state)
            if state.step % log_every == 0 or state.step == plan.steps:
                row = {"step": state.step, "loss": state.loss, "grad_norm": state.grad_norm, "lr": state.lr}
                log.add({**row, "bins": bins.rows()})
                bins.clear()
            look(state.step)
            if progress is not None:
                progress(state, plan.steps)
    if sharded:
        whole = _assembled(config, data, spectrum).module
        whole.load_state_dict(weights(average))
        averaged = averaged.having(whole.eval().requires_grad_(False))
    if isinstance(averaged, ClassifierModel) and processes.main:
        averaged = averaged.judged(data.held_out)
    processes.together(lambda: averaged.save(out / "model"))
    bad = sum(len(path.read_text().splitlines()) for path in out.glob("bad*.jsonl"))
    if bad and processes.main:
        warnings.warn(f"{bad} sample{'s' * (bad > 1)} could not be read; see {out / 'bad.jsonl'}", stacklevel=3)
    log.draw()
    log.close()
    return Fitted(averaged, data.train, data.held_out)


def _watch(model: Model | ClassifierModel, data: RunData, n: int) -> Watch | ClassifierWatch:
    """What measures a run on the way."""
    if isinstance(model, ClassifierModel):
        return ClassifierWatch(model, data.held_out)
    return Watch(model, data.train, data.held_out, n)


def _aim(config: Config, std: float) -> Aim:
    """What a configuration trains on data of this std."""
    if config.classifies:
        return ClassifierObjective(config.build("schedule"), config.build("levels"), config.build("draws"))
    return objective_of(config, std)


def objective_of(config: Config, std: float) -> Objective:
    """What a configuration of a denoiser trains on data of this std."""
    names = ("levels", "weight", "draws", "variance", "coupling")
    return Objective(config.build("schedule"), sigma_data=std, **{name: config.build(name) for name in names})


def largest_batch(config: Config, data: RunData, spectrum: Spectrum, device: torch.device, most: int = 4096) -> int:
    """The batch, a power of two from 16 on, after which doubling brings under 10 % more samples a second, or memory
    runs out: measured by some steps of the configured network on noise."""
    model = _assembled(config, data, spectrum).module.to(device)
    told = data.conditions.told(data.train)
    objective = _aim(config, spectrum.std)
    best, speed, precision = 16, 0.0, config.section("train").precision
    for b in (2**k for k in range(4, most.bit_length())):
        gradient = Gradient(model, objective, precision, Engine(micro=b), Processes(device=device), 0)
        x = torch.randn(2, b, *spectrum.shape, device=device)
        cond = None if told is None else told[torch.arange(b) % len(told)].to(device)
        times = []
        try:
            for step in range(1, 5):
                started = time.perf_counter()
                with warnings.catch_warnings():
                    warnings.simplefilter("error", UserWarning)  # of memory that runs out
                    float(gradient(x[0], x[1], objective.draw(b, 0, step), cond, torch.arange(b)).loss.sum())
                times.append(time.perf_counter() - started)
        except UserWarning:
            break
        except (InputError, RuntimeError) as error:
            if isinstance(error, InputError) or out_of_memory(error):
                break
            raise
        now = b / min(times)
        if now < 1.1 * speed:
            break
        best, speed = b, now
    return best
