"""Frozen encoders of `transformers`: by folder or hub name, hashed by their weights, embeddings kept in files."""

from __future__ import annotations

import functools
import hashlib
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from undiffuse.cond.cond import Cond
from undiffuse.cond.transformer import pooled
from undiffuse.types import InputError


def transformers() -> Any:
    """The package; InputError where it is missing."""
    try:
        import transformers
    except ImportError as error:
        raise InputError("frozen encoders need transformers: pip install 'undiffuse[text]'") from error
    return transformers


def loaded(kind: str, name: str, load: Callable[[Any], Any]) -> Any:
    """`load(transformers)`; InputError saying that there is no encoder of this kind by that name, if it fails."""
    package = transformers()
    try:
        return load(package)
    except Exception as error:  # transformers raises many kinds
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"no {kind} encoder at {name!r}: give the folder of one, or a name on the hub ({first})"
        ) from error


@functools.cache
def width(kind: str, name: str) -> int:
    """The width of an encoder's hidden states, as its configuration says."""
    config = loaded(kind, name, lambda package: package.AutoConfig.from_pretrained(name))
    config = getattr(config, "text_config", None) or config
    return int(getattr(config, "hidden_size", None) or config.d_model)


def frozen(model: nn.Module) -> str:
    """Make an encoder one that is not trained; the hash of its weights."""
    model.eval().requires_grad_(False)
    digest = hashlib.sha256()
    for key, value in model.state_dict().items():
        digest.update(key.encode() + value.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def kept(cache: str, key: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """What `make` gives, from the file in the folder `cache` that the hash of `key` names, if there is one, and written
    to it if not; "" for no folder."""
    if not cache:
        return make()
    name = hashlib.sha256(key.encode()).hexdigest()
    path = Path(cache).expanduser() / name[:2] / f"{name}.safetensors"
    if path.is_file():
        try:
            return load_file(path)
        except SafetensorError:  # a file that was not written to its end is made anew
            path.unlink()
    found = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(save(found))
    os.replace(file.name, path)
    return found


class Pooled(nn.Module):
    """The tokens that were read, times their weights if there are any, and their mean; nothing to train."""

    def forward(self, read: Mapping[str, Tensor], size: Sequence[int]) -> Cond:
        return pooled(read["tokens"], read["mask"], read.get("weights"))
