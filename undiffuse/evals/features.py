"""Features: what sets of samples are compared by, each with the hash of all that decides it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, interpolate

from undiffuse.data.source import digest
from undiffuse.evals.classifier import CLASSIFIERS, Classifier, load_classifier
from undiffuse.spectrum import Spectrum
from undiffuse.types import InputError, did_you_mean

SIDE = 32  # of pictures, where their elements themselves are compared: larger ones are shrunk
ROWS = 64  # of every call: a network rounds by batch size, and so features do not depend on how a set is cut
COMPONENTS = 64
_SHRUNK = f"antialiased bilinear to a longer side of {SIDE}, where it is more"


class Features(Protocol):
    """Samples (n, *data) -> (n, width), by `extract`; `hash` changes with whatever changes the result."""

    @property
    def name(self) -> str: ...
    @property
    def hash(self) -> str: ...
    @property
    def resize(self) -> str:
        """What is done to a picture before it is read."""
        ...

    def __call__(self, x: Tensor, /) -> Tensor: ...


@torch.no_grad()
def extract(
    features: Callable[[Tensor], Tensor], x: Tensor, rows: int = ROWS, device: torch.device | str = "cpu"
) -> Tensor:
    """Features (n, width) of samples (n, *data), in calls of exactly `rows` rows on `device`, where the networks of
    `features` are moved: equal for every way to cut a set.

    >>> extract(Pixels(), torch.zeros(3, 1, 2, 2)).shape
    torch.Size([3, 4])
    """
    for network in vars(features).values() if hasattr(features, "__dict__") else ():
        if isinstance(network, nn.Module):
            network.to(device)
    out = []
    for part in torch.split(x, rows):
        short = rows - len(part)
        full = torch.cat([part, part[-1:].expand(short, *part.shape[1:])]) if short else part
        out.append(features(full.to(device))[: len(part)].cpu().double())
    return torch.cat(out)


def shaped(x: Tensor, shape: Sequence[int]) -> Tensor:
    """Pictures (n, c, h, w) as those of `shape` (channels, height, width): gray by ITU-R BT.601, resized by
    antialiased bilinear interpolation; as they are where they fit."""
    channels, *size = shape
    if x.ndim != 4 or x.shape[1] not in (1, 3):
        raise InputError(f"this feature network reads pictures of 1 or 3 channels, got samples {tuple(x.shape[1:])}")
    if channels == 1 and x.shape[1] == 3:
        x = (x * torch.tensor([0.299, 0.587, 0.114]).to(x).reshape(3, 1, 1)).sum(1, keepdim=True)
    x = x.expand(-1, channels, -1, -1)
    if list(x.shape[2:]) == list(size):
        return x
    return interpolate(x, tuple(size), mode="bilinear", align_corners=False, antialias=True)


def shrunk(x: Tensor) -> Tensor:
    """Pictures (n, c, h, w) with the longer side at most 32, by antialiased bilinear interpolation; else x itself."""
    if x.ndim != 4 or max(x.shape[2:]) <= SIDE:
        return x
    size = [max(1, round(side * SIDE / max(x.shape[2:]))) for side in x.shape[2:]]
    return interpolate(x, size, mode="bilinear", align_corners=False, antialias=True)


def hash_of(x: Tensor) -> str:
    """SHA-256 of the shape and float32 values of samples."""
    return digest(str(tuple(x.shape)), x.detach().cpu().float().contiguous().numpy().tobytes())


@dataclass(frozen=True)
class Pixels:
    """The elements of a sample themselves."""

    name: str = "pixels"
    hash: str = digest("pixels", str(SIDE))
    resize: str = _SHRUNK

    def __call__(self, x: Tensor) -> Tensor:
        return shrunk(x).flatten(1)


@dataclass(frozen=True, eq=False)
class Components:
    """The first principal components of real samples, of which `hash` is, in units of an element's std: features of any
    data."""

    spectrum: Spectrum
    hash: str
    name: str = "pca"
    resize: str = _SHRUNK

    @staticmethod
    def of(train: Tensor, count: int = COMPONENTS, name: str = "pca") -> Components:
        """The first `count` of samples (n, *data)."""
        train = shrunk(train)
        with torch.random.fork_rng(devices=[]):  # of wide data they are found by a randomised algorithm
            torch.manual_seed(0)
            spectrum = Spectrum.measure(train, count)
        return Components(spectrum, digest("pca/std", str(count), hash_of(train)), name)

    def __call__(self, x: Tensor) -> Tensor:
        assert self.spectrum.basis is not None
        x = shrunk(x).double().flatten(1)
        return (x - self.spectrum.mean.to(x.device)) / self.spectrum.std @ self.spectrum.basis.T.to(x.device)


@dataclass(frozen=True, eq=False)
class Reading:
    """A built-in classifier's penultimate layer; `read` gives its probabilities of the classes `names`."""

    name: str
    classifier: Classifier
    hash: str

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(CLASSIFIERS[self.name].shape)

    @property
    def names(self) -> tuple[str, ...]:
        return self.classifier.names

    @property
    def resize(self) -> str:
        return f"antialiased bilinear to {'x'.join(map(str, self.shape))} where it differs"

    def __call__(self, x: Tensor) -> Tensor:
        return self.classifier.features(shaped(x, self.shape))

    def read(self, x: Tensor) -> Tensor:
        """Probabilities (n, classes)."""
        device = next(self.classifier.parameters()).device
        return extract(lambda part: self.classifier(shaped(part, self.shape)).softmax(1), x, device=device)


