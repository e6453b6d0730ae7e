"""Built-in feature networks: small classifiers, trained by `recipes/features.py` and pinned by their hash."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import safetensors.torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, pixel_unshuffle, silu

from undiffuse.types import InputError

WEIGHTS = Path(__file__).parent / "weights"
FEATURES = 64
WIDTHS = (32, 64, 96)  # channels of the stem and of each block


@dataclass(frozen=True)
class Pinned:
    """A trained classifier: its file's hash, a sample's shape, the number of classes, its accuracy on its `test`."""

    sha256: str
    shape: tuple[int, int, int]
    classes: int
    accuracy: float
    test: str


CLASSIFIERS: dict[str, Pinned] = {
    "digits": Pinned(
        sha256="87d4fcc0cb570872f085c9f5ee55116393ad2ac93022960b2c91e9cfb18e2905",
        shape=(1, 8, 8),
        classes=10,
        accuracy=0.9937,
        test="797 samples held out",
    ),
    "mnist": Pinned(
        sha256="22cc1727fb3b38a843d0b3e0133596b4f7facb8801b7e9b64fabb790c30db69d",
        shape=(1, 28, 28),
        classes=10,
        accuracy=0.9965,
        test="its 10,000 test samples",
    ),
    "fashion-mnist": Pinned(
        sha256="39abbb039b2713adb98aae199d7e3bc3ebeec7bd47e6b9ab254c5544df1c4bfe",
        shape=(1, 28, 28),
        classes=10,
        accuracy=0.9222,
        test="its 10,000 test samples",
    ),
    "emoji": Pinned(
        sha256="1caaf98eab6485febe7007bb0c5f9719f5622a78c3843dd2385b0e5f25671865",
        shape=(3, 32, 32),
        classes=1885,
        accuracy=0.9964,
        test="5 fresh distortions of each",
    ),
}


class _Block(nn.Module):
    """Halves each side by averaging, then two convolutions beside a shortcut."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(channels, out, 3, padding=1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.norm2 = nn.Conv2d(out, out, 3, padding=1, bias=False), nn.BatchNorm2d(out)
        self.skip = nn.Conv2d(channels, out, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = avg_pool2d(x, 2)
        h = silu(self.norm1(self.conv1(x)))
        return silu(self.skip(x) + self.norm2(self.conv2(h)))


class Classifier(nn.Module):
    """A residual network from pictures (n, *shape) in [-1, 1] to logits (n, classes); `names` are the classes.

    As loaded it is in eval mode: batch norm is then a fixed scale and shift, so a sample's result does not depend on
    its batch. Raises InputError for samples of another shape.

    >>> import torch
    >>> Classifier((1, 28, 28), ("a", "b", "c"))(torch.zeros(2, 1, 28, 28)).shape
    torch.Size([2, 3])
    """

    def __init__(self, shape: tuple[int, int, int], names: tuple[str, ...]) -> None:
        super().__init__()
        self.shape, self.names, self.patch = shape, names, 2 if shape[1] > 16 else 1  # halves large pictures at once
        channels, out = shape[0] * self.patch**2, WIDTHS[0]
        self.stem, self.norm = nn.Conv2d(channels, out, 3, padding=1, bias=False), nn.BatchNorm2d(out)
        self.blocks = nn.Sequential(*(_Block(a, b) for a, b in pairwise(WIDTHS)))
        self.narrow, self.norm_out = nn.Conv2d(WIDTHS[-1], FEATURES, 1, bias=False), nn.BatchNorm2d(FEATURES)
        self.head = nn.Linear(FEATURES, len(names))

    def features(self, x: Tensor) -> Tensor:
        """The penultimate layer (n, 64): channels of the last convolution, averaged over the picture."""
        if x.ndim != 4 or tuple(x.shape[1:]) != self.shape:
            raise InputError(
                f"samples of shape {tuple(x.shape)}; this classifier reads (n, {', '.join(map(str, self.shape))}): "
                "resize them, or take another classifier"
            )
        h = self.blocks(silu(self.norm(self.stem(pixel_unshuffle(x, self.patch)))))
        return silu(self.norm_out(self.narrow(h))).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(x))
        return logits


def load_classifier(name: str) -> Classifier:
    """The trained classifier `name` of `CLASSIFIERS`, in eval mode and without gradients.

    Raises InputError for unknown names and for a weight file that is missing or is not the one of the table.

    >>> load_classifier("digits").names
    ('0', '1', '2', '3', '4', '5', '6', '7', '8', '9')
    """
    if name not in CLASSIFIERS:
        raise InputError(f"no classifier is named {name!r}; there are {', '.join(CLASSIFIERS)}")
    known, path = CLASSIFIERS[name], WEIGHTS / f"{name}.safetensors"
    if not path.is_file():
        raise InputError(f"{path} is missing: install undiffuse again, or train it by recipes/features.py {name}")
    content = path.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != known.sha256:
        raise InputError(
            f"{path} has SHA-256 {found}; expected {known.sha256}: install undiffuse again, else scores do not compare"
        )
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    net = Classifier(known.shape, tuple(json.loads(header["__metadata__"]["names"])))
    net.load_state_dict(safetensors.torch.load(content))
    return net.eval().requires_grad_(False)
