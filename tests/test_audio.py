"""Sound as a condition: the spectrogram of pure tones in closed form, tokens over time, joint training."""

import math

import pytest
import torch

from tests.test_encoders import assert_learned
from tests.test_nets import randomised, relative
from undiffuse import InputError
from undiffuse.cond import Audio, Encoders, log_mel
from undiffuse.cond.audio import bands, mel

RATE = 16_000


def tone(hertz, amplitude=1.0, n=8000, rate=RATE):
    """A sine."""
    return amplitude * torch.sin(2 * math.pi * hertz * torch.arange(n, dtype=torch.float64) / rate)


def power(wave, **kw):
    """Power in mel bands in the middle of a waveform, away from its ends."""
    spectrum = 10 ** (4 * log_mel(wave, RATE, **kw).double() - 4)
    return spectrum[5:-5].mean(0)


def test_the_mel_scale_is_a_thousand_at_a_thousand_hertz():
    assert abs(float(mel(torch.tensor(1000.0))) - 1000) < 0.1


def test_bands_are_triangles_that_sum_to_one_between_the_outer_peaks():
    filters, f = bands(RATE, 2048, 24), torch.linspace(0, RATE / 2, 1025, dtype=torch.float64)
    peaks = 700 * (10 ** (float(mel(f[-1])) * torch.arange(1, 25) / 25 / 2595) - 1)
    between = (f >= peaks[0]) & (f <= peaks[-1])
    assert torch.allclose(filters.sum(0)[between], torch.ones(int(between.sum())).double(), atol=1e-4)
    assert ((f[filters.argmax(1)] - peaks).abs() <= RATE / 2048).all()
    assert ((filters > 0).sum(0) <= 2).all()


@pytest.mark.parametrize("hertz", [400.0, 1000.0, 2743.5, 5111.0])
@pytest.mark.parametrize("amplitude", [1.0, 0.03])
def test_a_pure_tone_has_its_power_in_its_band(hertz, amplitude):
    found = power(tone(hertz, amplitude), count=24)
    place = float(mel(torch.tensor(hertz)) / mel(torch.tensor(RATE / 2.0)) * 25 - 1)  # 0 is the first band's peak
    assert int(found.argmax()) in (math.floor(place), math.ceil(place))
    assert abs(float(found.sum()) / amplitude**2 - 1) < 0.02
    near = found[max(0, math.floor(place) - 1) : math.ceil(place) + 2].sum()
    assert float(near / found.sum()) > 0.99


def test_silence_is_minus_one_and_frames_are_a_hop_apart():
    assert torch.equal(log_mel(torch.zeros(1600), RATE, 16), -torch.ones(11, 16))
    late = torch.cat([torch.zeros(8000).double(), tone(1000)])
    loud = log_mel(late, RATE, 24).amax(1) > 0
    assert not loud[: (8000 - 256) // 160].any()
    assert loud[(8000 + 256) // 160 + 1 : -3].all()


def test_amplitude_is_two_tenths_of_a_unit_each_decade_of_power():
    loud, quiet = (log_mel(tone(1000, a), RATE, 24)[20].max() for a in (1.0, 0.1))
    assert abs(float(loud - quiet) - 2 / 4) < 1e-3


def small(**kw):
    """Encoders of short sounds, randomised, in float64."""
    settings = {"rate": 8000, "mels": 16, "width": 16, "depth": 1}
    return randomised(Encoders({"sound": Audio(**{**settings, **kw})}).double())


def test_a_row_is_a_function_of_its_own_waveform():
    encoders, waves = small(), [tone(440, n=n, rate=8000).float() for n in (4000, 1500, 2500)]
    whole = encoders.encoded(encoders(sound=waves), ())
    for row, wave in enumerate(waves):
        alone = encoders.encoded(encoders(sound=[wave]), ())
        n = alone.tokens.shape[1]
        assert n == -(-(1 + len(wave) // 160) // 4) == int(whole.tokens_mask[row].sum())
        assert torch.allclose(alone.tokens[0], whole.tokens[row, :n], atol=1e-12)
        assert torch.allclose(alone.vector[0], whole.vector[row], atol=1e-12)
        assert not whole.tokens[row, n:].any()
    other = encoders.encoded(encoders(sound=[tone(880, n=4000, rate=8000).float()]), ())
    assert relative(other.vector[0], whole.vector[0]) > 1e-2


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: Audio().read([torch.zeros(100)]), "a waveform of 100 samples: expected 512 to 160000, which is 10 s"),
        (lambda: Audio().read([torch.zeros(2, 1000)]), "finite floats"),
        (lambda: Audio().read([torch.full((1000,), torch.nan)]), "finite floats"),
        (lambda: Audio().read([torch.zeros(1000).short()]), "finite floats"),
        (lambda: Audio(mels=512), "too narrow"),
        (lambda: Audio(hop=600), "window >= hop"),
        (lambda: Audio(patch=0), "patch >= 1"),
    ],
)
def test_mistakes_are_refused(make, why):
    with pytest.raises(InputError, match=why):
        make()


def test_sounds_are_learned():
    high = torch.arange(16) % 2
    x = (2.0 * high - 1)[:, None, None, None] + 0.1 * torch.randn(
        16, 1, 6, 6, generator=torch.Generator().manual_seed(0)
    )
    encoders = Encoders({"sound": Audio(rate=8000, mels=16, width=16, depth=1)})
    waves = [tone(1500 if k else 300, n=1200 + 100 * i, rate=8000).float() for i, k in enumerate(high.tolist())]
    assert_learned(encoders, x, {"sound": waves}, cross=(0,))