@dataclass(frozen=True, eq=False)
class Inception:
    """FID's Inception-v3 (2,048 features) as torch-fidelity has it, from its weight file."""

    file: Path
    net: nn.Module
    hash: str
    name: str = "inception"
    resize: str = "8 bits; TensorFlow's bilinear to 299x299, as FID was defined"

    @staticmethod
    def load(file: str) -> Inception:
        """The extractor with the weights in `file`; InputError without them."""
        path = Path(file).expanduser()
        if not path.is_file():
            raise InputError(
                f"--features inception={file}: no such file. Give torch-fidelity's weights, "
                "weights-inception-2015-12-05-6726825d.pth of its releases"
            )
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except ImportError as error:
            raise InputError(f"Inception features need torch-fidelity: pip install torch-fidelity ({error})") from error
        try:
            torch.load(path, weights_only=True)  # the extractor unpickles anything: let nothing but tensors come to it
            net = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=str(path))
        except Exception as error:  # whatever a foreign file makes torch raise
            raise InputError(f"{file} does not hold the weights of torch-fidelity's Inception-v3: {error}") from error
        return Inception(path, net.eval(), digest(path.read_bytes()))

    def __call__(self, x: Tensor) -> Tensor:
        (features,) = self.net(_bytes(x))
        return features  # type: ignore[no-any-return]


@dataclass(frozen=True, eq=False)
class Pretrained:
    """A vision network of transformers (CLIP, DINOv2, SigLIP, ...) from a folder on this machine: its picture
    embedding, else its class token; `score` is the CLIP score where the network reads text too."""

    folder: Path
    net: Any
    processor: Any
    name: str
    hash: str
    resize: str = "8 bits; as its processor says"

    @staticmethod
    def load(folder: str) -> Pretrained:
        """The network of a folder with config.json, preprocessor_config.json and .safetensors weights; InputError."""
        path = Path(folder).expanduser()
        if not (path / "config.json").is_file():
            raise InputError(
                f"--features transformers={folder}: no config.json there. Give the folder of a vision network, as "
                "`huggingface-cli download openai/clip-vit-base-patch32 --local-dir FOLDER` writes it"
            )
        try:
            from transformers import AutoImageProcessor, AutoModel
        except ImportError as error:
            raise InputError(f"these features need transformers: pip install transformers ({error})") from error
        try:
            net = AutoModel.from_pretrained(path, local_files_only=True, use_safetensors=True).eval()
            processing: Any = AutoImageProcessor
            processor = processing.from_pretrained(path, local_files_only=True, backend="pil")
        except Exception as error:  # whatever a foreign folder makes transformers raise
            raise InputError(f"{folder} is no vision network that transformers can load: {error}") from error
        files = sorted(p for p in path.iterdir() if p.suffix == ".safetensors" or p.name.endswith("config.json"))
        parts = [part for p in files for part in (p.name, p.read_bytes())]
        return Pretrained(path, net, processor, path.resolve().name, digest(*parts))

    def __call__(self, x: Tensor) -> Tensor:
        pixels = _bytes(x).permute(0, 2, 3, 1).cpu().numpy()
        inputs = self.processor([Image.fromarray(p) for p in pixels], return_tensors="pt").to(x.device)
        if hasattr(self.net, "get_image_features"):
            return _pooled(self.net.get_image_features(**inputs))
        return _pooled(self.net(**inputs))

    @property
    def reads_text(self) -> bool:
        """Whether the network embeds texts beside pictures."""
        return hasattr(self.net, "get_text_features")

    @torch.no_grad()
    def score(self, x: Tensor, texts: Sequence[str]) -> Tensor:
        """CLIP score of each picture for its text, 100 max(cos, 0) (Hessel et al. 2021, as commonly scaled)."""
        if not self.reads_text:
            raise InputError(f"{self.name} reads no text: a CLIP score needs a network such as CLIP or SigLIP")
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self.folder, local_files_only=True)
        words = list(dict.fromkeys(texts))
        device = next(self.net.parameters()).device
        tokens = tokenizer(words, padding=True, truncation=True, return_tensors="pt").to(device)
        known = _pooled(self.net.get_text_features(**tokens)).double().cpu()
        meant = known[[words.index(text) for text in texts]]
        return 100 * cosine_similarity(extract(self, x, device=device), meant).clamp(min=0)


