"""Colour emoji with their English names, drawn from a font; some combinations of words are kept for the test."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from undiffuse.data.source import Arrays
from undiffuse.types import InputError

if TYPE_CHECKING:
    from PIL.ImageFont import FreeTypeFont

NOTO = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
LACKING = ("\U0001f1fd\U0001f1fd", "\U0010ffff")  # the flag of no region, and no character: a font's stand-ins
_STRIKE = 109  # the one size of this font's bitmaps: 136x128 pixels
_TONES = frozenset(map(chr, range(0x1F3FB, 0x1F400)))
_HOW = "apt-get install fonts-noto-color-emoji, pip install emoji; or give the file NotoColorEmoji.ttf as path"

HELD_OUT = (
    *("blue heart", "purple heart", "orange circle", "brown circle", "red square", "yellow square", "green square"),
    *("large blue diamond", "small orange diamond", "red triangle pointed down", "green apple", "orange book"),
    *("white flag", "black cat", "tiger face", "horse face", "crying cat", "kissing cat", "weary cat"),
    *("woman red hair", "person curly hair", "man white hair", "woman firefighter", "woman pilot", "woman scientist"),
    *("woman teacher", "woman health worker", "man cook", "man farmer", "man judge", "man mechanic", "man singer"),
    *("man running", "woman swimming", "person biking", "cloud with lightning", "oncoming taxi", "nine-thirty"),
    *("closed mailbox with raised flag", "backhand index pointing left"),
)
"""Names of the emoji of the test: combinations, such as of a colour and a shape, that training never shows, while it
shows every word of them in others."""


def emoji(size: int = 64, path: Path | None = None) -> Arrays:
    """About 1,900 colour emoji of size x size pixels on white, each with its English name as `text`; without skin
    tones. Those in `HELD_OUT` are the test.

    `segmentation` is 1 where the emoji covers at least half of a pixel, and 0 elsewhere. See `drawn` for what is drawn.
    """
    every, name = drawn(size, path), "emoji" if size == 64 else f"emoji-{size}"
    held = np.isin(every.extra["text"], HELD_OUT)
    test = _rows(every, held, f"{name} (test)") if held.any() else None
    return _rows(every, ~held, name, test)


def drawn(size: int = 64, path: Path | None = None) -> Arrays:
    """All emoji, those of the test among them, in the order of their code points.

    Debian's fonts-noto-color-emoji (or the font file `path`) draws those that PyPI's emoji names; those that the font
    lacks are left out, so both packages' versions decide which there are. InputError where one is missing.
    """
    from PIL import ImageFont, features

    font_file = NOTO if path is None else path
    if importlib.util.find_spec("emoji") is None:
        raise InputError(f"emoji: the Python package emoji is missing: {_HOW}")
    from emoji import EMOJI_DATA, STATUS

    if not font_file.is_file():
        raise InputError(f"emoji: the font {font_file} is missing: {_HOW}")
    sequences = features.check("raqm")  # without it, a flag is drawn as two letters
    try:
        engine = ImageFont.Layout.RAQM if sequences else ImageFont.Layout.BASIC
        font = ImageFont.truetype(font_file, _STRIKE, layout_engine=engine)
    except OSError as error:
        raise InputError(f"emoji: {font_file} has no bitmaps of {_STRIKE} pixels ({error}): {_HOW}") from error
    lacking = [glyph(font, code, size) for code in LACKING]
    pictures, texts = list[np.ndarray](), list[str]()
    for code, entry in sorted(EMOJI_DATA.items()):
        if entry["status"] != STATUS["fully_qualified"] or not _TONES.isdisjoint(code):
            continue
        picture = glyph(font, code, size) if sequences or len(code) == 1 else None
        if picture is not None and not any(np.array_equal(picture, other) for other in lacking if other is not None):
            pictures.append(picture)
            texts.append(entry["en"].strip(":").replace("_", " "))
    if not pictures:
        raise InputError(f"emoji: {font_file} draws none of the emoji: {_HOW}")
    whole = np.stack(pictures)
    columns = {"text": np.array(texts), "segmentation": (whole[:, 3] >= 128).astype(np.uint8)}
    return Arrays(np.ascontiguousarray(whole[:, :3]), name="emoji", extra=columns)


def glyph(font: FreeTypeFont, code: str, size: int) -> np.ndarray | None:
    """The emoji centred on white, and its alpha (4, size, size); None where the font draws nothing, or several
    glyphs."""
    from PIL import Image, ImageDraw

    left, top, right, bottom = (round(v) for v in font.getbbox(code))
    if bottom <= top or right - left > 1.5 * _STRIKE:
        return None
    side = max(right - left, bottom - top)
    at = ((side - right - left) // 2, (side - bottom - top) // 2)
    opaque, clear = Image.new("RGB", (side, side), "white"), Image.new("RGBA", (side, side))
    for picture in (opaque, clear):
        ImageDraw.Draw(picture).text(at, code, "black", font, embedded_color=True)
    planes = [p.resize((size, size), Image.Resampling.LANCZOS) for p in (*opaque.split(), clear.getchannel("A"))]
    return np.stack([np.asarray(plane) for plane in planes])


def _rows(of: Arrays, which: np.ndarray, name: str, test: Arrays | None = None) -> Arrays:
    return Arrays(of.x[which], name=name, extra={key: v[which] for key, v in of.extra.items()}, test=test)
