"""The scale of guidance that samplers really see, to compare kinds of guidance at equal ones."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from undiffuse.guide.contrast import asked, inner, prepared
from undiffuse.level import Level
from undiffuse.types import Denoise, Model


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


@dataclass
class Watched:
    """A guidance that measures its `scale` while it guides: the mean over evaluations of the effective scale of all
    samples, <x0 - x0_cond, d> / |d|^2 being taken over the whole batch at each level.

    >>> import torch
    >>> from undiffuse import APG, VP, Label, Mixture, Spectrum, sample
    >>> model = Mixture([Spectrum(torch.full((2,), m), torch.ones(2)) for m in (-1.0, 1.0)], labels=[0, 1])
    >>> watch = Watched(APG(3.0))
    >>> _ = sample(model, (8, 2), VP(), steps=5, cond=Label(2)([1] * 8), guidance=watch)
    >>> 1 < watch.scale < 3
    True
    """

    guide: Any
    scales: list[float] = field(default_factory=list)

    @property
    def scale(self) -> float:
        """The effective scale of the samples so far; 1 before the first."""
        return sum(self.scales) / len(self.scales) if self.scales else 1.0

    def prepared(self, levels: Any, rows: int = 0) -> Watched:
        """The same, with its guidance prepared."""
        return Watched(prepared(self.guide, levels, rows), self.scales)

    def __call__(self, model: Model, cond: Any, /) -> Denoise:
        """The denoiser that is guided and watched; it asks the model for two rows more."""
        bound = self.guide(model, cond)

        def denoise(x: Tensor, level: Level, /) -> Tensor:
            guided: Tensor = bound(x, level)
            with_it, without = asked(model, x, level, [cond, cond.null()])
            d = with_it - without
            size = inner(d, d).sum()
            if size > 0:
                self.scales.append(float(1 + inner(guided - with_it, d).sum() / size))
            return guided

        return denoise
