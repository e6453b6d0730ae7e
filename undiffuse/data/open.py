"""From what a user names to a source: a built-in set, a folder, an array file, tables, shards, or a set of a hub."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from undiffuse.data import arrays
from undiffuse.data.builtin import BUILT_IN
from undiffuse.data.data import Data
from undiffuse.data.folder import open_folder
from undiffuse.data.picture import to_float
from undiffuse.data.prepare import Prepare
from undiffuse.data.source import Arrays, Source
from undiffuse.data.split import materialise
from undiffuse.types import InputError, did_you_mean

_KINDS = "a folder of pictures, or .npy, .npz, .safetensors, .parquet or .tar files"


def open_source(
    name: str, path: str | Path | None = None, cache: str | Path | None = None, cache_bytes: int = 8 << 30
) -> Source:
    """The data that `name` means; nothing of the user's is changed.

    A built-in set (`path`: the folder of its files; also as "NAME path=FOLDER"); a folder of pictures, whose
    sub-folders are classes, with train/ and test/, or with metadata.jsonl or metadata.csv; a .npy, .npz or .safetensors
    file with `x` and optionally `labels`; .parquet files; shards (webdataset's .tar, or .safetensors such as
    `undiffuse sample` writes), as a folder, a pattern (part-{000..099}.tar, *.tar) or http(s) and file addresses, whose
    shards pass through the folder `cache` of at most `cache_bytes`; "hf:NAME" of a hub. Raises InputError.

    >>> source = open_source("digits")
    >>> len(source), source.classes[:3], source.read(0).label
    (1797, ('0', '1', '2'), 0)
    """
    if " path=" in name and path is None:
        name, path = name.split(" path=", 1)
    if name in BUILT_IN:
        return BUILT_IN[name](None if path is None else Path(path).expanduser())
    if path is not None:
        raise InputError(f"path belongs to built-in sets ({', '.join(BUILT_IN)}), not to {name!r}")
    if name.startswith("hf:"):
        from undiffuse.data.table import open_hub

        return open_hub(name[3:])
    place = Path(name).expanduser()
    if place.suffix in arrays.SUFFIXES and (place.is_file() or not re.search(r"://|[*{]", name)):
        return arrays.open_arrays(place)
    from undiffuse.data.shards import is_shards, open_shards

    if is_shards(name):
        return open_shards(name, cache, cache_bytes)
    if place.is_dir() and name:
        return open_folder(place)
    raise InputError(f"unknown data set {name!r}: {_hint(name)}")


def _hint(name: str) -> str:
    if near := did_you_mean(name, BUILT_IN):
        return near
    missing = "there is no such file or folder; " if "/" in name or "." in name else ""
    if Path(name).expanduser().is_file():
        missing = "a single file of another kind; "
    return f"{missing}built in: {', '.join(BUILT_IN)}; or give {_KINDS}"


def load_data(name: str) -> Data:
    """All of `open_source(name)` in memory: uint8 is mapped to [-1, 1], floats are taken as they are.

    Raises InputError for unknown names and unreadable files, and where samples differ in shape.

    >>> load_data("digits").x.shape
    torch.Size([1797, 1, 8, 8])
    """
    source = open_source(name)
    if not isinstance(source, Arrays):
        return materialise(source, Prepare())
    labels = None if source.labels is None else torch.from_numpy(source.labels)
    return Data(torch.from_numpy(to_float(source.x)), labels, source.name)
