"""`Prepare`: from a stored sample to a tensor in the model's range; random choices depend on (seed, index) alone."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL.Image import Resampling
from torch import Tensor

from undiffuse.data.audio import decode_audio
from undiffuse.data.picture import SUFFIXES, cover, decode, header, peak, resized, to_float, with_channels
from undiffuse.data.source import Raw, Source, Stored, Unreadable
from undiffuse.data.statistics import Statistics
from undiffuse.seeds import seed_of, uniform
from undiffuse.types import InputError

CROP_Y, CROP_X, FLIP = 20, 21, 22  # streams of random numbers
_LONGEST = 32  # the aspect ratio above which resizing the shorter side would take all memory


class Example(NamedTuple):
    """One decoded sample: x (channels, *size) float32 in the model's range, its label, and its other columns.

    `depth` is (1, *size) float32, in [0, 1] where it was stored as whole numbers; `segmentation` (*size) whole numbers;
    `audio` (n,) float32 in [-1, 1], with `rate` in Hz; `text` a string. A column of another name that is a picture's
    file is (channels, ...) as stored: of the sample's own size, cropped and flipped with it, where the proportions are
    the same, and else as it is.
    """

    x: Tensor
    label: int | None
    columns: dict[str, Any]


class Draws(NamedTuple):
    """The random numbers in (0, 1) that place a sample's crop and decide on its flip."""

    y: float
    x: float
    flip: float


