"""One step's gradient: micro-batches, reduced precision, several processes, and less memory where it runs out."""

from __future__ import annotations

import contextlib
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from undiffuse.denoise import Headed
from undiffuse.level import Level
from undiffuse.seeds import seed_of
from undiffuse.train.objective import Aim, Drawn, Loss
from undiffuse.train.plan import Engine
from undiffuse.train.processes import Processes, parts
from undiffuse.types import InputError

PRECISION = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SKIPS = 20  # loss scales that overflow in a row before it is called a divergence


class _Losses(nn.Module):
    """The objective as a module, since that is what DistributedDataParallel and FSDP2 take."""

    def __init__(self, model: Headed, objective: Aim, precision: str) -> None:
        super().__init__()
        self.model, self.objective, self.dtype = model, objective, PRECISION[precision]

    def forward(self, x0: Tensor, eps: Tensor, level: Level, cond: Any) -> Loss:
        with torch.autocast(x0.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return self.objective(self.model, x0, eps, level, cond)


def out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on a device or on the CPU, whose allocator has no error of its own."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


@contextlib.contextmanager
def recomputed(model: nn.Module) -> Any:
    """While entered, the network's parts keep no activations for the backward pass and compute them again."""
    changed = parts(model)
    for part in changed:
        part.forward = _again(part.forward)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for part in changed:
            del part.forward


def _again(forward: Any) -> Any:
    return lambda *args: checkpoint(forward, *args, use_reentrant=False)


class Gradient:
    """Calling it leaves the mean gradient over a step's samples, of all processes, in the parameters.

    `micro` is the number of rows of a network call; where memory runs out it is halved and the step is done again,
    which changes the gradient by rounding only (and dropout's draws, which are a micro-batch's own).
    """

    def __init__(
        self, model: Headed, objective: Aim, precision: str, engine: Engine, processes: Processes, seed: int
    ) -> None:
        self.inner = _Losses(model, objective, precision)
        self.module, self.sharding = processes.spread(self.inner, engine.sharding), engine.sharding
        self.processes, self.seed, self.micro = processes, seed, engine.micro
        self.skips = 0
        self.scaler = torch.amp.GradScaler(processes.device.type, enabled=precision == "fp16")

    def overflows(self, finite: bool) -> bool:
        """Whether fp16's loss scale was too large in this step, which is then left out; too often in a row is no
        matter of scale."""
        self.skips = 0 if finite else self.skips + 1
        return 0 < self.skips <= SKIPS

    @property
    def sharded(self) -> bool:
        """Whether parameters are shards (FSDP2)."""
        return self.processes.shards(self.sharding)

    def __call__(self, x0: Tensor, eps: Tensor, drawn: Drawn, cond: Any, index: Tensor) -> Loss:
        """The rows' losses, before the weights of `drawn`, which the gradient has; x0, eps (b, *data), `cond` of b rows
        or None, `index` (b,) in the whole run."""
        return self._fitting(self.module, self.processes.world == 1, x0, eps, drawn, cond, index)

    def probe(self, x0: Tensor, eps: Tensor, drawn: Drawn, cond: Any, index: Tensor) -> None:
        """Before the first step of several processes, agree on a `micro` that fits in all: later, one that runs out
        would leave the others waiting."""
        if self.processes.world == 1 or self.sharded:
            return
        self._fitting(self.inner, True, x0, eps, drawn, cond, index)
        self.clear()
        self.micro = self.processes.least(self.micro)

    def clear(self) -> None:
        """Forget the gradients."""
        for p in self.inner.parameters():
            p.grad = None

    def _fitting(self, module: nn.Module, alone: bool, x0: Tensor, *rest: Any) -> Loss:
        """The rows' losses, in calls that fit in memory; an error where others wait for this process's call."""
        self.micro = min(self.micro or len(x0), len(x0))
        while True:
            try:
                with self.processes.talking():
                    return self._run(module, x0, *rest)
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
                if not alone:
                    raise InputError(
                        f"memory ran out in process {self.processes.rank} with {self.micro} rows a network call: give "
                        f"engine.micro={max(1, self.micro // 2)} or less; the run goes on from its checkpoint"
                    ) from error
                self._halve(error)

    def _halve(self, error: BaseException) -> None:
        self.clear()
        if self.micro == 1:
            raise InputError(
                "memory runs out even with one sample a network call: use a smaller network or samples, "
                "engine.recompute=true, train.precision=bf16, or a device with more memory"
            ) from error
        self.micro = -(-self.micro // 2)
        if self.processes.device.type == "cuda":
            torch.cuda.empty_cache()
        warnings.warn(f"memory ran out: going on with {self.micro} rows a network call", stacklevel=3)

    def _run(self, module: nn.Module, x0: Tensor, eps: Tensor, drawn: Drawn, cond: Any, index: Tensor) -> Loss:
        self.clear()
        done: list[Loss] = []
        for start in range(0, len(x0), self.micro):
            part = slice(start, start + self.micro)
            torch.manual_seed(seed_of(self.seed, 3, int(index[start])))  # dropout inside the network
            some = drawn[part]
            with _synchronised(module, start + self.micro >= len(x0)):
                loss = module(x0[part], eps[part], some.level, None if cond is None else cond[part])
                self.scaler.scale((some.weight.to(loss.loss) * loss.loss).sum() / len(x0)).backward()
            done.append(Loss(loss.loss.detach(), loss.error.detach(), loss.lam))
        return Loss(*(torch.cat(parts) for parts in zip(*done, strict=True)))


def _synchronised(module: nn.Module, now: bool) -> contextlib.AbstractContextManager[None]:
    """Gradients meet those of the other processes in the last micro-batch only."""
    if isinstance(module, DistributedDataParallel):
        return contextlib.nullcontext() if now else module.no_sync()  # type: ignore[no-any-return]
    if hasattr(module, "set_requires_gradient_sync"):  # FSDP2
        module.set_requires_gradient_sync(now)  # type: ignore[operator]
    return contextlib.nullcontext()
