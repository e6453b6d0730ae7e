"""Scenes of solids with their depth maps, a function of (seed, index); and how a picture's depth is read back."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from undiffuse.data.drawn import Drawn
from undiffuse.data.source import Raw
from undiffuse.types import InputError

SOLIDS = ("sphere", "box", "torus", "capsule")
ALBEDOS = {"red": (0.95, 0.2, 0.1), "yellow": (1.0, 0.9, 0.1), "green": (0.1, 0.85, 0.2)}
HAZE = (0.3, 0.4, 0.9)  # the colour of the background: what lies at depth d shows a share d of it
NEAR, FAR = 0.05, 0.75  # the depths of z = -1 and z = 1; that of the background is 1
_LIGHT = np.array([-1.0, -1.0, -2.0]) / np.sqrt(6)  # towards the light: from the viewer's upper left
_AMBIENT = 0.35
_STEPS, _HIT = 100, 1e-4  # steps of a ray, and the distance at which it has arrived
_EDGE = (1 + FAR) / 2  # what is read as farther is background


@dataclass(frozen=True, eq=False)
class Solid:
    """A solid within `radius` of its centre (x right, y down, z away, in [-1, 1]); `turn` (3, 3) is its rotation."""

    kind: str
    albedo: str
    radius: float
    centre: tuple[float, float, float]
    turn: np.ndarray


def distance(kind: str, p: np.ndarray) -> np.ndarray:
    """The distance (n,) of points p (n, 3) from the surface of a solid of radius 1 at the origin; negative inside."""
    x, y, z = p.T
    if kind == "sphere":
        return np.asarray(np.linalg.norm(p, axis=1) - 1)
    if kind == "box":  # a cube, its corners on the unit sphere
        out = abs(p) - 1 / np.sqrt(3)
        return np.asarray(np.linalg.norm(out.clip(0), axis=1) + out.max(1).clip(max=0))
    if kind == "torus":
        return np.asarray(np.hypot(np.hypot(x, y) - 0.7, z) - 0.3)
    if kind == "capsule":
        return np.asarray(np.sqrt(x**2 + y**2 + (z - z.clip(-0.55, 0.55)) ** 2) - 0.45)
    raise InputError(f"no solid is named {kind!r}; there are {', '.join(SOLIDS)}")


def solids(seed: int, index: int) -> tuple[Solid, ...]:
    """The one to three solids of scene `index` of `seed`, which do not touch."""
    rng = np.random.default_rng([seed, index])
    count, out = int(rng.integers(1, 4)), list[Solid]()
    while len(out) < count:
        radius = float(rng.uniform(0.3, 0.5))
        centre = rng.uniform(radius - 1, 1 - radius, 3)
        if all(np.linalg.norm(centre - s.centre) > radius + s.radius for s in out):
            kind, albedo = SOLIDS[int(rng.integers(4))], list(ALBEDOS)[int(rng.integers(3))]
            x, y, z = centre.tolist()
            out.append(Solid(kind, albedo, radius, (x, y, z), _rotation(rng)))
    return tuple(out)


def _rotation(rng: np.random.Generator) -> np.ndarray:
    """A rotation, uniform among all: the QR decomposition of a Gaussian matrix (Stewart 1980)."""
    q, r = np.linalg.qr(rng.normal(size=(3, 3)))
    q = q * np.sign(np.diag(r))
    return np.asarray(q * np.linalg.det(q))


def render(scene: tuple[Solid, ...], side: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(picture (3, side, side) uint8, depth (1, side, side) float32, mask (side, side) uint8) in parallel projection.

    One ray through the centre of each pixel; depth is 0.05 at z = -1, 0.75 at z = 1 and 1 where there is nothing; the
    mask numbers the solids from 1. A surface of normal n is (1 - d) (0.35 + 0.65 max(0, n . light)) albedo + d haze.
    """
    at = (2 * np.arange(side) + 1) / side - 1
    z, mask = np.full((side, side), np.inf), np.zeros((side, side), np.uint8)
    lit = np.zeros((side, side, 3))
    for number, solid in enumerate(scene, 1):
        rows, cols = np.nonzero(np.hypot(at[None] - solid.centre[0], at[:, None] - solid.centre[1]) <= solid.radius)
        found = _cast(solid, np.stack([at[cols], at[rows]], 1))
        nearer = found < z[rows, cols]
        rows, cols, found = rows[nearer], cols[nearer], found[nearer]
        normal = _normals(solid, np.stack([at[cols], at[rows], found], 1))
        light = _AMBIENT + (1 - _AMBIENT) * (normal @ _LIGHT).clip(0)
        z[rows, cols], mask[rows, cols] = found, number
        lit[rows, cols] = light[:, None] * np.array(ALBEDOS[solid.albedo])
    depth = np.where(mask > 0, NEAR + (FAR - NEAR) * (z.clip(-1, 1) + 1) / 2, 1.0)
    picture = (1 - depth)[..., None] * lit + depth[..., None] * np.array(HAZE)
    return np.rint(255 * picture.transpose(2, 0, 1)).astype(np.uint8), depth.astype(np.float32)[None], mask