@dataclass(frozen=True)
class Prepare:
    """How samples become tensors.

    `size` is the side after cropping, the shorter side being resized to it (0: as they are); `crop` "center" or
    "random"; `flip` mirrors every second sample; `channels` 1, 3 or 4 (0: as they are); `normalize` "range" maps whole
    numbers to [-1, 1] and leaves floats, "channels" then takes (x - mean) / (2 std) of each channel of `statistics`
    (`settle` measures them). With `buckets`, aspect ratios width / height, a picture goes to the nearest and keeps an
    area of size * size, sides being multiples of `multiple`. Raises InputError for values out of range.
    """

    size: int = 0
    crop: str = "center"
    flip: bool = False
    channels: int = 0
    normalize: str = "range"
    buckets: tuple[float, ...] = ()
    multiple: int = 8
    statistics: Statistics | None = None

    def __post_init__(self) -> None:
        for name, ok, wanted in (
            ("size", 0 <= self.size <= 16384, "0 (as they are) or at most 16384"),
            ("crop", self.crop in ("center", "random"), "center or random"),
            ("channels", self.channels in (0, 1, 3, 4), "0 (as they are), 1, 3 or 4"),
            ("normalize", self.normalize in ("range", "channels"), "range or channels"),
            ("buckets", all(0.1 <= a <= 10 for a in self.buckets), "aspect ratios width / height in [0.1, 10]"),
            ("multiple", self.multiple >= 1, "at least 1"),
        ):
            if not ok:
                raise InputError(f"data.{name} = {getattr(self, name)!r}: expected {wanted}")
        if self.buckets and not self.size:
            raise InputError("data.buckets needs data.size: the area of a bucket is size * size")

    def plain(self) -> Prepare:
        """The form for evaluation: centre crop, no flip, one shape."""
        return replace(self, crop="center", flip=False, buckets=())

    def shapes(self) -> list[tuple[int, int]]:
        """The (height, width) of each bucket."""
        return [self._shape(a) for a in self.buckets]

    def _shape(self, aspect: float) -> tuple[int, int]:
        sides = self.size / math.sqrt(aspect), self.size * math.sqrt(aspect)
        height, width = (max(1, math.floor(s / self.multiple + 0.5)) * self.multiple for s in sides)
        return height, width

    def bucket(self, height: int, width: int) -> int:
        """The bucket whose aspect ratio is nearest (of logarithms) to that of a picture."""
        aspect = math.log(width / height)
        return min(range(len(self.buckets)), key=lambda b: abs(math.log(self.buckets[b]) - aspect))

    def target(self, height: int, width: int) -> tuple[int, int]:
        """The (height, width) that a picture is cropped to."""
        if self.buckets:
            return self._shape(self.buckets[self.bucket(height, width)])
        return (self.size, self.size) if self.size else (height, width)

    def decode(self, raw: Raw) -> Raw:
        """The part without random choices: arrays of the right channels, just large enough to crop from.

        Decoding what is decoded changes nothing. Raises Unreadable.
        """
        if raw.target is not None:
            return raw
        target = self.target(*_size(raw)) if self.size else None
        x = raw.x if isinstance(raw.x, np.ndarray) else decode(raw.x, raw.where, max(target) if target else 0)
        if x.ndim != 3 and (self.size or self.channels or self.flip):
            raise InputError(
                f"{raw.where}: data.size, data.channels and data.flip are for pictures, not for samples of shape "
                f"{x.shape}; leave them out"
            )
        if x.ndim == 3:
            x = with_channels(x, self.channels, raw.where)
        if target is not None:
            if max(x.shape[1:]) > _LONGEST * min(x.shape[1:]):
                raise Unreadable(
                    raw.where, f"{x.shape[2]} x {x.shape[1]} pixels: more than {_LONGEST} times as long as wide"
                )
            x = resized(x, cover(x.shape[1], x.shape[2], target), Resampling.LANCZOS)
        columns = {k: v for name, value in raw.columns.items() for k, v in _column(name, value, x, raw.where)}
        return Raw(x, raw.label, columns, raw.where, target)

    def __call__(self, raw: Raw, index: int, seed: int) -> Example:
        """The sample at global index `index` of a run with `seed`; raises Unreadable, InputError."""
        return self.finish(self.decode(raw), *self.draws(torch.tensor([index]), seed))

    def draws(self, index: Tensor, seed: int) -> list[Draws]:
        """The random numbers of each global index (b,)."""
        half = torch.full(index.shape, 0.5)
        used = (CROP_Y, self.crop == "random"), (CROP_X, self.crop == "random"), (FLIP, self.flip)
        columns = [uniform(seed_of(seed, stream), index) if on else half for stream, on in used]
        return [Draws(*row) for row in zip(*(c.tolist() for c in columns), strict=True)]

    def finish(self, raw: Raw, draws: Draws) -> Example:
        """A decoded sample, cropped, flipped and normalised; raises Unreadable, InputError."""
        x, columns = self._augmented(raw, draws)
        values = to_float(x)
        if x.dtype.kind == "f" and not np.isfinite(values).all():
            raise Unreadable(raw.where, "NaN or infinite values")
        y = torch.from_numpy(np.ascontiguousarray(values))
        if self.normalize == "channels":
            if self.statistics is None:
                raise InputError('data.normalize = "channels" needs statistics: prepare, _ = settle(source, prepare)')
            y = self.statistics.apply(y)
        return Example(y, raw.label, columns)

    def restore(self, x: Tensor) -> Tensor:
        """The inverse of normalisation, for samples x (..., channels, *size) of a model; the identity for "range"."""
        return self.statistics.restore(x) if self.normalize == "channels" and self.statistics else x

    def _augmented(self, raw: Raw, draws: Draws) -> tuple[np.ndarray, dict[str, Any]]:
        x, columns = np.asarray(raw.x), dict(raw.columns)
        spatial: dict[str, np.ndarray] = {"": x, **{k: v for k, v in columns.items() if _along(k, v, x)}}
        if raw.target is not None:
            top, left = (
                self._offset(n - m, draw) for n, m, draw in zip(x.shape[1:], raw.target, draws[:2], strict=True)
            )
            rows, cols = slice(top, top + raw.target[0]), slice(left, left + raw.target[1])
            spatial = {k: v[..., rows, cols] for k, v in spatial.items()}
        if self.flip and draws.flip < 0.5:
            spatial = {k: v[..., ::-1] for k, v in spatial.items()}
        x = spatial.pop("")
        return x, {**columns, **{k: np.ascontiguousarray(v) for k, v in spatial.items()}}

    def _offset(self, room: int, draw: float) -> int:
        """Where the crop starts, in 0, ..., room."""
        return room // 2 if self.crop == "center" else min(room, int(draw * (room + 1)))


def _size(raw: Raw) -> tuple[int, int]:
    """(height, width) of a picture as shown."""
    if isinstance(raw.x, np.ndarray):
        return (int(raw.x.shape[-2]), int(raw.x.shape[-1])) if raw.x.ndim > 2 else (1, int(raw.x.shape[-1]))
    return header(raw.x, raw.where)


