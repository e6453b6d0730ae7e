"""How samples follow their conditions, six kinds of them: trains the recipes, and scores them on held-out conditions.

`python benchmarks/conditions.py [class text image depth segmentation audio emoji]` trains what is not trained yet, into
runs/, or goes on where it stopped, and writes its section and docs/conditions.png; emoji, at last, needs a
GPU and is left out unless it is named. `--minilm FOLDER` is where its text encoder lies. CPU seconds are those of the
process, with one thread. Shuffled: each sample against the condition of another.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import table, write
from torch import Tensor

from undiffuse.config import Config
from undiffuse.data import Raw, Subset, materialise
from undiffuse.data.depth import depth_fit
from undiffuse.data.picture import to_float
from undiffuse.data.scenes import adherence, parse, segmentation_iou
from undiffuse.data.source import choice
from undiffuse.evals import extract, open_features, retrieval
from undiffuse.evals.classifier import load_classifier
from undiffuse.fit import fit
from undiffuse.model import Model
from undiffuse.rundata import RunData

HERE = Path(__file__).parent
RECIPES = HERE.parent / "recipes"
KINDS = ("class", "text", "image", "depth", "segmentation", "audio")
WEIGHTS = (1.0, 3.0)
SHOWN = 8

Scores = dict[str, float]


def read_digits(x: Tensor, raws: Sequence[Raw]) -> Scores:
    """The share that an independent classifier reads as the digit asked for."""
    judge = load_classifier("digits")
    with torch.no_grad():
        found = judge(x.clamp(-1, 1)).argmax(1)
    return {"read as asked": float((found == torch.tensor([raw.label for raw in raws])).double().mean())}


def read_captions(x: Tensor, raws: Sequence[Raw]) -> Scores:
    """The shares of a caption's things, sizes and relations that are read right in the picture."""
    right = dict.fromkeys(("colour", "shape", "size", "relation"), 0.0)
    every, whole = dict.fromkeys(right, 0.0), 0.0
    for picture, raw in zip(x.clamp(-1, 1).numpy(), raws, strict=True):
        caption = raw.columns["text"]
        found, said = adherence(picture, caption), parse(caption)
        sized = sum(thing.size is not None for thing in said.things)
        counts = (len(said.things), len(said.things), sized, len(said.relations) or int(said.place is not None))
        for name, n in zip(right, counts, strict=True):
            right[name] += n * (getattr(found, name) or 0.0)
            every[name] += n
        whole += found.all
    return {**{name: right[name] / every[name] for name in right}, "all": whole / len(raws)}


def read_depths(x: Tensor, raws: Sequence[Raw]) -> Scores:
    """Correlation of the depth that pictures imply with the map on its solids, and the silhouettes' overlap."""
    pairs = zip(x.clamp(-1, 1).numpy(), raws, strict=True)
    fits = [depth_fit(picture, raw.columns["depth"]) for picture, raw in pairs]
    return {name: float(np.mean([getattr(fit, name) for fit in fits])) for name in ("correlation", "iou")}


def read_masks(x: Tensor, raws: Sequence[Raw]) -> Scores:
    """Intersection over union of the classes seen in pictures with the mask's."""
    pairs = zip(x.clamp(-1, 1).numpy(), raws, strict=True)
    return {"iou": float(np.mean([segmentation_iou(picture, raw.columns["segmentation"]) for picture, raw in pairs]))}


def read_low(x: Tensor, raws: Sequence[Raw]) -> Scores:
    """Correlation of what is given, 8x8 means, with those of the sample; and colours as `adherence` reads them."""
    pictures = torch.from_numpy(np.stack([to_float(np.asarray(raw.x)) for raw in raws]))
    low, seen = (torch.nn.functional.adaptive_avg_pool2d(part, 8).flatten(1) for part in (pictures, x.clamp(-1, 1)))
    low, seen = (part - part.mean(1, keepdim=True) for part in (low, seen))
    each = (low * seen).sum(1) / (low.norm(dim=1) * seen.norm(dim=1)).clamp(min=1e-9)
    return {"correlation": float(each.mean()), "colour": read_captions(x, raws)["colour"]}


