"""A folder of pictures: sub-folders are classes, or metadata.jsonl / metadata.csv says what belongs to each picture."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from undiffuse.data.picture import SUFFIXES
from undiffuse.data.source import Raw, Source, Unreadable, digest
from undiffuse.types import InputError

METADATA = ("metadata.jsonl", "metadata.csv")
_TEST = ("test", "validation", "val")
_FILES = ("depth", "segmentation", "audio")  # columns whose text is a path
_NAME = "_file_name"
_TEXT = {"caption": "text", "prompt": "text"}
_CLASSES = 100_000


@dataclass(frozen=True)
class Entry:
    """One picture: its path relative to the folder, its label, other columns by value, and those that are files."""

    path: str
    label: int | None = None
    values: dict[str, Any] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    wrong: str = ""  # why it cannot be used, where that was seen in the listing


@dataclass(frozen=True, eq=False)
class Folder:
    """Pictures below `root`, read as they are asked for; paths that leave `root` are unreadable."""

    root: Path
    entries: tuple[Entry, ...]
    classes: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    test: Source | None = None
    counts: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        return self.root.name or "data"

    def __len__(self) -> int:
        return len(self.entries)

    def read(self, i: int) -> Raw:
        entry = self.entries[i]
        where = f"{self.root}/{entry.path}"
        if entry.wrong:
            raise Unreadable(where, entry.wrong)
        files = {key: inside(self.root, path, where) for key, path in entry.files.items()}
        return Raw(inside(self.root, entry.path, where), entry.label, {**entry.values, **files}, where)

    def fingerprint(self) -> str:
        """SHA-256 over every picture's path, size, time of change, label and columns."""
        parts = []
        for entry in self.entries:
            stats = [_stat(self.root / path) for path in (entry.path, *entry.files.values())]
            parts.append(json.dumps([entry.path, entry.label, entry.values, entry.files, stats], default=str))
        return digest(*parts, *self.classes)


def _stat(path: Path) -> tuple[int, int]:
    try:
        found = path.stat()
    except (OSError, ValueError):
        return -1, -1
    return found.st_size, found.st_mtime_ns


def inside(root: Path, name: str, where: str) -> Path:
    """root / name, unless that leaves root: by an absolute path, by "..", or by a symbolic link. Raises Unreadable."""
    if not name or "\0" in name or Path(name).is_absolute() or ".." in Path(name).parts:
        raise Unreadable(where, f"the path {name!r} is empty, absolute or leads out of the folder")
    path = root / name
    if not path.resolve().is_relative_to(root.resolve()):
        raise Unreadable(where, f"{name!r} is a link out of the folder: put the file itself there")
    if path.exists() and not path.is_file():
        raise Unreadable(where, f"{name!r} is not a regular file")
    return path


def open_folder(root: Path, classes: tuple[str, ...] | None = None) -> Folder:
    """A folder as a source; `classes` fixes the classes and their order. Raises InputError."""
    test = next((root / name for name in _TEST if (root / name).is_dir()), None)
    if (root / "train").is_dir() and test is not None:
        train = open_folder(root / "train", classes)
        return replace(train, test=open_folder(test, train.classes or None))
    for name in METADATA:
        if (root / name).is_file():
            return _described(root, root / name, classes)
    return _plain(root, classes)


def pictures(root: Path) -> Iterator[str]:
    """The pictures below root, as relative paths in alphabetical order; hidden files and folders are passed over."""
    for folder, below, files in os.walk(root):
        below[:] = sorted(d for d in below if not d.startswith("."))
        for name in below:
            if (Path(folder) / name).is_symlink():
                raise InputError(
                    f"{Path(folder) / name} is a link to a folder, which is not followed: give that folder"
                )
        for name in sorted(files):
            if not name.startswith(".") and name.lower().endswith(SUFFIXES):
                yield (Path(folder) / name).relative_to(root).as_posix()