def _column(name: str, value: Any, x: np.ndarray, where: str) -> list[tuple[str, Any]]:
    """The decoded column, maps being of the picture's size."""
    if name == "depth":
        return [(name, _depth(value, x, where))]
    if name == "segmentation":
        return [(name, _segmentation(value, x, where))]
    if name == "audio" and isinstance(value, (bytes, Path)):
        samples, rate = decode_audio(value, f"{where} (audio)")
        return [(name, samples), ("rate", rate)]
    if name == "audio" and isinstance(value, np.ndarray):
        return [(name, value.astype(np.float32))]
    if isinstance(value, Path) and value.suffix.lower() in SUFFIXES:
        return [(name, _picture(value, x, f"{where} ({name})"))]
    return [(name, value)]


def _along(name: str, value: Any, x: np.ndarray) -> bool:
    """Whether a column is cropped and flipped with the sample: maps, and pictures of its size."""
    map_like = isinstance(value, np.ndarray) and value.ndim == x.ndim == 3 and value.shape[1:] == x.shape[1:]
    return name in ("depth", "segmentation") or map_like


def _picture(value: Path, x: np.ndarray, where: str) -> np.ndarray:
    found = decode(value, where)
    found = with_channels(found, 3 if len(found) == 4 else 0, where)
    if x.ndim != 3 or not _proportional(found, x):
        return found
    return resized(found, x.shape[1:], Resampling.LANCZOS)


def _proportional(found: np.ndarray, x: np.ndarray) -> bool:
    return abs(math.log(found.shape[1] / found.shape[2] * x.shape[2] / x.shape[1])) <= 0.05


def stored(value: bytes | Path, where: str, indices: bool = False) -> np.ndarray:
    """A picture (channels, height, width), or the array of a .npy file. Raises Unreadable."""
    if not isinstance(value, Path) or value.suffix.lower() != ".npy":
        return decode(value, where, indices=indices)
    try:
        found: np.ndarray = np.load(value, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise Unreadable(where, str(error)) from error
    return found


def _map(value: Stored, x: np.ndarray, where: str, indices: bool = False) -> np.ndarray:
    """A map (c, height, width) that fits the picture."""
    if not isinstance(value, (bytes, Path, np.ndarray)):
        raise Unreadable(where, f"expected a file or an array, got {value!r}")
    found = value if isinstance(value, np.ndarray) else stored(value, where, indices)
    found = found[None] if found.ndim == x.ndim - 1 else found
    if found.ndim != x.ndim or (x.ndim != 3 and found.shape[1:] != x.shape[1:]):
        raise Unreadable(where, f"shape {found.shape} does not fit a sample of shape {x.shape}")
    if x.ndim == 3 and not _proportional(found, x):
        raise Unreadable(where, f"{found.shape[2]} x {found.shape[1]} is another aspect ratio than the picture's")
    return found


def _depth(value: Stored, x: np.ndarray, where: str) -> np.ndarray:
    found = _map(value, x, where := f"{where} (depth)")
    found = as_depth(found, where)
    return resized(found, x.shape[1:], Resampling.BILINEAR) if x.ndim == 3 else found


def as_depth(found: np.ndarray, where: str) -> np.ndarray:
    """Depth (1, *size) float32 of what was stored (c, *size): whole numbers are shares of their type's largest."""
    found = with_channels(found, 1, where)
    return np.asarray(found / peak(found.dtype), np.float32)


def _segmentation(value: Stored, x: np.ndarray, where: str) -> np.ndarray:
    found = _map(value, x, where := f"{where} (segmentation)", indices=True)
    if len(found) != 1 or not np.issubdtype(found.dtype, np.integer):
        raise Unreadable(where, f"{found.shape[0]} channels of {found.dtype}; expected one channel of class numbers")
    found = resized(found, x.shape[1:], Resampling.NEAREST) if x.ndim == 3 else found
    return np.asarray(found[0], np.int64)


def bucket_of(source: Source, prepare: Prepare) -> Tensor:
    """(n,) the bucket of every sample, from headers alone; unreadable ones count as of bucket 0."""
    out = torch.zeros(len(source), dtype=torch.long)
    for i in range(len(source)):
        try:
            out[i] = prepare.bucket(*_size(source.read(i)))
        except Unreadable:
            continue
    return out
