"""Spoken digits: what is said by whom, how clips are paired with pictures, what is kept, and what is held out."""

import pickle
import shutil
import stat
import sys

import numpy as np
import pytest
import torch

from undiffuse import InputError
from undiffuse.data import Prepare, speech
from undiffuse.data.builtin import digits, spoken_digits
from undiffuse.data.speech import HELD_OUT, TEST_PICTURES, VOICES, WORDS, Clips, paired, record, recorded, speak

ESPEAK = shutil.which("espeak-ng")
needs_espeak = pytest.mark.skipif(ESPEAK is None, reason="needs Debian's espeak-ng")
RATE = 22050
HOW = "apt-get install espeak-ng; or give the program as path"

SAYS = """#!{python}
import sys, wave
if "--version" in sys.argv:
    print("fake {version}  Data at: /nowhere")
    sys.exit({code})
*_, voice, _, speed, _, pitch, _, out, word = sys.argv
levels = [0] * 50 + [len(word) * 1000, -int(speed) * 10, int(pitch) * 10, (len(voice) - 3) * 100] * 5 + [0] * 70
with wave.open(out, "wb") as file:
    file.setparams((1, 2, 22050, 0, "NONE", ""))
    file.writeframes(b"".join(({scale} * v).to_bytes(2, "little", signed=True) for v in levels))
"""


@pytest.fixture
def program(tmp_path):
    """A program in the place of espeak-ng, which beeps."""

    def make(version="1", code=0, scale=1):
        path = tmp_path / f"speaker-{version}"
        path.write_text(SAYS.format(python=sys.executable, version=version, code=code, scale=scale))
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return path

    return make


def clips(per=2):
    """Clips whose samples tell their digit and voice."""
    keys = [(d, v) for d in range(10) for v in range(len(VOICES + HELD_OUT)) for _ in range(per)]
    wave = np.concatenate([np.full(3 + d, 100 * d + v, np.int16) for d, v in keys])
    starts = np.cumsum([0, *(3 + d for d, _ in keys)])
    return Clips(wave, starts, *(np.array([k[j] for k in keys]) for j in (0, 1)), RATE)


def test_a_clip_is_what_the_program_says_without_silence_at_the_ends(program):
    wave, rate = speak(str(program()), "three", "f1", 160, 65)
    assert rate == RATE
    assert np.allclose(wave * 2**15, [5000, -1600, 650, 200] * 5)
    assert wave.dtype == np.float32


def test_every_voice_says_every_digit_at_every_speed_and_pitch(program):
    found = record(str(program()), ("f1", "m10"), (100, 150), (30,))
    assert found.digits.tolist() == [d for d in range(10) for _ in range(4)]
    assert found.voices.tolist() == [0, 0, 1, 1] * 10
    for k in range(40):
        d, voice, speed = found.digits[k], (2, 3)[found.voices[k]], (100, 150)[k % 2]
        expected = np.array([len(WORDS[d]) * 1000, -speed * 10, 300, voice * 100] * 5) / 2**15
        assert np.allclose(found.clip(k), expected, atol=1 / 2**14)


