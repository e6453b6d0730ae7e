"""Encoders by name: raw conditions of a batch -> `Given` -> `Cond`; and the network that has them inside."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from undiffuse.cond.cond import Cond
from undiffuse.cond.given import Given, Read
from undiffuse.cond.prompt import Prompt
from undiffuse.types import InputError


class Encoder(Protocol):
    """Settings of one condition's encoder, a frozen dataclass of simple types.

    `vector`, `tokens` and `spatial` are the widths that it gives to these parts of a `Cond`, 0 for none; `reads` is the
    kind of its values: label, text, picture, depth, segmentation or audio.
    """

    @property
    def vector(self) -> int: ...
    @property
    def tokens(self) -> int: ...
    @property
    def spatial(self) -> int: ...
    @property
    def reads(self) -> str: ...
    def read(self, values: Any) -> dict[str, Tensor]:
        """Values of b samples, checked, as tensors (b, ...) that training can keep; InputError for wrong ones."""

    def build(self) -> nn.Module:
        """The module with the encoder's parameters, trained with the network: (tensors that `read` gave, the sides of
        x) -> `Cond`."""


def check_names(encoders: Collection[str], alone: Mapping[str, float]) -> None:
    """InputError for names that conditions cannot have, and for probabilities that are none."""
    if not encoders or any(not name.isidentifier() for name in encoders):
        raise InputError(f"encoders need names such as text or depth, got {list(encoders)}")
    if taken := [name for name in encoders if hasattr(nn.ModuleDict, name)]:
        raise InputError(f"an encoder cannot be called {taken[0]!r}, which PyTorch's modules use: take another name")
    if strange := [name for name in alone if name not in encoders]:
        raise InputError(f"alone names {strange[0]!r}; there are encoders for {', '.join(encoders)}")
    if wrong := [f"{name}={p}" for name, p in alone.items() if not 0 <= p <= 1]:
        raise InputError(f"alone must be from 0 to 1, got {', '.join(wrong)}")


class Encoders(nn.Module):
    """The encoders of a network's conditions, by the names that they are given by.

    Calling it with raw conditions of b samples, one sequence of values or tensor each, gives a `Given`; None among the
    values of a list is a sample without that condition. `alone`, of several conditions, is the probability in [0, 1]
    with which training drops each by itself, for all or by name, so that guidance can weigh each.

    >>> from undiffuse.cond import Label
    >>> encoders = Encoders({"label": Label(3)})
    >>> given = encoders(label=[2, None])
    >>> encoders.encoded(given, ()).vector.tolist()
    [[0.0, 0.0, 1.0], [0.0, 0.0, 0.0]]
    """

    def __init__(self, encoders: Mapping[str, Encoder], alone: float | Mapping[str, float] = 0.1) -> None:
        super().__init__()
        each = dict.fromkeys(encoders, alone) if isinstance(alone, int | float) else dict(alone)
        check_names(encoders, each)
        self.encoders: dict[str, Encoder] = dict(encoders)
        self.alone: dict[str, float] = each
        self.modules_by_name = nn.ModuleDict({name: e.build() for name, e in self.encoders.items()})
        widths = {name: e.tokens for name, e in self.encoders.items() if e.tokens}
        self.tokens = max(widths.values(), default=0)
        # tokens of several kinds are told apart, and brought to one width, by a linear layer each
        self.kinds = nn.ModuleDict()
        if len(widths) > 1:
            self.kinds = nn.ModuleDict({name: nn.Linear(width, self.tokens) for name, width in widths.items()})

    @property
    def widths(self) -> dict[str, int]:
        """What a network is built with: `UNet(3, **encoders.widths)`."""
        every = self.encoders.values()
        return {
            "vector": sum(e.vector for e in every),
            "tokens": self.tokens,
            "spatial": sum(e.spatial for e in every),
        }

    def forward(self, /, **values: Any) -> Given:
        """Raw conditions of b samples by name; InputError for unknown names, wrong values and other numbers of rows."""
        for name in values:
            if name not in self.encoders:
                raise InputError(f"no condition is called {name!r}: this model has {', '.join(self.encoders)}")
        reads = {name: _read(name, self.encoders[name], v) for name, v in values.items() if v is not None}
        rows = {name: len(read.there) for name, read in reads.items()}
        if len(set(rows.values())) > 1:
            raise InputError(f"conditions of different numbers of samples: {rows}")
        given = Given(reads, {}, self.alone)
        negative = {name: found for name, v in values.items() if (found := _negative(v))}
        return given.against(self(**negative)) if negative else given

    def encoded(self, given: Given, size: Sequence[int]) -> Cond:
        """The condition of samples whose sides are `size`; where a condition is null so are its parts."""
        parts = {name: self._part(name, read, size).drop(~read.there) for name, read in given.reads.items()}
        told = [p for p in parts.values() if p.tokens is not None]
        return Cond(
            self._whole("vector", parts, len(given)),
            torch.cat([p.tokens for p in told], 1) if told else None,  # type: ignore[misc]
            torch.cat([p.tokens_mask for p in told], 1) if told else None,  # type: ignore[misc]
            self._whole("spatial", parts, len(given)),
            given.augment,
        )

    def ahead(self, given: Given, size: Sequence[int]) -> Given:
        """The same conditions for samples whose sides are `size`, encoded once, as for many steps of sampling: they
        stay as they are when weights change."""

        def done(name: str, read: Read) -> Read:
            parts = vars(self._part(name, read, size))
            return Read({part: v for part, v in parts.items() if v is not None}, read.there, done=True)

        reads, instead = ({k: done(k, v) for k, v in each.items()} for each in (given.reads, given.instead))
        return replace(given, reads=reads, instead=instead)

    def _part(self, name: str, read: Read, size: Sequence[int]) -> Cond:
        """What one encoder makes of its condition."""
        if read.done:
            return Cond(**read.tensors)
        if name not in self.encoders:
            raise InputError(f"no condition is called {name!r}: this model has {', '.join(self.encoders)}")
        try:
            part: Cond = self.modules_by_name[name](read.tensors, size)
        except InputError as error:
            raise InputError(f"{name}: {error}") from error
        if name in self.kinds and part.tokens is not None:
            layer: Any = self.kinds[name]
            part = replace(part, tokens=layer(part.tokens.to(layer.weight.dtype)))
        return part

    def _whole(self, what: str, parts: Mapping[str, Cond], b: int) -> Tensor | None:
        """The vectors or maps of all encoders side by side, zero of those that were not given."""
        every = {name: getattr(part, what) for name, part in parts.items()}
        found = {name: v for name, v in every.items() if v is not None}
        if not found:
            return None
        like = next(iter(found.values()))
        widths = {name: getattr(e, what) for name, e in self.encoders.items()}
        return torch.cat([found.get(k, like.new_zeros(b, w, *like.shape[2:])) for k, w in widths.items() if w], 1)

    def settings(self) -> dict[str, Any]:
        """Plain data from which `Encoders.of` builds encoders of the same kind, without their weights."""
        kinds = {kind: name for name, kind in _table().items()}
        for name, encoder in self.encoders.items():
            if type(encoder) not in kinds:
                raise InputError(
                    f"{name} is encoded by {type(encoder).__name__}: put it into ENCODERS to save the model"
                )
        each = {k: {"kind": kinds[type(e)], **dataclasses.asdict(e)} for k, e in self.encoders.items()}  # type: ignore[call-overload]
        return {"encoders": each, "alone": self.alone}

    @staticmethod
    def of(settings: Mapping[str, Any]) -> Encoders:
        """The encoders that `settings` describe, with new weights; InputError for a kind that is not known."""
        made = {}
        for name, given in settings["encoders"].items():
            given = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
            kind = given.pop("kind")
            if kind not in _table():
                raise InputError(f"no encoder of the kind {kind!r}: there are {', '.join(_table())}")
            made[name] = _table()[kind](**given)
        return Encoders(made, settings["alone"])


def _table() -> Mapping[str, Any]:
    from undiffuse.cond import ENCODERS

    return ENCODERS


def _read(name: str, encoder: Encoder, values: Any) -> Read:
    """The values of one condition; rows of None are null."""
    if isinstance(values, str | bytes | Prompt) or not hasattr(values, "__len__") or len(values) == 0:
        raise InputError(f"{name} takes a list of values, one a sample, got {values!r}")
    rows = torch.arange(len(values))
    if isinstance(values, list | tuple):
        rows = torch.tensor([k for k, v in enumerate(values) if v is not None], dtype=torch.long)
        if not len(rows):
            raise InputError(f"{name} is None for every sample: leave it out")
        there = [v for v in values if v is not None]
    else:
        there = values
    try:
        tensors = encoder.read(there)
    except InputError as error:
        raise InputError(f"{name}: {error}") from error
    mask = torch.zeros(len(values), dtype=torch.bool)
    mask[rows] = True
    if len(rows) < len(values):
        spread = {k: v.new_zeros(len(values), *v.shape[1:]) for k, v in tensors.items()}
        tensors = {k: spread[k].index_copy(0, rows, v) for k, v in tensors.items()}
    return Read(tensors, mask)


def _negative(values: Any) -> list[Prompt | None] | None:
    """What the prompts among the values are to be guided against; None where no prompt says so."""
    if not isinstance(values, list | tuple):
        return None
    found = [v.negative if isinstance(v, Prompt) else None for v in values]
    return found if any(found) else None


class Conditioned(nn.Module):
    """A network and the encoders of its conditions, trained, averaged and saved as one: `Denoiser(Conditioned(UNet(3,
    **encoders.widths), encoders), head)` takes `encoders(text=[...])` wherever a condition is taken.

    >>> from undiffuse.nets import UNet
    >>> from undiffuse.cond import Label
    >>> encoders = Encoders({"label": Label(3)})
    >>> net = Conditioned(UNet(1, width=16, **encoders.widths), encoders)
    >>> net(torch.zeros(2, 1, 8, 8), torch.zeros(2), encoders(label=[0, 1])).shape
    torch.Size([2, 1, 8, 8])
    """

    def __init__(self, net: nn.Module, encoders: Encoders) -> None:
        super().__init__()
        self.net, self.encoders = net, encoders

    def forward(self, x: Tensor, time: Tensor, cond: Given | Cond | None = None) -> Tensor:
        """The network's answer; `cond` is encoded, unless it is so already."""
        told = self.encoders.encoded(cond, x.shape[2:]) if isinstance(cond, Given) else cond
        out: Tensor = self.net(x, time, told)
        return out
