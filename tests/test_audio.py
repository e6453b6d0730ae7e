"""Sound as a condition: the spectrogram of pure tones in closed form, tokens over time, joint training."""

import math

import pytest
import torch

from tests.test_encoders import assert_learned
from tests.test_nets import randomised, relative
from undiffuse import InputError
from undiffuse.cond import Audio, Encoders, PretrainedAudio, log_mel
from undiffuse.cond import audio as module
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
        (lambda: PretrainedAudio(" "), "a folder or a hub's name"),
        (lambda: PretrainedAudio("any", seconds=0.0), "seconds > 0"),
        (lambda: PretrainedAudio("/nowhere/at/all").tokens, "no audio encoder at '/nowhere/at/all'"),
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


# frozen encoders

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
CONVOLUTIONS = {"conv_dim": (16, 16), "conv_kernel": (10, 3), "conv_stride": (5, 2), "num_feat_extract_layers": 2}


def wav2vec2(transformers):
    """A small wav2vec2: tokens of a waveform of n samples are what two convolutions leave."""
    config = transformers.Wav2Vec2Config(**SMALL, **CONVOLUTIONS, num_conv_pos_embeddings=16)
    extractor = transformers.Wav2Vec2FeatureExtractor(return_attention_mask=False)
    return transformers.Wav2Vec2Model(config), extractor, lambda n: ((n - 10) // 5 + 1 - 3) // 2 + 1


def hubert(transformers):
    """A small HuBERT, trained with an attention mask."""
    config = transformers.HubertConfig(**SMALL, **CONVOLUTIONS, num_conv_pos_embeddings=16, feat_extract_norm="layer")
    extractor = transformers.Wav2Vec2FeatureExtractor(return_attention_mask=True)
    return transformers.HubertModel(config), extractor, lambda n: ((n - 10) // 5 + 1 - 3) // 2 + 1


def whisper(transformers):
    """A small Whisper of one second: a token every 320 samples."""
    size = {"d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 64}
    size |= {"decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 64, "vocab_size": 40}
    numbers = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    config = transformers.WhisperConfig(**size, **numbers, num_mel_bins=16, max_source_positions=50)
    extractor = transformers.WhisperFeatureExtractor(feature_size=16, chunk_length=1)
    return transformers.WhisperModel(config), extractor, lambda n: -(-n // 320)


def ast(transformers):
    """A small spectrogram transformer, which has tokens of the silence that it adds, too."""
    config = transformers.ASTConfig(
        **SMALL, patch_size=4, frequency_stride=4, time_stride=4, max_length=64, num_mel_bins=16
    )
    extractor = transformers.ASTFeatureExtractor(num_mel_bins=16, max_length=64)
    return transformers.ASTModel(config), extractor, lambda n: 2 + 16 * 4


@pytest.fixture(params=[wav2vec2, hubert, whisper, ast])
def folder(request, tmp_path):
    """The folder of a small encoder, itself, its feature extractor, and how many tokens n samples have."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model, extractor, count = request.param(transformers)
    model.eval().save_pretrained(tmp_path)
    extractor.save_pretrained(tmp_path)
    return str(tmp_path), model, extractor, count


def test_any_audio_encoder_in_a_folder_gives_its_hidden_states(folder):
    name, model, extractor, count = folder
    encoders = Encoders({"sound": PretrainedAudio(name)})
    assert encoders.widths == {"vector": 32, "tokens": 32, "spatial": 0}
    assert list(encoders.parameters()) == []
    waves = [tone(440, 0.5, n).float() for n in (8000, 3200, 5001)]
    told = encoders.encoded(encoders(sound=waves), ())
    assert told.tokens_mask.sum(1).tolist() == [count(len(wave)) for wave in waves]
    network = getattr(model, "encoder", model) if model.config.is_encoder_decoder else model
    for row, wave in enumerate(waves):
        inputs, n = extractor(wave.numpy(), sampling_rate=RATE, return_tensors="pt"), count(len(wave))
        with torch.no_grad():
            expected = network(**inputs).last_hidden_state[0, :n]
        assert torch.allclose(told.tokens[row, :n], expected, atol=1e-5)
        assert torch.allclose(told.vector[row], expected.mean(0), atol=1e-5)
        assert not told.tokens[row, n:].any()
        assert not told.tokens_mask[row, n:].any()
    assert relative(told.vector[0], told.vector[1]) > 1e-4
    assert module._loaded(name)[1].training is False


def test_sounds_are_embedded_once_and_kept_by_hash(folder, tmp_path, monkeypatch):
    name, *_ = folder
    kept = tmp_path / "kept"
    encoder, waves = PretrainedAudio(name, cache=str(kept)), [tone(440).float(), tone(880).float(), tone(440).float()]
    module._embedded.cache_clear()
    first = encoder.read(waves)
    assert module._embedded.cache_info().misses == len(list(kept.rglob("*.safetensors"))) == 2
    assert torch.equal(first["tokens"][0], first["tokens"][2])
    module._embedded.cache_clear()
    extractor, _, weights = module._loaded(name)
    monkeypatch.setattr(module, "_loaded", lambda name: (extractor, None, weights))  # nothing is computed
    assert torch.equal(encoder.read(waves)["tokens"], first["tokens"])
    with pytest.raises(InputError, match="cannot read a waveform of 8000 samples"):
        encoder.read([tone(1000).float()])


def test_other_rates_are_refused_with_both_named(folder):
    name, *_ = folder
    why = f"22050 samples a second for '{name}', which reads 16000: resample them first, and give rate=16000"
    with pytest.raises(InputError, match=why):
        PretrainedAudio(name, rate=22_050).read([tone(440).float()])


@pytest.mark.parametrize("folder", [wav2vec2], indirect=True)
def test_what_is_too_short_for_an_encoder_is_said(folder):
    with pytest.raises(InputError, match="cannot read a waveform of 5 samples"):
        PretrainedAudio(folder[0]).read([torch.zeros(5)])


@pytest.mark.parametrize("folder", [whisper], indirect=True)
def test_what_an_encoder_would_cut_is_refused(folder):
    with pytest.raises(InputError, match=r"a waveform of 16001 samples for .*, which reads 16000 at most: cut it"):
        PretrainedAudio(folder[0]).read([torch.zeros(16_001)])
