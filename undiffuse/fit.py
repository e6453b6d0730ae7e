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

from undiffuse.cond import Encoder
from undiffuse.config import Config
from undiffuse.data import Data
from undiffuse.denoise import Denoiser
from undiffuse.model import Model, assemble
from undiffuse.rundata import RunData, about_of
from undiffuse.runlog import Log
from undiffuse.spectrum import Spectrum
from undiffuse.train import (
    EMA,
    TRACKED,
    Checkpoints,
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
from undiffuse.watch import Left, Watch

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
    """A finished run: the model, the data that trained it (of large data a part), and the data held out from it."""

    model: Model
    train: Data
    held_out: Data


def _identity(config: Config) -> dict[str, Any]:
    """The settings that must be the same when a run goes on."""
    values = {k: v for k, v in config.values.items() if k not in NOT_TRAINING}
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

    Writes config.toml, data.json, metrics.jsonl (loss per lam bin beside the best linear denoiser, measurements),
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
        return Fitted(replace(Model.load(out), config=config), data.train, data.held_out)
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
    made(config.build("optimiser"), model.denoiser, plan.lr, plan.weight_decay)


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


def _built(config: Config, data: RunData, spectrum: Spectrum) -> tuple[Model, Objective, EMA]:
    """The untrained model, what trains it, and its averages; InputError for what cannot be trained together."""
    plan, engine, augment = config.section("train"), config.section("engine"), config.build("augment")
    torch.manual_seed(config.values["seed"])
    try:
        model = assemble(config, spectrum, data.classes, data.conditions.fresh())
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        raise InputError(f"this network does not fit in memory: {config.values['net']}; make it smaller") from error
    shown = data.held_out.cond
    shown = None if shown is None else shown[:SHOWN]
    model = replace(model, names=tuple(data.source.classes), scale=data.prepare.statistics, shown_with=shown)
    objective = objective_of(config, spectrum.std)
    objective.check(model.denoiser)
    if engine.sharding == "fsdp":
        check_sharded(config.build("optimiser"), plan.precision)
    mirrors = isinstance(augment, Flip) or (isinstance(augment, Geometric) and augment.x_flip)
    if config.values["data"]["flip"] and mirrors:
        raise InputError(
            "data.flip=true mirrors every second picture without telling the network, so that samples show it, which "
            f"augment={config.values['augment']['kind']} is there to prevent: leave one of them out"
        )
    if config.values["augment"]["kind"] != "none" and (
        maps := [name for name, e in _encoders(model).items() if e.spatial]
    ):
        raise InputError(
            f"augment={config.values['augment']['kind']} moves pictures and not the maps that belong to them "
            f"({', '.join(maps)}): leave it out, or take data.flip=true, which mirrors both"
        )
    augment(data.train.x[:1], 0, torch.zeros(1, dtype=torch.long))
    find_tracker(config.values["track"])
    profiles = [config.build("ema")]
    profiles += [p for p in map(Power, TRACKED) if plan.snapshots and p not in profiles]
    return model, objective, EMA(model.denoiser, *profiles)


def _encoders(model: Model) -> Mapping[str, Encoder]:
    return {} if model.encoders is None else model.encoders.encoders


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
    bins = LevelBins(spectrum)
    average = ema.average
    assert isinstance(average, Denoiser)
    averaged, use = replace(model, denoiser=average), config.section("eval")
    log, asked = Log(out, config, processes.main), Signals()
    watch = Watch(averaged, data.train, data.held_out, use.n) if use.every else None
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
            model.denoiser, data.feed(config.section("data"), engine, seed, out / "bad.jsonl"), objective, plan,
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
            bins.add(state.lam, state.mse)
            if state.step % log_every == 0 or state.step == plan.steps:
                row = {"step": state.step, "loss": state.loss, "grad_norm": state.grad_norm, "lr": state.lr}
                log.add({**row, "bins": bins.rows()})
                bins.clear()
            look(state.step)
            if progress is not None:
                progress(state, plan.steps)
    if sharded:
        whole = assemble(config, spectrum, data.classes, data.conditions.fresh()).denoiser
        whole.load_state_dict(weights(average))
        averaged = replace(averaged, denoiser=whole.eval().requires_grad_(False))
    processes.together(lambda: averaged.save(out / "model"))
    bad = sum(len(path.read_text().splitlines()) for path in out.glob("bad*.jsonl"))
    if bad and processes.main:
        warnings.warn(f"{bad} sample{'s' * (bad > 1)} could not be read; see {out / 'bad.jsonl'}", stacklevel=3)
    log.draw()
    log.close()
    return Fitted(averaged, data.train, data.held_out)


def objective_of(config: Config, std: float) -> Objective:
    """What a configuration trains on data of this std."""
    names = ("levels", "weight", "draws", "variance", "coupling")
    return Objective(config.build("schedule"), sigma_data=std, **{name: config.build(name) for name in names})


def largest_batch(config: Config, data: RunData, spectrum: Spectrum, device: torch.device, most: int = 4096) -> int:
    """The batch, a power of two from 16 on, after which doubling brings under 10 % more samples a second, or memory
    runs out: measured by some steps of the configured network on noise."""
    model = assemble(config, spectrum, data.classes, data.conditions.fresh()).denoiser.to(device)
    told = data.conditions.told(data.train)
    objective = objective_of(config, spectrum.std)
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
