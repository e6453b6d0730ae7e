"""Captioned scenes of simple shapes, a function of (seed, index); and the reader that scores pictures by captions."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import permutations
from pathlib import Path

import numpy as np

from undiffuse.data.drawn import Drawn
from undiffuse.data.picture import to_float
from undiffuse.data.source import Raw
from undiffuse.types import InputError

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255),
           "yellow": (255, 255, 0), "magenta": (255, 0, 255), "cyan": (0, 255, 255)}  # fmt: skip
BACKGROUND = (128, 128, 128)  # zero in [-1, 1], and as far from each colour as from the others
SHAPES = {"circle": 1.0, "square": 1.25, "triangle": 1.3, "cross": 1.26}  # and the radius around each, in sizes
SIZES = {"small": 0.1, "large": 0.16}  # in sides of the picture
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}  # y points down
PLACES = {"on the left": (-1, 0), "on the right": (1, 0), "at the top": (0, -1), "at the bottom": (0, 1),
          "in the middle": (0, 0)}  # fmt: skip
HELD_OUT = frozenset({("red", "square"), ("green", "triangle"), ("blue", "cross"), ("yellow", "circle")})
_PAIRS = tuple((c, s) for c in COLOURS for s in SHAPES if (c, s) not in HELD_OUT)
_PALETTE = np.array([BACKGROUND, *COLOURS.values()], np.uint8)
_FINE = 8  # samples of a pixel along each axis
_GAP = 0.05  # between two shapes, in sides
_PHASES = 4  # positions within a pixel, along each axis, at which the reader tries a shape
_TRIES = 200
_THING = rf"an? (?:({'|'.join(SIZES)}) )?({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})"
_BETWEEN = rf"({'|'.join(RELATIONS)})"
_GRAMMAR = re.compile(rf"{_THING}(?: ({'|'.join(PLACES)})| {_BETWEEN} {_THING}(?:, which is {_BETWEEN} {_THING})?)?")


@dataclass(frozen=True)
class Thing:
    """One shape: its `size` as a word, or None where a caption leaves it open; its centre in sides, y pointing down."""

    colour: str
    shape: str
    size: str | None
    x: float = 0.0
    y: float = 0.0


@dataclass(frozen=True)
class Scene:
    """One to three things; each is in its relation to the next, a single one in its `place`; `caption` says it all."""

    things: tuple[Thing, ...]
    relations: tuple[str, ...] = ()
    place: str | None = None
    caption: str = ""


def scene(seed: int, index: int, held_out: bool = False) -> Scene:
    """Scene `index` of `seed`: no thing has a colour and shape of `HELD_OUT`, or, `held_out`, at least one has.

    >>> scene(0, 3).caption
    'a cyan square right of a large cyan cross'
    """
    rng = np.random.default_rng([seed, index, held_out])
    count = int(rng.integers(1, 4))
    while True:
        pairs = [_PAIRS[k] for k in rng.integers(0, len(_PAIRS), count)]
        if held_out:
            pairs[int(rng.integers(count))] = sorted(HELD_OUT)[int(rng.integers(len(HELD_OUT)))]
        sizes = [list(SIZES)[k] for k in rng.integers(0, len(SIZES), count)]
        said = rng.integers(0, 2, count)
        relations = tuple(list(RELATIONS)[k] for k in rng.integers(0, len(RELATIONS), count - 1))
        place = list(PLACES)[int(rng.integers(len(PLACES)))] if count == 1 else None
        radii = np.array([SHAPES[s] * SIZES[z] for (_, s), z in zip(pairs, sizes, strict=True)])
        at = radii[:, None] + (1 - 2 * radii[:, None]) * rng.random((_TRIES, count, 2))
        found = np.flatnonzero(_placed(at, radii, relations, place))
        if len(found):
            words = [f"a {z} {c} {s}" if say else f"a {c} {s}"
                     for (c, s), z, say in zip(pairs, sizes, said, strict=True)]  # fmt: skip
            things = tuple(Thing(c, s, z, float(x), float(y))
                           for (c, s), z, (x, y) in zip(pairs, sizes, at[found[0]], strict=True))  # fmt: skip
            links = [f" {place}"] if place else [f" {r} " for r in relations]
            caption = words[0] + ", which is".join(a + b for a, b in zip(links, [*words[1:], ""], strict=False))
            return Scene(things, relations, place, caption)


def _placed(at: np.ndarray, radii: np.ndarray, relations: tuple[str, ...], place: str | None) -> np.ndarray:
    """Which candidates (m, things, 2) are in their place or relations, apart from one another, and clearly so."""
    if place is not None:
        away = at[:, 0] - 0.5
        return _points(away, PLACES[place], 0.17) if any(PLACES[place]) else np.hypot(*away.T) < 0.06
    good = np.ones(len(at), bool)
    for k, relation in enumerate(relations):
        good &= _points(at[:, k] - at[:, k + 1], RELATIONS[relation], 0.0)
    for i in range(len(radii)):
        for j in range(i):
            good &= np.hypot(*(at[:, i] - at[:, j]).T) > radii[i] + radii[j] + _GAP
    return good


def _points(away: np.ndarray, direction: tuple[int, int], least: float) -> np.ndarray:
    along, across = away @ np.array(direction), away @ np.array(direction[::-1])
    return np.asarray((along > least) & (along > 1.5 * abs(across)))


def coverage(shape: str, x: float, y: float, size: float, side: int) -> np.ndarray:
    """The share of each pixel (side, side) that a shape at (x, y) covers; all in pixels, from 8x8 samples of each."""
    at = (np.arange(side * _FINE) + 0.5) / _FINE
    u, v = (at - x)[None] / size, (at - y)[:, None] / size
    if shape == "circle":
        inside = u**2 + v**2 <= 1
    elif shape == "square":
        inside = np.maximum(abs(u), abs(v)) <= 0.88
    elif shape == "triangle":  # its centre of mass at the origin
        inside = (v <= 0.65) & (np.sqrt(3) * abs(u) - v <= 1.3)
    else:
        inside = (np.maximum(abs(u), abs(v)) <= 1.2) & (np.minimum(abs(u), abs(v)) <= 0.36)
    return np.asarray(inside.reshape(side, _FINE, side, _FINE).mean((1, 3)))


def render(scene: Scene, side: int) -> tuple[np.ndarray, np.ndarray]:
    """(picture (3, side, side) uint8, mask (side, side) uint8): 0 is background, 1 + k the k-th of `COLOURS`.

    Things without a size are drawn large.

    >>> picture, mask = render(Scene((Thing("blue", "circle", "large", 0.5, 0.5),)), 32)
    >>> picture[:, 16, 16].tolist(), int(mask[16, 16]), picture[:, 0, 0].tolist(), int(mask[0, 0])
    ([0, 0, 255], 3, [128, 128, 128], 0)
    """
    picture = np.broadcast_to(_PALETTE[0].astype(float)[:, None, None], (3, side, side)).copy()
    mask = np.zeros((side, side), np.uint8)
    for thing in scene.things:
        size = SIZES[thing.size or "large"] * side
        box = _box(side)
        left, top = (round(c * side - box / 2) for c in (thing.x, thing.y))
        share = coverage(thing.shape, thing.x * side - left, thing.y * side - top, size, box)
        rows, cols = (slice(max(0, a), min(side, a + box)) for a in (top, left))
        share = share[rows.start - top : rows.stop - top, cols.start - left : cols.stop - left]
        number = 1 + list(COLOURS).index(thing.colour)
        picture[:, rows, cols] += share * (_PALETTE[number].astype(float)[:, None, None] - picture[:, rows, cols])
        mask[rows, cols] = np.where(share >= 0.5, number, mask[rows, cols])
    return np.rint(picture).astype(np.uint8), mask


def _box(side: int) -> int:
    """The side of a square that holds any shape wherever its centre lies within the middle pixels."""
    return 2 * int(np.ceil(max(SHAPES.values()) * max(SIZES.values()) * side)) + 4


def layout(mask: np.ndarray) -> np.ndarray:
    """The one-hot map (..., 1 + colours, *size) float32 of a mask (..., *size) of class numbers; background is 0."""
    return np.moveaxis(np.eye(len(_PALETTE), dtype=np.float32)[mask], -1, mask.ndim - 2)


def segment(x: np.ndarray) -> np.ndarray:
    """The class (side, side) whose colour is nearest to each pixel of x (3, side, side) in [-1, 1]."""
    away = x[None] - to_float(_PALETTE)[:, :, None, None]
    return np.asarray((away**2).sum(1).argmin(0))


def segmentation_iou(x: np.ndarray, mask: np.ndarray) -> float:
    """The intersection over union of `segment(x)` and the mask, averaged over the mask's classes but background.

    >>> picture, mask = render(scene(0, 0), 32)
    >>> segmentation_iou(to_float(picture), mask)
    1.0
    """
    found = segment(x)
    shares = [((found == k) & (mask == k)).sum() / ((found == k) | (mask == k)).sum() for k in np.unique(mask) if k]
    return float(np.mean(shares)) if shares else float((found == 0).all())


def parse(caption: str) -> Scene:
    """What a caption says: things without positions, sizes only where it names them. Raises InputError.

    >>> parse("a small red circle left of a blue square").relations
    ('left of',)
    """
    match = _GRAMMAR.fullmatch(caption)
    if match is None:
        raise InputError(f"{caption!r} is no caption of a scene; expected such as 'a small red circle left of a blue "
                         "square, which is above a cyan cross', or 'a large green circle on the left'")  # fmt: skip
    word = match.groups()
    parts = [word[0:3], word[5:8], word[9:12]]
    things = tuple(Thing(colour, shape, size) for size, colour, shape in parts if colour)
    return Scene(things, tuple(r for r in (word[4], word[8]) if r), word[3], caption)


def read(x: np.ndarray) -> tuple[Thing, ...]:
    """The things in a picture x (3, side, side) in [-1, 1], by colour and by the best match with drawn shapes.

    Pixels nearer to a colour than to the background form patches; each of at least half the area of the smallest
    shape is a thing.
    """
    side = x.shape[-1]
    least = 0.5 * np.pi * (min(SIZES.values()) * side) ** 2
    palette, patches = to_float(_PALETTE), _patches(segment(x) > 0)
    things = []
    for patch in patches:
        others = sum((p for p in patches if p is not patch), np.zeros_like(patch))
        if patch.sum() < least:
            continue
        nearest = ((np.median(x[:, patch], 1) - palette[1:]) ** 2).sum(1).argmin()
        colour = palette[1 + nearest] - palette[0]
        share = np.tensordot(colour, x - palette[0][:, None, None], 1) / (colour @ colour)
        things.append(_match(np.where(_grown(patch) & ~others, share, 0), list(COLOURS)[nearest]))
    return tuple(things)


def _patches(on: np.ndarray) -> list[np.ndarray]:
    """The connected parts of a mask (4 neighbours), each as a mask."""
    number = np.where(on, np.arange(1, on.size + 1).reshape(on.shape), 0)
    while True:  # the largest number of a part spreads over it
        wide = np.pad(number, 1)
        near = np.stack([number, wide[:-2, 1:-1], wide[2:, 1:-1], wide[1:-1, :-2], wide[1:-1, 2:]]).max(0)
        spread = np.where(on, near, 0)
        if np.array_equal(spread, number):
            return [number == k for k in np.unique(number) if k]
        number = spread


def _grown(on: np.ndarray) -> np.ndarray:
    """The mask and its 8 neighbours: where the shape's edge covers less than half a pixel."""
    wide = np.pad(on, 1)
    n, m = on.shape
    return np.asarray(np.stack([wide[i : i + n, j : j + m] for i in range(3) for j in range(3)]).any(0))


