"""Trains the feature networks of `undiffuse evaluate`, or measures the accuracy of those that are shipped.

    python recipes/features.py [digits] [mnist] [fashion-mnist] [emoji]   # train, write the weights, print their lines
    python recipes/features.py --check [names...]                         # the shipped weights on their tests
    python recipes/features.py mnist --path FOLDER                        # where the data is not at its usual place

The shipped weights are what OMP_NUM_THREADS=1 gave; another processor or number of threads rounds otherwise.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from arguments import given
from safetensors.torch import save
from torch import Tensor
from torch.nn.functional import affine_grid, avg_pool2d, cross_entropy, grid_sample, interpolate, pad
from torch.nn.utils import convert_conv2d_weight_memory_format
from torch.optim.lr_scheduler import OneCycleLR

from undiffuse.data import materialise, open_source, split
from undiffuse.data.emoji import drawn
from undiffuse.evals.classifier import CLASSIFIERS, WEIGHTS, Classifier, Pinned, load_classifier

LARGEST = 2_000_000
FRESH = 5  # distorted views of each emoji in its test


@dataclass(frozen=True)
class Distort:
    """Random changes of a picture: `shift` in pixels, `turn` in degrees, `scale` and `bend` relative to its size.

    `colour` is the deviation of each channel's gain and offset; with it come blur and noise.
    """

    shift: int = 0
    turn: float = 0.0
    scale: float = 0.0
    bend: float = 0.0
    flip: bool = False
    colour: float = 0.0

    def __call__(self, x: Tensor) -> Tensor:
        n, channels, side, _ = x.shape
        angle = self._uniform(n) * math.radians(self.turn)
        size = torch.exp(self._uniform(n) * self.scale)
        mirror = 1 - 2 * torch.randint(0, 2, (n,)) if self.flip else torch.ones(n)
        move = torch.randint(-self.shift, self.shift + 1, (2, n)) * 2 / side  # whole pixels: exact without a turn
        cos, sin = torch.cos(angle) / size, torch.sin(angle) / size
        rows = [mirror * cos, -mirror * sin, move[0]], [sin, cos, move[1]]
        matrix = torch.stack([torch.stack(row, 1) for row in rows], 1)
        grid = affine_grid(matrix, [n, channels, side, side], align_corners=False)
        if self.bend:
            field = interpolate(torch.randn(n, 2, 4, 4) * self.bend, (side, side), mode="bicubic", align_corners=True)
            grid = grid + field.permute(0, 2, 3, 1)
        x = grid_sample(x, grid, mode="bicubic", padding_mode="border", align_corners=False).clamp(-1, 1)
        return self._coloured(x)

    @staticmethod
    def _uniform(*shape: int) -> Tensor:
        return 2 * torch.rand(shape) - 1

    def _coloured(self, x: Tensor) -> Tensor:
        if not self.colour:
            return x
        n, channels = x.shape[:2]
        gain = 1 + self.colour * torch.randn(n, channels, 1, 1)
        x = gain * x + self.colour * torch.randn(n, channels, 1, 1)
        soft = avg_pool2d(pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
        x = torch.lerp(x, soft, torch.rand(n, 1, 1, 1))
        return (x + 0.1 * torch.rand(n, 1, 1, 1) * torch.randn_like(x)).clamp(-1, 1)


@dataclass(frozen=True)
class Recipe:
    """How a network is trained, and what its test is called."""

    epochs: int
    distort: Distort
    test: str
    held_out: int = 10_000
    batch: int = 256
    rate: float = 0.1
    decay: float = 5e-4
    smooth: float = 0.1


RECIPES = {
    "digits": Recipe(
        epochs=200,
        distort=Distort(shift=1, turn=12, scale=0.1, bend=0.05),
        test="797 samples held out",
        held_out=797,
        batch=50,
        rate=0.05,
    ),
    "mnist": Recipe(8, Distort(shift=2, turn=12, scale=0.12, bend=0.05), "its 10,000 test samples"),
    "fashion-mnist": Recipe(20, Distort(shift=2, flip=True), "its 10,000 test samples"),
    "emoji": Recipe(450, Distort(shift=3, turn=10, scale=0.15, colour=0.1), f"{FRESH} fresh distortions of each"),
}


@dataclass(frozen=True)
class Task:
    """Training and test samples in [-1, 1] with their labels, and the names of the classes."""

    x: Tensor
    labels: Tensor
    test_x: Tensor
    test_labels: Tensor
    names: tuple[str, ...]


def task(name: str, path: str | None) -> Task:
    """The data of a network; raises InputError where it is missing."""
    if name == "emoji":
        return emoji_task(path)
    source, held = split(open_source(name, path), RECIPES[name].held_out)
    train = materialise(source)
    assert train.labels is not None
    assert held.labels is not None
    return Task(train.x, train.labels, held.x, held.labels, source.classes)


def emoji_task(path: str | None) -> Task:
    """Every distinct picture, the test's among them, is a class, at 32x32 pixels; some flags are equal, and
    count once."""
    source = drawn(64, None if path is None else Path(path))
    data = materialise(source)
    first: dict[bytes, int] = {}
    for i, x in enumerate(data.x):
        first.setdefault(x.numpy().tobytes(), i)
    chosen = list(first.values())
    x, labels = avg_pool2d(data.x[chosen], 2), torch.arange(len(chosen))
    torch.manual_seed(1)
    fresh = torch.cat([RECIPES["emoji"].distort(x) for _ in range(FRESH)])
    names = tuple(str(source.read(i).columns["text"]) for i in chosen)
    return Task(x, labels, fresh, labels.repeat(FRESH), names)


def accuracy(net: Classifier, x: Tensor, labels: Tensor) -> float:
    """The share of samples whose largest logit is that of their label."""
    with torch.no_grad():
        found = torch.cat([net(part).argmax(1) for part in x.split(500)])
    return float((found == labels).float().mean())


def train(name: str, data: Task) -> Classifier:
    """Stochastic gradient descent with momentum, one cycle of its rate, in bfloat16; always the last weights."""
    recipe = RECIPES[name]
    torch.manual_seed(0)
    _, channels, height, width = data.x.shape
    net = Classifier((channels, height, width), data.names)
    convert_conv2d_weight_memory_format(net, torch.channels_last)
    decayed = [p for p in net.parameters() if p.ndim > 1]
    others = [p for p in net.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": recipe.decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=recipe.rate, momentum=0.9, nesterov=True)
    steps = len(data.x) // recipe.batch
    cycle = OneCycleLR(optimizer, recipe.rate, recipe.epochs * steps, pct_start=0.2)
    begun = time.monotonic()
    for epoch in range(recipe.epochs):
        total = torch.zeros(())
        for ids in torch.randperm(len(data.x))[: steps * recipe.batch].split(recipe.batch):
            x = recipe.distort(data.x[ids]).contiguous(memory_format=torch.channels_last)
            with torch.autocast("cpu", torch.bfloat16):
                loss = cross_entropy(net(x).float(), data.labels[ids], label_smoothing=recipe.smooth)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            cycle.step()
            total += loss.detach()
        if (epoch + 1) % max(1, recipe.epochs // 20) == 0:
            print(f"{name}: epoch {epoch + 1}, loss {total / steps:.4f}, {time.monotonic() - begun:.0f} s", flush=True)
    return net.eval()


def store(name: str, net: Classifier, found: float) -> None:
    """Writes the weights and prints their line of `CLASSIFIERS`."""
    state = {key: value.contiguous() for key, value in net.state_dict().items()}
    content = save(state, {"names": json.dumps(net.names)})
    if len(content) > LARGEST:
        raise SystemExit(f"{name}: {len(content)} bytes of weights; at most {LARGEST} may be shipped")
    WEIGHTS.mkdir(exist_ok=True)
    (WEIGHTS / f"{name}.safetensors").write_bytes(content)
    recipe, parameters = RECIPES[name], sum(p.numel() for p in net.parameters())
    down = math.floor(found * 1e4) / 1e4
    pin = Pinned(hashlib.sha256(content).hexdigest(), net.shape, len(net.names), down, recipe.test)
    print(f"{name}: accuracy {found:.4%} on {recipe.test}; {parameters} parameters, {len(content)} bytes")
    print(f'    "{name}": {pin},', flush=True)


def check(name: str, data: Task) -> None:
    """Prints the accuracy of the shipped weights, on those classes that both they and the data know."""
    net = load_classifier(name)
    place = {known: i for i, known in enumerate(net.names)}
    labels = torch.tensor([place.get(known, -1) for known in data.names])[data.test_labels]
    found = accuracy(net, data.test_x[labels >= 0], labels[labels >= 0])
    print(f"{name}: accuracy {found:.4%} on {RECIPES[name].test}; stated {CLASSIFIERS[name].accuracy:.2%}", flush=True)


def main() -> None:
    asked, mistakes = given(
        __doc__, RECIPES, "measure the shipped weights", "the folder of the data (emoji: the font file)"
    )
    for name in asked.names:
        with mistakes():
            data = task(name, asked.path)
        if asked.check:
            check(name, data)
        else:
            net = train(name, data)
            store(name, net, accuracy(net, data.test_x, data.test_labels))


if __name__ == "__main__":
    main()
