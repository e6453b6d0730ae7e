"""Pictures as arrays (channels, height, width): checked from their header before anything is decoded."""

from __future__ import annotations

import io
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from undiffuse.data.source import Unreadable

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
LIMIT = 2**28  # bytes of the decoded picture
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # not EPS, which runs ghostscript
_RATIO, _SMALL = 300, 2**24  # what decodes to more than 16 MiB may not grow more than 300 times
_ALPHA = {"LA", "La", "RGBA", "RGBa", "PA"}
_ROTATED = (5, 6, 7, 8)  # the EXIF orientations that exchange width and height


def _open(stored: bytes | Path) -> Image.Image:
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        return Image.open(io.BytesIO(stored) if isinstance(stored, bytes) else stored, formats=_FORMATS)


def _check(image: Image.Image, size: int) -> None:
    width, height = image.size
    wide = 4 if image.mode in ("I", "F") else 2 if image.mode.startswith("I;16") else len(image.getbands())
    total = width * height * wide
    if total > LIMIT:
        raise ValueError(f"{width} x {height} pixels would take {total >> 20} MiB; at most {LIMIT >> 20} are allowed")
    if total > _SMALL and total > _RATIO * size:
        raise ValueError(f"{size} bytes would become {total >> 20} MiB of pixels: refused as a decompression bomb")


def _size(stored: bytes | Path) -> int:
    size = len(stored) if isinstance(stored, bytes) else stored.stat().st_size
    if size == 0:
        raise ValueError("the file is empty")
    return size


def header(stored: bytes | Path, where: str) -> tuple[int, int]:
    """(height, width) as shown, from the header alone; raises Unreadable."""
    try:
        size = _size(stored)
        with _open(stored) as image:
            _check(image, size)
            turned = Image.Image.getexif(image).get(0x0112) in _ROTATED  # that of PNG would decode the picture
            return (image.width, image.height) if turned else (image.height, image.width)
    except Exception as error:  # a damaged picture may raise nearly anything
        raise Unreadable(where, _reason(error)) from error


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "the file does not exist"
    if type(error).__name__ == "UnidentifiedImageError":
        return f"not a picture of a known format ({', '.join(_FORMATS)})"
    return str(error) or type(error).__name__


def decode(stored: bytes | Path, where: str, cover: int = 0, indices: bool = False) -> np.ndarray:
    """The picture as (channels, height, width): uint8, uint16 (16-bit gray) or float32; upright, its first frame.

    1, 3 or 4 channels; palettes become colours (`indices`: stay indices), CMYK and other colour spaces become RGB.
    JPEG may be decoded at a fraction of its size, both sides at least twice `cover`. Raises Unreadable.
    """
    try:
        size = _size(stored)
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with _open(stored) as image:
                if cover and image.format == "JPEG" and image.mode in ("L", "RGB"):
                    image.draft(image.mode, (2 * cover, 2 * cover))
                _check(image, size)
                image.load()
                return _array(ImageOps.exif_transpose(image), indices)
    except Exception as error:  # a damaged picture may raise nearly anything
        raise Unreadable(where, _reason(error)) from error


def _array(image: Image.Image, indices: bool) -> np.ndarray:
    mode = image.mode
    if mode == "I" or mode.startswith("I;16"):
        return _sixteen(np.asarray(image))[None]
    if mode == "F":
        return np.asarray(image)[None]
    if mode == "P" and indices:
        return np.array(image)[None]
    see_through = mode in _ALPHA or "transparency" in image.info
    plain = "RGBA" if see_through else "L" if mode in ("1", "L") else "RGB"
    pixels = np.array(image if mode == plain else image.convert(plain))
    return pixels[None] if pixels.ndim == 2 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _sixteen(pixels: np.ndarray) -> np.ndarray:
    if pixels.size and (int(pixels.min()) < 0 or int(pixels.max()) > 65535):
        raise ValueError("32-bit whole-number pixels; expected 8 or 16 bits, or floats")
    return pixels.astype(np.uint16)


def peak(dtype: np.dtype[Any]) -> float:
    """The value of white: 255 for uint8, 65535 for uint16, 1 for floats."""
    return 255.0 if dtype == np.uint8 else 65535.0 if dtype == np.uint16 else 1.0


def with_channels(x: np.ndarray, channels: int, where: str) -> np.ndarray:
    """x (c, h, w) with 1, 3 or 4 channels: alpha is laid on white, gray is 0.299 R + 0.587 G + 0.114 B."""
    have = len(x)
    if have == channels or not channels:
        return x
    if have not in (1, 3, 4):
        raise Unreadable(where, f"{have} channels cannot become {channels}; leave data.channels at 0")
    white, dtype = peak(x.dtype), x.dtype
    wide: Any = x.astype(np.float32 if dtype == np.uint8 else np.float64)
    low = 0.0 if np.issubdtype(dtype, np.integer) else -1.0
    if have == 4:
        alpha = (wide[3:] - low) / (white - low)
        wide = wide[:3] * alpha + white * (1 - alpha)
    if channels == 1:
        wide = np.tensordot(np.array([0.299, 0.587, 0.114]), wide, 1)[None] if len(wide) == 3 else wide
    elif len(wide) == 1:
        wide = np.repeat(wide, 3, 0)
    if channels == 4:
        wide = np.concatenate([wide, np.full_like(wide[:1], white)])
    return np.asarray(np.rint(wide) if np.issubdtype(dtype, np.integer) else wide, dtype)


def resized(x: np.ndarray, size: tuple[int, ...], filter: Image.Resampling) -> np.ndarray:
    """x (c, h, w) at another (height, width): antialiased unless nearest; whole numbers stay whole."""
    height, width = size
    if x.shape[1:] == size:
        return x
    if x.dtype == np.uint8 and len(x) in (1, 3, 4):
        pixels = x[0] if len(x) == 1 else np.ascontiguousarray(x.transpose(1, 2, 0))
        out = np.array(Image.fromarray(pixels).resize((width, height), filter))
        return out[None] if out.ndim == 2 else np.ascontiguousarray(out.transpose(2, 0, 1))
    if filter == Image.Resampling.NEAREST:
        rows, columns = (
            ((np.arange(n) + 0.5) * m / n).astype(int) for n, m in zip((height, width), x.shape[1:], strict=True)
        )
        return np.ascontiguousarray(x[:, rows][:, :, columns])
    planes = [Image.fromarray(np.ascontiguousarray(p, np.float32)).resize((width, height), filter) for p in x]
    wide = np.stack([np.asarray(p) for p in planes])
    if np.issubdtype(x.dtype, np.integer):
        wide = np.rint(wide).clip(0, peak(x.dtype))
    return wide.astype(x.dtype)


def to_float(x: np.ndarray) -> np.ndarray:
    """float32 in [-1, 1] from uint8 (x / 127.5 - 1) and uint16 (x / 32767.5 - 1); floats as they are."""
    if x.dtype == np.uint8:
        return x.astype(np.float32) / np.float32(127.5) - np.float32(1)
    if x.dtype == np.uint16:
        return (x.astype(np.float64) / 32767.5 - 1).astype(np.float32)
    with np.errstate(over="ignore"):  # what becomes infinite is refused later
        return x.astype(np.float32)


def cover(height: int, width: int, target: tuple[int, int]) -> tuple[int, int]:
    """The smallest size of the same aspect ratio that covers `target` (height, width)."""
    scale = max(target[0] / height, target[1] / width)
    return max(target[0], math.floor(height * scale + 0.5)), max(target[1], math.floor(width * scale + 0.5))