@lru_cache(4)
def _bank(side: int) -> tuple[list[tuple[str, str, float, float]], np.ndarray]:
    """Each shape in each size at each position within a pixel: (what and where, drawn as rows of pixels)."""
    box, steps = _box(side), (np.arange(_PHASES) + 0.5) / _PHASES - 0.5
    keys = [(s, z, dx, dy) for s in SHAPES for z in SIZES for dx in steps for dy in steps]
    drawn = [coverage(s, box / 2 + dx, box / 2 + dy, SIZES[z] * side, box).ravel() for s, z, dx, dy in keys]
    return keys, np.stack(drawn)


def _match(share: np.ndarray, colour: str) -> Thing:
    """The shape, size and position with the least squared difference from the covered share of each pixel."""
    side = len(share)
    box, (keys, bank) = _box(side), _bank(side)
    weight = share.clip(0, 1)
    centre = [(weight.sum(a) @ (np.arange(side) + 0.5)) / weight.sum() for a in (1, 0)]  # y, x
    wide = np.pad(share, box)
    corners = [(round(centre[0] - box / 2) + i, round(centre[1] - box / 2) + j) for i in (-1, 0, 1) for j in (-1, 0, 1)]
    cut = np.stack([wide[i + box : i + 2 * box, j + box : j + 2 * box].ravel() for i, j in corners], 1)
    error = (bank**2).sum(1)[:, None] - 2 * bank @ cut + (cut**2).sum(0)
    which, where = np.unravel_index(error.argmin(), error.shape)
    shape, size, dx, dy = keys[which]
    top, left = corners[where]
    return Thing(colour, shape, size, (left + box / 2 + dx) / side, (top + box / 2 + dy) / side)


