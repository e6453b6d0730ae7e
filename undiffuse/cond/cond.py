"""`Cond`: what a network is told besides x and its time, by mechanism and not by modality."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from undiffuse.seeds import uniform


@dataclass(frozen=True, eq=False)
class Cond:
    """A batch of conditions; each part may be absent. The null condition of every part is zero (tokens: masked out).

    vector (b, d): class, pooled text, image embedding, guidance weight; tokens (b, n, d) with tokens_mask (b, n), True
    where there is a token, which is everywhere unless it is given; spatial (b, c, *size): depth, segmentation, a
    low-resolution image. `augment` (b, a), what augmentation did to x, zero for nothing, is no condition: the null
    condition has it too, or samples without a condition would be augmented ones.
    """

    vector: Tensor | None = None
    tokens: Tensor | None = None
    tokens_mask: Tensor | None = None
    spatial: Tensor | None = None
    augment: Tensor | None = None

    def __post_init__(self) -> None:
        if self.tokens is not None and self.tokens_mask is None:
            everywhere = torch.ones(self.tokens.shape[:2], dtype=torch.bool, device=self.tokens.device)
            object.__setattr__(self, "tokens_mask", everywhere)

    def _map(self, change) -> Cond:  # type: ignore[no-untyped-def]
        parts = {f.name: getattr(self, f.name) for f in fields(self)}
        return Cond(**{k: None if v is None else change(v) for k, v in parts.items()})

    def __len__(self) -> int:
        return next((len(v) for f in fields(self) if (v := getattr(self, f.name)) is not None), 0)

    def null(self) -> Cond:
        """The condition that says nothing, of the same shapes."""
        return replace(self._map(torch.zeros_like), augment=self.augment)

    def drop(self, which: Tensor) -> Cond:
        """The same batch with the rows where `which` (b,) is True replaced by the null condition."""

        def zero(v: Tensor) -> Tensor:
            return v.masked_fill(which.reshape(-1, *[1] * (v.ndim - 1)), 0)

        return replace(self._map(zero), augment=self.augment)

    def dropped(self, seed: int, index: Tensor, p: float) -> Cond:
        """The rows as training sees them: each dropped with probability p, a function of (seed, global index (b,))."""
        return self.drop(uniform(seed, index) < p)

    def flat(self) -> Tensor:
        """(b, any number) in float64: equal rows have equal conditions."""
        parts = [v.flatten(1).double() for f in fields(self) if (v := getattr(self, f.name)) is not None]
        return torch.cat(parts, 1)

    def to(self, device: torch.device | str) -> Cond:
        """The same batch on another device."""
        return self._map(lambda v: v.to(device))

    def __getitem__(self, rows: slice | Tensor) -> Cond:
        return self._map(lambda v: v[rows])

    @staticmethod
    def cat(parts: list[Cond]) -> Cond:
        """Batches one after the other; all must have the same parts."""
        whole = {}
        for f in fields(Cond):
            values = [v for p in parts if (v := getattr(p, f.name)) is not None]
            if values and len(values) != len(parts):
                raise ValueError(f"Cond.cat: {f.name} is present in some batches and absent in others")
            whole[f.name] = torch.cat(values) if values else None
        return Cond(**whole)