def _plain(root: Path, classes: tuple[str, ...] | None) -> Folder:
    found = list(pictures(root))
    if not found:
        raise InputError(f"{root} has no pictures ({', '.join(SUFFIXES)}) and no {' or '.join(METADATA)}")
    above = [path.split("/")[0] if "/" in path else None for path in found]
    if None not in above:
        known = classes or tuple(sorted({a for a in above if a is not None}))
        number = {name: k for k, name in enumerate(known)}
        for path, name in zip(found, above, strict=True):
            if name not in number:
                raise InputError(f"{root / path}: the class {name!r} is not one of {', '.join(known)}")
        pairs = zip(found, above, strict=True)
        return Folder(root, tuple(Entry(path, number[a]) for path, a in pairs if a is not None), known)
    if any(a is not None for a in above):
        inner = next(p for p, a in zip(found, above, strict=True) if a is not None)
        outer = next(p for p, a in zip(found, above, strict=True) if a is None)
        raise InputError(
            f"{root} has pictures beside sub-folders with pictures ({outer}, {inner}): move all into sub-folders, one "
            f"for each class, or describe them in {METADATA[0]}"
        )
    return Folder(root, tuple(Entry(path) for path in found))


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The lines of metadata as dictionaries, with their numbers."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        if path.suffix == ".csv":
            for line, row in enumerate(csv.DictReader(file), 2):
                yield line, {k: v for k, v in row.items() if k is not None and v not in (None, "")}
            return
        for line, text in enumerate(file, 1):
            if text.strip():
                try:
                    row = json.loads(text)
                except ValueError as error:
                    raise ValueError(f"line {line}: {error}") from error
                if not isinstance(row, dict):
                    raise ValueError(f"line {line} is not an object: {text.strip()[:80]}")
                yield line, row


def _described(root: Path, path: Path, classes: tuple[str, ...] | None) -> Folder:
    try:
        rows = list(_rows(path))
    except (ValueError, RecursionError, csv.Error, OSError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    if not rows:
        raise InputError(f"{path} describes no pictures")
    for line, row in rows:
        if not isinstance(row.get("file_name"), str):
            raise InputError(f"{path}, line {line}: no file_name; expected the path of a picture relative to {root}")
    known, numbers = class_numbers([row.get("label") for _, row in rows], classes, str(path))
    entries = []
    for (_, row), label in zip(rows, numbers, strict=True):
        rest = {k: v for k, v in row.items() if k not in ("file_name", "label") and v is not None}
        paths = {k.removesuffix(_NAME): v for k, v in rest.items() if k.endswith(_NAME) or k in _FILES}
        values = {_TEXT.get(k, k): v for k, v in rest.items() if not k.endswith(_NAME) and k not in _FILES}
        files = {k: v for k, v in paths.items() if isinstance(v, str)}
        wrong = f"{', '.join(paths.keys() - files.keys())}: expected the path of a file" if paths != files else ""
        entries.append(Entry(row["file_name"], label, values, files, wrong))
    columns = {key: None for entry in entries for key in (*entry.values, *entry.files)}
    return Folder(root, tuple(entries), known, tuple(columns))


def class_numbers(
    labels: list[Any], classes: tuple[str, ...] | None, where: str
) -> tuple[tuple[str, ...], list[int | None]]:
    """(class names, number of each sample) from labels that all are whole numbers, or all names, or all absent."""
    if all(label is None for label in labels):
        return (), [None] * len(labels)
    if any(label is None for label in labels):
        raise InputError(f"{where}: sample {labels.index(None)} has no label, though others have")
    whole = [_whole(label) for label in labels]
    numbers = [n for n in whole if n is not None]
    if len(numbers) == len(labels):
        most = len(classes) if classes else _CLASSES
        if min(numbers) < 0 or max(numbers) >= most:
            raise InputError(f"{where}: labels from {min(numbers)} to {max(numbers)}; expected 0 to {most - 1}")
        return classes or tuple(str(k) for k in range(max(numbers) + 1)), list(numbers)
    names = classes or tuple(sorted({str(label) for label in labels}))
    number = {name: k for k, name in enumerate(names)}
    for k, label in enumerate(labels):
        if str(label) not in number:
            raise InputError(f"{where}: the class {label!r} of sample {k} is not one of {', '.join(names)}")
    return names, [number[str(label)] for label in labels]


def _whole(label: Any) -> int | None:
    if isinstance(label, bool):
        return int(label)
    if isinstance(label, int):
        return label
    return int(label) if isinstance(label, str) and label.isascii() and label.isdigit() else None
