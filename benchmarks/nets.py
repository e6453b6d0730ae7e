"""Speed of the networks beside diffusers', forward and training step, taking turns in one process.

`python benchmarks/nets.py` measures all and writes its section; `--only TEXT` measures and prints what matches.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from common import table, write
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import mse_loss
from torch.utils.flop_counter import FlopCounterMode

from undiffuse import Cond
from undiffuse.config import Config
from undiffuse.nets import DiT, UNet

TOKENS, FEATURES, CLASSES = 16, 384, 10
WIDTH, MULTS, DEPTH = 64, (1, 2, 2), 2
HEADER = [
    "network", "M parameters", "GFLOP/sample", "what", "precision", "mode", "ours, ms", "diffusers, ms", "ratio",
    "at equal FLOPs", "over diffusers, float32, eager",
]  # fmt: skip


@dataclass(frozen=True)
class Case:
    """Two networks of equal channels and depth, each called by x (b, *shape), time (b,) and what it is told."""

    name: str
    shape: tuple[int, ...]
    batch: int
    ours: Callable[[], nn.Module]
    theirs: Callable[[], nn.Module]
    told: Callable[[int, torch.dtype], tuple[Any, dict[str, Any]]]  # the condition, and diffusers' keywords


def unet2d(widths: list[int], depth: int, channels: int = 3) -> nn.Module:
    """UNet2DModel as `benchmarks/training` has it: scale and shift, our groups, attention in the middle alone."""
    from diffusers import UNet2DModel

    return UNet2DModel(
        sample_size=32, in_channels=channels, out_channels=channels, block_out_channels=widths, layers_per_block=depth,
        down_block_types=("DownBlock2D",) * len(widths), up_block_types=("UpBlock2D",) * len(widths),
        attention_head_dim=32, norm_num_groups=widths[0] // 16, attn_norm_num_groups=widths[0] // 16,
        resnet_time_scale_shift="scale_shift",
    )  # fmt: skip


def unet2d_condition() -> nn.Module:
    """UNet2DConditionModel with a transformer after every block of the coarsest level and in the middle."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=32, in_channels=3, out_channels=3, block_out_channels=[WIDTH * m for m in MULTS],
        layers_per_block=DEPTH, down_block_types=("DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"), cross_attention_dim=FEATURES,
        attention_head_dim=4, norm_num_groups=WIDTH // 16, resnet_time_scale_shift="scale_shift",
    )  # fmt: skip


def dit2d() -> nn.Module:
    """DiTTransformer2DModel, of classes."""
    from diffusers import DiTTransformer2DModel

    return DiTTransformer2DModel(
        num_attention_heads=6, attention_head_dim=64, in_channels=4, num_layers=6, sample_size=32, patch_size=2,
        num_embeds_ada_norm=CLASSES,
    )  # fmt: skip


