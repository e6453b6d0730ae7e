"""Spoken digits with pictures of the same digit: espeak-ng's voices, kept on disk once they have spoken."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from undiffuse.data.audio import decode_audio
from undiffuse.data.cache import default_cache
from undiffuse.data.drawn import Drawn
from undiffuse.data.source import Arrays, Raw, digest
from undiffuse.seeds import seed_of
from undiffuse.types import InputError

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
VOICES = ("Alex", "Alicia", "Andrea", "Andy", "Denis", "Diogo", "Gene", "Henrique", "Hugo", "Jacky", "Lee", "Marco",
          "Mario", "Michael", "Mike", "Storm", "adam", "anika", "announcer", "antonio", "belinda", "benjamin", "boris",
          "john", "zac", "f1", "f3", "f4", "klatt", "klatt3", "m1", "m3")  # fmt: skip
HELD_OUT = ("linda", "paul", "quincy", "rob", "steph", "victor", "f2", "m2")
SPEEDS, PITCHES = (120, 160, 200), (35, 65)  # in words a minute, and of espeak's 100
TEST_PICTURES = 360
_HOW = "apt-get install espeak-ng; or give the program as path"
_QUIET = 0.02  # of the loudest sample: what is below at either end is cut


@dataclass(frozen=True, eq=False)
class Clips:
    """Sounds one after the other in `wave` (int16), clip k from starts[k] to starts[k + 1], at `rate` Hz; the digit
    and the number of the voice in `VOICES` + `HELD_OUT` of each.
    """

    wave: np.ndarray
    starts: np.ndarray
    digits: np.ndarray
    voices: np.ndarray
    rate: int

    def __len__(self) -> int:
        return len(self.digits)

    def clip(self, k: int) -> np.ndarray:
        """Clip k (n,) as float32 in [-1, 1]."""
        return self.wave[self.starts[k] : self.starts[k + 1]].astype(np.float32) / 2**15


def speak(program: str, word: str, voice: str, speed: int, pitch: int) -> tuple[np.ndarray, int]:
    """(samples (n,) float32 in [-1, 1] without silence at the ends, rate in Hz) of an English word by espeak-ng.

    Raises InputError where the program fails or says nothing.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "say.wav"
        command = [program, "-v", f"en+{voice}", "-s", str(speed), "-p", str(pitch), "-w", str(out), word]
        _run(command)
        wave, rate = decode_audio(out, f"{voice} saying {word!r}")
    loud = np.flatnonzero(abs(wave) > _QUIET * abs(wave).max(initial=0))
    if not len(loud):
        raise InputError(f"spoken-digits: {' '.join(command)} gave silence: {_HOW}")
    return wave[loud[0] : loud[-1] + 1], rate


def _run(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, check=True, text=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise InputError(f"spoken-digits: {' '.join(command)} failed ({error}): {_HOW}") from error


def record(program: str, voices: tuple[str, ...], speeds: tuple[int, ...], pitches: tuple[int, ...]) -> Clips:
    """Every digit by every voice at every speed and pitch, in that order of loops, the last the innermost."""
    keys = [(d, v, s, p) for d in range(10) for v in range(len(voices)) for s in speeds for p in pitches]
    waves, rate = list[np.ndarray](), 0
    for d, v, s, p in keys:
        wave, rate = speak(program, WORDS[d], voices[v], s, p)
        waves.append(np.rint(wave * (2**15 - 1)).astype(np.int16))
    starts = np.cumsum([0, *map(len, waves)])
    digits, numbers = (np.array([key[k] for key in keys]) for k in (0, 1))
    return Clips(np.concatenate(waves), starts, digits, numbers, rate)


def recorded(path: Path | None = None) -> Clips:
    """All clips: 10 digits by 40 voices at 3 speeds and 2 pitches, recorded (half a minute) unless they are on disk.

    They lie in the cache's folder `speech`, by the version of espeak-ng. Raises InputError where it is missing.
    """
    program = shutil.which("espeak-ng") if path is None else str(path)
    if program is None:
        raise InputError(f"spoken-digits: the program espeak-ng is missing: {_HOW}")
    version = _run([program, "--version"]).split("Data at")[0].strip()
    key = digest(version, repr((VOICES, HELD_OUT, SPEEDS, PITCHES, _QUIET)))[:16]
    file = default_cache().parent / "speech" / f"digits-{key}.npz"
    if not file.is_file():
        found = record(program, VOICES + HELD_OUT, SPEEDS, PITCHES)
        file.parent.mkdir(parents=True, exist_ok=True)
        aside = file.with_name(f".{os.getpid()}.npz")
        np.savez(aside, **vars(found))
        aside.replace(file)
    try:
        with np.load(file, allow_pickle=False) as archive:
            parts = {name: archive[name] for name in ("wave", "starts", "digits", "voices")}
            return Clips(**parts, rate=int(archive["rate"]))
    except Exception as error:  # damaged archives raise nearly anything
        raise InputError(f"{file} cannot be read ({error}): remove it, and it is made again") from error


def paired(clips: Clips, pictures: Arrays, test: bool, n: int) -> Drawn:
    """n samples: clip i modulo their number by the voices for training, or for the test, with a picture of its digit.

    The pictures are those for training or the 360 for the test, drawn by i; `audio` is float32 in [-1, 1], and comes
    with its `rate` in Hz. Raises InputError for pictures without labels.
    """
    if pictures.labels is None:
        raise InputError(f"{pictures.name} has no labels to pair with spoken digits")
    order = np.random.default_rng(0).permutation(len(pictures))
    ids = order[:TEST_PICTURES] if test else order[TEST_PICTURES:]
    of = [ids[pictures.labels[ids] == d] for d in range(10)]
    said = np.flatnonzero((clips.voices >= len(VOICES)) == test)
    name = "spoken-digits (test)" if test else "spoken-digits"
    draw = partial(_sample, clips, pictures, said, of, int(test))
    return Drawn(name, n, draw, ("audio",), classes=pictures.classes)


def _sample(clips: Clips, pictures: Arrays, said: np.ndarray, of: list[np.ndarray], seed: int, i: int) -> Raw:
    k = int(said[i % len(said)])
    digit = int(clips.digits[k])
    picture = pictures.x[of[digit][seed_of(seed, i) % len(of[digit])]]
    return Raw(picture, digit, {"audio": clips.clip(k), "rate": clips.rate})


def open_spoken(pictures: Arrays, path: Path | None = None) -> Drawn:
    """7,680 pairs for training, each of 1,920 clips with four pictures; as `test` the 480 clips of other voices."""
    clips = recorded(path)
    train, test = 4 * 60 * len(VOICES), 60 * len(HELD_OUT)
    return replace(paired(clips, pictures, False, train), test=paired(clips, pictures, True, test))
