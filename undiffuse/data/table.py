"""Tables: .parquet files by row group, and data sets of a hub."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from undiffuse.data.cache import Cache, Recent, Shards
from undiffuse.data.source import Raw, Source, Unreadable, digest
from undiffuse.types import InputError

_PICTURES = ("image", "img", "picture", "pixel_values", "x")
_LABELS = ("label", "labels", "cls", "class", "target", "fine_label")
_TEXTS = ("text", "caption", "prompt")
_OTHERS = ("depth", "segmentation", "audio")
_MEMORY, _GROUP = 2**30, 2**30  # bytes of row groups kept, and of one
_SMALL, _RATIO = 2**26, 200  # what takes more than 64 MiB may not have been stored 200 times smaller
_CLASSES = 100_000


def _arrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise InputError("tables need pyarrow: pip install 'undiffuse[data]'") from error
    return pyarrow, pyarrow.parquet


@dataclass(frozen=True)
class Plan:
    """Which column of a table is what; `names` are the classes where the table says them."""

    x: str
    label: str | None
    others: Mapping[str, str]
    names: tuple[str, ...] = ()

    @property
    def wanted(self) -> list[str]:
        """The columns to read."""
        return [self.x, *([self.label] if self.label else []), *self.others.values()]


def plan_of(schema: Any, where: str) -> Plan:
    """The plan of an arrow schema: columns by their usual names, else the first that holds pictures."""
    pa, _ = _arrow()
    fields = {f.name: f.type for f in schema}
    holds = [
        name
        for name, kind in fields.items()
        if (pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0)
        or pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
    ]
    x = next((name for name in (*_PICTURES, *(h for h in holds if h not in _OTHERS)) if name in fields), None)
    if x is None:
        raise InputError(f"{where} has the columns {', '.join(fields)}; expected one of {', '.join(_PICTURES)}")
    label = next((name for name in _LABELS if name in fields and _is_label(fields[name])), None)
    others = {kind: name for kind in _OTHERS for name in (kind,) if name in fields}
    text = next((name for name in _TEXTS if name in fields), None)
    return Plan(x, label, {**others, **({"text": text} if text else {})}, _names(schema, label))


def _is_label(kind: Any) -> bool:
    pa, _ = _arrow()
    return bool(pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_boolean(kind))


def _names(schema: Any, label: str | None) -> tuple[str, ...]:
    """The class names that `datasets` stores in a schema."""
    try:
        known = json.loads(schema.metadata[b"huggingface"])["info"]["features"][label]["names"]
        return tuple(str(name) for name in known)
    except (TypeError, KeyError, ValueError, RecursionError):
        return ()


def to_raw(row: dict[str, Any], plan: Plan, numbers: dict[Any, int], where: str, root: Path | None = None) -> Raw:
    """A row as a sample; raises Unreadable."""
    columns = {}
    for kind, name in plan.others.items():
        value = row.get(name)
        if value is not None:
            columns[kind] = value if kind == "text" else _stored(value, f"{where} ({kind})", root)
    label = row.get(plan.label) if plan.label else None
    if plan.label and label not in numbers:
        raise Unreadable(where, f"the label {label!r} is not one of the classes")
    return Raw(_stored(row.get(plan.x), where, root), numbers[label] if plan.label else None, columns, where)


def _stored(value: Any, where: str, root: Path | None) -> Any:
    """Bytes of a picture, or an array; a path is followed only below `root`."""
    if isinstance(value, dict):
        if isinstance(value.get("bytes"), bytes):
            return value["bytes"]
        path = value.get("path")
        if root is None or not isinstance(path, str) or not Path(path).resolve().is_relative_to(root.resolve()):
            raise Unreadable(where, f"no bytes, and the path {path!r} of a table is not followed")
        return Path(path)
    if isinstance(value, bytes):
        return value
    try:
        found = np.asarray(value)
    except ValueError as error:
        raise Unreadable(where, f"rows of different lengths: {error}") from error
    if found.dtype.kind not in "uif" or found.ndim == 0:
        raise Unreadable(where, f"neither a picture nor numbers: {type(value).__name__}")
    return found[None] if found.ndim == 1 else found


def class_table(values: list[Any], names: tuple[str, ...]) -> tuple[tuple[str, ...], dict[Any, int]]:
    """(class names, number of each stored label) from the distinct labels of a table."""
    if all(isinstance(v, (int, bool)) for v in values):
        count = len(names) or max((int(v) for v in values), default=-1) + 1
        if count > _CLASSES:
            raise InputError(f"labels up to {count - 1}; expected at most {_CLASSES} classes")
        return names or tuple(str(k) for k in range(count)), {k: k for k in range(count)}
    known = names or tuple(sorted(str(v) for v in values))
    return known, {name: k for k, name in enumerate(known)}


def parquet_index(file: BinaryIO) -> dict[str, Any]:
    """The rows of every row group and the distinct labels."""
    _, pq = _arrow()
    try:
        table = pq.ParquetFile(file)
        groups = [table.metadata.row_group(k).num_rows for k in range(table.metadata.num_row_groups)]
        plan = plan_of(table.schema_arrow, file.name)
        labels: set[Any] = set()
        if plan.label and not plan.names:
            for batch in table.iter_batches(batch_size=1024, columns=[plan.label]):
                labels.update(batch.column(0).unique().to_pylist())
                if len(labels) > _CLASSES:
                    raise InputError(f"{file.name}: more than {_CLASSES} different values of {plan.label}")
        return {"groups": groups, "labels": sorted(labels - {None}, key=str)}
    except InputError:
        raise
    except Exception as error:  # damaged files raise nearly anything
        raise InputError(f"{file.name} is not a readable .parquet file: {error}") from error


@dataclass(frozen=True, eq=False)
class Tables(Shards):
    """Rows of .parquet files by number; a row group is read whole and kept while it is in use.

    Each row group counts as a shard, unless all together take little memory.
    """

    name: str
    places: tuple[str, ...]
    cache: Cache
    test: Source | None = None
    counts: tuple[int, ...] = field(init=False)
    classes: tuple[str, ...] = field(init=False)
    columns: tuple[str, ...] = field(init=False)
    _plan: Plan = field(init=False, repr=False)
    _numbers: dict[Any, int] = field(init=False, repr=False)
    _groups: list[tuple[str, int]] = field(init=False, repr=False)
    _starts: list[int] = field(init=False, repr=False)
    _recent: Recent[Any] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        _, pq = _arrow()
        found = [self.cache.index(place, parquet_index) for place in self.places]
        with self.cache.open(self.places[0]) as file:
            plan = plan_of(pq.ParquetFile(file).schema_arrow, self.places[0])
        groups = [(p, k, n) for p, index in zip(self.places, found, strict=True) for k, n in enumerate(index["groups"])]
        rows = [n for _, _, n in groups]
        labels: list[Any] = sorted({v for index in found for v in index["labels"]}, key=str)
        classes, numbers = class_table(labels, plan.names) if plan.label else ((), {})
        small = sum(index["stamp"][0] for index in found) <= _MEMORY // 4 and all(i["stamp"][0] for i in found)
        values = {
            "counts": () if small else tuple(rows),
            "classes": classes,
            "columns": tuple(plan.others),
            "_plan": plan,
            "_numbers": numbers,
            "_groups": [(p, k) for p, k, _ in groups],
            "_starts": list(itertools.accumulate(rows, initial=0)),
            "_recent": Recent(1 << 20, _MEMORY),
        }
        for key, value in values.items():
            object.__setattr__(self, key, value)
        if not sum(rows):
            raise InputError(f"{self.name}: the tables have no rows")

    def read(self, i: int) -> Raw:
        group, at = self._find(i)
        place, k = self._groups[group]
        table = self._recent.get(group, lambda: self._read_group(place, k))
        row = table.slice(at, 1).to_pylist()[0]
        for name in [self._plan.x, *self._plan.others.values()]:
            if isinstance(row.get(name), list):
                row[name] = _typed(row[name], table.schema.field(name).type)
        return to_raw(row, self._plan, self._numbers, f"{place}[{at} of group {k}]")

    def _read_group(self, place: str, k: int) -> tuple[Any, int]:
        """A row group as an arrow table, and its bytes; read in pieces, lest a packed column take all memory."""
        pa, pq = _arrow()
        pieces, total = [], 0
        try:
            with self.cache.open(place) as file:
                table = pq.ParquetFile(file)
                group = table.metadata.row_group(k)
                packed = sum(group.column(c).total_compressed_size for c in range(group.num_columns))
                for batch in table.iter_batches(batch_size=32, row_groups=[k], columns=self._plan.wanted):
                    total += batch.nbytes
                    if total > _SMALL and total > _RATIO * packed:
                        raise InputError(
                            f"{place}: row group {k} grows from {packed} bytes to more than {total}: a bomb"
                        )
                    if total > _GROUP:
                        raise InputError(
                            f"{place}: row group {k} takes more than {_GROUP >> 20} MiB; write smaller ones"
                        )
                    pieces.append(batch)
                return pa.Table.from_batches(pieces).combine_chunks(), total
        except InputError:
            raise
        except Exception as error:  # damaged files raise nearly anything
            raise Unreadable(f"{place} (row group {k})", str(error)) from error

    def _stamps(self) -> Iterable[tuple[Any, Any]]:
        found = (self.cache.index(place, parquet_index) for place in self.places)
        return ((index["stamp"], index["groups"]) for index in found)


def _typed(value: list[Any], kind: Any) -> np.ndarray | list[Any]:
    """Nested lists as an array of the type that the table has for their numbers."""
    while hasattr(kind, "value_type"):
        kind = kind.value_type
    try:
        return np.asarray(value, kind.to_pandas_dtype())
    except (ValueError, TypeError, NotImplementedError):
        return value


def open_tables(name: str, places: list[str], test: list[str], cache: Cache) -> Source:
    """.parquet files as a source, with those of a test split."""
    other = Tables(f"{name} (test)", tuple(test), cache) if test else None
    return Tables(name, tuple(places), cache, other)


@dataclass(frozen=True, eq=False)
class Hub:
    """A `datasets` data set as a source; pictures are decoded here, not there."""

    name: str
    rows: Any
    test: Source | None = None
    counts: tuple[int, ...] = ()
    classes: tuple[str, ...] = field(init=False)
    columns: tuple[str, ...] = field(init=False)
    _plan: Plan = field(init=False, repr=False)
    _numbers: dict[Any, int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        import datasets

        rows = self.rows
        for name, feature in rows.features.items():
            if isinstance(feature, (datasets.Image, datasets.Audio)):
                rows = rows.cast_column(name, type(feature)(decode=False))
        plan = plan_of(rows.features.arrow_schema, self.name)
        feature = rows.features.get(plan.label) if plan.label else None
        names = tuple(getattr(feature, "names", None) or plan.names)
        labels = rows.unique(plan.label) if plan.label and not names else []
        classes, numbers = class_table(labels, names) if plan.label else ((), {})
        values = {"rows": rows, "classes": classes, "columns": tuple(plan.others), "_plan": plan, "_numbers": numbers}
        for key, value in values.items():
            object.__setattr__(self, key, value)

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, i: int) -> Raw:
        row = self.rows[i]
        kinds = self.rows.features.arrow_schema
        for name in [self._plan.x, *self._plan.others.values()]:
            if isinstance(row.get(name), list):
                row[name] = _typed(row[name], kinds.field(name).type)
        return to_raw(row, self._plan, self._numbers, f"hf:{self.name}[{i}]", _hub_cache())

    def fingerprint(self) -> str:
        """SHA-256 over the data set's own fingerprint and its number of rows."""
        return digest(self.name, str(getattr(self.rows, "_fingerprint", "")), str(len(self.rows)))


def _hub_cache() -> Path:
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "huggingface"
    return Path(home)


def open_hub(name: str) -> Source:
    """NAME or NAME:CONFIG of the hub, with its test split; code from a hub is never run. Raises InputError."""
    try:
        import datasets
    except ImportError as error:
        raise InputError("sets of a hub need datasets: pip install 'undiffuse[data]'") from error
    repository, _, config = name.partition(":")
    try:
        found = datasets.load_dataset(repository, config or None)
    except Exception as error:  # no network, no such set, no rights: each raises its own
        text = str(error).strip() or "no reason given"
        raise InputError(
            f"hf:{name} cannot be loaded ({type(error).__name__}: {text.splitlines()[0][:200]}): check the name and "
            "the network; or fetch its .parquet files elsewhere (hf download) and give their folder"
        ) from error
    if not isinstance(found, dict) or not found:
        raise InputError(f"hf:{name} has no splits")
    main = "train" if "train" in found else next(iter(found))
    test = next((t for t in ("test", "validation") if t in found and t != main), None)
    return Hub(name, found[main], Hub(f"{name} (test)", found[test]) if test else None)
