"""Webdataset shards: uncompressed .tar files in which the files of one basename are a sample. Nothing is unpacked."""

from __future__ import annotations

import glob
import io
import itertools
import json
import os
import re
import tarfile
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from undiffuse.data.cache import Cache, Recent, Shards, default_cache, is_remote, suffix
from undiffuse.data.folder import METADATA
from undiffuse.data.picture import SUFFIXES
from undiffuse.data.source import Raw, Source, Unreadable
from undiffuse.data.tensors import Tensors, check_job
from undiffuse.types import InputError

_MEMBER, _MEMBERS, _SMALL = 2**28, 200_000, 2**20  # bytes of a member, members of a shard, bytes of a text member
_PICTURES = tuple(s[1:] for s in SUFFIXES)
_MAPS = tuple(f"{kind}.{s}" for kind in ("depth", "segmentation") for s in (*_PICTURES, "npy"))
_SOUND = ("wav", "flac", "ogg", "mp3", "audio.wav", "audio.flac")
_KNOWN = frozenset((*_PICTURES, "npy", "cls", "txt", "json", *_MAPS, *_SOUND))
_TEXT = ("text", "caption", "prompt")
_SHARDS = (".tar", ".parquet", ".safetensors")
_OPEN = 16  # shards open at a time: two windows of 8


def is_shards(name: str) -> bool:
    """Whether `name` means shards: by ending, address or pattern, or as a folder that has them."""
    if not name:
        return False
    if is_remote(name) or suffix(name) in (".tar", ".parquet", ".tgz", ".gz") or re.search(r"[*{]", name):
        return True
    folder = Path(name).expanduser()
    return _only_shards(folder) or _only_shards(folder / "train")


def _only_shards(folder: Path) -> bool:
    """Whether a folder has shards, and neither sub-folders nor pictures nor metadata."""
    if not _inside(folder):
        return False
    others = (p for p in folder.iterdir() if p.name[0] not in "._")
    return not any(p.is_dir() or p.name.lower().endswith(SUFFIXES) or p.name in METADATA for p in others)


def _inside(folder: Path) -> list[str]:
    """The shards directly in a folder, sorted."""
    if not folder.is_dir():
        return []
    return sorted(str(p) for p in folder.iterdir() if p.suffix in _SHARDS and p.name[0] not in "._")


def braces(pattern: str) -> Iterator[str]:
    """The strings of a pattern with {000..099} and {a,b}.

    >>> list(braces("s-{08..10}.{a,b}"))
    ['s-08.a', 's-08.b', 's-09.a', 's-09.b', 's-10.a', 's-10.b']
    """
    pieces: list[list[str]] = []
    for text, inner in re.findall(r"([^{]*)(?:\{([^{}]*)\})?", pattern):
        pieces.append([text])
        if inner:
            span = re.fullmatch(r"(\d+)\.\.(\d+)", inner)
            if span and int(span[2]) - int(span[1]) >= 1_000_000:
                raise InputError(f"{pattern} means more than a million shards")
            pieces.append(
                [f"{k:0{len(span[1])}d}" for k in range(int(span[1]), int(span[2]) + 1)] if span else inner.split(",")
            )
    for parts in itertools.product(*pieces):
        yield "".join(parts)


def expand(name: str) -> list[str]:
    """The shards that a name, pattern or folder means, in order; raises InputError if there are none."""
    local = name if is_remote(name) else str(Path(name).expanduser())
    if not is_remote(local) and Path(local).is_dir():
        return _inside(Path(local))
    out: list[str] = []
    for place in itertools.islice(braces(local), 1_000_000):
        out += sorted(glob.glob(place)) if not is_remote(place) and re.search(r"[*?\[]", place) else [place]
    missing = [place for place in out if not is_remote(place) and not Path(place).is_file()]
    if missing or not out:
        raise InputError(f"{missing[0] if missing else name} does not exist; expected {', '.join(_SHARDS)} files")
    return out


def open_shards(name: str, cache: str | Path | None, limit: int) -> Source:
    """Shards by name (see `expand`); a folder with train/ and test/ has both."""
    store = Cache(Path(cache).expanduser() if cache is not None else default_cache(), limit)
    folder = Path(name).expanduser()
    if not is_remote(name) and _inside(folder / "train"):
        test = next((_inside(folder / t) for t in ("test", "validation", "val") if _inside(folder / t)), [])
        return _open(folder.name, _inside(folder / "train"), test, store)
    check_job(folder)
    places = expand(name)
    stems = [Path(place).name for place in places]
    test = [p for p, s in zip(places, stems, strict=True) if re.match(r"(test|validation|val)[-_.]", s)]
    train = [p for p in places if p not in set(test)]
    if not train:
        train, test = test, []
    return _open(folder.name if folder.is_dir() else Path(places[0]).stem, train, test, store)


