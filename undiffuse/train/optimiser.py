"""Optimisers as settings: AdamW, and Muon for the weights of hidden layers; and torch's schedulers of the rate."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from undiffuse.train.checkpoint import is_shard, whole_like
from undiffuse.train.processes import parts
from undiffuse.types import InputError, require


class OptimiserKind(Protocol):
    """Settings that make torch's optimiser for a module's parameters, at the rate `lr` and with `weight_decay`."""

    def __call__(self, module: nn.Module, lr: float, weight_decay: float) -> torch.optim.Optimizer: ...


def _check_moments(betas: tuple[float, float], eps: float) -> None:
    fine = len(betas) == 2 and all(0 <= b < 1 for b in betas)
    require(fine, "optimiser.betas", betas, "two numbers in [0, 1)")
    require(0 < eps <= 1, "optimiser.eps", eps, "above 0 and at most 1")


@dataclass(frozen=True)
class AdamW:
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019, arXiv 1711.05101), of all parameters.

    `betas` in [0, 1) are the decays of the gradient's first and second moments, `eps` in (0, 1] is added to its root.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def __post_init__(self) -> None:
        _check_moments(self.betas, self.eps)

    def __call__(self, module: nn.Module, lr: float, weight_decay: float) -> torch.optim.Optimizer:
        return torch.optim.AdamW(
            module.parameters(), lr=lr, betas=self.betas, eps=self.eps, weight_decay=weight_decay, fused=True
        )


@dataclass(frozen=True)
class Muon:
    """Momentum made orthogonal for the matrices of hidden layers, AdamW for the rest (Jordan et al. 2024).

    Hidden matrices are the parameters with two or more dimensions in the network's repeated parts (its ModuleLists),
    a convolution's as (out, in k k). The layers that read the data, the time and the condition, the last layer, norms
    and biases are AdamW's, with `betas` and `eps`. A step is lr r U V' where U S V' is the momentum, in `ns_steps`
    Newton-Schulz iterations: with m the larger side, r = 0.2 sqrt(m) gives it the size that AdamW's have, so that they
    share a rate ("match_rms_adamw"; Liu et al. 2025, arXiv 2502.16982); "original" is r = sqrt(max(1, rows / columns)).
    Raises InputError for a module without such matrices and for sharded parameters.
    """

    momentum: float = 0.95
    nesterov: bool = True
    ns_steps: int = 5
    adjust_lr_fn: Literal["match_rms_adamw", "original"] = "match_rms_adamw"
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def __post_init__(self) -> None:
        _check_moments(self.betas, self.eps)
        require(0 <= self.momentum < 1, "optimiser.momentum", self.momentum, "in [0, 1)")
        require(1 <= self.ns_steps < 100, "optimiser.ns_steps", self.ns_steps, "from 1 to 99")
        known = ("match_rms_adamw", "original")
        require(self.adjust_lr_fn in known, "optimiser.adjust_lr_fn", repr(self.adjust_lr_fn), " or ".join(known))

    def __call__(self, module: nn.Module, lr: float, weight_decay: float) -> torch.optim.Optimizer:
        parameters = list(module.parameters())
        if any(is_shard(p) for p in parameters):
            check_sharded(self)
        inside = {p for part in parts(module) for p in part.parameters() if p.ndim >= 2}
        hidden = [p for p in parameters if p in inside]
        if not hidden:
            raise InputError("Muon found no matrices in this network's ModuleLists: use AdamW (optimiser=adamw)")
        return _Muon(hidden, [p for p in parameters if p not in inside], lr, weight_decay, self)


def check_sharded(optimiser: OptimiserKind, precision: str = "float32") -> None:
    """InputError for what cannot train shards of parameters (FSDP)."""
    if isinstance(optimiser, Muon):
        raise InputError(
            "Muon needs whole matrices, and FSDP shards them: use AdamW (optimiser=adamw), or engine.sharding=ddp"
        )
    if precision == "fp16":
        raise InputError("train.precision=fp16 cannot be sharded: use bf16, or engine.sharding=ddp")


def made(kind: OptimiserKind, module: nn.Module, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """The optimiser that `kind` makes; InputError for what makes none."""
    expected = (
        f"optimiser = {kind!r} makes no optimiser: expected AdamW(), Muon(), or a function of (module, lr, "
        "weight_decay) such as lambda module, lr, weight_decay: torch.optim.Adam(module.parameters(), lr)"
    )
    try:
        optimiser = kind(module, lr, weight_decay)
    except TypeError as error:  # most often a class of torch.optim, or an optimiser itself
        raise InputError(f"{expected} ({error})") from error
    if not isinstance(optimiser, torch.optim.Optimizer):
        raise InputError(expected)
    return optimiser


Scheduler = Callable[[torch.optim.Optimizer], LRScheduler]

OPTIMISERS: dict[str, Callable[..., OptimiserKind]] = {"adamw": AdamW, "muon": Muon}


def _matrix(value: Tensor, like: Tensor) -> Tensor:
    """`value` (out, in, *k) as (out, in k), columns in the order in which `like` has them in memory: a view of what is
    laid out as `like` is. Newton-Schulz commutes with any order of the columns."""
    return value.permute(0, *sorted(range(1, like.ndim), key=like.stride, reverse=True)).flatten(1)


class _Muon(torch.optim.Optimizer):
    """torch's Muon over views of the hidden matrices and its AdamW over the others, as one optimiser of two groups.

    Its groups and its state are of the parameters themselves; the two work on views of them.
    """

    def __init__(
        self, hidden: Sequence[Tensor], others: Sequence[Tensor], lr: float, weight_decay: float, use: Muon
    ) -> None:
        self.views = [_matrix(p.detach(), p) for p in hidden]
        self.muon = torch.optim.Muon(
            self.views, lr=lr, weight_decay=weight_decay, momentum=use.momentum, nesterov=use.nesterov,
            ns_steps=use.ns_steps, adjust_lr_fn=use.adjust_lr_fn,
        )  # fmt: skip
        self.adamw = torch.optim.AdamW(
            [{"params": others}], lr=lr, betas=use.betas, eps=use.eps, weight_decay=weight_decay, fused=True
        )
        super().__init__([{**self.muon.param_groups[0], "params": hidden}, {**self.adamw.param_groups[0]}], {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step of both; `closure`, if given, is called for the gradients first."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group, inner in zip(self.param_groups, (self.muon, self.adamw), strict=True):
            inner.param_groups[0].update({k: v for k, v in group.items() if k != "params"})
        for p, view in zip(self.param_groups[0]["params"], self.views, strict=True):
            view.grad = None if p.grad is None else _matrix(p.grad, p)
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            self.muon.state[view] = {"momentum_buffer": _matrix(self.state[p]["momentum_buffer"], p)}
        self.adamw.state = self.state
        self.muon.step()  # type: ignore[no-untyped-call]
        self.adamw.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up a state; momenta are laid out as their parameters are, whatever their layout was."""
        super().load_state_dict(state_dict)
        for p in self.param_groups[0]["params"]:
            for name, value in self.state[p].items():
                self.state[p][name] = whole_like(value, p)