@dataclass(frozen=True)
class Adherence:
    """What of a caption a picture shows: the share of its things with the right colour, shape and size, and of its
    relations (or place); None where the caption says nothing. `count`: whether there are as many things as it says.
    """

    count: bool
    colour: float
    shape: float
    size: float | None
    relation: float | None

    @property
    def all(self) -> bool:
        """Whether everything is right."""
        return self.count and all(v in (None, 1.0) for v in (self.colour, self.shape, self.size, self.relation))


def adherence(x: np.ndarray, caption: str) -> Adherence:
    """How a picture x (3, side, side) in [-1, 1] follows a caption: things are read, and assigned as fits best.

    Raises InputError for a caption that `parse` refuses.

    >>> adherence(to_float(render(scene(0, 3), 32)[0]), "a small cyan circle right of a cyan cross")
    Adherence(count=True, colour=1.0, shape=0.5, size=0.0, relation=1.0)
    """
    wanted = parse(caption)
    seen: list[Thing | None] = [*read(x)]
    count = len(seen) == len(wanted.things)
    seen += [None] * (len(wanted.things) - len(seen))
    found = [_judged(wanted, order, count) for order in permutations(seen[:8], len(wanted.things))]
    return max(found, key=lambda a: (a.all, a.colour + a.shape + (a.size or 0) + (a.relation or 0)))


