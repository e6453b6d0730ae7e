"""The demonstration: train on real digits, sample with guidance, measure, and write a report."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from undiffuse import plot
from undiffuse.config import Config
from undiffuse.data import Data
from undiffuse.evals import Distances, Reader, copy_ratio, distances
from undiffuse.fit import Fitted, fit
from undiffuse.model import Model
from undiffuse.sample import Noise, trajectory
from undiffuse.solvers import DDIM, DDPM, DPMpp2M, Solver
from undiffuse.train import TrainState
from undiffuse.types import InputError
from undiffuse.watch import loss_by_level

PRESET: dict[str, Any] = {
    "data": "digits",
    "out": "runs/demo",
    "eval": {"every": 0},
    "track": "none",
    "train": {"steps": 1000, "every": 500},
    "guidance": {"kind": "cfg", "w": 2.0},
}
SOLVERS: dict[str, Solver] = {"DDPM": DDPM(), "DDIM": DDIM(), "DPM-Solver++(2M)": DPMpp2M()}
STEPS, PATH_STEPS = (5, 10, 20, 50), 32
LAMS = torch.tensor([-4.0, -3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0])


class Result(NamedTuple):
    """What the demonstration measured; `table` is solver -> steps -> distances."""

    parameters: int
    train_seconds: float
    levels: list[dict[str, float]]
    reader_accuracy: float
    recognised: dict[float, float]
    samples: int
    floor: Distances
    table: dict[str, dict[int, Distances]]
    seconds_per_image: float
    copies: float
    folder: Path

    def level_rows(self) -> list[list[str]]:
        """lam, sigma / alpha, the network's error, the best linear denoiser's, their ratio; as text."""
        return [
            [f"{r['lam']:+.0f}", f"{np.exp(-r['lam']):.3g}", f"{r['mse']:.4f}", f"{r['linear']:.4f}",
             f"{r['mse'] / r['linear']:.2f}"] for r in self.levels
        ]  # fmt: skip

    def distance_rows(self) -> list[list[str]]:
        """A row a solver and the floor: Frechet / 1000 x kernel distance at each number of steps; as text."""

        def pair(d: Distances) -> str:
            return f"{d.frechet:.2f} / {1000 * d.kernel:.1f}"

        solvers = [[name, *(pair(row[n]) for n in STEPS)] for name, row in self.table.items()]
        return [*solvers, ["real against real", *[pair(self.floor)] * len(STEPS)]]

    def json(self) -> dict[str, Any]:
        """As plain data."""
        plain = self._asdict()
        plain["folder"] = str(self.folder)
        plain["floor"] = self.floor._asdict()
        plain["table"] = {s: {str(n): d._asdict() for n, d in row.items()} for s, row in self.table.items()}
        return plain


def clear(out: Path) -> None:
    """Remove an earlier demonstration's run from `out`; InputError if the folder holds anything else."""
    if not out.exists():
        return
    if not out.is_dir() or (any(out.iterdir()) and not (out / "config.toml").is_file()):
        raise InputError(f"{out} exists and is not a run folder of undiffuse: give another with --out")
    for name in ("checkpoints", "model", "samples"):
        shutil.rmtree(out / name, ignore_errors=True)
    texts = "config.toml data.json spectrum.safetensors metrics.jsonl report.html result.json"
    pictures = "samples levels distances curves"
    for name in [*texts.split(), "denoising.gif", *(f"{p}.png" for p in pictures.split())]:
        (out / name).unlink(missing_ok=True)


def measure(model: Model, data: Data, solver: Solver, steps: int, w: float = 1.0, seed: int = 1) -> Distances:
    """Distances on pixels between the data and as many conditional samples of the same classes."""
    assert data.labels is not None
    x = model.sample(len(data), data.labels, steps=steps, solver=solver, guidance=w, seed=seed)
    return distances(x.clamp(-1, 1), data.x)