def test_clips_are_recorded_once_for_each_version_and_kept(program, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    calls = []

    def fake(name, voices, speeds, pitches):
        calls.append((voices, speeds, pitches))
        return clips(1)

    monkeypatch.setattr(speech, "record", fake)
    first, again = recorded(program("1")), recorded(program("1"))
    assert calls == [(VOICES + HELD_OUT, speech.SPEEDS, speech.PITCHES)]
    assert all(np.array_equal(v, getattr(again, key)) for key, v in vars(first).items())
    assert np.array_equal(first.wave, clips(1).wave)
    recorded(program("2"))
    assert len(calls) == 2
    files = sorted((tmp_path / "cache" / "undiffuse" / "speech").iterdir())
    assert len(files) == 2  # and nothing half written
    for file in files:
        file.write_bytes(b"broken")
    with pytest.raises(InputError, match=r"digits-.*npz cannot be read .*: remove it, and it is made again"):
        recorded(program("1"))


def test_missing_and_failing_programs_are_named_with_the_command(program, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(InputError, match=f"spoken-digits: the program espeak-ng is missing: {HOW}"):
        spoken_digits()
    with pytest.raises(InputError, match=f"absent --version failed .*: {HOW}"):
        spoken_digits(tmp_path / "absent")
    with pytest.raises(InputError, match=f"--version failed .*: {HOW}"):
        spoken_digits(program(code=3))
    with pytest.raises(InputError, match=f"gave silence: {HOW}"):
        speak(str(program(scale=0)), "three", "f1", 160, 65)


def test_pictures_and_clips_are_of_the_same_digit():
    source = paired(clips(), digits(), False, 1500)
    for i in range(0, 1500, 7):
        raw = source.read(i)
        wave = np.rint(raw.columns["audio"] * 2**15).astype(int)
        assert (len(wave), set(wave // 100)) == (3 + raw.label, {raw.label})
        assert raw.columns["rate"] == RATE
        assert any(np.array_equal(raw.x, x) for x in digits().x[digits().labels == raw.label])


def test_voices_and_pictures_of_the_test_never_occur_in_training():
    train, test = paired(clips(), digits(), False, 4000), paired(clips(), digits(), True, 400)
    voices, pictures = ([], []), ([], [])
    for k, source in enumerate((train, test)):
        for raw in map(source.read, range(len(source))):
            voices[k].append(round(raw.columns["audio"][0] * 2**15) % 100)
            pictures[k].append(raw.x.tobytes())
    assert set(voices[0]) == set(range(len(VOICES)))
    assert set(voices[1]) == set(range(len(VOICES), len(VOICES) + len(HELD_OUT)))
    assert not set(pictures[0]) & set(pictures[1])
    assert len(set(pictures[0])) > 0.9 * (1797 - TEST_PICTURES)  # nearly all pictures are used
    assert not set(VOICES) & set(HELD_OUT)


def test_pairs_depend_on_their_number_alone_also_in_workers():
    source = paired(clips(), digits(), False, 3000)
    other = pickle.loads(pickle.dumps(source))
    assert all(np.array_equal(source.read(i).x, other.read(i).x) for i in (0, 5, 2999))
    assert source.fingerprint() == other.fingerprint() != paired(clips(), digits(), True, 3000).fingerprint()
    n = (clips().voices < len(VOICES)).sum()  # the same clips come again with other pictures
    assert np.mean([np.array_equal(source.read(i).x, source.read(i + n).x) for i in range(300)]) < 0.1


def spectra(found):
    """Short spectra at 16 places of each clip (a check of the data, not a feature to copy)."""
    out = []
    for k in range(len(found)):
        wave = torch.from_numpy(found.clip(k))
        frames = torch.stft(wave, 512, 128, window=torch.hann_window(512), return_complex=True).abs()
        bands = torch.nn.functional.adaptive_avg_pool2d(frames[None, :180], (30, 16))[0]
        out.append(torch.log(bands / bands.max() + 1e-3).flatten().numpy())
    return np.stack(out)


@needs_espeak
def test_digits_of_unknown_voices_can_be_told_apart():
    from sklearn.linear_model import LogisticRegression

    known, other = (record(ESPEAK, voices, (160,), (50,)) for voices in (VOICES[:12], HELD_OUT[:4]))
    model = LogisticRegression(C=0.1, max_iter=300).fit(spectra(known), known.digits)
    assert model.score(spectra(other), other.digits) >= 0.95


@needs_espeak
def test_voices_differ_and_say_the_same_each_time():
    found = [speak(ESPEAK, "seven", voice, 160, 50)[0] for voice in VOICES + HELD_OUT]
    assert len({wave.tobytes() for wave in found}) == len(found)
    assert np.array_equal(found[3], speak(ESPEAK, "seven", VOICES[3], 160, 50)[0])
    assert all(0.1 * RATE < len(wave) < 1.5 * RATE for wave in found)


def test_prepared_samples_carry_waveform_rate_and_label():
    source = paired(clips(), digits(), False, 10)
    example = Prepare()(source.read(4), 0, 0)
    assert source.columns == ("audio",)  # as of a folder: the rate comes with it
    assert example.x.shape == (1, 8, 8)
    assert (example.columns["audio"].dtype, example.columns["rate"]) == (np.float32, RATE)
    assert source.classes[example.label] == str(example.label)
