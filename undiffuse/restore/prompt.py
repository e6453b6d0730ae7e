"""Prompt-to-prompt (Hertz et al. 2022, arXiv 2208.01626): a picture changes with its prompt and keeps its layout, since
attention maps are those of the picture before."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from undiffuse.grid import Grid
from undiffuse.level import Level
from undiffuse.nets.attention import CrossAttention
from undiffuse.nets.blocks import Attention
from undiffuse.nets.transformer import JointBlock, Stream
from undiffuse.restore.inversion import invertible, reconstruct
from undiffuse.schedule import Schedule
from undiffuse.solvers import Solver
from undiffuse.types import Denoise, InputError, require


def _projections(net: nn.Module, cross: bool, own: bool) -> Iterator[tuple[Any, int, float]]:
    """The layers that make queries and keys, the axis of their features, and which share of these queries and keys are:
    those of attention to tokens (`cross`), and of self-attention (`own`); of joint attention (MMDiT) both at once."""
    joint = {id(part) for block in net.modules() if isinstance(block, JointBlock) for part in (block.image, block.text)}
    for module in net.modules():
        if isinstance(module, CrossAttention) and cross:
            yield from ((module.q, -1, 1.0), (module.kv, -1, 1 / 2))
        elif isinstance(module, Attention) and own:
            yield module.qkv, 1, 2 / 3
        elif isinstance(module, Stream) and (cross if id(module) in joint else own):
            yield module.qkv, -1, 2 / 3
        elif id(module) in joint and cross:
            yield module.kv, -1, 1 / 2


def _of_source(pairs: int, axis: int, share: float, layer: nn.Module, args: Any, out: Tensor) -> Tensor:
    """A layer's output in which the targets have the first features, a share of all, of their sources."""
    out = out.clone()
    features = out.movedim(axis, -1)[..., : round(share * out.shape[axis])]
    batches = torch.unflatten(features, 0, (-1, 2, pairs))
    batches[:, 1] = batches[:, 0]
    return out


@contextmanager
def injected(net: nn.Module, pairs: int, cross: bool = True, own: bool = True) -> Iterator[None]:
    """Within it, attention maps of targets are those of their sources, with the targets' values: to tokens (`cross`),
    and of self-attention (`own`).

    Rows of every call are one or several batches [sources, targets] of 2 `pairs` rows, as guidance asks. The network
    is not changed: hooks on its projections are taken off at the end, also after an error.
    """
    handles = []
    try:
        for layer, axis, share in _projections(net, cross, own):
            handles.append(layer.register_forward_hook(partial(_of_source, pairs, axis, share)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def check_shares(cross: float, own: float) -> None:
    """InputError unless both are shares of the steps in [0, 1]."""
    for name, share in (("cross", cross), ("own", own)):
        require(0 <= share <= 1, name, share, "a share of the steps from 0 to 1")


def check_attention(net: nn.Module) -> None:
    """InputError for a network without attention, whose maps could be kept."""
    if not any(True for _ in _projections(net, True, True)):
        raise InputError(
            "prompt-to-prompt keeps attention maps, and this network has no attention: use inversion alone"
        )


def paired(
    denoise: Denoise, net: nn.Module, pairs: int, levels: Sequence[Level], cross: float = 0.8, own: float = 0.4
) -> Denoise:
    """A denoiser of rows [sources, targets] (2 `pairs`), bound to their conditions in this order, in which targets have
    the attention maps of their sources for these shares in [0, 1] of the steps between `levels`, from the noisiest on.

    `net` is the network inside. More `cross` keeps the layout of what words mean, more `own` that of the whole
    picture. InputError for a network without attention, and for shares out of range.
    """
    check_shares(cross, own)
    check_attention(net)
    lams = [float(level.lam) for level in levels[:-1]]
    until = [len(lams) if share == 1 else round(share * len(lams)) for share in (cross, own)]
    ends = [-torch.inf if n == 0 else lams[n - 1] for n in until]

    def denoised(x: Tensor, level: Level, /) -> Tensor:
        now = float(level.lam)
        with injected(net, pairs, *(n > 0 and now <= end + 1e-9 for n, end in zip(until, ends, strict=True))):
            return denoise(x, level)

    return denoised


def check_aligned(cond: Any) -> None:
    """InputError unless the encoded condition of rows [sources, targets] has as many tokens for each pair: attention
    maps are taken over by position."""
    if cond is None or cond.tokens_mask is None:
        return
    source, target = cond.tokens_mask.chunk(2)
    if not torch.equal(source, target):
        k = int((source != target).any(1).nonzero()[0])
        raise InputError(
            f"prompt-to-prompt needs prompts of the same number of tokens, got {int(source[k].sum())} and "
            f"{int(target[k].sum())}: exchange words one for one, or use inversion without attention maps"
        )


def prompt_to_prompt(
    denoise: Denoise,
    net: nn.Module,
    noise: Tensor,
    schedule: Schedule,
    *,
    cross: float = 0.8,
    own: float = 0.4,
    strength: float = 1.0,
    steps: int = 50,
    solver: Solver | None = None,
    grid: Grid | None = None,
) -> tuple[Tensor, Tensor]:
    """Sources and targets (b, *data) sampled from the same noise, such as `invert` gives of pictures: the targets with
    their own condition and the sources' attention maps, as `paired` says.

    `denoise` has the conditions of rows [sources, targets] bound, and `net` is the network inside. The levels are those
    of `reconstruct`.
    """
    levels = invertible(strength, schedule, steps, grid)
    pairs = paired(denoise, net, len(noise), levels, cross, own)
    found = reconstruct(
        pairs, torch.cat([noise, noise]), schedule, strength=strength, steps=steps, solver=solver, grid=grid
    )
    source, target = found.chunk(2)
    return source, target
