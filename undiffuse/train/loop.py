"""The training loop: a generator of typed states. Everything random is a function of (seed, global index)."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from undiffuse.data import InMemory
from undiffuse.denoise import Headed
from undiffuse.sample import Noise
from undiffuse.seeds import seed_of
from undiffuse.train.augment import Augment, NoAugment, labelled
from undiffuse.train.checkpoint import Checkpoints, is_shard, whole
from undiffuse.train.ema import EMA, Snapshots
from undiffuse.train.feed import Feed, Rows
from undiffuse.train.files import Files
from undiffuse.train.gradient import Gradient, recomputed
from undiffuse.train.objective import Aim, Drawn
from undiffuse.train.optimiser import AdamW, OptimiserKind, Scheduler, advance, check_sharded, made, scheduled
from undiffuse.train.plan import Engine, Plan
from undiffuse.train.processes import Processes, shard
from undiffuse.train.stop import end
from undiffuse.types import InputError


class NonFinite(RuntimeError):
    """The loss or a gradient is NaN or infinite; the message names the step, the level and the parameters."""


@dataclass(frozen=True)
class TrainState:
    """After optimiser step `step`: the batch's estimate of the objective, gradient norm before clipping, learning rate,
    and for each sample of the batch its lam, its plain error (see `Loss`), its number in the data, and its loss."""

    step: int
    loss: float
    grad_norm: float
    lr: float
    lam: Tensor
    error: Tensor
    ids: Tensor
    losses: Tensor


def _diagnosis(step: int, loss: Tensor, lam: Tensor, ids: Tensor, model: nn.Module) -> NonFinite:
    def names(tensors: list[tuple[str, Tensor]]) -> str:
        return ", ".join(n for n, t in tensors if not bool(torch.isfinite(whole(t)).all())) or "none"

    named = list(model.named_parameters())
    rows = (~torch.isfinite(loss)).nonzero().flatten().tolist()
    where = ", ".join(f"{float(lam[i]):.2f}" for i in rows[:4]) or "none (the loss is finite)"
    which = ", ".join(str(int(ids[i])) for i in rows[:4]) or "none"
    gradients = names([(n, p.grad) for n, p in named if p.grad is not None])
    return NonFinite(
        f"training stopped at step {step}: the loss or a gradient is not finite. Levels (lam) with a non-finite loss: "
        f"{where}. Samples: {which}. Non-finite gradients: {_few(gradients)}. Non-finite weights: "
        f"{_few(names([(n, p.detach()) for n, p in named]))}. Lower train.lr or train.clip, or check those samples"
    )


def _few(names: str, most: int = 6) -> str:
    listed = names.split(", ")
    return ", ".join(listed[:most]) + (f" and {len(listed) - most} more" if len(listed) > most else "")


def train(
    model: Headed,
    data: Tensor | Feed,
    objective: Aim,
    plan: Plan,
    *,
    cond: Any = None,
    seed: int = 0,
    checkpoints: Checkpoints | None = None,
    identity: dict[str, Any] | None = None,
    ema: EMA | None = None,
    snapshots: Snapshots | None = None,
    optimiser: OptimiserKind = AdamW(),  # noqa: B008 (it is immutable)
    scheduler: Scheduler | None = None,
    augment: Augment = NoAugment(),  # noqa: B008
    engine: Engine | None = None,
    processes: Processes | None = None,
    also: Mapping[str, Tensor] | None = None,
    asked: Callable[[], int] = lambda: 0,
    started: Callable[[int], None] = lambda step: None,
) -> Iterator[TrainState]:
    """Train in place, yielding a `TrainState` after every step; stop early with `break`.

    `model` is a denoiser for an `Objective`, or a classifier for a `ClassifierObjective`, which takes its labels from
    `cond`. `data` is x (n, *data), with `cond`, a `Cond` or `Given` of n rows or None, or a `Feed`. Give
    `ema=EMA(model)` to keep its average, and `snapshots=Snapshots(folder)` for averages of any length afterwards.
    `optimiser` makes torch's optimiser, and `scheduler` one of torch's schedulers for it instead of the plan's rate, as
    in `lambda o: OneCycleLR(o, ...)`; `augment` changes data and tells the network how.

    With `checkpoints` the run continues from the newest that verifies, bit for bit as if it had not stopped; `identity`
    (JSON-able) must then be the same, and the tensors in `also` are saved and taken up in place with it;
    `started(step)` is called with the step that was taken up, before the next. In several `processes` each takes its
    rows of every batch; levels, noise and dropped conditions are those of one process, while noise is coupled with the
    rows of each process. When `asked()` gives a signal's number the state is saved and Preempted (SIGINT:
    KeyboardInterrupt) raised. Raises NonFinite, Lost where another process is gone, and InputError for impossible
    combinations.

    >>> from undiffuse import Denoiser, EDMPrecond, VP
    >>> from undiffuse.nets import UNet
    >>> from undiffuse.train import Objective
    >>> model = Denoiser(UNet(1, width=16), EDMPrecond())
    >>> states = train(model, torch.randn(8, 1, 8, 8), Objective(VP()), Plan(steps=2, batch=4))
    >>> [state.step for state in states]
    [1, 2]
    """
    objective.check(model)
    engine, batch = engine or Engine(), plan.batch
    own = next(model.parameters()).device
    processes = processes or Processes(device=own)
    if engine.sharding == "fsdp":
        check_sharded(optimiser, plan.precision)
    if batch == "auto":
        raise InputError("train.batch=auto is resolved by `fit`: give `train` a number")
    if batch % processes.world:
        raise InputError(f"train.batch={batch} cannot be shared by {processes.world} processes: give a multiple of it")
    feed: Feed = _in_memory(data, cond, seed) if isinstance(data, Tensor) else data
    if not hasattr(feed, "steps"):
        raise InputError(f"train takes a tensor x (n, ...) or a Feed, got {type(data).__name__}: torch.as_tensor(x)?")
    model.to(processes.device)
    ema = ema or EMA(model)
    if snapshots is not None:
        snapshots.check(ema)
    for average in ema.averages:
        average.to(processes.device)
    with contextlib.ExitStack() as stack:
        if engine.recompute:
            stack.enter_context(recomputed(model))
        if engine.compile and isinstance(model.net, nn.Module):
            model.net.compile()
        gradient = Gradient(model, objective, plan.precision, engine, processes, seed)
        for average in ema.averages if gradient.sharded else ():
            shard(average, processes)
        mover = made(optimiser, model, plan.lr, plan.weight_decay)
        identity = json.loads(json.dumps(identity or {}))
        drawer = objective.draws.start()
        files = Files(model, ema, mover, gradient.scaler, identity, {**(also or {}), **drawer.state()})
        start = files.newest(checkpoints)
        started(start)
        rates = None if scheduler is None else scheduled(scheduler, mover, start)
        reading = feed.steps(start + 1, plan.steps, batch, processes.rank, processes.world)
        stack.callback(getattr(reading, "close", lambda: None))  # a generator may hold worker processes
        draw = _Draws(objective, augment, plan, seed, processes)
        for step, rows in enumerate(reading, start + 1):
            if not model.training:
                model.train()
            drawn = objective.draw(batch, seed, step, drawer)
            given = draw(step, rows, drawn)
            if step == start + 1:
                gradient.probe(*given)
            state, number = _step(step, plan, gradient, given, drawn, rows.ids, mover, asked, rates)
            drawer.learn(drawn.u, state.losses)
            ema.update(step)
            if snapshots is not None and snapshots.due(step, plan.steps):
                snapshots.save(step, ema, processes)
            due = bool(plan.every) and (step % plan.every == 0 or step == plan.steps)
            try:
                yield state
            except GeneratorExit:
                if checkpoints is not None and due:
                    files.save(checkpoints, step, processes)
                raise
            number = number if processes.world > 1 else asked()
            if checkpoints is not None and (due or number):
                files.save(checkpoints, step, processes)
            if number:
                raise end(number)


def _in_memory(x: Tensor, cond: Any, seed: int) -> InMemory:
    """The tensor as a feed; InputError for what cannot be trained on."""
    if not x.is_floating_point() or len(x) == 0:
        raise InputError(
            f"train takes floats in the model's range, got {x.dtype} of shape {tuple(x.shape)}: x / 127.5 - 1?"
        )
    if cond is not None and not hasattr(cond, "drop"):
        raise InputError(f"cond must be a Cond, such as Label(10)(labels), or a Given, got {type(cond).__name__}")
    return InMemory(x, cond, seed)


class _Draws:
    """What a step trains on; noise and dropped conditions are a function of (seed, global index)."""

    def __init__(self, objective: Aim, augment: Augment, plan: Plan, seed: int, processes: Processes) -> None:
        self.objective, self.augment, self.plan = objective, augment, plan
        self.seed, self.processes = seed, processes

    def __call__(self, step: int, rows: Rows, drawn: Drawn) -> tuple[Tensor, Tensor, Drawn, Any, Tensor]:
        """(x0, eps, levels, condition, global index) of this process's rows of a batch with the levels `drawn`; data
        and noise on its device."""
        mine, device = slice(self.processes.rank, None, self.processes.world), self.processes.device
        batch = len(drawn.u)
        index = torch.arange((step - 1) * batch, step * batch)[mine]
        x0, labels = self.augment(rows.x.to(device), seed_of(self.seed, 8), index)
        cond = rows.cond
        eps = Noise(rows.x.shape, seed_of(self.seed, 1), index.tolist(), device=device)()
        eps = self.objective.coupling(x0, eps, cond)
        if cond is not None:
            cond = self.objective.dropped(cond, seed_of(self.seed, 6), index, self.plan.cond_dropout).to(device)
        return x0, eps, drawn[mine], labelled(cond, labels), index


def _step(
    step: int,
    plan: Plan,
    gradient: Gradient,
    given: tuple[Tensor, Tensor, Drawn, Any, Tensor],
    drawn: Drawn,
    ids: Tensor,
    optimiser: torch.optim.Optimizer,
    asked: Callable[[], int],
    rates: LRScheduler | None,
) -> tuple[TrainState, int]:
    """Gradient, check, clip, move: the state after it, and the signal that any process was given."""
    model, scaler = gradient.inner.model, gradient.scaler
    if rates is None:
        for group in optimiser.param_groups:
            group["lr"] = plan.rate(step)
    rate = optimiser.param_groups[0]["lr"]
    mine = gradient(*given)
    signal = torch.full_like(mine.lam, asked())
    columns = [c.double().to(gradient.processes.device) for c in (mine.loss, mine.error, mine.lam, ids, signal)]
    loss, error, lam, rows, signals = gradient.processes.gather(torch.stack(columns, 1)).cpu().T.contiguous()
    scaler.unscale_(optimiser)
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    norm = norm.full_tensor() if is_shard(norm) else norm  # type: ignore[attr-defined]
    value, size = float((drawn.weight * loss).mean()), float(norm)
    overflow = scaler.is_enabled() and math.isfinite(value) and gradient.overflows(math.isfinite(size))
    if not overflow and not (math.isfinite(value) and math.isfinite(size)):
        raise _diagnosis(step, loss, lam, rows, model)
    if not overflow and size + 1e-6 > plan.clip:  # else it would multiply by 1
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), plan.clip, norm)
    scaler.step(optimiser)
    scaler.update()
    if rates is not None:
        advance(rates, step)
    return TrainState(step, value, size, rate, lam, error, rows.long(), loss), int(signals.max())
