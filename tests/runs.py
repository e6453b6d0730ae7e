"""Runs that tests start in one process and in several."""

import contextlib
import json
import os
import time
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image
from torch import nn

from undiffuse import VP, Denoiser, EDMPrecond, Label, V
from undiffuse.config import Config
from undiffuse.fit import fit
from undiffuse.nets import UNet
from undiffuse.train import EMA, Checkpoints, Engine, Lost, NonFinite, Objective, Plan, Processes, train, weights

STEPS = 12
SETTINGS = {
    "net": {"kind": "unet", "width": 16, "mults": [1], "patch": 2, "dropout": 0.2},
    "train": {"steps": STEPS, "batch": 6, "every": 3, "warmup": 2},
    "eval": {"every": 4, "n": 4},
    "sample": {"steps": 2},
    "held_out": 6,
    "seed": 3,
    "track": "none",
}


class Stop(Exception):
    """A caller that gives up."""


def write_pictures(folder):
    """30 byte pictures of 10 x 12, to be cropped at random: what passes through the reader of real data."""
    g = np.random.default_rng(0)
    x = g.integers(0, 256, (30, 1, 10, 12)).astype("uint8")
    np.savez(folder / "data.npz", x=x, labels=np.arange(30) % 3)
    return str(folder / "data.npz")


def settings(data, out, workers=0, **more):
    """The configuration of such a run."""
    layer = {"data": {"name": data, "size": 8, "crop": "random", "flip": True}, "out": str(out)}
    return Config.resolve(SETTINGS, layer, {"engine": {"workers": workers}}, more)


def run(data, out, stop=None, workers=0, **more):
    """Train to the end or to step `stop`; by step: loss, samples, levels."""
    torch.set_num_threads(1)
    seen = {}

    def progress(state, steps):
        seen[state.step] = (state.loss, state.ids.tolist(), state.lam.tolist())
        if state.step == stop:
            raise Stop

    with contextlib.suppress(Stop), mock.patch("undiffuse.plot.plot_curves"):  # which takes most of the time
        fit(settings(data, out, workers, **more), progress, log_every=2, processes=Processes.start("cpu"))
    return seen


def run_classifier(data, out, stop=None):
    """As `run`, of a classifier with augmentation and snapshots; by step: loss, errors."""
    torch.set_num_threads(1)
    seen = {}

    def progress(state, steps):
        seen[state.step] = (state.loss, state.error.tolist())
        if state.step == stop:
            raise Stop

    ours = {key: value for key, value in SETTINGS.items() if key != "sample"}
    layer = {"kind": "classifier", "data": {"name": data, "size": 8, "crop": "random"}, "out": str(out)}
    more = {"eval": {"every": 4}, "augment": "flip", "train": {**SETTINGS["train"], "snapshots": 2}}
    with contextlib.suppress(Stop), mock.patch("undiffuse.plot.plot_curves"):
        fit(Config.resolve({**ours, **layer, **more}), progress, log_every=2, processes=Processes.start("cpu"))
    return seen