def _pooled(answer: Any) -> Tensor:
    """The embedding in what a network of transformers answers."""
    pooled = answer if isinstance(answer, Tensor) else getattr(answer, "pooler_output", None)
    return answer.last_hidden_state[:, 0] if pooled is None else pooled  # type: ignore[no-any-return]


def _bytes(x: Tensor) -> Tensor:
    """Pictures in [-1, 1] as RGB bytes, which is what published scores are computed on."""
    if x.ndim != 4 or x.shape[1] not in (1, 3):
        raise InputError(f"this feature network reads pictures of 1 or 3 channels, got samples {tuple(x.shape[1:])}")
    return ((x.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).expand(-1, 3, -1, -1).contiguous()


def _reading(name: str) -> Callable[[str, Tensor], Features]:
    return lambda _, train: Reading(name, load_classifier(name), CLASSIFIERS[name].sha256)


def _components(count: str, train: Tensor) -> Components:
    """So many of them; without a number 64, or a quarter of the samples where these are few."""
    number = int(count) if count else min(COMPONENTS, max(2, len(train) // 4))
    return Components.of(train, number, f"pca={count}" if count else "pca")


FEATURES: dict[str, Callable[[str, Tensor], Features]] = {
    "pixels": lambda _, train: Pixels(),
    "pca": _components,
    **{name: _reading(name) for name in CLASSIFIERS},
    "inception": lambda file, train: Inception.load(file),
    "transformers": lambda folder, train: Pretrained.load(folder),
}


def check_features(words: str) -> list[tuple[str, str]]:
    """(kind, argument) of each word between commas; InputError for what names no features."""
    out = []
    for word in words.split(","):
        kind, _, argument = word.strip().partition("=")
        if kind not in ("auto", *FEATURES):
            known = f"{did_you_mean(kind, FEATURES)} there are auto, {', '.join(FEATURES)}".lstrip()
            raise InputError(f"unknown features {kind!r}: {known}")
        if argument and kind in ("auto", "pixels", *CLASSIFIERS):
            raise InputError(f"features {kind} take no argument, got {word!r}")
        if kind == "pca" and argument and not (argument.isdigit() and int(argument) > 0):
            raise InputError(f"pca={argument}: expected the number of components, such as pca=64")
        out.append((kind, argument))
    if len(set(out)) != len(out):
        raise InputError(f"features {words!r} name one twice")
    return out


def open_features(words: str, train: Tensor, data: str = "") -> list[Features]:
    """The features of words between commas: `pixels`, `pca` or `pca=COUNT` (of the real samples `train`), a built-in
    classifier, `inception=FILE`, `transformers=FOLDER`; `auto` is the classifier of the set `data`, if there is one for
    its shape, and `pca`. InputError for other words.

    >>> [f.name for f in open_features("pca=2,pixels", torch.randn(5, 1, 2, 2))]
    ['pca=2', 'pixels']
    """
    found: dict[str, Features] = {}
    for kind, argument in check_features(words):
        own = (data,) if data in CLASSIFIERS and train.ndim == 4 else ()
        for name in (*own, "pca") if kind == "auto" else (kind,):
            made = FEATURES[name](argument, train)
            found[made.name] = made
    return list(found.values())
