"""The training loop: a generator of typed states. Everything random is a function of (seed, step)."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from undiffuse.denoise import Denoiser
from undiffuse.seeds import seed_of
from undiffuse.train.checkpoint import Checkpoints, load_weights, weights
from undiffuse.train.ema import EMA
from undiffuse.train.objective import Objective
from undiffuse.types import InputError


@dataclass(frozen=True)
class Plan:
    """How long and how fast.

    `steps` of `batch` samples; AdamW's peak rate `lr` after `warmup` steps, falling as a cosine to zero over the last
    `decay` of the run; gradients clipped to norm `clip`; `cond_dropout` is the share of samples trained without their
    condition; a checkpoint every `every` steps (0: none). Raises InputError for impossible values.
    """

    steps: int = 1500
    batch: int = 64
    lr: float = 2e-3
    warmup: int = 100
    decay: float = 0.3
    weight_decay: float = 0.0
    clip: float = 1.0
    ema_gamma: float = 6.94
    cond_dropout: float = 0.15
    every: int = 500

    def __post_init__(self) -> None:
        for name, ok in {
            "steps": self.steps >= 1,
            "batch": self.batch >= 1,
            "lr": self.lr > 0,
            "warmup": self.warmup >= 0,
            "decay": 0 <= self.decay <= 1,
            "weight_decay": self.weight_decay >= 0,
            "clip": self.clip > 0,
            "ema_gamma": self.ema_gamma >= 0,
            "cond_dropout": 0 <= self.cond_dropout <= 1,
            "every": self.every >= 0,
        }.items():
            if not ok:
                raise InputError(f"train.{name} = {getattr(self, name)} is out of range: see `undiffuse info config`")

    def rate(self, step: int) -> float:
        """The learning rate of step 1, 2, ..., steps."""
        left = (self.steps + 1 - step) / (self.decay * self.steps) if self.decay else 1.0
        return self.lr * min(1.0, step / max(1, self.warmup)) * (0.5 - 0.5 * math.cos(math.pi * min(1.0, left)))


class NonFinite(RuntimeError):
    """The loss or a gradient is NaN or infinite; the message names the step, the level and the parameters."""


@dataclass(frozen=True)
class TrainState:
    """After optimiser step `step`: mean weighted loss, gradient norm before clipping, learning rate, and for each
    sample of the batch its lam and plain x0 error."""

    step: int
    loss: float
    grad_norm: float
    lr: float
    lam: Tensor
    mse: Tensor


def batch_indices(n: int, batch: int, step: int, seed: int) -> Tensor:
    """The samples of optimiser step 1, 2, ...: a new permutation each epoch, a function of (seed, global index)."""
    wanted = torch.arange((step - 1) * batch, step * batch)
    out = torch.empty_like(wanted)
    for epoch in torch.unique(wanted // n).tolist():
        order = torch.randperm(n, generator=torch.Generator().manual_seed(seed_of(seed, 2, epoch)))
        mine = wanted // n == epoch
        out[mine] = order[wanted[mine] % n]
    return out


def _diagnosis(step: int, loss: Tensor, lam: Tensor, model: nn.Module) -> NonFinite:
    bad = [n for n, p in model.named_parameters() if p.grad is not None and not bool(torch.isfinite(p.grad).all())]
    broken = [n for n, p in model.named_parameters() if not bool(torch.isfinite(p).all())]
    rows = (~torch.isfinite(loss)).nonzero().flatten().tolist()
    where = ", ".join(f"{float(lam[i]):.2f}" for i in rows[:4]) or "none (the loss is finite)"
    return NonFinite(
        f"training stopped at step {step}: the loss or a gradient is not finite. Levels (lam) with a non-finite loss: "
        f"{where}. Non-finite gradients: {', '.join(bad[:6]) or 'none'}. Non-finite weights: "
        f"{', '.join(broken[:6]) or 'none'}. Lower train.lr or train.clip, or check the data at those levels"
    )


class _Files:
    """Model, average and optimiser as safetensors and JSON; no pickle."""

    def __init__(self, model: nn.Module, ema: EMA, optimiser: torch.optim.Optimizer) -> None:
        self.model, self.ema, self.optimiser = model, ema, optimiser

    def write(self, folder: Path, step: int, identity: dict[str, Any]) -> None:
        save_file(weights(self.model), folder / "model.safetensors")
        save_file(weights(self.ema.average), folder / "ema.safetensors")
        moments = {
            f"{i}.{name}": value.contiguous()
            for i, state in self.optimiser.state_dict()["state"].items()
            for name, value in state.items()
        }
        save_file(moments, folder / "optimiser.safetensors")
        (folder / "state.json").write_text(json.dumps({"step": step, "identity": identity}))

    def read(self, folder: Path, identity: dict[str, Any]) -> int:
        known = json.loads((folder / "state.json").read_text())
        same_settings(known["identity"], identity, folder)
        load_weights(self.model, folder / "model.safetensors")
        load_weights(self.ema.average, folder / "ema.safetensors")
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in load_file(folder / "optimiser.safetensors").items():
            i, name = key.split(".", 1)
            state.setdefault(int(i), {})[name] = value
        self.optimiser.load_state_dict({**self.optimiser.state_dict(), "state": state})
        return int(known["step"])


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in values.items():
        out |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return out


def same_settings(was: dict[str, Any], now: dict[str, Any], folder: Path) -> None:
    """InputError naming the settings in which a run differs from the one that `folder` belongs to."""
    a, b = _flat(was), _flat(now)
    differ = [f"{k} was {a.get(k)!r}, is {b.get(k)!r}" for k in {**a, **b} if a.get(k) != b.get(k)]
    if differ:
        raise InputError(
            f"{folder} belongs to a run with other settings: {'; '.join(differ)}. Give another `out` or delete that run"
        )


def train(
    model: Denoiser,
    x: Tensor,
    objective: Objective,
    plan: Plan,
    *,
    cond: Any = None,
    seed: int = 0,
    checkpoints: Checkpoints | None = None,
    identity: dict[str, Any] | None = None,
    ema: EMA | None = None,
) -> Iterator[TrainState]:
    """Train in place, yielding a `TrainState` after every step; stop early with `break`.

    x (n, *data); `cond` is a `Cond` of n rows or None. Give `ema=EMA(model)` to keep its average. With `checkpoints`
    the run continues from the newest that verifies, bit for bit as if it had not stopped; `identity` (JSON-able) must
    then be the same. Raises NonFinite, and InputError for impossible combinations.

    >>> from undiffuse import Denoiser, EDMPrecond, VP
    >>> from undiffuse.nets import UNet
    >>> model = Denoiser(UNet(1, width=16), EDMPrecond())
    >>> states = train(model, torch.randn(8, 1, 8, 8), Objective(VP()), Plan(steps=2, batch=4))
    >>> [state.step for state in states]
    [1, 2]
    """
    objective.check(model)
    if cond is not None and len(cond) != len(x):
        raise InputError(f"the condition has {len(cond)} rows for {len(x)} samples")
    ema, identity = ema or EMA(model, plan.ema_gamma), json.loads(json.dumps(identity or {}))
    optimiser = torch.optim.AdamW(model.parameters(), lr=plan.lr, weight_decay=plan.weight_decay, fused=True)
    files, start = _Files(model, ema, optimiser), 0
    if checkpoints is not None and (found := checkpoints.latest()) is not None:
        for problem in found[1]:
            warnings.warn(f"{problem}; going on from {found[0].name}", stacklevel=2)
        start = files.read(found[0], identity)
    device = next(model.parameters()).device
    for step in range(start + 1, plan.steps + 1):
        model.train()
        draw = torch.Generator().manual_seed(seed_of(seed, 1, step))
        torch.manual_seed(seed_of(seed, 3, step))  # dropout inside the network
        rows = batch_indices(len(x), plan.batch, step, seed)
        level = objective.draw(len(rows), draw)
        x0 = x[rows]
        eps = torch.randn(x0.shape, generator=draw)
        c = cond
        if c is not None:
            c = c[rows].drop(torch.rand(len(rows), generator=draw) < plan.cond_dropout).to(device)
        for group in optimiser.param_groups:
            group["lr"] = plan.rate(step)
        loss, mse, lam = objective(model, x0.to(device), eps.to(device), level, c)
        optimiser.zero_grad(set_to_none=True)
        loss.mean().backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        value = float(loss.detach().mean())
        if not (math.isfinite(value) and math.isfinite(float(norm))):
            raise _diagnosis(step, loss.detach(), lam, model)
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), plan.clip, norm)
        optimiser.step()
        ema.update(step)
        yield TrainState(step, value, float(norm), plan.rate(step), lam, mse.detach().cpu())
        if checkpoints is not None and plan.every and (step % plan.every == 0 or step == plan.steps):
            checkpoints.save(step, lambda folder, step=step: files.write(folder, step, identity))  # type: ignore[misc]
