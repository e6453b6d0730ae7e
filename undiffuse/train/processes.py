"""The processes of a run: one alone, or those that `accelerate launch` or `torchrun` started."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from undiffuse.types import InputError


class Lost(RuntimeError):
    """Another process of the run failed or ended: start the run again, it goes on from what was saved."""


def launched() -> int:
    """The number of processes that a launcher started (WORLD_SIZE); 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@dataclass(frozen=True)
class Processes:
    """This process's number `rank` among `world`, and its device."""

    rank: int = 0
    world: int = 1
    device: torch.device = torch.device("cpu")  # noqa: RUF009 (a device is immutable)

    @staticmethod
    def start(device: str = "auto", patience: timedelta = timedelta(minutes=30)) -> Processes:
        """Join the group that the environment names (RANK, WORLD_SIZE), on the CPU by gloo, else by nccl; or be alone.

        `device` is auto, cpu or cuda; InputError for cuda where there is none. `patience` bounds every wait.
        """
        if device not in ("auto", "cpu", "cuda"):
            raise InputError(f"device must be auto, cpu or cuda, got {device!r}")
        if device == "cuda" and not torch.cuda.is_available():
            raise InputError("engine.device=cuda: PyTorch finds no CUDA device here; use engine.device=cpu or auto")
        if launched() == 1:
            use = "cuda" if device == "cuda" or (device == "auto" and torch.cuda.is_available()) else "cpu"
            return Processes(device=torch.device(use))
        from accelerate import PartialState

        cpu = device == "cpu" or not torch.cuda.is_available()
        try:
            _join("gloo" if cpu else "nccl", patience)
            state = PartialState(cpu=cpu, timeout=patience)
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise Lost(f"the processes of this run cannot reach each other: {reason}") from error
        where = torch.device("cpu") if state.device.type == "cpu" else state.device
        return Processes(state.process_index, state.num_processes, where)

    @property
    def main(self) -> bool:
        """Whether this process writes the files and speaks."""
        return self.rank == 0

    @contextlib.contextmanager
    def talking(self) -> Any:
        """Around what waits for other processes: where one of them is gone, Lost is raised."""
        try:
            yield
        except RuntimeError as error:  # gloo raises nothing more particular
            if not any(word in str(error).lower() for word in ("gloo", "nccl", "connection", "socket")):
                raise
            raise Lost(f"another process of this run ended, or cannot be reached: {str(error).splitlines()[0]}") from (
                error
            )

    def gather(self, rows: Tensor) -> Tensor:
        """The rows (b, ...) of all processes, where process r has rows r, r + world, ... of the whole batch."""
        if self.world == 1:
            return rows
        parts = [torch.empty_like(rows) for _ in range(self.world)]
        with self.talking():
            dist.all_gather(parts, rows.contiguous())
        return torch.stack(parts, 1).flatten(0, 1)

    def least(self, number: int) -> int:
        """The smallest of all processes' numbers."""
        if self.world == 1:
            return number
        value = torch.tensor(number, device=self.device)
        with self.talking():
            dist.all_reduce(value, dist.ReduceOp.MIN)
        return int(value)

    def together(self, work: Callable[[], None]) -> None:
        """Do `work` in the main process while the others wait; if it fails there, everybody fails."""
        error: BaseException | None = None
        if self.main:
            try:
                work()
            except BaseException as raised:
                error = raised
        failed = self.least(0 if error else 1) == 0
        if error is not None:
            raise error
        if failed:
            raise Lost("the main process of this run failed; its message says why")

    def share(self, make: Callable[[], Any]) -> Any:
        """What `make` gives in the main process, in all of them; its failure fails everybody."""
        box: list[Any] = [None]

        def fill() -> None:
            box[0] = make()

        self.together(fill)
        if self.world > 1:
            with self.talking():
                dist.broadcast_object_list(box, 0)
        return box[0]

    def each(self, work: Callable[[], Any]) -> list[Any]:
        """What `work` gives in every process, once all have theirs; if it fails in one, that one raises its error and
        the others Lost. However long the slowest takes, the others hear signals."""
        if self.world == 1:
            return [work()]
        value, error = None, None
        try:
            value = work()
        except Exception as raised:
            if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun ends the others, which may be far from done
                raise
            error = raised
        heard: list[Any] = [None] * self.world
        with self.talking():
            waiting = dist.barrier(async_op=True)
            while not waiting.is_completed():  # rather than in wait(), where no signal is heard
                time.sleep(0.02)
            waiting.wait()
            dist.all_gather_object(heard, (value, None if error is None else str(error) or repr(error)))
        if error is not None:
            raise error
        for number, (_, trouble) in enumerate(heard):
            if trouble is not None:
                raise Lost(f"process {number} failed: {trouble}")
        return [value for value, _ in heard]

    def part(self, n: int) -> range:
        """This process's numbers of 0, ..., n - 1, of which each has a piece."""
        return range(n * self.rank // self.world, n * (self.rank + 1) // self.world)

    def divide(self, n: int, work: Callable[[range], Tensor]) -> Tensor:
        """The rows 0, ..., n - 1 of `work`, of which each process makes its part; all get all of them, on the CPU."""
        part = self.part(n)
        found = self.each(lambda: work(part).cpu() if part else None)
        return torch.cat([rows for rows in found if rows is not None])

    def end(self) -> None:
        """Leave the group, once all is done."""
        if self.world > 1 and dist.is_initialized():
            dist.destroy_process_group()

    def shards(self, sharding: str) -> bool:
        """Whether parameters are shards in this group."""
        return self.world > 1 and sharding == "fsdp"

    def spread(self, module: nn.Module, sharding: str) -> nn.Module:
        """The module for this group: itself, DistributedDataParallel, or sharded in place by FSDP2."""
        if self.world == 1:
            return module
        if self.shards(sharding):
            shard(module, self)
            return module
        return nn.parallel.DistributedDataParallel(module)


def _join(backend: str, patience: timedelta) -> None:
    """Join the group by torchrun's store, in a part of it for each attempt.

    The store outlives restarts, and a process that is started again would find there the address of one that is gone.
    Without torchrun there is no such store, and accelerate joins by itself.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or dist.is_initialized():
        return
    c10d: Any = dist  # which does not list its stores
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = c10d.TCPStore(host, port, is_master=False, timeout=patience)
    mine = c10d.PrefixStore(f"attempt-{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    rank = int(os.environ["RANK"])
    dist.init_process_group(backend, store=mine, rank=rank, world_size=launched(), timeout=patience)


def parts(module: nn.Module) -> list[nn.Module]:
    """The repeated parts of a network, those in its ModuleLists: what is sharded or recomputed as one."""
    lists = [m for m in module.modules() if isinstance(m, nn.ModuleList)]
    return [part for many in lists for part in many if next(part.parameters(), None) is not None]


def shard(module: nn.Module, processes: Processes) -> None:
    """Shard parameters in place over the group (FSDP2): each part by itself, then the rest."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    module.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]  # all that fully_shard takes
    mesh = init_device_mesh(processes.device.type, (processes.world,))
    for part in [*parts(module), module]:
        fully_shard(part, mesh=mesh, reshard_after_forward=True)  # the whole too, or sampling would leave it gathered
