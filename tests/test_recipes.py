"""The recipes of conditions at the size of a test: few samples and steps; what they learn, shuffling destroys."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from undiffuse.config import Config
from undiffuse.data import Subset, open_source
from undiffuse.data.depth import solid_scenes
from undiffuse.data.scenes import Scene, Thing, render, scenes
from undiffuse.edit import Inpaint, edit
from undiffuse.fit import fit
from undiffuse.model import Model
from undiffuse.rundata import RunData

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from conditions import KIND, KINDS, RECIPES, held_out

# samples to train on; steps of 32; and how far each score at w = 1 must be above that of shuffled conditions
SIZE = {
    "class": (0, 150, {"read as asked": 0.4}),
    "text": (400, 100, {"colour": 0.3}),
    "image": (400, 40, {"correlation": 0.7, "colour": 0.4}),
    "depth": (400, 60, {"correlation": 0.25, "iou": 0.1}),
    "segmentation": (400, 40, {"iou": 0.3}),
    "audio": (400, 250, {"read as asked": 0.3}),
}
TEST = 64


def coloured(n):
    """One thing a picture, in the middle, of six colours and four shapes: what a minute can learn of captions."""
    g, out = np.random.default_rng(0), []
    for _ in range(n):
        colour = ("red", "green", "blue", "yellow", "magenta", "cyan")[g.integers(6)]
        shape = ("circle", "square", "triangle", "cross")[g.integers(4)]
        picture, _ = render(Scene((Thing(colour, shape, "large", 0.5, 0.5),)), 32)
        out.append((picture, {"text": f"a large {colour} {shape} in the middle"}))
    return out


def written(name, n, path):
    """n samples of a recipe's data as one file."""
    if name == "audio":
        return sung(n, path)
    source = {"depth": solid_scenes, "image": scenes, "segmentation": scenes}.get(name)
    raws = [source().read(i) for i in range(n)] if source else []
    pairs = coloured(n) if name == "text" else [(raw.x, raw.columns) for raw in raws]
    columns = {key: np.stack([np.asarray(each[key]) for _, each in pairs]) for key in pairs[0][1]}
    np.savez(path, x=np.stack([x for x, _ in pairs]), **columns)
    return str(path)


def sung(n, path):
    """n handwritten digits, each with a tone whose pitch says it, of any loudness and phase, in a little noise."""
    digits, g, rate = open_source("digits"), np.random.default_rng(0), 22_050
    raws = [digits.read(i) for i in range(n)]
    at = np.arange(rate // 2) / rate
    tones = [g.uniform(0.3, 0.9) * np.sin(2 * np.pi * 300 * (raw.label + 1) * at + g.uniform(0, 6)) for raw in raws]
    audio = np.stack(tones) + 0.01 * g.normal(size=(n, len(at)))
    labels = np.array([raw.label for raw in raws])
    np.savez(path, x=np.stack([raw.x for raw in raws]), labels=labels, audio=audio, rate=np.full(n, rate))
    return str(path)


@pytest.mark.parametrize("name", KINDS)
def test_a_recipe_learns_what_its_conditions_say(name, tmp_path):
    many, steps, above = SIZE[name]
    train = {"steps": steps, "batch": 32, "warmup": 10}
    layer = {"out": str(tmp_path / name), "held_out": TEST, "train": train, "sample": {"steps": 10}}
    if many:
        layer["data"] = {"name": written(name, many + TEST, tmp_path / f"{name}.npz")}
        layer["net"] = {"width": 64 if name == "audio" else 32}
    config = Config.resolve(Config.read(RECIPES / f"{name}.toml"), layer)
    fit(config)
    model, data = Model.load(tmp_path / name), RunData.of(config)
    raws, told = data_of(data, model, many)
    x = model.sample(len(raws), given=told, guidance=1.0, seed=1)
    found, off = KIND[name].score(x, raws), KIND[name].score(x, [*raws[7:], *raws[:7]])
    for score, margin in above.items():
        assert found[score] > off[score] + margin, (score, found, off)


def data_of(data, model, many):
    """Held-out samples as they are stored, with their conditions."""
    if many:
        stored = open_source(str(data.source.source.where))
        order = np.random.default_rng(0).permutation(len(stored))[:TEST]
        part = Subset(stored, order)
        return [part.read(i) for i in range(TEST)], data.held_out.cond
    return held_out(model, TEST)


def test_the_recipe_for_filling_in_learns_to(tmp_path):
    """On digits: the hidden middle is nearer to the truth where what is known is theirs than where it is another's."""
    layer = {"out": str(tmp_path / "inpaint"), "held_out": TEST, "data": {"name": "digits"}, "sample": {"steps": 10}}
    layer |= {"train": {"steps": 200, "batch": 32, "warmup": 10}, "net": {"width": 32}}
    config = Config.resolve(Config.read(RECIPES / "inpaint.toml"), layer)
    fit(config)
    model, x = Model.load(tmp_path / "inpaint"), RunData.of(config).held_out.x
    known = torch.ones(1, 1, 8, 8)
    known[..., 2:6, 2:6] = 0
    own, other = (
        edit(model, pictures, Inpaint(known, by="net"), seed=1).results["result"] for pictures in (x, x.roll(7, 0))
    )
    error, off = (float((found - x)[..., 2:6, 2:6].square().mean()) for found in (own, other))
    here = known.expand_as(x) == 1
    assert torch.equal(own[here], x[here])
    assert error < 0.8 * off, (error, off)


def test_every_recipe_of_the_benchmark_says_what_it_is_told():
    for name in (*KINDS, "emoji"):
        config = Config.resolve(Config.read(RECIPES / f"{name}.toml"))
        assert list(config.values["cond"]) == [{"class": "label", "emoji": "text"}.get(name, name)]
        assert config.values["out"] == f"runs/{name}"
