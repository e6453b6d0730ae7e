"""Configuration: one literal table of kinds per family, built from TOML or dicts; errors name the key and the nearest
valid one."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import pydantic
import tomli_w

from undiffuse.cond import ENCODERS, Encoder, Encoders
from undiffuse.cond.encoders import check_names
from undiffuse.data import Prepare
from undiffuse.grid import GRIDS
from undiffuse.guide import GUIDES
from undiffuse.nets import CLASSIFIERS, NETS
from undiffuse.precond import HEADS
from undiffuse.schedule import SCHEDULES
from undiffuse.solvers import SOLVERS
from undiffuse.train import (
    AUGMENTS,
    COUPLINGS,
    DRAWS,
    LEVELS,
    OPTIMISERS,
    PROFILES,
    TRACKERS,
    VARIANCES,
    WEIGHTS,
    Engine,
    Plan,
)
from undiffuse.types import InputError, did_you_mean

KINDS: dict[str, dict[str, Callable[..., Any]]] = {
    "schedule": SCHEDULES,
    "head": HEADS,
    "net": NETS,
    "levels": LEVELS,
    "draws": DRAWS,
    "weight": WEIGHTS,
    "variance": VARIANCES,
    "coupling": COUPLINGS,
    "augment": AUGMENTS,
    "optimiser": OPTIMISERS,
    "ema": PROFILES,
    "solver": SOLVERS,
    "grid": GRIDS,
    "guidance": GUIDES,
}


@dataclass(frozen=True)
class SampleConfig:
    """How many samples, in how many solver steps, from which seed, at most `batch` at once; network calls of exactly
    `rows` rows make sample k bit-equal for every batch (0: calls as they come)."""

    n: int = 16
    steps: int = 20
    seed: int = 0
    batch: int = 256
    rows: int = 64

    def __post_init__(self) -> None:
        for name in ("n", "steps", "batch"):
            if getattr(self, name) < 1:
                raise InputError(f"sample.{name} must be >= 1, got {getattr(self, name)}")
        if self.rows < 0:
            raise InputError(f"sample.rows must be >= 0 (0: off), got {self.rows}")


_WANTED = {
    "name": "a built-in set, a folder, a file, shards or hf:NAME",
    "channels": "0 (as they are), 1, 3 or 4",
    "buckets": "aspect ratios width / height, and data.size besides, whose square is their area",
    "bad_share": "a share from 0 to 1",
    "cache_gb": "more than 0",
    **dict.fromkeys(("size", "memory_mb"), "at least 0"),
    **dict.fromkeys(("window", "lanes"), "at least 1"),
}


@dataclass(frozen=True)
class DataConfig:
    """What to train on and how samples are made of it.

    `name` is a built-in set, a folder, a file, shards, or hf:NAME; `path` says where a built-in set's files lie. Images
    are resized to `size` by their shorter side and cropped (0: as they are), with `channels` 1, 3 or 4 (0: as they
    are); `crop` is center or random, `flip` mirrors every second one, and `buckets` are aspect ratios that are kept
    instead of cropped to a square. `normalize` is range (bytes to [-1, 1], floats as they are) or channels (by each
    channel's measured mean and std). The job stops when more than `bad_share` of the samples cannot be read. Decoded
    samples of up to `memory_mb` megabytes stay in memory. Shards: samples are mixed within `window` shards, in `lanes`
    streams that processes can read apart; fetched ones pass through the folder `cache` of at most `cache_gb` gigabytes.
    """

    name: str = "digits"
    path: str = ""
    size: int = 0
    channels: int = 0
    crop: Literal["center", "random"] = "center"
    flip: bool = False
    buckets: tuple[float, ...] = ()
    normalize: Literal["range", "channels"] = "range"
    bad_share: float = 0.01
    memory_mb: int = 512
    window: int = 4
    lanes: int = 1
    cache: str = ""
    cache_gb: float = 8.0

    def prepare(self) -> Prepare:
        """How samples are made of what is read."""
        return Prepare(self.size, self.crop, self.flip, self.channels, self.normalize, self.buckets)

    def __post_init__(self) -> None:
        for name, ok in {
            "name": bool(self.name.strip()),
            "size": self.size >= 0,
            "channels": self.channels in (0, 1, 3, 4),
            "buckets": all(0 < ratio < 100 for ratio in self.buckets) and (not self.buckets or self.size > 0),
            "bad_share": 0 <= self.bad_share <= 1,
            "memory_mb": self.memory_mb >= 0,
            "cache_gb": self.cache_gb > 0,
            "window": self.window >= 1,
            "lanes": self.lanes >= 1,
        }.items():
            if not ok:
                raise InputError(f"data.{name} = {getattr(self, name)!r}: expected {_WANTED[name]}")


@dataclass(frozen=True)
class EvalConfig:
    """While training, every `every` steps and at the end (0: never): a grid of samples from fixed seeds, and the
    distances of `n` samples to held-out data."""

    every: int = 500
    n: int = 64

    def __post_init__(self) -> None:
        if self.every < 0:
            raise InputError(f"eval.every must be >= 0 steps (0: off), got {self.every}")
        if self.n < 2:
            raise InputError(f"eval.n must be >= 2 samples, got {self.n}")


TRAINED = ("denoiser", "classifier")  # what `kind` may be
# what says nothing to a classifier: whole families and sections, and single settings
OF_DENOISERS = ("head", "weight", "variance", "coupling", "cond", "solver", "grid", "guidance", "sample")
_SETTINGS_OF_DENOISERS = {"train": "cond_dropout", "eval": "n"}

DEFAULTS: dict[str, Any] = {
    "kind": "denoiser",
    "data": {"name": "digits"},
    "cond": {},
    "held_out": 797,
    "seed": 0,
    "out": "runs/digits",
    "track": "auto",
    "schedule": {"kind": "vp"},
    "head": {"kind": "edm"},
    "net": {"kind": "unet", "width": 64, "mults": [1], "patch": 2},
    "levels": {"kind": "uniform-lam", "lam_min": -4.0, "lam_max": 3.0},
    "draws": {"kind": "stratified"},
    "weight": {"kind": "edm"},
    "variance": {"kind": "fixed"},
    "coupling": {"kind": "independent"},
    "augment": {"kind": "none"},
    "optimiser": {"kind": "muon"},
    "ema": {"kind": "power"},
    "train": {},
    "engine": {},
    "eval": {},
    "solver": {"kind": "dpmpp-2m"},
    "grid": {"kind": "uniform-lam", "lam_max": 3.0},  # as far as levels are trained
    "guidance": {"kind": "cfg", "w": 2.0},
    "sample": {},
}
SECTIONS: dict[str, Callable[..., Any]] = {
    "data": DataConfig,
    "train": Plan,
    "engine": Engine,
    "eval": EvalConfig,
    "sample": SampleConfig,
}
SHORT = {**dict.fromkeys(KINDS, "kind"), "data": "name"}  # what `key=WORD` means for these
FROM_DATA = {
    "channels",
    "dims",
    "vector",
    "augment",
    "tokens",
    "spatial",
    "learned_variance",
}  # of networks: set by data or objective


MEASURED = ("classes", "channels", "dims")  # settings of encoders that follow from the data unless stated
_OF_ANY: dict[str, tuple[Any, Any]] = {"column": (str, ""), "alone": (float, 0.1)}  # settings of every condition


def _simple(annotation: Any) -> bool:
    if get_origin(annotation) in (tuple, list, Sequence, Union, UnionType):
        return all(_simple(a) for a in get_args(annotation) if a is not Ellipsis)
    return get_origin(annotation) is Literal or annotation in (int, float, bool, str)


def fields(kind: Callable[..., Any]) -> dict[str, tuple[Any, Any]]:
    """The settings of a kind that a configuration may give: name -> (type, default or `...` where it must be given)."""
    # a dataclass's inherited fields are annotated in their own modules, which only its class knows
    plain = inspect.isclass(kind) and not dataclasses.is_dataclass(kind)
    hints = get_type_hints(kind.__init__ if plain else kind)
    return {
        p.name: (hints[p.name], ... if p.default is p.empty else p.default)
        for p in inspect.signature(kind).parameters.values()
        if _simple(hints[p.name]) and not (p.name in FROM_DATA and kind in NETS.values())
    }


def _conditions(before: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The conditions by name of one layer over those of the layers before; a string is short for the encoder's kind."""
    out = {name: dict(settings) for name, settings in before.items()}
    for name, settings in given.items():
        settings = {"kind": settings} if isinstance(settings, str) else settings
        if not isinstance(settings, Mapping):
            raise InputError(f"cond.{name} needs an encoder, such as cond.text=bytes, got {settings!r}")
        changed = "kind" in settings and settings["kind"] != out.get(name, {}).get("kind")
        out[name] = {**({} if changed else out.get(name, {})), **settings}
    return out


def _condition(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of one condition, validated and complete but for what is measured."""
    given = dict(given)
    kind = given.pop("kind", None)
    if kind not in ENCODERS:
        was = f"cond.{name} has no kind" if kind is None else f"unknown encoder cond.{name}={kind!r}"
        raise InputError(f"{was}: {_nearest(str(kind), list(ENCODERS), 'there are')}")
    make = ENCODERS[kind]
    known = {k: v for k, v in fields(make).items() if k in given or k not in MEASURED}
    return {"kind": kind, **_check(f"cond.{name}", make, given, {**known, **_OF_ANY, "column": (str, name)})}


def _nearest(word: str, words: Sequence[str], what: str) -> str:
    return did_you_mean(word, words) or f"{what}: {', '.join(sorted(words)) or 'none'}"


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _elsewhere(where: str, key: str, kind: Callable[..., Any], known: Sequence[str]) -> str:
    """What to say of a setting that this kind of a family lacks."""
    kinds = KINDS.get(where) or (ENCODERS if where.startswith("cond.") else {})
    if not (owners := [name for name, other in kinds.items() if key in fields(other)]):
        return _nearest(key, known, f"{where} takes")
    (own,) = [name for name, other in kinds.items() if other is kind]
    return f"it belongs to {where}={' or '.join(owners)}, and {where}={own} takes {', '.join(sorted(known)) or 'none'}"


def _check(
    where: str, kind: Callable[..., Any], given: Mapping[str, Any], known: Mapping[str, tuple[Any, Any]] | None = None
) -> dict[str, Any]:
    """The given settings of a kind, validated and complete; `known` are those that it takes, by default its own."""
    known = fields(kind) if known is None else known
    for key in given:
        if key in FROM_DATA and kind in NETS.values() and key in inspect.signature(kind).parameters:
            raise InputError(f"{where}.{key} follows from the data and cannot be set")
        if key not in known:
            raise InputError(f"unknown key {where}.{key}: {_elsewhere(where, key, kind, list(known))}")
    schema: Any = pydantic.create_model("Settings", **known)  # type: ignore[call-overload]
    try:
        return {k: _plain(v) for k, v in schema(**given)}
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        annotation, default = known[name]
        if get_origin(annotation) in (tuple, list, Sequence) and name in given:
            words = (
                ', such as \'["text", "depth"]\', in single quotes in a shell' if str in get_args(annotation) else ""
            )
            example = f", such as {list(default)}" if default not in (..., ()) else words
            raise InputError(f"{where}.{name} is a list{example}; got {given[name]!r}") from error
        key = ".".join([where, *(str(part) for part in first["loc"])])
        raise InputError(f"{key}: {first['msg'].lower()}, got {first.get('input')!r}") from error


@dataclass(frozen=True, eq=False)
class Config:
    """A complete, validated configuration; `values` is nested plain data, `build` makes the objects.

    `given` has the dotted keys that were stated rather than left at their default.
    """

    values: dict[str, Any]
    given: frozenset[str] = frozenset()

    @staticmethod
    def resolve(*layers: Mapping[str, Any]) -> Config:
        """The defaults under these layers, later ones winning; a string for a family is short for its kind.

        Raises InputError for unknown keys, wrong types and values out of range.

        >>> Config.resolve({"solver": "ddim", "net": {"width": 96}}).values["net"]["width"]
        96
        """
        values, stated = copy.deepcopy(DEFAULTS), set()
        for layer in layers:
            for key, value in layer.items():
                if key not in DEFAULTS:
                    raise InputError(f"unknown key {key!r}: {_nearest(key, list(DEFAULTS), 'known keys')}")
                if key in SHORT and isinstance(value, str):
                    value = {SHORT[key]: value}
                if key == "cond" and isinstance(value, Mapping):
                    values[key] = _conditions(values[key], value)
                    stated |= {f"{key}.{name}" for name in value}
                    continue
                if isinstance(DEFAULTS[key], dict):
                    if not isinstance(value, Mapping):
                        raise InputError(f"{key} needs settings such as {key}.NAME=VALUE, got {value!r}")
                    changed = "kind" in value and value["kind"] != values[key].get("kind")
                    values[key] = {**({} if changed else values[key]), **value}
                    stated |= {f"{key}.{name}" for name in value}
                else:
                    if type(value) is not type(DEFAULTS[key]):
                        wanted = "a whole number" if isinstance(DEFAULTS[key], int) else "text"
                        raise InputError(f"{key} must be {wanted}, got {value!r}")
                    values[key] = value
                    stated.add(key)
        if values["kind"] not in TRAINED:
            raise InputError(f"kind={values['kind']!r} is not known: {_nearest(values['kind'], TRAINED, 'there are')}")
        for family, kinds in KINDS.items():
            given = dict(values[family])
            kind = given.pop("kind", None)
            if kind not in kinds:
                raise InputError(f"unknown {family} {kind!r}: {_nearest(str(kind), list(kinds), 'kinds')}")
            values[family] = {"kind": kind, **_check(family, kinds[kind], given)}
        for section, make in SECTIONS.items():
            values[section] = _check(section, make, values[section])
        values["cond"] = {name: _condition(name, given) for name, given in values["cond"].items()}
        if not values["out"].strip():
            raise InputError("out must name a run folder, got an empty string")
        if values["track"] not in TRACKERS:
            raise InputError(
                f"track={values['track']!r} is not known: {_nearest(values['track'], TRACKERS, 'there are')}"
            )
        if not -(2**63) <= values["seed"] < 2**63:
            raise InputError(f"seed must be a 64-bit number, got {values['seed']}")
        if values["held_out"] < 2:
            raise InputError(f"held_out must be >= 2 samples, got {values['held_out']}")
        config = Config(values, frozenset(stated))
        if config.classifies:
            return config._of_classifier()
        for family in KINDS.keys() - {"net"}:
            config.build(family)
        for section in SECTIONS:
            config.section(section)
        if values["cond"]:
            check_names(values["cond"], {name: settings["alone"] for name, settings in values["cond"].items()})
        for name in values["cond"]:
            config.encoder(name, {"classes": 1})
        return config

    @property
    def classifies(self) -> bool:
        """Whether p(c | x) is what is trained, and not a denoiser."""
        return bool(self.values["kind"] == "classifier")

    def _of_classifier(self) -> Config:
        """The same without what only denoisers have; InputError where that was stated."""
        alone = [key for key in sorted(self.given) if key.split(".")[0] in OF_DENOISERS]
        alone += [key for key in (f"{s}.{name}" for s, name in _SETTINGS_OF_DENOISERS.items()) if key in self.given]
        if alone:
            told = ", ".join(key.removesuffix(".kind") for key in alone)
            raise InputError(f"kind=classifier takes no {told}, only denoisers do: leave that out")
        kind = self.values["net"]["kind"]
        if kind not in CLASSIFIERS:
            raise InputError(f"net={kind} cannot be a classifier: kind=classifier takes net={' or '.join(CLASSIFIERS)}")
        for name, (_, default) in fields(NETS[kind]).items():
            if name not in fields(CLASSIFIERS[kind]) and self.values["net"][name] != _plain(default):
                raise InputError(f"net.{name} is for what a denoiser is told: kind=classifier has no such setting")
        values = {k: v for k, v in self.values.items() if k not in OF_DENOISERS}
        for section, name in _SETTINGS_OF_DENOISERS.items():
            values[section] = {k: v for k, v in values[section].items() if k != name}
        values["net"] = {k: v for k, v in values["net"].items() if k == "kind" or k in fields(CLASSIFIERS[kind])}
        config = Config(values | {"cond": {}}, self.given)
        for family in KINDS.keys() & values.keys() - {"net"}:
            config.build(family)
        for section in SECTIONS.keys() & values.keys():
            config.section(section)
        return config

    def measured(self, sigma_data: float, held_out: int, batch: int) -> Config:
        """The same completed by what was measured: `held_out`, `train.batch`, and the head's sigma_data unless it was
        stated."""
        values = {**self.values, "held_out": held_out, "train": {**self.values["train"], "batch": batch}}
        if "sigma_data" in self.values.get("head", ()) and "head.sigma_data" not in self.given:
            values["head"] = {**self.values["head"], "sigma_data": sigma_data}
        return Config(values, self.given)

    def build(self, family: str, **extra: Any) -> Any:
        """The object of a family, e.g. `build("solver")`; `extra` are settings that follow from the data."""
        given = {k: tuple(v) if isinstance(v, list) else v for k, v in self.values[family].items()}
        kinds = CLASSIFIERS if family == "net" and self.classifies else KINDS[family]
        kind: Any = given.pop("kind")
        return kinds[kind](**given, **extra)

    def section(self, name: str) -> Any:
        """The object of a section, e.g. the `Plan` of "train" or the `SampleConfig` of "sample"."""
        return SECTIONS[name](**{k: tuple(v) if isinstance(v, list) else v for k, v in self.values[name].items()})

    def encoder(self, name: str, found: Mapping[str, Any]) -> Encoder:
        """The encoder of a condition; `found` are its settings that follow from the data, which stated ones win over.

        Raises InputError for settings that cannot be.
        """
        given = {k: tuple(v) if isinstance(v, list) else v for k, v in self.values["cond"][name].items()}
        make: Any = ENCODERS[str(given.pop("kind"))]
        takes = fields(make)
        settings = {k: v for k, v in {**found, **given}.items() if k in takes}
        try:
            encoder: Encoder = make(**settings)
        except InputError as error:
            raise InputError(f"cond.{name}: {error}") from error
        return encoder

    def encoders(self, found: Mapping[str, Mapping[str, Any]]) -> Encoders | None:
        """The encoders of all conditions by name, `found` being what follows from the data for each; None without."""
        every = self.values["cond"]
        if not every:
            return None
        made = {name: self.encoder(name, found.get(name, {})) for name in every}
        return Encoders(made, {name: settings["alone"] for name, settings in every.items()})

    def toml(self) -> str:
        """As TOML, sufficient to rebuild."""
        plain = {k: v for k, v in self.values.items() if not isinstance(v, dict)}
        return tomli_w.dumps({**plain, **{k: v for k, v in self.values.items() if isinstance(v, dict)}})

    @staticmethod
    def read(path: Path) -> dict[str, Any]:
        """The layer in a TOML file."""
        try:
            return tomllib.loads(path.read_text())
        except FileNotFoundError as error:
            raise InputError(f"configuration file {path} does not exist") from error
        except IsADirectoryError as error:
            raise InputError(f"{path} is a folder; a configuration is a TOML file") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise InputError(f"{path} is not valid TOML: {error}") from error


def parse_overrides(words: Sequence[str]) -> dict[str, Any]:
    """`key=value` words as a layer; dots nest, values are TOML or else strings.

    >>> parse_overrides(["net.width=96", "solver=dpmpp-2m", "net.mults=[1, 2]"])
    {'net': {'width': 96, 'mults': [1, 2]}, 'solver': {'kind': 'dpmpp-2m'}}
    """
    layer: dict[str, Any] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not key:
            file = "; a file of settings is given by --config" if word.endswith(".toml") else ""
            raise InputError(f"{word!r} is not an override: write key=value, such as net.width=96 or solver=ddim{file}")
        try:
            value = tomllib.loads(f"v = {text}")["v"]
        except tomllib.TOMLDecodeError:
            value = text
        *parents, last = key.split(".")
        if not parents and last in SHORT:
            parents, last = [last], SHORT[last]
        elif parents == ["cond"] and isinstance(value, str):
            parents, last = ["cond", last], "kind"
        place = layer
        for parent in parents:
            place = place.setdefault(parent, {})
            if not isinstance(place, dict):
                raise InputError(f"{word!r}: {parent} was given a plain value before")
        place[last] = value
    return layer