def _local(solid: Solid, p: np.ndarray) -> np.ndarray:
    return np.asarray((p - solid.centre) @ solid.turn / solid.radius)


def _cast(solid: Solid, xy: np.ndarray) -> np.ndarray:
    """The z (n,) at which rays along z meet the solid, infinite where they miss it: sphere tracing (Hart 1996)."""
    z = np.full(len(xy), solid.centre[2] - solid.radius)
    end = solid.centre[2] + solid.radius
    going = np.arange(len(xy))
    for _ in range(_STEPS):
        gap = solid.radius * distance(solid.kind, _local(solid, np.column_stack([xy[going], z[going]])))
        z[going] += gap
        going = going[(gap > _HIT) & (z[going] < end)]
        if not len(going):
            break
    z[going] = np.inf  # along a flat side, not onto it
    z[z >= end] = np.inf
    return z


def _normals(solid: Solid, p: np.ndarray) -> np.ndarray:
    """The unit normals (n, 3): the gradient of the distance, by central differences."""
    q, h = _local(solid, p), 1e-4
    shifts = h * np.eye(3)
    gradient = np.stack([distance(solid.kind, q + e) - distance(solid.kind, q - e) for e in shifts], 1)
    return np.asarray(gradient / np.linalg.norm(gradient, axis=1, keepdims=True).clip(1e-12) @ solid.turn.T)


def read_depth(x: np.ndarray) -> np.ndarray:
    """The depth (side, side) in [0, 1] that the haze of a picture x (3, side, side) in [-1, 1] implies.

    A pixel is u albedo + d haze: for each albedo, u >= 0 and d by least squares; the albedo with the smallest residual
    in the pixel and its neighbours counts.
    """
    pixels, haze = (x.transpose(1, 2, 0) + 1) / 2, np.array(HAZE)
    errors, depths = [], []
    for albedo in ALBEDOS.values():
        u = (pixels @ np.linalg.pinv(np.column_stack([albedo, haze]))[0]).clip(0)
        rest = pixels - u[..., None] * np.array(albedo)
        depths.append(rest @ haze / (haze @ haze))
        errors.append(_around(((rest - depths[-1][..., None] * haze) ** 2).sum(2)))
    best = np.argmin(errors, 0)[None]
    return np.asarray(np.take_along_axis(np.stack(depths), best, 0)[0].clip(0, 1))


def _around(error: np.ndarray) -> np.ndarray:
    """The sum over each pixel and its 8 neighbours, the pixel itself four times."""
    wide = np.pad(error, 1)
    n, m = error.shape
    return 3 * error + sum(wide[i : i + n, j : j + m] for i in range(3) for j in range(3))


def silhouette(x: np.ndarray) -> np.ndarray:
    """Where a picture x (3, side, side) in [-1, 1] shows a solid: nearer than halfway from the farthest to nothing."""
    return read_depth(x) < _EDGE


@dataclass(frozen=True)
class Fit:
    """How a picture follows a depth map: the correlation of depths on the map's solids, where silhouettes cannot help;
    and the silhouettes' intersection over union.
    """

    correlation: float
    iou: float


def depth_fit(x: np.ndarray, depth: np.ndarray) -> Fit:
    """Compares a picture x (3, side, side) in [-1, 1] with a map (1, side, side) of depths; nothing common is 0.

    >>> picture, depth, _ = render(solids(0, 0), 32)
    >>> fit = depth_fit(picture / 127.5 - 1, depth)
    >>> round(fit.correlation, 2), fit.iou
    (1.0, 1.0)
    """
    given, seen = depth[0] < _EDGE, silhouette(x)
    iou = (given & seen).sum() / max(1, (given | seen).sum())
    a, b = depth[0][given], read_depth(x)[given]
    spread = a.std() * b.std() if len(a) else 0.0
    correlation = ((a - a.mean()) * (b - b.mean())).mean() / spread if spread > 1e-9 else 0.0
    return Fit(float(correlation), float(iou))


def solid_scenes(side: int = 32, n: int = 6_000, seed: int = 0, name: str = "depth") -> Drawn:
    """Scenes 0, ..., n - 1 of `seed` as a source: pictures with columns `depth` and `segmentation` (solids by number).

    Raises InputError for a side below 8 pixels.

    >>> sample = solid_scenes().read(0)
    >>> sample.x.shape, sample.columns["depth"].shape, sample.columns["segmentation"].shape
    ((3, 32, 32), (1, 32, 32), (32, 32))
    """
    if side < 8:
        raise InputError(f"scenes of {side} pixels; expected a side of at least 8")
    return Drawn(name, n, partial(_sample, side, seed), ("depth", "segmentation"))


def _sample(side: int, seed: int, i: int) -> Raw:
    picture, depth, mask = render(solids(seed, i), side)
    return Raw(picture, columns={"depth": depth, "segmentation": mask})


def open_depth(side: int, path: Path | None = None) -> Drawn:
    """6,000 scenes of solids for training; as `test` 1,000 others."""
    name = "depth" if side == 32 else f"depth-{side}"
    return replace(solid_scenes(side, name=name), test=solid_scenes(side, 1_000, seed=1, name=f"{name} (test)"))
