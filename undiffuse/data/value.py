"""One value of a column from a file, as `Prepare` gives it to training."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from undiffuse.data.picture import to_float, with_channels
from undiffuse.data.prepare import as_depth, stored
from undiffuse.types import InputError


def read_picture(path: Path, channels: int = 0) -> np.ndarray:
    """(channels, ...) float32 in [-1, 1] of a picture, with so many channels (0: as stored, transparency on white)."""
    found = stored(path, str(path))
    return to_float(with_channels(found, channels or (3 if len(found) == 4 else 0), str(path)))


def read_depth(path: Path) -> np.ndarray:
    """(1, height, width) float32: whole numbers are shares of their type's largest, floats stay."""
    found = stored(path, str(path))
    return as_depth(found[None] if found.ndim == 2 else found, str(path))


def read_segmentation(path: Path) -> np.ndarray:
    """(height, width) whole numbers; of a palette the numbers of its colours."""
    found = stored(path, str(path), indices=True)
    found = found[0] if found.ndim == 3 and len(found) == 1 else found
    if found.ndim != 2 or found.dtype.kind not in "iu":
        raise InputError(f"{path}: {found.dtype} of shape {found.shape}; expected one channel of class numbers")
    return np.asarray(found, np.int64)
