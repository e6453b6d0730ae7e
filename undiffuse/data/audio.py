"""Sound files as float32 samples in [-1, 1]."""

from __future__ import annotations

import importlib
import io
import math
import wave
from pathlib import Path
from typing import Any

import numpy as np

from undiffuse.data.source import Unreadable
from undiffuse.types import InputError

LIMIT = 2**28  # bytes of decoded sound


def decode_audio(stored: bytes | Path, where: str) -> tuple[np.ndarray, int]:
    """(samples (n,) float32 in [-1, 1], rate in Hz), channels averaged: PCM .wav, others with `soundfile` installed.

    Raises Unreadable, and InputError where soundfile is needed and missing.
    """
    try:
        data = stored if isinstance(stored, bytes) else stored.read_bytes()
        return _wave(data) if data[:4] == b"RIFF" else _other(data)
    except InputError:
        raise
    except Exception as error:  # a damaged file may raise nearly anything
        raise Unreadable(where, str(error) or type(error).__name__) from error


def resampled(wave: np.ndarray, rate: int, wanted: int) -> np.ndarray:
    """Samples (n,) float32 at `rate` Hz brought to another rate, without aliasing."""
    if rate == wanted:
        return wave
    from scipy.signal import resample_poly

    common = math.gcd(rate, wanted)
    return np.asarray(resample_poly(wave, wanted // common, rate // common), np.float32)


def _wave(data: bytes) -> tuple[np.ndarray, int]:
    with wave.open(io.BytesIO(data)) as file:
        width, rate, channels = file.getsampwidth(), file.getframerate(), file.getnchannels()
        raw = file.readframes(file.getnframes())
    if width == 1:
        x = (np.frombuffer(raw, np.uint8).astype(np.float32) - 128) / 128
    elif width in (2, 4):
        x = np.frombuffer(raw, f"<i{width}").astype(np.float32) / 2 ** (8 * width - 1)
    else:
        raise ValueError(f"{8 * width}-bit sound; expected 8, 16 or 32 bits")
    return x.reshape(-1, channels).mean(1), rate


def _other(data: bytes) -> tuple[np.ndarray, int]:
    try:
        soundfile: Any = importlib.import_module("soundfile")
    except ImportError as error:
        raise InputError("this is no PCM .wav; sounds of other kinds need soundfile: pip install soundfile") from error
    info = soundfile.info(io.BytesIO(data))
    if info.frames * info.channels * 4 > LIMIT:
        raise ValueError(f"{info.frames} frames of {info.channels} channels are above {LIMIT >> 20} MiB")
    x, rate = soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)
    return x.mean(1), int(rate)