def scheduled(make: Scheduler, optimiser: torch.optim.Optimizer, steps: int = 0) -> LRScheduler:
    """torch's scheduler on a new `optimiser`, as it is after `steps` steps: it takes them again, so rates and momenta
    are those of a run that did not stop, for every scheduler that is a function of the step alone.

    Raises InputError for what is not, `ReduceLROnPlateau`, and for what torch says of it.

    >>> optimiser = AdamW()(nn.Linear(2, 2), 0.1, 0.0)
    >>> scheduled(lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.5), optimiser, 2).get_last_lr()
    [0.025]
    """
    try:
        scheduler = make(optimiser)
    except Exception as error:  # torch raises errors of any kind
        raise InputError(f"scheduler cannot be made for this optimiser: {error}") from error
    if not isinstance(scheduler, LRScheduler) or isinstance(scheduler, ReduceLROnPlateau):
        raise InputError(
            f"scheduler makes {type(scheduler).__name__}: expected a scheduler of torch.optim.lr_scheduler whose "
            "step() needs no measurement, such as OneCycleLR"
        )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")  # before the optimiser's
        for step in range(1, steps + 1):
            advance(scheduler, step)
    return scheduler


def advance(scheduler: LRScheduler, step: int) -> None:
    """Let the scheduler take step 1, 2, ...; InputError where it cannot."""
    try:
        scheduler.step()
    except ValueError as error:  # as OneCycleLR after its last
        raise InputError(
            f"scheduler fails in step {step}; it must last for all of the plan's steps: {error}"
        ) from error
