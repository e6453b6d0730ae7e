"""Averages of the weights over training: as it goes on, and of any length afterwards, from snapshots of two."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from undiffuse.train.checkpoint import Checkpoints, commit, is_shard, takes_part, verify, weights
from undiffuse.train.processes import Processes
from undiffuse.types import InputError

LONGEST = 12**-0.5  # of the power rule: the plain average of all steps
TRACKED = (0.05, 0.10)  # lengths whose averages are kept for snapshots, as in EDM2
_ABOUT = "about.json"


class Profile(Protocol):
    """How an average forgets: average_t = beta(t) average_(t-1) + (1 - beta(t)) weights_t, t = 1, 2, ..."""

    def beta(self, t: int) -> float: ...


@dataclass(frozen=True)
class Power:
    """beta_t = (1 - 1 / t)^(gamma + 1): a window that grows with training (Karras et al. 2024, arXiv 2312.02696, 3.1).

    Step i has the weight (i / t)^(gamma + 1) - ((i - 1) / t)^(gamma + 1), and the steps under it the standard deviation
    `length` t, in (0, 12^(-1/2) = 0.2887], where the end is the plain average. The initial weights leave it at once.

    >>> round(Power(0.10).gamma, 2)
    6.94
    """

    length: float = 0.10

    def __post_init__(self) -> None:
        if not 0 < self.length <= LONGEST:
            raise InputError(f"ema.length must be in (0, {LONGEST:.4f}], a share of the run, got {self.length}")

    @property
    def gamma(self) -> float:
        """The root >= 0 of (gamma + 1) / ((gamma + 2)^2 (gamma + 3)) = length^2."""
        s = self.length**-2
        return max(0.0, float(np.roots([1, 7, 16 - s, 12 - s]).real.max()))

    def beta(self, t: int) -> float:
        return float((1 - 1 / t) ** (self.gamma + 1))


@dataclass(frozen=True)
class Classic:
    """beta_t = min(decay, t / (t + 9)) and beta_1 = 0: the usual exponential average with its usual warm-up.

    `decay` in [0, 1); its window is 1 / (1 - decay) steps, however long the run.
    """

    decay: float = 0.9999

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise InputError(f"ema.decay must be in [0, 1), got {self.decay}")

    def beta(self, t: int) -> float:
        return min(self.decay, t / (t + 9)) if t > 1 else 0.0


PROFILES: dict[str, Callable[..., Profile]] = {"power": Power, "classic": Classic}


def _own(p: Tensor) -> Tensor:
    """What this process holds of a parameter: all of it, or its shard."""
    return p.detach().to_local() if is_shard(p) else p.detach()  # type: ignore[attr-defined]


class EMA:
    """Averages of a module's weights, each by its `Profile`; `average` is that of the first, in eval mode, to sample.

    Buffers are copied, not averaged; the trained module is left alone. `averages` are all of them, in order.

    >>> ema = EMA(nn.Linear(2, 2), Power(0.05))
    >>> ema.update(1)
    """

    def __init__(self, module: nn.Module, *profiles: Profile) -> None:
        if strange := [p for p in profiles if not hasattr(p, "beta")]:
            raise InputError(f"EMA takes profiles such as Power(0.1) or Classic(0.999), got {strange[0]!r}")
        self.module, self.profiles = module, profiles or (Power(),)
        self.averages = [copy.deepcopy(module).eval().requires_grad_(False) for _ in self.profiles]

    @property
    def average(self) -> nn.Module:
        """The average by the first profile."""
        return self.averages[0]

    @torch.no_grad()
    def update(self, t: int) -> None:
        """Take in the weights after optimiser step t (1, 2, ...)."""
        newest = [_own(p) for p in self.module.parameters()]
        for profile, average in zip(self.profiles, self.averages, strict=True):
            torch._foreach_lerp_([_own(p) for p in average.parameters()], newest, 1 - profile.beta(t))
            for mine, theirs in zip(average.buffers(), self.module.buffers(), strict=True):
                mine.copy_(theirs)


def shares(t: int, length: float, steps: int) -> np.ndarray:
    """The weight of steps 1 ... `steps` in the power-rule average of this length after step t; they sum to 1."""
    i = np.minimum(np.arange(steps + 1) / t, 1.0)
    return np.diff(i ** (Power(length).gamma + 1))


class Fit(NamedTuple):
    """What makes an average from others: `coefficients` that sum to 1, and the `error` of the weights that steps then
    have, in the 2-norm and relative to the wanted ones."""

    coefficients: np.ndarray
    error: float


def rebuild(stored: Sequence[tuple[int, float]], step: int, length: float) -> Fit:
    """The least-squares combination of power-rule averages (step, length) that is nearest to the one of `length` after
    `step` (Karras et al. 2024, section 3.2), with steps' weights exactly those of `EMA`.

    >>> rebuild([(50, 0.05), (100, 0.05), (100, 0.10)], 100, 0.10).coefficients.round(9).tolist()
    [0.0, 0.0, 1.0]
    """
    wanted = shares(step, length, step)
    basis = np.stack([shares(t, s, step) for t, s in stored], 1)
    # sums of 1 as a constraint: the last coefficient is what the others leave, so that constant weights stay exact
    free, *_ = np.linalg.lstsq(basis[:, :-1] - basis[:, -1:], wanted - basis[:, -1], rcond=None)
    coefficients = np.append(free, 1 - free.sum())
    error = np.linalg.norm(basis @ coefficients - wanted) / np.linalg.norm(wanted)
    return Fit(coefficients, float(error))


class Snapshots:
    """The power-rule averages of an `EMA`, kept `count` times over a run in folders step-N, for any length afterwards.

    A length is in (0, 0.2887], as those of `Power`; with averages of 0.05 and 0.10, 16 snapshots give those from 0.03
    to 0.2 to within 5 % of the wanted weights of the steps, and more snapshots shorter and longer ones.

    >>> Snapshots("runs/mine/averages", count=8).due(500, steps=1000)
    True
    """

    def __init__(self, root: str | Path, count: int = 16) -> None:
        if count < 1:
            raise InputError(f"snapshots must be >= 1, got {count}: 16 give lengths from 0.03 to 0.2 to within 5 %")
        self.root, self.count = Path(root), count

    def check(self, ema: EMA) -> None:
        """InputError for an EMA that has no average by the power rule to keep."""
        if not any(isinstance(p, Power) for p in ema.profiles):
            raise InputError(
                f"snapshots keep averages by the power rule, and this EMA has {ema.profiles}: add Power(0.05) and "
                "Power(0.10)"
            )

    def due(self, step: int, steps: int) -> bool:
        """Whether the averages are kept after this step of so many: at `count` steps in equal distances, or all."""
        return step * self.count // steps > (step - 1) * self.count // steps

    def save(self, step: int, ema: EMA, processes: Processes) -> None:
        """Commit step-N; every process takes part where parameters are shards, the main one writes."""
        pairs = zip(ema.profiles, ema.averages, strict=True)
        kept = {p.length: a for p, a in pairs if isinstance(p, Power)}
        parts: dict[float, dict[str, Tensor]] = {}
        if takes_part(ema.module, processes.main):
            parts = {length: weights(average) for length, average in kept.items()}
        about = {"lengths": list(kept), "buffers": [name for name, _ in ema.average.named_buffers()]}

        def write(folder: Path) -> None:
            for length, tensors in parts.items():
                save_file(tensors, folder / f"{length}.safetensors")
            (folder / _ABOUT).write_text(json.dumps(about))

        processes.together(lambda: commit(self.root / f"step-{step}", write))

    def steps(self) -> list[int]:
        """The steps that were kept, oldest first."""
        return Checkpoints(self.root).steps()

    def average(self, length: float, end: int | None = None, most: float = 0.15) -> tuple[dict[str, Tensor], Fit]:
        """The weights averaged with the power rule of this length up to the snapshot of step `end`, or the newest, for
        `load_state_dict`.

        Raises InputError where there are no snapshots, where that of step `end` is missing, and where the nearest
        combination of them misses by more than `most`; buffers are those of the newest.
        """
        Power(length)
        steps = self.steps()
        if not steps:
            raise InputError(f"{self.root} has no snapshots to rebuild an average from: train with train.snapshots=16")
        if end is not None and end not in steps:
            raise InputError(
                f"{self.root / f'step-{end}'} is missing, the snapshot with which averages of the run end (it has "
                f"those of steps {', '.join(map(str, steps))}): put it back, or train the run again"
            )
        steps = [step for step in steps if end is None or step <= end]
        for step in steps:
            verify(self.root / f"step-{step}")
        about = {step: json.loads((self.root / f"step-{step}" / _ABOUT).read_text()) for step in steps}
        stored = [(step, s) for step in steps for s in about[step]["lengths"]]
        fit = rebuild(stored, steps[-1], length)
        if fit.error > most:
            there = ", ".join(f"{s:g}" for s in about[steps[-1]]["lengths"])
            raise InputError(
                f"{len(steps)} snapshots of lengths {there} cannot give an average of length {length}: the nearest "
                f"differs by {100 * fit.error:.0f} %. Choose a length nearer to those (16 snapshots give 0.03 to 0.2 "
                "to within 5 %), or train with more snapshots"
            )
        total: dict[str, Tensor] = {}
        dtypes: dict[str, torch.dtype] = {}
        for (step, s), c in zip(stored, fit.coefficients, strict=True):
            for name, value in load_file(self.root / f"step-{step}" / f"{s}.safetensors").items():
                if name in about[step]["buffers"]:
                    total[name] = value
                else:
                    total[name] = total.get(name, torch.zeros(())) + c * value.double()
                dtypes[name] = value.dtype
        return {name: value.to(dtypes[name]) for name, value in total.items()}, fit