def write_told(folder):
    """30 pictures with labels, of which three have a text."""
    g, lines = np.random.default_rng(0), []
    for i in range(30):
        Image.fromarray(g.integers(0, 256, (8, 8), np.uint8)).save(folder / f"{i}.png")
        text = {"text": f"number {i}"} if i % 10 == 0 else {}
        lines.append(json.dumps({"file_name": f"{i}.png", "label": "ab"[i % 2], **text}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return str(folder)


def run_told(folder, out):
    """The losses of a run whose batches, read from files, mostly lack a text, by step."""
    torch.set_num_threads(1)
    cond = {"text": {"kind": "bytes", "width": 16, "depth": 1}, "label": "label"}
    layer = {"data": {"name": folder, "memory_mb": 0}, "cond": cond, "out": str(out), "eval": {"every": 0}}
    found = {}
    with mock.patch("undiffuse.plot.plot_curves"):
        config = Config.resolve(SETTINGS, layer, {"net": {"dropout": 0.0}})
        fit(config, lambda state, _: found.update({state.step: state.loss}), processes=Processes.start("cpu"))
    return found


def run_everywhere(data, root, workers):
    """A run stopped at every step and gone on with, each in its own folder."""
    for k in range(1, STEPS + 1):
        out = Path(root) / f"stop{k}"
        run(data, out, stop=k, workers=workers)
        run(data, out, workers=workers)


def small(dropout=0.0):
    torch.manual_seed(0)
    return Denoiser(UNet(1, width=16, mults=(1, 2), vector=3, dropout=dropout), EDMPrecond())


POINTS = 0.5 * torch.randn(16, 1, 4, 4, generator=torch.Generator().manual_seed(0))
LABELS = Label(3)(torch.arange(16) % 3)


def losses(plan, engine, root=None, stop=None):
    """The losses of a run on POINTS by step, gradient norms, and the averaged weights at its end."""
    torch.set_num_threads(1)
    model, found = small(), {}
    ema, processes = EMA(model), Processes.start("cpu")
    states = train(
        model, POINTS, Objective(VP()), Plan(**plan), cond=LABELS, seed=5, ema=ema, engine=Engine(**engine),
        processes=processes, checkpoints=Checkpoints(Path(root)) if root else None,
    )  # fmt: skip
    for state in states:
        found[state.step] = (state.loss, state.grad_norm)
        if state.step == stop:
            break
    del states
    return found, {k: v.numpy() for k, v in weights(ema.average).items()}


class Scaled(nn.Module):
    """Two parameters: a step takes no time."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.full((3,), 0.5)), nn.Parameter(torch.full((3,), -0.2))

    def forward(self, x, time, cond):
        return self.a * x + self.b


def poisoned(step, place):
    """Train where the sample at row `place` of `step` is NaN: what is said, and after how long."""
    from undiffuse.data import Shuffled

    x = torch.randn(16, 3, generator=torch.Generator().manual_seed(1))
    x[int(Shuffled(16, 0).rows(step, 4)[place])] = torch.nan
    model, plan, began = Denoiser(Scaled(), V()), Plan(steps=9, batch=4), time.monotonic()
    try:
        for _ in train(model, x, Objective(VP()), plan, processes=Processes.start("cpu")):
            began = time.monotonic()
    except NonFinite as error:
        return str(error), time.monotonic() - began
    return "nothing happened", 0.0


def deserted(step):
    """Train until process 1 dies in `step`: what the other says, and after how long."""
    processes, died = Processes.start("cpu"), 0.0
    model, x = Denoiser(Scaled(), V()), torch.randn(16, 3)
    try:
        for state in train(model, x, Objective(VP()), Plan(steps=9, batch=4), processes=processes):
            died = time.monotonic()
            if state.step == step and processes.rank == 1:
                os._exit(9)
    except Lost as error:
        return str(error), time.monotonic() - died
    return "nothing happened", 0.0


class Hungry(Scaled):
    """Has memory for `most` rows, in the processes named."""

    def __init__(self, most, ranks=(0,)):
        super().__init__()
        self.most, self.ranks, self.calls = most, ranks, []

    def forward(self, x, time, cond):
        self.calls.append(len(x))
        if len(x) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory (planted)")
        return super().forward(x, time, cond)


def hungry(most, world_most=None, steps=4, engine=None):
    """Weights after some steps, and the sizes of the network calls, where memory is short."""
    processes = Processes.start("cpu")
    mine = most if processes.rank == 0 or world_most is None else world_most
    model = Denoiser(Hungry(mine), V())
    x = torch.randn(64, 3, generator=torch.Generator().manual_seed(1))
    plan = Plan(steps=steps, batch=16, lr=1e-2, warmup=0)
    for _ in train(model, x, Objective(VP()), plan, processes=processes, engine=Engine(**(engine or {}))):
        pass
    return {k: v.tolist() for k, v in model.state_dict().items()}, model.net.calls