def path_frames(model: Model, w: float, steps: int = PATH_STEPS, rows: int = 3, seed: int = 7) -> list[Image.Image]:
    """Frames from noise to digits: the state x on the left, the prediction E[x0 | x] on the right."""
    labels = torch.arange(10).repeat(rows)
    levels = model.config.build("grid")(model.schedule, steps)
    noise, denoise = Noise((len(labels), *model.shape), seed), model.bind(labels, len(labels), w)
    x = (levels[0].sigma * noise()).float()
    frames = [(0, x, torch.zeros_like(x) + model.spectrum.mean.reshape(model.shape).float())]
    with torch.no_grad():
        for state in trajectory(denoise, x, levels, DPMpp2M(), noise):
            frames.append((state.i, state.x, state.x0))
    font = ImageFont.load_default(size=15)
    pictures = []
    for i, x, x0 in frames:
        left, right = (plot.tile(part, 10, scale=4, gap=2, smooth=True) for part in (x, x0))
        sheet = Image.new("L", (left.width * 2 + 36, left.height + 40), 255)
        sheet.paste(left, (12, 30))
        sheet.paste(right, (left.width + 24, 30))
        pen = ImageDraw.Draw(sheet)
        pen.text((14, 8), f"x after step {i} of {steps}", fill=0, font=font)
        pen.text((left.width + 26, 8), "what the network predicts", fill=0, font=font)
        pictures.append(sheet)
    return pictures


def configure(layers: Sequence[dict[str, Any]] = (), out: Path | None = None) -> Config:
    """The preset under these layers; InputError for other data than the digits."""
    if any("kind" in layer for layer in layers):
        raise InputError("the demo trains a denoiser: leave out kind, or train a classifier with `undiffuse train`")
    config = Config.resolve(PRESET, *layers, {"out": str(out)} if out else {})
    if config.values["data"]["name"] != "digits":
        raise InputError("the demo is about the digits; train on your own data with `undiffuse train data=FILE`")
    return config


def demo(
    config: Config | None = None,
    on_step: Callable[[TrainState, int], None] | None = None,
    on_stage: Callable[[int, int, str], None] = lambda i, n, name: None,
) -> Result:
    """Train, sample, measure and report into the run folder `out` (default runs/demo), replacing an earlier demo there.

    `on_step(state, steps)` and `on_stage(i, n, name)` are for progress bars.
    """
    config = config or configure()
    folder = Path(config.values["out"])
    clear(folder)
    clock = time.perf_counter()
    fitted = fit(config, on_step)
    return report(fitted, folder, time.perf_counter() - clock, on_stage)


def report(
    fitted: Fitted,
    folder: Path,
    train_seconds: float,
    on_stage: Callable[[int, int, str], None] = lambda i, n, name: None,
) -> Result:
    """Measure a fitted model and write pictures and the report."""
    stages = 3 + len(SOLVERS) * len(STEPS)
    done = iter(range(stages))
    model, train, held_out = fitted
    assert held_out.labels is not None
    assert train.labels is not None
    w = float(model.config.values["guidance"]["w"])
    on_stage(next(done), stages, "loss per noise level on held-out digits")
    levels = loss_by_level(model, held_out, LAMS)
    on_stage(next(done), stages, f"1,000 samples at w = 1 and w = {w:g}")
    reader, labels = Reader(held_out), torch.arange(1000) % 10
    samples: dict[float, Tensor] = {}
    for weight in dict.fromkeys((1.0, w)):
        clock = time.perf_counter()
        samples[weight] = model.sample(1000, labels, guidance=weight, steps=20).clamp(-1, 1)
    seconds_per_image = (time.perf_counter() - clock) / 1000
    recognised = {weight: reader.accuracy(x, labels) for weight, x in samples.items()}
    table: dict[str, dict[int, Distances]] = {name: {} for name in SOLVERS}
    for name, solver in SOLVERS.items():
        for steps in STEPS:
            on_stage(next(done), stages, f"{len(held_out)} samples with {name}, {steps} steps")
            table[name][steps] = measure(model, held_out, solver, steps)
    floor = distances(train.x[: len(held_out)], held_out.x)
    on_stage(next(done), stages, "pictures and report")
    guided = samples[w]
    plot.save_png(guided[:100], folder / "samples.png", columns=10, smooth=True)
    plot.save_gif(path_frames(model, w), folder / "denoising.gif")
    plot.plot_levels(levels, folder / "levels.png")
    curves = {name: {n: d.frechet for n, d in row.items()} for name, row in table.items()}
    plot.plot_distances(curves, floor.frechet, "Fréchet distance (pixels)", folder / "distances.png")
    result = Result(
        model.parameters, train_seconds, levels, reader.accuracy(train.x, train.labels), recognised, 1000, floor, table,
        seconds_per_image, copy_ratio(guided, train.x, held_out.x), folder,
    )  # fmt: skip
    (folder / "result.json").write_text(json.dumps(result.json(), indent=1))
    (folder / "report.html").write_text(_html(result, fitted, guided, w))
    on_stage(stages, stages, "done")
    return result


