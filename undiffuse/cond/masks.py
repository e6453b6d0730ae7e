"""Random masks of what is known of a picture, for training networks that fill in the rest."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from undiffuse.seeds import seed_of, uniform

_STROKES = 6
KINDS = {"box": 0.35, "strokes": 0.35, "outside": 0.15, "everything": 0.15}


def random_known(seed: int, index: Tensor, sides: Sequence[int]) -> Tensor:
    """(b, 1, *sides): 1 where a picture is known and 0 where it is hidden, functions of (seed, global index (b,)).

    Hidden are, with the probabilities of `KINDS`, a box, of sides that are uniform from a quarter of the picture's to
    all of it, anywhere inside; free strokes, 1 to 6 straight pieces of a broken line through random points, with a
    width that is uniform from a tenth to three tenths of the picture; all but such a box; or everything.

    >>> random_known(0, torch.arange(2), (8, 8)).shape
    torch.Size([2, 1, 8, 8])
    """
    b, dims, index = len(index), len(sides), index.long().cpu()

    def draws(stream: int, n: int) -> Tensor:
        return uniform(seed_of(seed, stream), index[:, None] * n + torch.arange(n)).float()

    axes = [(torch.arange(n) + 0.5) / n for n in sides]
    pixels = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(1, -1, dims)
    extent = 0.25 + 0.75 * draws(0, dims)[:, None]
    low = (1 - extent) * draws(1, dims)[:, None]
    box = ((pixels >= low) & (pixels <= low + extent)).all(-1)
    at = draws(2, (_STROKES + 1) * dims).reshape(b, _STROKES + 1, dims)
    pieces, width = 1 + (_STROKES * draws(3, 1)).long(), 0.1 + 0.2 * draws(4, 1)
    near = _distances(pixels, at[:, :-1], at[:, 1:])  # (b, pieces, pixels)
    drawn = torch.arange(_STROKES)[None, :, None] < pieces[..., None]
    strokes = ((near <= width[..., None] / 2) & drawn).any(1)
    every = {"box": box, "strokes": strokes, "outside": ~box, "everything": torch.ones_like(box)}
    kind = torch.bucketize(draws(5, 1)[:, 0], torch.tensor(list(KINDS.values())).cumsum(0)[:-1])
    hidden = torch.stack([every[name] for name in KINDS], 1)[torch.arange(b), kind]
    return (~hidden).float().reshape(b, 1, *sides)


def _distances(points: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """(b, pieces, points): how far points (1, points, dims) are from line pieces (b, pieces, dims)."""
    along = (end - start)[:, :, None]
    off = points[:, None] - start[:, :, None]
    share = ((off * along).sum(-1) / along.square().sum(-1).clamp(min=1e-12)).clamp(0, 1)
    return (off - share[..., None] * along).square().sum(-1).sqrt()