def _judged(wanted: Scene, seen: tuple[Thing | None, ...], count: bool) -> Adherence:
    pairs = list(zip(wanted.things, seen, strict=True))
    colour = [s is not None and s.colour == w.colour for w, s in pairs]
    shape = [s is not None and s.shape == w.shape for w, s in pairs]
    size = [s is not None and s.size == w.size for w, s in pairs if w.size]
    relation = [a is not None and b is not None and _relation(a.x - b.x, a.y - b.y) == r
                for a, b, r in zip(seen[:-1], seen[1:], wanted.relations, strict=False)]  # fmt: skip
    if wanted.place:
        relation = [seen[0] is not None and _place(seen[0]) == wanted.place]
    means = [float(np.mean(v)) if v else None for v in (size, relation)]
    return Adherence(count, float(np.mean(colour)), float(np.mean(shape)), *means)


def _relation(dx: float, dy: float) -> str:
    if abs(dx) > abs(dy):
        return "left of" if dx < 0 else "right of"
    return "above" if dy < 0 else "below"


def _place(thing: Thing) -> str:
    dx, dy = thing.x - 0.5, thing.y - 0.5
    if np.hypot(dx, dy) < 0.115:  # halfway between the farthest that is drawn in the middle and the nearest outside
        return "in the middle"
    direction = RELATIONS[_relation(dx, dy)]
    return next(place for place, towards in PLACES.items() if towards == direction)


def scenes(side: int = 32, n: int = 20_000, seed: int = 0, held_out: bool = False, name: str = "scenes") -> Drawn:
    """Scenes 0, ..., n - 1 of `seed` as a source: pictures with columns `text` and `segmentation`.

    Raises InputError for a side below 24 pixels, where shapes cannot be told apart.

    >>> sample = scenes().read(3)
    >>> sample.x.shape, sample.columns["text"], sample.columns["segmentation"].shape
    ((3, 32, 32), 'a cyan square right of a large cyan cross', (32, 32))
    """
    if side < 24:
        raise InputError(f"scenes of {side} pixels; expected a side of at least 24")
    return Drawn(name, n, partial(_sample, side, seed, held_out), ("text", "segmentation"))


def _sample(side: int, seed: int, held_out: bool, i: int) -> Raw:
    drawn = scene(seed, i, held_out)
    picture, mask = render(drawn, side)
    return Raw(picture, columns={"text": drawn.caption, "segmentation": mask})


def open_scenes(side: int, path: Path | None = None) -> Drawn:
    """20,000 scenes for training; as `test` 2,000 others, each with a combination of `HELD_OUT`."""
    name = "scenes" if side == 32 else f"scenes-{side}"
    return replace(scenes(side, name=name), test=scenes(side, 2_000, held_out=True, name=f"{name} (test)"))