def _neighbours(x: Tensor, train: Tensor) -> Image.Image:
    """Ten samples above their nearest training digits."""
    nearest = train[torch.cdist(x.flatten(1), train.flatten(1)).argmin(1)]
    return plot.tile(torch.cat([x, nearest]), len(x), scale=8, smooth=True)


def _html(result: Result, fitted: Fitted, guided: Tensor, w: float) -> str:
    model, train, held_out = fitted
    folder = result.folder
    values = model.config.values
    cards = [
        (f"{100 * result.recognised[w]:.1f} %", f"of 1,000 guided samples (w = {w:g}) read as their class"),
        (f"{100 * result.reader_accuracy:.1f} %", "of real digits unseen by the same reader"),
        (f"{1000 * result.seconds_per_image:.1f} ms", "per guided image, 20 steps"),
        (f"{result.train_seconds:.0f} s", f"training, {result.parameters:,} parameters, {len(train):,} digits"),
    ]
    recognised = "; ".join(f"{100 * share:.1f} % at w = {weight:g}" for weight, share in result.recognised.items())
    body = f"""
<h1>From noise to digits</h1>
<p class="lead">A class-conditional U-Net denoiser, trained on {len(train):,} real handwritten digits of 8×8 pixels and
sampled with classifier-free guidance. {len(held_out)} digits were held out.</p>
<div class="cards">{"".join(f'<div class="card"><b>{a}</b><span>{b}</span></div>' for a, b in cards)}</div>
<h2>The path</h2>
<figure><img src="{plot.data_uri(folder / "denoising.gif")}" alt="Noise turning into digits">
<figcaption>{PATH_STEPS} steps of DPM-Solver++(2M), w = {w:g}. Left the state x, right the prediction E[x0 | x] that
pulls it.</figcaption></figure>
<h2>Samples</h2>
<figure><img src="{plot.data_uri(folder / "samples.png")}" alt="A hundred generated digits">
<figcaption>20 steps, w = {w:g}, one class a column; not selected, 8×8 pixels enlarged. A support vector machine fitted
on the {len(held_out)} held-out digits, which the denoiser never saw, reads {recognised}; it reads
{100 * result.reader_accuracy:.1f} % of the {len(train):,} other real digits.</figcaption></figure>
<h2>Did it copy?</h2>
<figure><img src="{plot.image_uri(_neighbours(guided[:10], train.x))}" alt="Samples and their neighbours">
<figcaption>Ten samples above their nearest training digits. Median distance to the nearest training digit over that to
the nearest held-out digit, from equally many of each: {result.copies:.2f} (copying pulls it far below 1).</figcaption>
</figure>
<h2>Error per noise level</h2>
<p>Squared error of x0 on held-out digits at fixed noise, beside the best linear denoiser, which knows the data's mean
and covariance only.</p>
<figure><img src="{plot.data_uri(folder / "levels.png")}" width="640" alt="Relative error over noise level"></figure>
{plot.table_html(["lam", "sigma / alpha", "network", "best linear", "ratio"], result.level_rows())}
<h2>Distance to held-out digits</h2>
<p>Fréchet distance / kernel distance × 1000 between {len(held_out)} samples (w = 1) and {len(held_out)} held-out digits
of the same classes, on pixels. The last row is the floor: real training digits in place of samples.</p>
<figure><img src="{plot.data_uri(folder / "distances.png")}" width="640" alt="Distance over steps"></figure>
{plot.table_html(["solver", *(f"{n} steps" for n in STEPS)], result.distance_rows())}
<h2>To repeat this</h2>
<pre>undiffuse train out={values["out"]} train.steps={values["train"]["steps"]} train.every={values["train"]["every"]}
undiffuse sample {values["out"]} --label 3 solver=ddim sample.steps=10</pre>
<p>The configuration is in <code>config.toml</code> beside this file, every figure in <code>result.json</code>.</p>
"""
    return plot.page("undiffuse: from noise to digits", body)