def nothing(b: int, dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
    return None, {}


def tokens(b: int, dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
    words = torch.randn(b, TOKENS, FEATURES, generator=torch.Generator().manual_seed(1))
    return Cond(tokens=words), {"encoder_hidden_states": words.to(dtype)}


def classes(b: int, dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
    labels = torch.arange(b) % CLASSES
    return Cond(vector=nn.functional.one_hot(labels, CLASSES).float()), {"class_labels": labels}


CASES = (
    Case(
        "U-Net", (3, 32, 32), 16, lambda: UNet(3, width=WIDTH, mults=MULTS, depth=DEPTH),
        lambda: unet2d([WIDTH * m for m in MULTS], DEPTH), nothing,
    ),
    Case(
        "U-Net with text", (3, 32, 32), 16,
        lambda: UNet(
            3, width=WIDTH, mults=MULTS, depth=DEPTH, attention=(2,), cross=(2,), transformer=1, tokens=FEATURES
        ),
        unet2d_condition, tokens,
    ),
    Case(
        "DiT", (4, 32, 32), 4, lambda: DiT(4, width=384, depth=6, patch=2, vector=CLASSES), dit2d, classes
    ),
    Case(
        "DiT, gated", (4, 32, 32), 4, lambda: DiT(4, width=384, depth=6, patch=2, vector=CLASSES, gated=True), dit2d,
        classes,
    ),
    Case(
        "default", (3, 32, 32), 16, lambda: Config.resolve().build("net", channels=3, dims=2), lambda: unet2d([64], 1),
        nothing,
    ),
)  # fmt: skip

NOTES = f"""
Medians of calls that take turns in one process; the ratios are medians over the turns, above 1 where ours is faster.
*At equal FLOPs* multiplies by the ratio of operations (`torch.utils.flop_counter`, forward). bf16: weights and data for
the forward pass, autocast for the training step, which is forward, backward and fused AdamW. diffusers {{version}}.

* U-Net: widths {", ".join(str(WIDTH * m) for m in MULTS)}, {DEPTH} residual blocks a level, batch 16 of 32x32x3,
  against `UNet2DModel`, attention in the middle alone. What differs is said under *Training speed*.
* U-Net with text: the same with {TOKENS} tokens of {FEATURES} features, read at the coarsest level and in the middle,
  against `UNet2DConditionModel`, which has a whole transformer block (with a feed-forward network of 4 widths, gated)
  after every residual block there; ours has self- and cross-attention, and one such block in the bottleneck.
* DiT: width 384, 6 blocks of 6 heads, patches of 2, batch 4 of 32x32x4, {CLASSES} classes, against
  `DiTTransformer2DModel`, which embeds time and class in every block anew and does not normalise queries and keys.
  *Gated*: the same with SwiGLU of as many weights, since GELU by tanh, which both have, is slow on CPUs.
* default: the network that the configuration gives (64 channels on patches of 2, one level) against a `UNet2DModel` of
  equal channels and blocks on pixels, batch 16 of 32x32x3.
"""


def prepared(case: Case, precision: str, what: str) -> list[Callable[[Tensor, Tensor], Tensor]]:
    """Ours and theirs as functions of x and time."""
    dtype = torch.bfloat16 if precision == "bf16" and what == "forward" else torch.float32
    torch.manual_seed(0)
    nets = [case.ours().to(dtype), case.theirs().to(dtype)]
    for net in nets:
        net.train(what == "step").requires_grad_(what == "step")
    cond, keywords = case.told(case.batch, dtype)
    return [
        _call(nets[0], lambda net, x, t: net(x, t, cond)),
        _call(nets[1], lambda net, x, t: net(x, t, return_dict=False, **keywords)[0]),
    ]


def _call(net: nn.Module, how: Callable[[Any, Tensor, Tensor], Tensor]) -> Any:
    def call(x: Tensor, time: Tensor) -> Tensor:
        return how(net, x, time)

    call.net = net  # type: ignore[attr-defined]
    return call


def flops(case: Case) -> list[float]:
    """GFLOP a sample of ours and theirs, forward."""
    found = []
    for call in prepared(case, "float32", "forward"):
        x, t = torch.zeros(case.batch, *case.shape), torch.ones(case.batch)
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
            call(x, t)
        found.append(counter.get_total_flops() / case.batch / 1e9)
    return found


def running(call: Any, case: Case, precision: str, what: str) -> Callable[[], object]:
    """One call of it, or one training step."""
    dtype = torch.bfloat16 if precision == "bf16" and what == "forward" else torch.float32
    g = torch.Generator().manual_seed(0)
    x, t = torch.randn(case.batch, *case.shape, generator=g).to(dtype), torch.linspace(1, 3, case.batch).to(dtype)
    if what == "forward":

        def forward() -> object:
            with torch.no_grad():
                return call(x, t)

        return forward
    optimiser = torch.optim.AdamW(call.net.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            answer = call(x, t)
        loss = mse_loss(answer[:, : case.shape[0]].float(), x)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()

    return step


def measure(case: Case, precision: str, what: str, compiled: bool, seconds: float) -> tuple[list[float], float]:
    """Median milliseconds of ours and theirs, and the median over turns of theirs over ours."""
    calls = prepared(case, precision, what)
    if compiled:
        for call in calls:
            call.net.compile()
    runs, times = [running(call, case, precision, what) for call in calls], [list[float](), list[float]()]
    for run in runs:
        run(), run()
    start, turn = time.perf_counter(), 0
    while turn < 5 or time.perf_counter() - start < seconds:
        for i in (0, 1) if turn % 2 else (1, 0):
            begin = time.perf_counter()
            runs[i]()
            times[i].append(1e3 * (time.perf_counter() - begin))
        turn += 1
    torch._dynamo.reset()
    return [statistics.median(t) for t in times], statistics.median(b / a for a, b in zip(*times, strict=True))


def cells(only: str, every: bool) -> Iterator[tuple[Case, str, str, str]]:
    """(case, what, precision, mode) to be measured; training steps compiled, which takes minutes each, with `every`."""
    precisions = ["float32", *(["bf16"] if torch.ops.mkldnn._is_mkldnn_bf16_supported() else [])]
    for case in CASES:
        for what in ("forward", "step"):
            for precision in precisions:
                for mode in ("eager", "compiled") if every or what == "forward" else ("eager",):
                    if only in f"{case.name} {what} {precision} {mode}":
                        yield case, what, precision, mode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="measure only what contains this, and write nothing")
    parser.add_argument("--all", action="store_true", help="training steps compiled, too, which takes an hour")
    parser.add_argument("--seconds", type=float, default=6.0, help="for each pair")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows, base, known = [], dict[tuple[str, str], float](), dict[str, tuple[list[float], list[float]]]()
    for case, what, precision, mode in cells(options.only, options.all):
        if case.name not in known:
            nets = (case.ours(), case.theirs())
            known[case.name] = flops(case), [sum(p.numel() for p in net.parameters()) / 1e6 for net in nets]
        (mine, theirs), millions = known[case.name]
        ms, ratio = measure(case, precision, what, mode == "compiled", options.seconds)
        base.setdefault((case.name, what), ms[1])
        row = [case.name, *(f"{a:.2f} / {b:.2f}" for a, b in (millions, (mine, theirs))), what, precision, mode]
        row += [*(f"{m:.1f}" for m in ms), f"{ratio:.2f}", f"{ratio * mine / theirs:.2f}"]
        row.append(f"{base[case.name, what] / ms[0]:.2f}")
        print("  ".join(row), flush=True)
        rows.append(row)
    text = table(HEADER, rows)
    if options.only:
        print(text)
    else:
        notes = NOTES.strip().replace("{version}", version("diffusers"))
        write("Networks beside diffusers", "make bench-nets", f"{text}\n\n{notes}")


if __name__ == "__main__":
    main()