def _open(name: str, places: list[str], test: list[str], store: Cache) -> Source:
    kinds = {suffix(place) for place in (*places, *test)}
    if kinds == {".parquet"}:
        from undiffuse.data.table import open_tables

        return open_tables(name, places, test, store)
    if kinds == {".safetensors"}:
        held = Tensors(f"{name} (test)", tuple(test), store) if test else None
        return Tensors(name, tuple(places), store, held)
    if kinds != {".tar"}:
        raise InputError(
            f"shards of type {', '.join(sorted(kinds)) or 'unknown'}; expected {', '.join(_SHARDS)}, all of one kind: "
            "unpack compressed ones (gunzip), which cannot be read at random"
        )
    other = Tar(f"{name} (test)", tuple(test), store) if test else None
    return Tar(name, tuple(places), store, other)


class _Sample:
    """A sample of an index: its name, its members' (offset, size) by ending, and why it is refused, if it is."""

    __slots__ = ("members", "name", "wrong")

    def __init__(self, stored: list[Any]) -> None:
        self.name, self.members, self.wrong = str(stored[0]), dict(stored[1]), str(stored[2])


@dataclass(frozen=True, eq=False)
class Tar(Shards):
    """Samples of .tar shards by number: an index of every shard, made once, says where each lies.

    Pictures or .npy become x; .cls the label; .txt the text; .json its text and label; depth.*, segmentation.* and
    sound their columns. Other members, pickles above all, are passed over and reported.
    """

    name: str
    places: tuple[str, ...]
    cache: Cache
    test: Source | None = None
    counts: tuple[int, ...] = field(init=False)
    classes: tuple[str, ...] = field(init=False)
    columns: tuple[str, ...] = field(init=False)
    ignored: dict[str, int] = field(init=False)
    _starts: list[int] = field(init=False, repr=False)
    _recent: Recent[tuple[BinaryIO, list[_Sample]]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        found = [self.cache.index(place, tar_index) for place in self.places]
        counts = tuple(len(index["samples"]) for index in found)
        highest = max((int(index["label"]) for index in found), default=-1)
        ignored: Counter[str] = Counter()
        for index in found:
            ignored.update(index["ignored"])
        values = {
            "counts": counts,
            "classes": tuple(str(k) for k in range(highest + 1)),
            "columns": tuple(sorted({column for index in found for column in index["columns"]})),
            "ignored": dict(ignored),
            "_starts": list(itertools.accumulate(counts, initial=0)),
            "_recent": Recent(_OPEN),
        }
        for key, value in values.items():
            object.__setattr__(self, key, value)
        if not sum(counts):
            raise InputError(f"{self.name}: {len(counts)} shards without a sample (pictures or .npy with one basename)")
        if ignored:
            what = ", ".join(f"{n} .{ending}" for ending, n in ignored.most_common(8))
            warnings.warn(f"{self.name}: members of unknown kinds are passed over: {what}", stacklevel=3)

    def read(self, i: int) -> Raw:
        shard, k = self._find(i)
        file, samples = self._recent.get(shard, lambda: (self._shard(shard), 0))
        sample = samples[k]
        where = f"{self.places[shard]}/{sample.name}"
        if sample.wrong:
            raise Unreadable(where, sample.wrong)
        return _raw({k: _at(file, where, *span) for k, span in sample.members.items()}, where, len(self.classes))

    def _shard(self, shard: int) -> tuple[BinaryIO, list[_Sample]]:
        place = self.places[shard]
        return self.cache.open(place), [_Sample(s) for s in self.cache.index(place, tar_index)["samples"]]

    def _stamps(self) -> Iterable[tuple[Any, Any]]:
        return zip((self.cache.index(place, tar_index)["stamp"] for place in self.places), self.counts, strict=True)


def _at(file: BinaryIO, where: str, offset: int, size: int) -> bytes:
    # pread keeps no position: forked workers may share the file
    content = os.pread(file.fileno(), size, offset) if size <= _MEMBER else b""
    if len(content) != size:
        raise Unreadable(where, "the shard is truncated or was changed")
    return content


def _raw(members: dict[str, bytes], where: str, classes: int) -> Raw:
    picture = next((k for k in (*_PICTURES, "npy") if k in members), None)
    if picture is None:
        raise Unreadable(where, f"neither picture nor .npy among {', '.join(members) or 'its members'}")
    columns: dict[str, Any] = {}
    label: Any = None
    if "json" in members:
        described = _json(members["json"], where)
        label = described.get("label", described.get("cls"))
        if (text := _text_of(described)) is not None:
            columns["text"] = text
    if "txt" in members:
        columns["text"] = members["txt"].decode("utf-8", "replace").strip()
    if "cls" in members:
        label = members["cls"].decode("ascii", "replace").strip()
    for key, content in members.items():
        if key in _MAPS:
            columns[key.split(".")[0]] = _numbers(content, where) if key.endswith("npy") else content
        elif key in _SOUND:
            columns["audio"] = content
    number = _class(label)
    if classes and number is None:
        raise Unreadable(where, f"the label {label!r} is not a whole number")
    x = _numbers(members["npy"], where) if picture == "npy" else members[picture]
    return Raw(x, number, columns, where)


def _json(content: bytes, where: str) -> dict[str, Any]:
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise Unreadable(where, f"its .json cannot be read: {error}") from error
    return found if isinstance(found, dict) else {}


def _text_of(described: dict[str, Any]) -> str | None:
    return next((described[k] for k in _TEXT if isinstance(described.get(k), str)), None)


def _class(label: Any) -> int | None:
    try:
        number = int(label)
    except (TypeError, ValueError):
        return None
    return number if 0 <= number < 1_000_000 else None


def _numbers(content: bytes, where: str) -> np.ndarray:
    try:
        found = np.load(io.BytesIO(content), allow_pickle=False)
    except Exception as error:  # damaged files raise nearly anything
        raise Unreadable(where, f"its .npy cannot be read: {error}") from error
    if not isinstance(found, np.ndarray) or found.dtype.kind not in "uif":
        raise Unreadable(where, "its .npy has no numbers")
    return found.astype(found.dtype.newbyteorder("="))


def tar_index(file: BinaryIO) -> dict[str, Any]:
    """Samples in order of appearance as [name, {ending: [offset, size]}, why refused], and what else is in the shard.

    Links, devices and names that lead out of the shard are refused, though nothing is ever unpacked.
    """
    size = os.fstat(file.fileno()).st_size
    samples: dict[str, list[Any]] = {}
    ignored: Counter[str] = Counter()
    columns: set[str | None] = set()
    label = -1
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            for count, member in enumerate(archive):
                archive.members.clear()  # type: ignore[attr-defined]  # tarfile keeps them all otherwise
                if count >= _MEMBERS:
                    raise InputError(f"{file.name}: more than {_MEMBERS} members; make smaller shards")
                base, ending = split_name(member.name)
                if member.isdir() or base.split("/")[-1] in ("", "._", "__MACOSX"):
                    continue
                wrong = _wrong(member, size)
                if not wrong and ending not in _KNOWN:
                    ignored[ending[:32]] += 1
                    continue
                sample = samples.setdefault(base, [base, {}, ""])
                sample[2] = sample[2] or wrong
                sample[1][ending] = [member.offset_data, member.size]
                columns.add(_column(ending))
                if not wrong and ending in ("cls", "json") and member.size <= _SMALL:
                    described = _described(os.pread(file.fileno(), member.size, member.offset_data), ending)
                    number = _class(described.get("label", described.get("cls")))
                    label = max(label, -1 if number is None else number)
                    columns.add("text" if _text_of(described) is not None else None)
    except (tarfile.TarError, OSError, ValueError, EOFError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        if not samples:
            raise InputError(f"{file.name} is not a readable .tar file: {error}") from error
        warnings.warn(f"{file.name} is damaged after {len(samples)} samples, which are used: {error}", stacklevel=2)
    known = sorted(c for c in columns if c)
    return {"samples": list(samples.values()), "ignored": dict(ignored), "label": label, "columns": known}


def split_name(name: str) -> tuple[str, str]:
    """(basename with its folders, ending in lower case from the first dot)."""
    folder, _, last = name.rpartition("/")
    base, _, ending = last.partition(".")
    return (f"{folder}/{base}" if folder else base), ending.lower()


def _column(ending: str) -> str | None:
    return (
        "text"
        if ending == "txt"
        else "audio"
        if ending in _SOUND
        else ending.split(".")[0]
        if ending in _MAPS
        else None
    )


def _described(content: bytes, ending: str) -> dict[str, Any]:
    """What a .cls or .json member says; nothing where it cannot be read, which `read` reports."""
    try:
        found: Any = json.loads(content) if ending == "json" else {"label": content.decode("ascii").strip()}
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _wrong(member: tarfile.TarInfo, size: int) -> str:
    """Why a member is refused; empty if it is not."""
    if member.name.startswith("/") or ".." in member.name.split("/") or "\0" in member.name:
        return f"the path {member.name!r} leads out of the shard"
    if member.issym() or member.islnk():
        return f"{member.name!r} is a link (to {member.linkname!r}), not a file"
    if not member.isreg() or member.issparse():
        return f"{member.name!r} is a device, pipe or sparse file, not a plain one"
    if member.size > _MEMBER:
        return f"{member.name!r} has {member.size >> 20} MiB; at most {_MEMBER >> 20} are allowed"
    if member.offset_data + member.size > size:
        return f"{member.name!r} is cut off: the shard is truncated"
    return ""