def read_emoji(x: Tensor, raws: Sequence[Raw]) -> Scores:
    """The share whose own caption's picture is the nearest of ten, by features that the training of the sampler did
    not use."""
    pictures = torch.from_numpy(np.stack([to_float(np.asarray(raw.x)) for raw in raws]))
    feature = open_features("emoji", pictures, "emoji")[0]
    texts = [raw.columns["text"] for raw in raws]
    return {"retrieved of 10": retrieval(x.clamp(-1, 1), pictures, texts, lambda part: extract(feature, part)).value}


@dataclass(frozen=True)
class Kind:
    """A recipe, how it is scored, and what each score should reach."""

    score: Callable[[Tensor, Sequence[Raw]], Scores]
    goal: Scores
    n: int = 256


KIND = {
    "class": Kind(read_digits, {"read as asked": 0.95}),
    "text": Kind(read_captions, {"colour": 0.9, "shape": 0.9, "relation": 0.9}),
    "image": Kind(read_low, {"correlation": 0.95}),
    "depth": Kind(read_depths, {"correlation": 0.9, "iou": 0.9}),
    "segmentation": Kind(read_masks, {"iou": 0.85}),
    "audio": Kind(read_digits, {"read as asked": 0.95}, n=240),
    "emoji": Kind(read_emoji, {}, n=40),
}


def trained(name: str, layers: Sequence[dict[str, Any]] = ()) -> tuple[Model, float]:
    """The model of a recipe, trained or as it was, and the CPU seconds of the whole training."""
    config = Config.resolve(Config.read(RECIPES / f"{name}.toml"), *layers)
    clock, begun = Path(config.values["out"]) / "cpu.json", time.process_time()
    before = float(json.loads(clock.read_text())) if clock.is_file() else 0.0

    def progress(state: Any, steps: int) -> None:
        if state.step % 100 == 0 or state.step == steps:
            used = before + time.process_time() - begun
            clock.write_text(json.dumps(used))
            print(f"{name}: step {state.step} of {steps}, loss {state.loss:.4f}, {used:.0f} CPU s", flush=True)

    fit(config, progress)
    return Model.load(config.values["out"]), float(json.loads(clock.read_text()))


def held_out(model: Model, n: int) -> tuple[list[Raw], Any]:
    """n held-out samples as they are stored, and their conditions; of data without a test split, labels in turn."""
    data = RunData.of(Config.resolve(model.config.values))
    if data.source.test is None:
        labels = [k % model.classes for k in range(n)]
        return [Raw(np.empty(0), label) for label in labels], model.cond(labels, n)
    ids = choice(data.source.test, n)
    part = Subset(data.source.test, ids, "held out")
    return [part.read(i) for i in range(len(part))], materialise(part, data.prepare, data.conditions).cond


def scored(kind: Kind, model: Model, raws: list[Raw], told: Any, w: float) -> tuple[Tensor, Scores, Scores]:
    """(samples, their scores, the scores against the conditions of other samples)."""
    x = model.sample(len(raws), given=told, guidance=w, seed=1).cpu()
    order = np.random.default_rng(0).permutation(len(raws))
    return x, kind.score(x, raws), kind.score(x, [raws[i] for i in order])


def real(kind: Kind, raws: list[Raw]) -> Scores:
    """What the real pictures of the conditions score; nothing where there are none."""
    if not raws[0].x.size:  # type: ignore[union-attr]
        return {}
    return kind.score(torch.from_numpy(np.stack([to_float(np.asarray(raw.x)) for raw in raws])), raws)


