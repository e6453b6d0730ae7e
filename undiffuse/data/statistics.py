"""`Statistics`: mean and deviation of every channel, measured once and stored with the run."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from undiffuse.data.source import Source, Unreadable, choice
from undiffuse.types import InputError

if TYPE_CHECKING:
    from undiffuse.data.prepare import Prepare

LIMIT = 10_000  # samples that are enough to measure a mean


@dataclass(frozen=True)
class Statistics:
    """Of `count` samples of `shape` (channels, *size): each channel's mean and std, the `low`est and `high`est value.

    >>> s = Statistics((1.0,), (0.25,), (1, 8, 8), 9, 0.0, 2.0)
    >>> float(s.apply(torch.full((1, 8, 8), 1.5))[0, 0, 0]), s == Statistics.from_json(s.to_json())
    (1.0, True)
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    shape: tuple[int, ...]
    count: int
    low: float = -1.0
    high: float = 1.0

    def _columns(self, x: Tensor) -> tuple[Tensor, Tensor]:
        view = (-1,) + (1,) * (len(self.shape) - 1)
        mean, std = (torch.tensor(v, dtype=torch.float32, device=x.device).view(view) for v in (self.mean, self.std))
        return mean, 2 * std.clamp_min(1e-8)

    def apply(self, x: Tensor) -> Tensor:
        """(x - mean) / (2 std) of each channel: std 1/2, as pictures in [-1, 1] have; x (..., channels, *size)."""
        mean, scale = self._columns(x)
        return (x - mean) / scale

    def restore(self, x: Tensor) -> Tensor:
        """The inverse of `apply`."""
        mean, scale = self._columns(x)
        return x * scale + mean

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Statistics:
        """What `to_json` wrote; raises InputError."""
        try:
            raw: dict[str, Any] = json.loads(text)
            mean, std, shape = (tuple(raw[k]) for k in ("mean", "std", "shape"))
            return cls(mean, std, shape, int(raw["count"]), float(raw["low"]), float(raw["high"]))
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"not statistics of data: {error}; delete the file to measure them again") from error

    def warnings(self) -> list[str]:
        """What looks wrong with samples that should lie in [-1, 1] with channels first, and what to do."""
        out = []
        reach, std = max(abs(self.low), abs(self.high)), max(self.std)
        if reach > 10 or std > 3 or std < 0.05:
            out.append(
                f"values lie in [{self.low:.4g}, {self.high:.4g}] with standard deviation {std:.3g}, far from [-1, 1]: "
                "set data.normalize=channels, or scale them"
            )
        elif self.low >= 0 and 0.5 < self.high <= 1:
            out.append(
                f"values lie in [{self.low:.4g}, {self.high:.4g}], not in [-1, 1]: give 2 x - 1, bytes, or "
                "data.normalize=channels"
            )
        if len(self.shape) == 2 and self.shape[0] > 4 and self.shape[1] < 4 * self.shape[0]:
            out.append(
                f"samples of shape {self.shape} are taken for signals of {self.shape[1]} values with {self.shape[0]} "
                f"channels; grey pictures are (n, 1, {self.shape[0]}, {self.shape[1]}), x[:, None]"
            )
        return out

    def refuse(self, name: str) -> None:
        """InputError for pictures whose channels come last, since a network would take rows for channels."""
        if len(self.shape) == 3 and self.shape[-1] in (1, 3, 4) and self.shape[0] > 4 and self.shape[1] > 1:
            raise InputError(
                f"{name}: samples of shape {self.shape} look like channels last: save them as (n, {self.shape[2]}, "
                f"{self.shape[0]}, {self.shape[1]}), x.transpose(0, 3, 1, 2)"
            )


def measure(source: Source, prepare: Prepare, limit: int = LIMIT, seed: int = 0) -> Statistics:
    """Statistics of at most `limit` samples, cropped at the centre, before `normalize`; unreadable ones are left out.

    The choice is fixed by `seed`; of shards, whole ones. Raises InputError if shapes differ or nothing can be read.
    """
    plain = replace(prepare.plain(), normalize="range", statistics=None)
    total = mean = squares = torch.zeros(())
    shape: tuple[int, ...] = ()
    count, low, high = 0, float("inf"), float("-inf")
    for i in choice(source, limit, seed):
        try:
            x = plain(source.read(i), 0, 0).x
        except Unreadable as error:
            last = error
            continue
        if not shape:
            shape, total = tuple(x.shape), torch.zeros(len(x), dtype=torch.float64)
            mean = squares = torch.zeros_like(total)
        if tuple(x.shape) != shape:
            raise InputError(shapes_differ(source.name, shape, tuple(x.shape)))
        flat = x.flatten(1).double()
        here, count = flat.mean(1), count + 1
        step = here - mean
        mean = mean + step / count  # Chan et al. 1979: every sample has as many values
        squares = squares + flat.var(1, correction=0) + step.square() * (count - 1) / count
        low, high = min(low, float(x.min())), max(high, float(x.max()))
    if not count:
        raise InputError(f"{source.name}: no sample can be read; the last: {last}")
    std = (squares / count).sqrt()
    return Statistics(tuple(mean.tolist()), tuple(std.tolist()), shape, count, low, high)


def shapes_differ(name: str, one: tuple[int, ...], other: tuple[int, ...]) -> str:
    """The message for samples of two shapes."""
    return f"{name}: samples of shapes {one} and {other}; one shape is needed: set data.size (and data.channels)"


def settle(source: Source, prepare: Prepare) -> tuple[Prepare, Statistics]:
    """(prepare, statistics): channels 0 becomes the most frequent number, normalize="channels" gets what it needs.

    At most 10,000 samples are read; 1,000 where the statistics only serve their warnings.
    """
    if not prepare.channels:
        prepare = replace(prepare, channels=_channels(source, prepare))
    found = measure(source, prepare, LIMIT if prepare.normalize == "channels" else LIMIT // 10)
    return replace(prepare, statistics=found if prepare.normalize == "channels" else None), found


def _channels(source: Source, prepare: Prepare) -> int:
    """The most frequent number of channels among 100 samples; 0 where the samples are arrays."""
    seen: dict[int, int] = {}
    for i in choice(source, 100, 1):
        try:
            raw = source.read(i)
            if not isinstance(raw.x, np.ndarray):
                channels = len(np.asarray(prepare.decode(raw).x))
                seen[channels] = seen.get(channels, 0) + 1
        except Unreadable:
            continue
    return max(seen, key=lambda c: (seen[c], c)) if seen else 0
