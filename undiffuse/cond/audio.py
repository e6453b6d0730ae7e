"""Sound -> tokens over time: by a log-mel spectrogram and a transformer trained along, or by a frozen encoder."""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from undiffuse.cond.cond import Cond
from undiffuse.cond.frozen import Pooled, frozen, kept, loaded, width
from undiffuse.cond.transformer import Transformer, check_sizes, sequences
from undiffuse.types import InputError

_FLOOR = 1e-8  # of power: what is quieter is silence


def mel(hertz: Tensor) -> Tensor:
    """The mel scale, 2595 log10(1 + f / 700) (O'Shaughnessy 1987)."""
    return 2595 * torch.log10(1 + hertz / 700)


def bands(rate: int, window: int, count: int) -> Tensor:
    """(count, window / 2 + 1): triangles over a Fourier transform's frequencies, with peak 1, at equal distances in mel
    from 0 to rate / 2; each ends where its neighbours peak, so that between the outer peaks they sum to 1."""
    f = torch.linspace(0, rate / 2, window // 2 + 1, dtype=torch.float64)
    edges = 700 * (10 ** (torch.linspace(0, float(mel(f[-1])), count + 2, dtype=torch.float64) / 2595) - 1)
    low, peak, high = (edges[i : count + i, None] for i in range(3))
    return torch.minimum((f - low) / (peak - low), (high - f) / (high - peak)).clamp(min=0)


def log_mel(wave: Tensor, rate: int, count: int = 64, window: int = 512, hop: int = 160) -> Tensor:
    """Samples (n,) in [-1, 1] at `rate` a second -> (frames, count), frames = 1 + n // hop: log10 of the power in mel
    bands under a Hann window, as (log10 + 4) / 4, which is -1 for silence and near 1 for the loudest tone.

    The powers of a sine of amplitude a sum to a^2, in the one or two bands that it falls into.
    """
    hann = torch.hann_window(window, dtype=torch.float64)
    padded = pad(wave.double(), (window // 2, window // 2))
    spectrum = torch.stft(padded, window, hop, window=hann, center=False, return_complex=True)
    power = (2 * spectrum.abs() / hann.sum()).square()
    # a tone's main lobe holds sum(hann^2) window / sum(hann)^2 times the power at its peak
    power = power * (hann.sum() ** 2 / (window * hann.square().sum()))
    return ((bands(rate, window, count) @ power).clamp(min=_FLOOR).log10().T.float() + 4) / 4


def _waveform(value: Any, least: int, seconds: float, rate: int) -> Tensor:
    """Samples (n,), checked."""
    wave = torch.as_tensor(value)
    if wave.ndim != 1 or not wave.is_floating_point() or not bool(wave.isfinite().all()):
        raise InputError(f"a waveform must be finite floats (n,), got {wave.dtype} {tuple(wave.shape)}")
    if not least <= len(wave) <= seconds * rate:
        raise InputError(
            f"a waveform of {len(wave)} samples: expected {least} to {int(seconds * rate)}, "
            f"which is {seconds:g} s at {rate} a second"
        )
    return wave


@dataclass(frozen=True)
class Audio:
    """Waveforms in [-1, 1] at `rate` samples a second as tokens, one for every `patch` frames of their log-mel
    spectrogram of `mels` bands, and their mean: through a transformer of `depth` layers of `width` features, trained
    along with the network. A waveform (n,) may have any length from one window on, up to `seconds`.

    >>> from undiffuse.cond import Encoders
    >>> encoders = Encoders({"sound": Audio(rate=8000, mels=16, width=16, depth=1)})
    >>> encoders.encoded(encoders(sound=[torch.rand(4000), torch.rand(2000)]), ()).tokens_mask.sum(1).tolist()
    [7, 4]
    """

    rate: int = 16_000
    mels: int = 64
    window: int = 512
    hop: int = 160
    patch: int = 4
    width: int = 128
    depth: int = 2
    seconds: float = 10.0
    spatial = 0
    reads = "audio"

    def __post_init__(self) -> None:
        least = {name: getattr(self, name) for name in ("rate", "mels", "window", "hop", "patch")}
        check_sizes("Audio", self.width, self.depth, **least)
        if not 0 < self.seconds < math.inf or self.hop > self.window or self.window % 2:
            raise InputError(f"Audio needs seconds > 0, and an even window >= hop, got {self}")
        if not bool((bands(self.rate, self.window, self.mels).sum(1) > 0).all()):
            raise InputError(f"{self.mels} mel bands are too narrow for a window of {self.window} samples: take fewer")

    @property
    def vector(self) -> int:
        """The width of the mean."""
        return self.width

    @property
    def tokens(self) -> int:
        """The width of the tokens."""
        return self.width

    def read(self, values: Sequence[Any] | Tensor) -> dict[str, Tensor]:
        """Spectrograms (b, n patch, mels), filled up with zeros, and which of the n tokens are there."""
        parts = []
        for value in values:
            wave = _waveform(value, self.window, self.seconds, self.rate)
            frames = log_mel(wave, self.rate, self.mels, self.window, self.hop)
            silence = -torch.ones(-len(frames) % self.patch, self.mels)
            parts.append(torch.cat([frames, silence]).reshape(-1, self.patch, self.mels))
        whole, mask = sequences(parts)
        return {"mel": whole, "mask": mask}

    def build(self) -> nn.Module:
        """Patches of frames and the transformer."""
        return _Sound(self)


class _Sound(nn.Module):
    def __init__(self, of: Audio) -> None:
        super().__init__()
        self.stem, self.transformer = nn.Linear(of.patch * of.mels, of.width), Transformer(of.width, of.depth)

    def forward(self, read: Mapping[str, Tensor], size: Sequence[int]) -> Cond:
        out: Cond = self.transformer(self.stem(read["mel"].flatten(2).to(self.stem.weight.dtype)), read["mask"])
        return out


@dataclass(frozen=True)
class PretrainedAudio:
    """A frozen audio encoder of `transformers`, by its folder or its name on the hub (wav2vec2, HuBERT, the encoder of
    Whisper, AST): its last hidden states are the tokens, their mean is the vector. `pip install 'undiffuse[text]'`.

    Waveforms in [-1, 1] have `rate` samples a second, which must be the encoder's, and any length up to `seconds`;
    Whisper reads 30 s at most, and AST cuts what is longer than its own. A waveform is embedded once, by itself, and
    kept in memory; and, where `cache` names a folder, in a file named by the hash of the encoder's weights and of the
    waveform. Encoders that fill waveforms up to a length of their own, as Whisper does, have tokens only where there is
    sound, if they say where. InputError where there is no such encoder.
    """

    name: str
    rate: int = 16_000
    seconds: float = 10.0
    cache: str = ""
    spatial = 0
    reads = "audio"

    def __post_init__(self) -> None:
        if not self.name.strip() or self.rate < 1 or not 0 < self.seconds < math.inf:
            raise InputError(f"PretrainedAudio needs a folder or a hub's name, rate >= 1 and seconds > 0: got {self}")

    @property
    def vector(self) -> int:
        """The width of the mean."""
        return self.tokens

    @property
    def tokens(self) -> int:
        """The width of the hidden states."""
        return width("audio", self.name)

    def read(self, values: Sequence[Any] | Tensor) -> dict[str, Tensor]:
        """Tokens (b, n, tokens), and where they are."""
        waves = [_waveform(value, 1, self.seconds, self.rate).float().contiguous() for value in values]
        found = [_embedded(self.name, self.rate, self.cache, _Wave.of(wave)) for wave in waves]
        tokens, mask = sequences([each["tokens"] for each in found])
        return {"tokens": tokens, "mask": mask}

    def build(self) -> nn.Module:
        """Nothing to train."""
        return Pooled()


@dataclass(frozen=True)
class _Wave:
    """A waveform that is known by its hash."""

    hash: str
    samples: Tensor = field(compare=False)

    @staticmethod
    def of(wave: Tensor) -> _Wave:
        return _Wave(hashlib.sha256(wave.numpy().tobytes()).hexdigest(), wave)


@functools.cache
def _loaded(name: str) -> tuple[Any, Any, str]:
    """(feature extractor, frozen encoder, hash of its weights)."""

    def load(transformers: Any) -> tuple[Any, Any]:
        extractor = transformers.AutoFeatureExtractor.from_pretrained(name)
        model = transformers.AutoModel.from_pretrained(name, dtype=torch.float32)
        return extractor, model.get_encoder() if model.config.is_encoder_decoder else model

    extractor, model = loaded("audio", name, load)
    return extractor, model, frozen(model)


@functools.lru_cache(1000)
def _embedded(name: str, rate: int, cache: str, wave: _Wave) -> dict[str, Tensor]:
    """`tokens` (n, width) of a waveform."""
    extractor, model, weights = _loaded(name)
    if extractor.sampling_rate != rate:
        raise InputError(
            f"waveforms of {rate} samples a second for {name!r}, which reads {extractor.sampling_rate}: resample them "
            f"first, and give rate={extractor.sampling_rate}"
        )
    n, most = len(wave.samples), getattr(extractor, "n_samples", math.inf)
    if n > most:
        raise InputError(f"a waveform of {n} samples for {name!r}, which reads {most} at most: cut it")

    def embed() -> dict[str, Tensor]:
        try:
            inputs = extractor(
                wave.samples.numpy(), sampling_rate=rate, return_tensors="pt", return_attention_mask=True
            )
            # told to the encoder where it was trained so; else it only says which tokens are there
            there = inputs["attention_mask"] if extractor.return_attention_mask else inputs.pop("attention_mask", None)
            with torch.no_grad():
                tokens = model(**inputs).last_hidden_state[0]
        except Exception as error:  # what is too short for an encoder's convolutions
            first = (str(error).splitlines() or [type(error).__name__])[0]
            raise InputError(f"{name!r} cannot read a waveform of {n} samples ({first})") from error
        count = len(tokens) if there is None else math.ceil(float(there.double().mean()) * len(tokens) - 1e-6)
        return {"tokens": tokens[:count].contiguous()}

    return kept(cache, f"{weights} {rate} {wave.hash}", embed)
