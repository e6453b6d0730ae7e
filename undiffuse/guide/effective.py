"""The scale of guidance that samplers really see, to compare kinds of guidance at equal ones."""

from __future__ import annotations

from torch import Tensor

from undiffuse.guide.contrast import inner


def effective_scale(guided: Tensor, cond: Tensor, uncond: Tensor) -> Tensor:
    """The weight of CFG that goes as far along x0_cond - x0_uncond as a guided prediction does, for each sample (b,):
    1 + <x0 - x0_cond, d> / |d|^2 with d = x0_cond - x0_uncond.

    Much of what methods gain is what a larger weight of CFG gains (arXiv 2602.22570): compare them
    where this is the same.

    >>> import torch
    >>> cond, uncond = torch.tensor([[2.0, 1.0]]), torch.tensor([[0.0, 1.0]])
    >>> effective_scale(uncond + 3 * (cond - uncond), cond, uncond).tolist()
    [3.0]
    """
    d = cond - uncond
    return 1 + (inner(guided - cond, d) / inner(d, d).clamp(min=1e-30)).flatten()
