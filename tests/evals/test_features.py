"""Features: closed forms, independence of how a set is cut, pictures of other shapes, and networks from files."""

import json
import sys
import types

import pytest
import torch

from tests.peers import load_torch_fidelity
from undiffuse import InputError
from undiffuse.data import load_data
from undiffuse.data.source import digest
from undiffuse.evals.classifier import CLASSIFIERS
from undiffuse.evals.features import (
    FEATURES,
    Components,
    Inception,
    Pixels,
    Pretrained,
    extract,
    hash_of,
    open_features,
    shaped,
    shrunk,
)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_components_are_the_projections_with_the_largest_variance():
    scales = torch.tensor([5.0, 3.0, 1.0, 0.1])
    q = torch.linalg.qr(normal(4, 4, seed=1).double())[0]
    z = normal(2000, 4).double()
    z = z - z.mean(0)
    z = z @ torch.linalg.inv(torch.linalg.cholesky(z.T @ z / len(z))).T
    x = (z * scales) @ q.T + 2
    found = Components.of(x.reshape(-1, 1, 2, 2), 2)(x.reshape(-1, 1, 2, 2))
    expected = (z * scales)[:, :2] / scales.square().mean().sqrt()
    assert torch.allclose(found.abs(), expected.abs(), atol=1e-6)


def test_components_of_wide_data_are_repeatable():
    """Above 2,048 elements they are found by a randomised algorithm."""
    x = normal(40, 3, 28, 28)
    torch.manual_seed(1)
    a = Components.of(x, 4)
    state = torch.get_rng_state()
    b = Components.of(x, 4)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(a(x), b(x))
    assert a.hash == b.hash != Components.of(x, 5).hash
    assert a.hash != Components.of(x + 1e-3, 4).hash


@pytest.mark.parametrize("name", ["pixels", "pca", "digits"])
def test_features_do_not_depend_on_how_a_set_is_cut(name):
    x = load_data("digits").x[:130]
    (features,) = open_features(name, x)
    whole = extract(features, x)
    assert torch.equal(torch.cat([extract(features, part) for part in x.split([1, 3, 96, 30])]), whole)
    assert torch.equal(extract(features, x.flip(0)).flip(0), whole)
    assert whole.dtype == torch.float64


def test_hash_sees_values_and_shape():
    x = normal(4, 1, 2, 2)
    assert hash_of(x) == hash_of(x.clone()) == hash_of(x.double())
    assert len({hash_of(x), hash_of(x.reshape(2, 2, 2, 2)), hash_of(x.flip(0)), hash_of(x + 1e-6)}) == 4


def test_pictures_of_another_shape():
    flat = torch.full((2, 3, 5, 7), 0.25)
    assert torch.allclose(shaped(flat, (1, 8, 8)), torch.full((2, 1, 8, 8), 0.25))
    red = torch.zeros(1, 3, 4, 4)
    red[:, 0] = 1
    assert torch.allclose(shaped(red, (1, 4, 4)), torch.full((1, 1, 4, 4), 0.299))
    assert torch.equal(shaped(red[:, :1], (3, 4, 4)), torch.ones(1, 3, 4, 4))
    same = normal(2, 1, 8, 8)
    assert torch.equal(shaped(same, (1, 8, 8)), same)
    ramp = torch.linspace(-1, 1, 64).expand(1, 1, 64, 64)
    smaller = shaped(ramp, (1, 8, 8))[0, 0, 0]
    assert torch.allclose(smaller, ramp[0, 0, 0].reshape(8, 8).mean(1), atol=0.06)  # antialiased: means of 8 pixels
    with pytest.raises(InputError, match="1 or 3 channels"):
        shaped(normal(2, 2, 8, 8), (1, 8, 8))
    with pytest.raises(InputError, match="1 or 3 channels"):
        shaped(normal(2, 1, 8), (1, 8, 8))


def test_auto_is_the_sets_own_classifier_and_components():
    x = load_data("digits").x[:100]
    assert [f.name for f in open_features("auto", x, "digits")] == ["digits", "pca"]
    assert [f.name for f in open_features("auto", x, "photos")] == ["pca"]
    assert [f.name for f in open_features("auto", normal(9, 1, 6), "digits")] == ["pca"]
    (found,) = open_features("digits", x)
    assert found.hash == CLASSIFIERS["digits"].sha256
    assert set(CLASSIFIERS) <= set(FEATURES)


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ("picels", "did you mean 'pixels'"),
        ("resnet", "there are auto, pixels"),
        ("pca=0", "pca=64"),
        ("pca=many", "pca=64"),
        ("pixels,pixels", "twice"),
        ("digits=3", "no argument"),
        ("", "unknown features"),
        ("inception", "weights"),
        ("inception=/nowhere.pth", "no such file"),
        ("transformers=/nowhere", "no config.json"),
    ],
)
def test_mistakes_in_the_words(words, why):
    with pytest.raises(InputError, match=why):
        open_features(words, normal(9, 1, 4, 4))


LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """The folder of a CLIP of random weights."""
    transformers = pytest.importorskip("transformers")
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    folder = tmp_path_factory.mktemp("clip")
    words = ["<|startoftext|>", "<|endoftext|>", *LETTERS, *(c + "</w>" for c in LETTERS)]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**small, "vocab_size": len(words), "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    config = transformers.CLIPConfig(
        text_config=text, vision_config={**small, "image_size": 32, "patch_size": 16}, projection_dim=12
    )
    torch.manual_seed(0)
    transformers.CLIPModel(config).save_pretrained(folder)
    transformers.CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt")).save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def test_clip_from_a_folder(clip):
    """The same as the network itself on the same bytes, and its score is 100 cos."""
    from transformers import CLIPModel, CLIPTokenizer

    x = torch.tanh(normal(5, 3, 32, 32))
    found = Pretrained.load(str(clip))
    net, tokenizer = CLIPModel.from_pretrained(clip).eval(), CLIPTokenizer.from_pretrained(clip)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).reshape(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).reshape(3, 1, 1)
    pixels = (((x + 1) * 127.5).round() / 255 - mean) / std
    texts = ["a photo of a cat", "7", "a photo of a cat", "dog", "7"]
    with torch.no_grad():
        out = net(pixel_values=pixels, **tokenizer(texts, padding=True, return_tensors="pt"))
    seen = extract(found, x)
    assert torch.allclose(seen / seen.norm(dim=1, keepdim=True), out.image_embeds.double(), atol=1e-5)
    cosine = (out.image_embeds * out.text_embeds).sum(1).double()
    assert found.reads_text
    assert torch.allclose(found.score(x, texts), 100 * cosine.clamp(min=0), atol=1e-3)
    assert (cosine > 0).any()
    gray = x[:, :1]
    assert torch.equal(extract(found, gray), extract(found, gray.expand(-1, 3, -1, -1)))
    settings = json.loads((clip / "preprocessor_config.json").read_text())
    (clip / "preprocessor_config.json").write_text(json.dumps({**settings, "image_mean": [0.5, 0.5, 0.5]}))
    other = Pretrained.load(str(clip))
    assert other.hash != found.hash
    assert not torch.allclose(extract(other, x), seen, atol=1e-3)


def test_dino_from_a_folder(tmp_path):
    """A network without text gives its class token, and no CLIP score."""
    transformers = pytest.importorskip("transformers")
    from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil

    torch.manual_seed(0)
    config = transformers.Dinov2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    net = transformers.Dinov2Model(config).eval()
    net.save_pretrained(tmp_path)
    processor = BitImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    processor.save_pretrained(tmp_path)
    found, x = Pretrained.load(str(tmp_path)), torch.tanh(normal(3, 3, 28, 28))
    mean, std = (torch.tensor(v).reshape(3, 1, 1) for v in (processor.image_mean, processor.image_std))
    with torch.no_grad():
        expected = net(pixel_values=(((x + 1) * 127.5).round() / 255 - mean) / std).pooler_output
    assert torch.allclose(extract(found, x), expected.double(), atol=1e-4)
    with pytest.raises(InputError, match="reads no text"):
        found.score(x, ["a"] * 3)


def test_a_folder_that_is_no_network(tmp_path):
    pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="no vision network"):
        Pretrained.load(str(tmp_path))


def test_pixels_are_the_samples():
    x = normal(3, 2, 5)
    assert torch.equal(Pixels()(x), x.reshape(3, 10))


def test_large_pictures_are_shrunk_where_elements_are_compared():
    """Else a few thousand of them would not fit into memory."""
    x = normal(70, 4, 8, 8).repeat_interleave(8, 2).repeat_interleave(8, 3)
    assert Pixels()(x).shape == (70, 4 * 32 * 32)
    wide = normal(3, 1, 40, 80)
    assert torch.equal(Pixels()(wide), shaped(wide, (1, 16, 32)).flatten(1))
    found = Components.of(x, 3)
    assert extract(found, x).shape == (70, 3)
    assert shrunk(normal(2, 1, 32, 32)).shape == (2, 1, 32, 32)


def test_inception_from_a_file(tmp_path, monkeypatch):
    """torch-fidelity's own extractor on the bytes of the pictures; a file that would run code is refused."""
    pytest.importorskip("prdc")  # installed beside torch-fidelity
    with load_torch_fidelity() as load:
        module = load("feature_extractor_inceptionv3")
        monkeypatch.setattr(module.FeatureExtractorInceptionV3, "load_state_dict", torch.nn.Module.load_state_dict)
        torch.manual_seed(0)
        with monkeypatch.context() as patch:
            patch.setattr(torch, "load", lambda *_, **__: {})
            patch.setattr(module.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
            net = module.FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path="x").eval()
        torch.save(net.state_dict(), tmp_path / "weights.pth")
        found, x = Inception.load(str(tmp_path / "weights.pth")), torch.tanh(normal(2, 3, 16, 16))
        with torch.no_grad():
            (expected,) = net(((x + 1) * 127.5).round().to(torch.uint8))
        assert torch.allclose(extract(found, x, rows=2), expected.double(), rtol=1e-4)
        assert found.hash == digest((tmp_path / "weights.pth").read_bytes())
        torch.save(torch.nn.Linear(2, 2), tmp_path / "code.pth")
        with pytest.raises(InputError, match="does not hold the weights"):
            Inception.load(str(tmp_path / "code.pth"))


def test_inception_without_its_library(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", types.ModuleType("torch_fidelity"))
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    (tmp_path / "weights.pth").write_bytes(b"x")
    with pytest.raises(InputError, match="pip install torch-fidelity"):
        Inception.load(str(tmp_path / "weights.pth"))
