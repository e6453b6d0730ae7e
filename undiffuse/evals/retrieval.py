"""Whether samples show what their captions say: each caption's own picture among those of others."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from undiffuse.evals.estimate import Estimate, features, share
from undiffuse.evals.features import extract
from undiffuse.seeds import uniform
from undiffuse.types import InputError


def retrieval(
    x: Tensor,
    pictures: Tensor,
    texts: Sequence[str],
    of: Callable[[Tensor], Tensor],
    among: int = 10,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Estimate:
    """The share of samples x (n, *data), made of the captions `texts`, to which in the features `of` the real one of
    the n `pictures` with their caption is nearer than those of among - 1 other captions, drawn for each: 1 / among by
    chance (the R-precision of AttnGAN, Xu et al. 2018, arXiv 1711.10485, with pictures for captions). Pictures that are
    equally near share the hit.

    The features should be none that the model was trained with. InputError for other numbers of captions and pictures
    than of samples, and for fewer different captions than `among`.

    >>> from undiffuse.evals import FEATURES
    >>> x = torch.arange(4.0).reshape(4, 1, 1, 1)
    >>> retrieval(x, x, ["a", "b", "c", "d"], FEATURES["pixels"]("", x), among=4).value
    1.0
    """
    first = {text: i for i, text in reversed(list(enumerate(texts)))}
    if not len(x) == len(pictures) == len(texts):
        raise InputError(f"{len(x)} samples, {len(pictures)} pictures and {len(texts)} captions: give one of each")
    if not 2 <= among <= len(first):
        raise InputError(f"{len(first)} different captions for a choice among {among}: take from 2 to {len(first)}")
    names = {text: k for k, text in enumerate(first)}
    own = torch.tensor([names[text] for text in texts])
    found, known = features(extract(of, x, device=device), extract(of, pictures[list(first.values())], device=device))
    distance = torch.cdist(found, known, compute_mode="donot_use_mm_for_euclid_dist")
    draws = uniform(seed, torch.arange(len(x) * len(known))).reshape(len(x), -1)
    others = draws.scatter(1, own[:, None], 2.0).topk(among - 1, largest=False).indices  # never the own one
    mine, theirs = distance.gather(1, own[:, None]), distance.gather(1, others)
    return share((mine <= theirs).all(1).double() / (1 + (mine == theirs).sum(1)))
