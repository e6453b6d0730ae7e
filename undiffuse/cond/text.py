"""Text -> tokens and their mean: by a small transformer over bytes that is trained along, or by a frozen encoder."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from undiffuse.cond.cond import Cond
from undiffuse.cond.frozen import Pooled, frozen, kept, loaded, width
from undiffuse.cond.prompt import Prompt, plain
from undiffuse.cond.transformer import Transformer, check_sizes, sequences
from undiffuse.types import InputError


@dataclass(frozen=True)
class Bytes:
    """The UTF-8 bytes of a text through a transformer of `depth` layers of `width` features, trained along with the
    network (as in GLIDE; Nichol et al. 2021, arXiv 2112.10741): tokens (b, n, width) and their mean as the vector.

    A token is a word, or every `chunk` bytes of a longer one: the sum of embeddings of its bytes by their places in it.
    No vocabulary and no download. A text of more than `length` bytes is refused. Texts are strings or `Prompt`s, whose
    weights multiply the tokens.

    >>> from undiffuse.cond import Encoders
    >>> encoders = Encoders({"text": Bytes(width=16, depth=1)})
    >>> encoders.encoded(encoders(text=["red", "a car"]), ()).tokens_mask.sum(1).tolist()
    [1, 2]
    """

    width: int = 128
    depth: int = 2
    length: int = 256
    chunk: int = 16
    spatial = 0
    reads = "text"

    def __post_init__(self) -> None:
        check_sizes("Bytes", self.width, self.depth, length=self.length, chunk=self.chunk)

    @property
    def vector(self) -> int:
        """The width of the mean."""
        return self.width

    @property
    def tokens(self) -> int:
        """The width of the tokens."""
        return self.width

    def read(self, values: Sequence[str | Prompt]) -> dict[str, Tensor]:
        """Bytes (b, n, chunk) of n tokens plus 1, 0 for none, where tokens are, and their weights."""
        codes, weights = [], []
        for given in map(plain, values):
            if (many := len(given.text.encode())) > self.length:
                raise InputError(f"{many} bytes of text, {given.text[:40]!r} ...: length={self.length} is the most")
            tokens = self._tokens(given)
            padded = [[code + 1 for code, _ in token] + [0] * (self.chunk - len(token)) for token in tokens]
            codes.append(torch.tensor(padded, dtype=torch.int16).reshape(-1, self.chunk))
            weights.append(torch.tensor([sum(w for _, w in token) / len(token) for token in tokens]))
        whole, mask = sequences(codes)
        return {"bytes": whole, "mask": mask, "weights": sequences(weights)[0]}

    def _tokens(self, given: Prompt) -> list[list[tuple[int, float]]]:
        """The (byte, weight) pairs of each token: white space ends a word and belongs to none."""
        words: list[list[tuple[int, float]]] = [[]]
        for c, w in zip(given.text, given.weights, strict=True):
            words += [[]] if c.isspace() else []
            words[-1].extend((code, w) for code in (b"" if c.isspace() else c.encode()))
        return [word[i : i + self.chunk] for word in words for i in range(0, len(word), self.chunk)]

    def build(self) -> nn.Module:
        """The transformer and the embedding of bytes."""
        return _Bytes(self.width, self.depth, self.chunk)


class _Bytes(nn.Module):
    def __init__(self, width: int, depth: int, chunk: int) -> None:
        super().__init__()
        self.embed = nn.Parameter(torch.randn(chunk, 257, width))
        self.transformer = Transformer(width, depth)

    def forward(self, read: Mapping[str, Tensor], size: Sequence[int]) -> Cond:
        codes = read["bytes"].long()
        places = torch.arange(codes.shape[-1], device=codes.device)
        there = (codes > 0)[..., None].to(self.embed.dtype)
        out: Cond = self.transformer((self.embed[places, codes] * there).sum(-2), read["mask"], read["weights"])
        return out


@dataclass(frozen=True)
class Text:
    """A frozen text encoder of `transformers`, by its folder or its name on the hub (CLIP, T5, BERT, MiniLM): its last
    hidden states are the tokens, their mean is the vector. `pip install 'undiffuse[text]'`.

    A text is embedded once, by itself, and kept in memory; and, where `cache` names a folder, in a file named by the
    hash of the encoder's weights and of the text. Texts of more than `length` tokens are cut. InputError where there is
    no such encoder.
    """

    name: str
    length: int = 77
    cache: str = ""
    spatial = 0
    reads = "text"

    def __post_init__(self) -> None:
        if not self.name.strip() or self.length < 1:
            raise InputError(f"Text needs a folder or a hub's name, and length >= 1: got {self.name!r}, {self.length}")

    @property
    def vector(self) -> int:
        """The width of the mean."""
        return self.tokens

    @property
    def tokens(self) -> int:
        """The width of the hidden states."""
        return width("text", self.name)

    def read(self, values: Sequence[str | Prompt]) -> dict[str, Tensor]:
        """Tokens (b, n, tokens), times the weights of their words, and where they are."""
        kept = [self._embedded(given) for given in map(plain, values)]
        tokens, mask = sequences([tokens for tokens, _ in kept])
        return {"tokens": tokens, "mask": mask, "weights": sequences([weights for _, weights in kept])[0]}

    def _embedded(self, given: Prompt) -> tuple[Tensor, Tensor]:
        """(n, tokens) and the weight (n,) of the character that each token begins with, 1 of those without any."""
        found = _embedded(self.name, self.length, self.cache, given.text)
        ends = [(int(start), int(end)) for start, end in found["ends"]]
        return found["tokens"], torch.tensor([given.weights[start] if end > start else 1.0 for start, end in ends])

    def build(self) -> nn.Module:
        """Nothing to train."""
        return Pooled()


@functools.cache
def _loaded(name: str) -> tuple[Any, Any, str]:
    """(tokenizer, frozen model, hash of its weights)."""

    def load(transformers: Any) -> tuple[Any, Any]:
        config = transformers.AutoConfig.from_pretrained(name)
        config = getattr(config, "text_config", None) or config
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, use_fast=True)
        return tokenizer, transformers.AutoModelForTextEncoding.from_pretrained(
            name, config=config, dtype=torch.float32
        )

    tokenizer, model = loaded("text", name, load)
    return tokenizer, model, frozen(model)


@functools.lru_cache(100_000)
def _embedded(name: str, length: int, cache: str, text: str) -> dict[str, Tensor]:
    """`tokens` (n, width) of a text and `ends` (n, 2), the characters where each begins and ends."""
    tokenizer, model, weights = _loaded(name)

    def embed() -> dict[str, Tensor]:
        ids = tokenizer(text, return_tensors="pt", return_offsets_mapping=True, truncation=True, max_length=length)
        ends = ids.pop("offset_mapping")[0]
        with torch.no_grad():
            tokens = model(**ids).last_hidden_state[0]
        return {"tokens": tokens.contiguous(), "ends": ends.contiguous()}

    return kept(cache, f"{weights} {length} {text}", embed)
