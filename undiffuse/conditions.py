"""`Conditions`: what a run's network is told of each sample, read from the columns of its data; and from words."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from undiffuse.cond import ENCODERS, Cond, Encoders, Given, Label, prompt
from undiffuse.cond.encoders import Encoder
from undiffuse.config import Config, fields
from undiffuse.data import (
    Batch,
    Data,
    Prepare,
    Source,
    decode_audio,
    read_depth,
    read_picture,
    read_segmentation,
    resampled,
)
from undiffuse.data.source import Unreadable, choice
from undiffuse.types import InputError, did_you_mean

SELF = "x"  # the column that is the sample itself, such as for pictures of low resolution
USUAL = {"text": "bytes", "depth": "depth", "segmentation": "layout", "audio": "audio", "label": "label"}
_LOOKED_AT = 1000  # samples from which settings of encoders are measured


@dataclass(frozen=True, eq=False)
class Conditions:
    """How batches of data become conditions: labels 0 ... classes - 1 as `Label` encodes them, or, with `encoders` by
    name, the `columns` of the data that these read. `prepare` is how the data are, and `examples` has a value, and the
    rate of a sound, of each column."""

    classes: int
    encoders: Encoders | None
    columns: Mapping[str, str]
    prepare: Prepare
    examples: Mapping[str, tuple[Any, int | None]] = field(default_factory=dict)

    @staticmethod
    def of(config: Config, source: Source, prepare: Prepare, classes: int) -> Conditions:
        """The configured conditions; numbers of classes and channels that are not stated are measured on at most 1,000
        samples.

        Raises InputError for a column that the data do not have, and for values that do not fit.
        """
        every = {name: settings["column"] for name, settings in config.values["cond"].items()}
        if not every:
            return Conditions(classes, None, {}, prepare)
        there = [SELF, *(c for c in source.columns if c != "rate")]
        there += ["label"] if source.classes and "label" not in there else []
        for name, column in every.items():
            if column not in there:
                known = f"{source.name} has the columns {', '.join(there)}: set cond.{name}.column"
                hint = f"{did_you_mean(column, there)} {known}".lstrip()
                raise InputError(f"cond.{name}: no column is called {column!r}: {hint}")
        stated = config.values["cond"].values()
        counted = any(k in fields(ENCODERS[s["kind"]]) and k not in s for s in stated for k in ("classes", "channels"))
        found, examples = _measured(source, prepare, set(every.values()), classes, counted)
        for name, column in every.items():
            kind, has = config.values["cond"][name]["kind"], _modality(examples[column][0])
            reads = config.encoder(name, {"classes": 1, **found[column]}).reads
            if has and reads not in has:
                raise InputError(
                    f"cond.{name}={kind} reads {reads}, and the column {column!r} of {source.name} has "
                    f"{' or '.join(has)}: take cond.{name}={' or '.join(USUAL[h] for h in has if h in USUAL)}"
                )
        encoders = config.encoders({name: found[column] for name, column in every.items()})
        label = encoders.encoders.get("label") if encoders else None
        return Conditions(label.classes if isinstance(label, Label) else 0, encoders, every, prepare, examples)

    def fresh(self) -> Encoders | None:
        """New encoders of the same settings, for a network."""
        return None if self.encoders is None else Encoders.of(self.encoders.settings())

    def __call__(self, batch: Batch) -> Cond | Given | None:
        """The conditions of a batch; None for data without. A sample without a value has none."""
        if self.encoders is None:
            return None if batch.labels is None else Label(self.classes)(batch.labels)
        values = {name: self._values(name, column, batch) for name, column in self.columns.items()}
        there = {name for name, each in values.items() if each is not None}
        for name in values.keys() - there:  # its encoder has work in every batch, so that processes agree on gradients
            value, rate = self.examples[self.columns[name]]
            values[name] = [self._heard(name, value, rate)] * len(batch)
        try:
            given: Given = self.encoders(**values)
        except InputError:
            for k, i in enumerate(batch.ids.tolist()):  # which sample it is
                try:
                    self.encoders(**{name: each[k : k + 1] for name, each in values.items() if each[k] is not None})
                except InputError as error:
                    raise InputError(f"sample {i} of the data: {error}") from error
            raise
        return given.only(there)

    @property
    def reader(self) -> Conditions | None:
        """What `materialise` reads columns by; None where labels are all that is told, which data have anyway."""
        return None if self.encoders is None else self

    def told(self, data: Data) -> Cond | Given | None:
        """The conditions of data in memory, as they were read with them."""
        return told(data, self.classes, self.encoders)

    def _values(self, name: str, column: str, batch: Batch) -> Any:
        if column == SELF:
            return self.prepare.restore(batch.x)
        if column == "label" and "label" not in batch.columns:
            return batch.labels
        values = batch.columns.get(column)
        if values is None or all(v is None for v in values):
            return None
        rates = batch.columns.get("rate", [None] * len(batch))
        return [None if v is None else self._heard(name, v, r) for v, r in zip(values, rates, strict=True)]

    def _heard(self, name: str, value: Any, rate: int | None) -> Any:
        """The value, a sound at its encoder's rate."""
        assert self.encoders is not None
        wanted = getattr(self.encoders.encoders[name], "rate", None)
        return value if rate is None or wanted is None else resampled(value, rate, wanted)