def measured(name: str, layers: Sequence[dict[str, Any]]) -> tuple[list[list[str]], dict[str, Any]]:
    """The rows of a recipe, and what its picture shows."""
    kind = KIND[name]
    model, seconds = trained(name, layers)
    raws, told = held_out(model, kind.n)
    best, rows = real(kind, raws), []
    by = {w: scored(kind, model, raws, told, w) for w in WEIGHTS}
    plan = model.config.section("train")
    about = [name, f"{seconds / 60:.1f}", f"{plan.steps:,} x {plan.batch}", f"{model.parameters / 1e6:.2f}"]
    for i, score in enumerate(by[1.0][1]):
        each = [f"{by[w][1][score]:.3f}" for w in WEIGHTS]
        off = [f"{by[w][2][score]:.3f}" for w in WEIGHTS]
        goal = f"{kind.goal[score]:g}" if score in kind.goal else ""
        known = f"{best[score]:.3f}" if score in best else ""
        rows.append([*(about if i == 0 else [""] * 4), score, goal, known, *each, *off])
    some = [31 * k % len(raws) for k in range(SHOWN)]  # of different digits, where these are sorted or in turn
    return rows, {"raws": [raws[k] for k in some], "x": by[3.0][0][some], "name": name}


def draw(shown: Sequence[dict[str, Any]], path: Path) -> None:
    """Conditions above the samples that they were given, w = 3."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(15, 2.1 * math.ceil(len(shown) / 2)))
    panels = figure.subfigures(math.ceil(len(shown) / 2), 2).ravel()
    for panel, each in zip(panels, shown, strict=False):
        room = {"hspace": 0.06, "wspace": 0.06, "left": 0.02, "right": 0.98, "bottom": 0.02, "top": 0.88}
        axes = panel.subplots(2, SHOWN, gridspec_kw=room)
        panel.suptitle(each["name"], fontsize=11, y=0.98)
        for k in range(SHOWN):
            _condition(axes[0, k], each, k)
            picture = ((each["x"][k].clamp(-1, 1) + 1) / 2).permute(1, 2, 0).squeeze(-1).numpy()
            axes[1, k].imshow(picture, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        for ax in axes.ravel():
            ax.set_axis_off()
    figure.savefig(path, dpi=80)
    plt.close(figure)


def _condition(ax: Any, each: dict[str, Any], k: int) -> None:
    name, raw = each["name"], each["raws"][k]
    if name in ("text", "emoji"):
        import textwrap

        ax.text(0.5, 0.5, "\n".join(textwrap.wrap(raw.columns["text"], 14)), ha="center", va="center", fontsize=6.5)
    elif name == "class":
        ax.text(0.5, 0.5, str(raw.label), ha="center", va="center", fontsize=14)
    elif name == "depth":
        ax.imshow(raw.columns["depth"][0], cmap="gray_r", vmin=0, vmax=1)
    elif name == "segmentation":
        ax.imshow(raw.columns["segmentation"], cmap="tab10", vmin=0, vmax=9, interpolation="nearest")
    elif name == "image":
        low = torch.nn.functional.adaptive_avg_pool2d(torch.from_numpy(to_float(np.asarray(raw.x)))[None], 8)[0]
        ax.imshow(((low + 1) / 2).permute(1, 2, 0).numpy(), interpolation="nearest")
    else:
        ax.plot(raw.columns["audio"], lw=0.3, color="tab:blue")
        ax.text(0.03, 0.85, str(raw.label), fontsize=8, transform=ax.transAxes)


def main() -> None:
    """Train and measure the recipes that are named, else the six."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(KIND)}; default: all but emoji")
    parser.add_argument("--minilm", help="the folder of all-MiniLM-L6-v2, for emoji")
    parser.add_argument("--dry", action="store_true", help="print, and write nothing")
    asked = parser.parse_args()
    names = asked.names or list(KINDS)
    rows, shown = [], []
    for name in names:
        layer = {"cond": {"text": {"name": asked.minilm}}} if name == "emoji" and asked.minilm else {}
        found, pictures = measured(name, [layer])
        rows, shown = rows + found, [*shown, pictures]
        print(table(HEADER, found), flush=True)
    if not asked.dry and set(names) >= set(KINDS):
        draw(shown, HERE.parent / "docs" / "conditions.png")
        write("Samples follow their conditions", "make bench-conditions", table(HEADER, rows))
    elif not asked.dry:
        draw(shown, Path("runs") / f"conditions-{'-'.join(names)}.png")


HEADER = ["recipe", "CPU min", "steps x batch", "M parameters", "score", "goal", "real", "w = 1", "w = 3",
          "shuffled, w = 1", "w = 3 "]  # fmt: skip

if __name__ == "__main__":
    main()
