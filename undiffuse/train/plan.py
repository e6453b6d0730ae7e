"""What is computed (`Plan`), how the work is done (`Engine`), and whether two runs are the same."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from undiffuse.types import InputError

_WANTED = {
    **dict.fromkeys(("steps", "batch"), "at least 1"),
    **dict.fromkeys(("warmup", "every"), "at least 0"),
    **dict.fromkeys(("decay", "cond_dropout"), "from 0 to 1"),
    "lr": "above 0 and at most 1e30",
    "weight_decay": "from 0 to 1e6",
    "snapshots": "from 0 to train.steps",
    "clip": "above 0",
    "precision": "float32, bf16 or fp16",
}


@dataclass(frozen=True)
class Plan:
    """How long and how fast.

    `steps` of `batch` samples, over all processes ("auto": measured once, see `fit`); the optimiser's peak rate `lr`
    after `warmup` steps, falling as a cosine to zero over the last `decay` of the run; gradients clipped to norm
    `clip`; `cond_dropout` is the share of samples trained without their condition; a checkpoint every `every` steps
    (0: none). Averages of the weights are kept `snapshots` times (0: never), for one of any length afterwards.
    With `precision` bf16 or fp16 the network's matrix products and convolutions are in that precision, while weights,
    levels, the network's time input and the loss stay in float32. Raises InputError for impossible values.
    """

    steps: int = 1500
    batch: int | Literal["auto"] = 64
    lr: float = 2e-3
    warmup: int = 100
    decay: float = 0.3
    weight_decay: float = 0.0
    clip: float = 1.0
    cond_dropout: float = 0.15
    every: int = 500
    snapshots: int = 0
    precision: Literal["float32", "bf16", "fp16"] = "float32"

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "warmup", "every", "snapshots"):
            value = getattr(self, name)
            if not isinstance(value, int) and (name, value) != ("batch", "auto"):
                raise InputError(f"train.{name} must be a whole number, got {value!r}")
        for name, ok in {
            "steps": self.steps >= 1,
            "batch": self.batch == "auto" or int(self.batch) >= 1,
            "lr": 0 < self.lr <= 1e30,  # float32 has more, but not much
            "warmup": self.warmup >= 0,
            "decay": 0 <= self.decay <= 1,
            "weight_decay": 0 <= self.weight_decay <= 1e6,
            "clip": self.clip > 0,
            "cond_dropout": 0 <= self.cond_dropout <= 1,
            "every": self.every >= 0,
            "snapshots": 0 <= self.snapshots <= self.steps,
            "precision": self.precision in ("float32", "bf16", "fp16"),
        }.items():
            if not ok:
                raise InputError(f"train.{name} = {getattr(self, name)} is out of range: {_WANTED[name]}")

    def rate(self, step: int) -> float:
        """The learning rate of step 1, 2, ..., steps."""
        left = (self.steps + 1 - step) / (self.decay * self.steps) if self.decay else 1.0
        return self.lr * min(1.0, step / max(1, self.warmup)) * (0.5 - 0.5 * math.cos(math.pi * min(1.0, left)))


@dataclass(frozen=True)
class Engine:
    """How the work is done; all of it may change when a run goes on.

    `device` is auto (cuda where there is one), cpu or cuda. Several processes keep whole copies of the network ("ddp")
    or shards of it ("fsdp", PyTorch's FSDP2). `micro` bounds the rows of a network call (0: as many as fit), `compile`
    uses torch.compile, `recompute` computes activations again in the backward pass instead of keeping them, and
    `workers` processes read the data (0: the training process itself).
    """

    device: Literal["auto", "cpu", "cuda"] = "auto"
    sharding: Literal["ddp", "fsdp"] = "ddp"
    micro: int = 0
    compile: bool = False
    recompute: bool = False
    workers: int = 0

    def __post_init__(self) -> None:
        for name in ("micro", "workers"):
            if getattr(self, name) < 0:
                raise InputError(f"engine.{name} must be >= 0, got {getattr(self, name)}")
        for name, known in {"device": ("auto", "cpu", "cuda"), "sharding": ("ddp", "fsdp")}.items():
            if getattr(self, name) not in known:
                raise InputError(f"engine.{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in values.items():
        out |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return out


def _difference(key: str, was: dict[str, Any], now: dict[str, Any]) -> str:
    one, other = (repr(values[key]) if key in values else "not set" for values in (was, now))
    return f"{key.removesuffix('.kind')} was {one}, is {other}"


def same_settings(was: dict[str, Any], now: dict[str, Any], folder: Path) -> None:
    """InputError naming the settings in which a run differs from the one that `folder` belongs to."""
    a, b = _flat(was), _flat(now)
    differ = [k for k in {**a, **b} if a.get(k) != b.get(k)]
    others = {k.removesuffix(".kind") for k in differ if k.endswith(".kind")}  # whose settings cannot be compared
    if differ:
        told = [k for k in differ if k.endswith(".kind") or k.rpartition(".")[0] not in others]
        longer = (
            "The rate falls to 0 over a run's steps, which are fixed therefore: for more of them train anew, or go on "
            "from its weights as docs/training.md says. "
        )
        raise InputError(
            f"{folder} belongs to a run with other settings: {'; '.join(_difference(k, a, b) for k in told)}. "
            f"{longer * ('train.steps' in differ)}Give another `out` or delete that run"
        )
