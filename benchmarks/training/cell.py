"""One measurement in a process of its own: `python cell.py '{"cell": {...}, ...}'` prints a line of JSON."""

from __future__ import annotations

import copy
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]
ROOT = HERE.parents[1] / "runs" / "bench-training"
os.environ.setdefault("HF_HOME", str(ROOT / "hub"))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch  # noqa: E402
from loops import LIBRARIES, Cell, Loop, images, our_net, our_states  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402
from torch.nn.functional import mse_loss  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

WARM = 3


def size(loop: Loop, cell: Cell) -> dict[str, float]:
    """Parameters, and the floating-point operations of matrix products and convolutions, forward and backward."""
    x, t = torch.randn(2, *cell.shape), torch.tensor([3.0, 5.0])
    net = copy.deepcopy(loop.net)
    for module in net.modules():
        if hasattr(module, "flash"):  # lucidrains' attention chooses its kernel itself, and the counter sees none
            module.flash = False
    call = net if not hasattr(net, "config") else lambda x, t: net(x, t).sample
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        call(x, t).sum().backward()
    count = sum(p.numel() for p in loop.net.parameters())
    return {"parameters": count, "flops": counter.get_total_flops() / len(x)}


def speed(loop: Loop, cell: Cell, seconds: float) -> dict[str, float]:
    """Steps and seconds of about `seconds`, at least two steps, after a warm-up of two steps and a second or more."""
    loop.advance(1)
    start = time.perf_counter()
    loop.advance(1)
    step = time.perf_counter() - start
    loop.advance(round(min(1.0, seconds / 4) / step))
    steps = max(2, round(seconds / step))
    start = time.perf_counter()
    loop.advance(steps)
    return {"steps": steps, "seconds": time.perf_counter() - start, "batch": cell.batch}


class Bare:
    """The shortest step: forward, backward, fused AdamW and the average of the weights, on one fixed batch."""

    def __init__(self, net: nn.Module, cell: Cell) -> None:
        self.net, self.cell, self.average = net, cell, copy.deepcopy(net).requires_grad_(False)
        self.optimiser = torch.optim.AdamW(net.parameters(), lr=1e-4, fused=True)
        self.x, self.time = images(cell)[: cell.batch], torch.linspace(-3, 3, cell.batch)
        self.target = torch.randn(self.x.shape)

    def __call__(self) -> Tensor:
        with self.cell.autocast():
            answer = self.net(self.x, self.time)
        loss = mse_loss(answer.float(), self.target)
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        self.optimiser.step()
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.parameters()), list(self.net.parameters()), 0.01)
        return loss.detach()


def overhead(cell: Cell, seconds: float) -> dict[str, float]:
    """Median milliseconds of a step of `train` and of the bare one, taking turns, and the difference in percent."""
    from undiffuse import Denoiser, EDMPrecond

    model = Denoiser(our_net(cell), EDMPrecond())
    states, bare = our_states(model, cell), Bare(our_net(cell), cell)
    runs: list[Any] = [lambda: next(states), bare]
    times: list[list[float]] = [[], []]
    start, pairs = time.perf_counter(), 0
    while pairs < WARM + 12 or time.perf_counter() - start < seconds:
        for i in (0, 1) if pairs % 2 else (1, 0):
            begin = time.perf_counter()
            runs[i]()
            times[i].append(time.perf_counter() - begin)
        pairs += 1
    whole, least = (t[WARM:] for t in times)
    share = statistics.median((a - b) / a for a, b in zip(whole, least, strict=True))
    found = {"train_ms": statistics.median(whole) * 1e3, "bare_ms": statistics.median(least) * 1e3}
    return {**found, "percent": 100 * share, "pairs": len(whole)}


def main() -> None:
    task = json.loads(sys.argv[1])
    torch.set_num_threads(task["threads"])
    torch.manual_seed(0)
    cell = Cell(**task["cell"])
    ROOT.mkdir(parents=True, exist_ok=True)
    if task["kind"] == "overhead":
        found = overhead(cell, task["seconds"])
    else:
        loop = LIBRARIES[cell.library](cell, ROOT)
        found = {**size(loop, cell), **speed(loop, cell, task["seconds"])}
    print("\n" + json.dumps(found), flush=True)
    os._exit(0)  # a loader's processes and the bars of unfinished loops have nothing to say


if __name__ == "__main__":
    main()