def told(data: Data, classes: int, encoders: Encoders | None) -> Cond | Given | None:
    """The conditions that belong to samples: those of `encoders` are `Data.cond`; without, labels of `classes`, if any.

    InputError where there are encoders, and the data were read without them.
    """
    if encoders is None:
        return None if data.labels is None or not classes else Label(classes)(data.labels)
    if data.cond is None:
        raise InputError(f"{data.name} was read without the conditions {', '.join(encoders.encoders)}")
    return data.cond  # type: ignore[no-any-return]


def _measured(
    source: Source, prepare: Prepare, columns: set[str], classes: int, counted: bool
) -> tuple[dict[str, dict[str, Any]], dict[str, tuple[Any, int | None]]]:
    """The settings of encoders that follow from the data, and a value, by column; without `counted`, only as many
    samples are read as it takes to see every column."""
    plain, seen, dims = prepare.plain(), dict[str, list[Any]](), 0
    examples = dict[str, tuple[Any, int | None]]()
    for i in choice(source, _LOOKED_AT):
        try:
            example = plain(source.read(i), 0, 0)
        except Unreadable:
            continue
        values = {SELF: example.x, "label": example.label, **example.columns}
        for column in columns:
            if values.get(column) is not None:
                seen.setdefault(column, []).append(_size(values[column]))
                examples.setdefault(column, (values[column], values.get("rate") if column != SELF else None))
        dims = example.x.ndim - 1
        if not counted and examples.keys() == columns:
            break
    found = {}
    for column in columns:
        if not (sizes := seen.get(column)):
            raise InputError(f"{source.name}: no sample that was looked at has anything in the column {column!r}")
        channels, most = (max(pair[k] for pair in sizes) for k in (0, 1))
        found[column] = {"dims": dims, "channels": channels, "classes": most + 1}
    if "label" in found:
        found["label"]["classes"] = max(classes, found["label"]["classes"])
    return found, examples


def _modality(value: Any) -> tuple[str, ...]:
    """What kinds of values a value may be of; none where that cannot be said."""
    if isinstance(value, str):
        return ("text",)
    if isinstance(value, int | np.integer):
        return ("label",)
    if not hasattr(value, "shape"):
        return ()
    return ("depth", "segmentation", "picture") if len(value.shape) > 1 else ("audio", "label")


def _size(value: Any) -> tuple[int, int]:
    """(channels of an array, the highest class in a value): -1 for none."""
    if isinstance(value, str | bytes | Path) or value is None:
        return 0, -1
    array = np.asarray(value)
    channels = array.shape[0] if array.ndim > 1 else 0
    known = array[array != 255] if array.dtype.kind in "iu" and array.ndim > 1 else array
    return channels, int(known.max()) if known.dtype.kind in "iu" and known.size else -1


def unread(source: Source, conditions: Conditions) -> list[str]:
    """What the user may want to know of columns that the network is not told."""
    told = {"rate", *(["label"] if conditions.encoders is None else conditions.columns.values())}
    every = dict.fromkeys([*source.columns, *(["label"] if source.classes else [])])
    others = [column for column in every if column not in told]
    if not others:
        return []
    words = " ".join(f"cond.{c}={USUAL[c]}" for c in others if c in USUAL)
    hint = f": {words} would tell it" if words else ""
    return [f"the network is not told the {', '.join(others)} of {source.name}{hint}"]


FILES: dict[str, Callable[[Path, Any], np.ndarray]] = {  # how the values that are files are read, for an encoder
    "picture": lambda path, encoder: read_picture(path, encoder.channels),
    "depth": lambda path, _: read_depth(path),
    "segmentation": lambda path, _: read_segmentation(path),
    "audio": lambda path, encoder: resampled(*decode_audio(path, str(path)), encoder.rate),
}


def whole(word: str) -> int:
    """A number in words; InputError for what is none."""
    try:
        return int(word)
    except ValueError as error:
        raise InputError(f"{word!r} is no label: labels are whole numbers") from error


def value_of(name: str, encoder: Encoder, word: str, number: Callable[[str], int]) -> Any:
    """What a word of the command line means to an encoder: a prompt, a class (by `number`), several with +, or a file.

    InputError for files that are missing or cannot be read, and for prompts with unbalanced parentheses.
    """
    if encoder.reads == "text":
        return prompt(word)
    if encoder.reads == "label":
        return [number(part.strip()) for part in word.split("+")]
    path = Path(word).expanduser()
    if not path.is_file():
        kind = "a sound's file" if encoder.reads == "audio" else "a picture's file, or a .npy of an array"
        raise InputError(f"{name}: {word!r} is no file; expected {kind}")
    try:
        return torch.from_numpy(FILES[encoder.reads](path, encoder))
    except Unreadable as error:
        raise InputError(f"{name}: {error}") from error
