"""The variational bound on log p(x0), term by term (Ho et al. 2020, arXiv 2006.11239; Kingma et al. 2021, VDM)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from undiffuse.evals.bits import (
    DENSITY,
    DISCRETE,
    check_data,
    check_finite,
    check_same,
    per_dim,
    snapped,
    standard_error,
)
from undiffuse.grid import check_levels
from undiffuse.level import Level, reconstruction, reverse_bounds, reverse_divergence, reverse_transition
from undiffuse.sample import Noise
from undiffuse.types import InputError

Variance = Literal["small", "large", "learned"]


class Term(NamedTuple):
    """The mean of one term of the bound in bits per dimension, with the lam it leads from and to.

    None stands for an infinite lam: the prior leads from pure noise, the reconstruction to clean data.
    """

    lam_now: float | None
    lam_then: float | None
    bits: float


class Bound(NamedTuple):
    """An upper bound on -log2 p(x0) / d for each sample, `bits` (n,) in float64, and the means of its terms.

    `terms` are the prior, one a step, and the reconstruction; they sum to `mean`. `unit` says whether p is the
    probability of discrete data or a density, whose bits may be negative.
    """

    bits: Tensor
    terms: tuple[Term, ...]
    variance: str
    unit: str

    @property
    def mean(self) -> float:
        """Over the samples."""
        return float(self.bits.mean())

    @property
    def error(self) -> float | None:
        """The standard error of `mean` over samples and their noise; None for one sample."""
        return standard_error(self.bits)

    def summary(self) -> dict[str, Any]:
        """All but the rows, as JSON takes it."""
        terms = [term._asdict() for term in self.terms]
        return {
            "mean": self.mean,
            "error": self.error,
            "samples": len(self.bits),
            "unit": self.unit,
            "variance": self.variance,
            "terms": terms,
        }

    @staticmethod
    def cat(parts: Sequence[Bound]) -> Bound:
        """The bound of several sets of samples as one; InputError unless levels, variance and unit are the same.

        >>> a = Bound(torch.zeros(1), (Term(None, 0.0, 0.0),), "small", "bits/dim of the density")
        >>> b = a._replace(bits=torch.full((3,), 4.0), terms=(Term(None, 0.0, 4.0),))
        >>> Bound.cat([a, b]).terms
        (Term(lam_now=None, lam_then=0.0, bits=3.0),)
        """
        check_same(list(parts), ("variance", "unit", "_lams"))
        weights = torch.tensor([len(part.bits) for part in parts], dtype=torch.float64)
        values = torch.tensor([[term.bits for term in part.terms] for part in parts], dtype=torch.float64)
        means = (weights @ values / weights.sum()).tolist()
        terms = (term._replace(bits=bits) for term, bits in zip(parts[0].terms, means, strict=True))
        return parts[0]._replace(bits=torch.cat([part.bits for part in parts]), terms=tuple(terms))

    @property
    def _lams(self) -> tuple[tuple[float | None, float | None], ...]:
        return tuple(term[:2] for term in self.terms)


def falling(levels: Sequence[Level]) -> tuple[Level, ...]:
    """The levels, noisiest first, without clean data at the end; InputError where they rise or differ by sample."""
    checked, rises = check_levels(levels)
    if any(rises):
        raise InputError(f"the bound needs levels of falling noise; step {rises.index(True)} rises: use another grid")
    if any(level.alpha.numel() > 1 for level in checked):
        raise InputError("the bound needs one level for all samples; these have one a sample")
    used = checked[:-1] if checked[-1].is_clean else checked
    if bool(used[-1].alpha == 0):
        raise InputError("the bound needs a level with alpha > 0 and sigma > 0 to reconstruct from: take more steps")
    return used


def _log_sum(values: Tensor, z: Tensor, s: Tensor) -> Tensor:
    """log sum_v exp(-(z - v)^2 / (2 s^2)) per element, one value at a time: 256 copies of a picture are too many."""
    total = torch.full_like(z, -math.inf)
    for v in values:
        total = torch.logaddexp(total, -((z - v) ** 2) / (2 * s**2))
    return total


def decode(values: Tensor, z: Tensor, s: Tensor) -> Tensor:
    """log p(v | z) (values, *z) of each allowed value: softmax over v of -(z - v)^2 / (2 s^2), VDM's decoder.

    z = x / alpha and s = sigma / alpha at the last level.

    >>> bool(decode(torch.linspace(-1, 1, 17), torch.zeros(3), torch.tensor(0.1)).exp().sum(0).allclose(torch.ones(3)))
    True
    """
    v = values.reshape(-1, *[1] * z.ndim)
    return -((z - v) ** 2) / (2 * s**2) - _log_sum(values, z, s)


def bound(
    model: Any,
    x0: Tensor,
    levels: Sequence[Level],
    *,
    cond: Any = None,
    variance: Variance | Tensor | None = None,
    step: float | None = None,
    span: tuple[float, float] = (-1.0, 1.0),
    seed: int = 0,
    first: int = 0,
    batch: int = 256,
) -> Bound:
    """The variational bound in bits per dimension of data x0 (n, *data) for the reverse chain on `levels`.

    -log p(x0) <= KL(q(x_T|x0) || N(0, sigma_T^2)) + sum of KL(q(x_then|x_now, x0) || p(x_then|x_now)) - log p(x0|x_N),
    where p(x_then|x_now) = N(c_x x_now + c_x0 D(x_now), variance) as in `DDPM`: "small" is beta-tilde, whose terms are
    (1/2) (snr_then - snr_now) |x0 - D|^2; "large" is beta; "learned" asks `model.reverse`, the default for networks
    that predict it; a tensor (steps,) of mean squared errors v of D, measured by `errors` on other data, makes it
    beta-tilde + c_x0^2 v, the best one per level (Bao et al. 2022, arXiv 2201.06503). A clean last level is left out:
    x_N is at the one before. Continuous data are decoded by N(D(x_N), sigma^2 / alpha^2). Quantised data of spacing
    `step` from span[0] to span[1], such as 2 / 255 for bytes as [-1, 1], are decoded by a softmax over their values,
    and the bits are those of the discrete data.

    One noise draw a term and sample, which depends on (seed, first + k) alone for sample k: parts computed apart
    `Bound.cat` to the same result. The model gets x in the dtype of x0, at most `batch` rows at once; put networks in
    eval mode. If y = k x0 + m was normalised to x0, the density of y has log2(k) more bits a dimension; discrete data
    have the same. Raises InputError for unusable data, levels or answers.

    >>> from undiffuse import Gaussian, Spectrum, UniformLam, VP
    >>> model = Gaussian(Spectrum(torch.zeros(2), torch.ones(2)))
    >>> x0 = torch.randn(4, 2)
    >>> result = bound(model, x0, UniformLam()(VP(), 10))
    >>> result.bits.shape, len(result.terms), result.unit
    (torch.Size([4]), 11, 'bits/dim of the density')
    """
    check_data(x0, cond, batch)
    used, known, kind = falling(levels), None, "analytic"
    if isinstance(variance, Tensor):
        known = variance.double()
        if known.shape != (len(used) - 1,) or not bool((torch.isfinite(known) & (known >= 0)).all()):
            raise InputError(
                f"variance as a tensor needs {len(used) - 1} errors >= 0, one a step; got {known.tolist()}"
            )
    elif variance not in (None, "small", "large", "learned"):
        raise InputError(f"variance must be 'small', 'large', 'learned' or a tensor, got {variance!r}")
    else:
        kind = variance or ("learned" if getattr(model, "learned_variance", False) else "small")
    if kind == "learned" and not hasattr(model, "reverse"):
        raise InputError("variance='learned' asks the model's `reverse`, which this one lacks: use 'small' or 'large'")
    dtype, data = x0.dtype, x0.double()
    data, values = (data, None) if step is None else snapped(data, step, span)
    parts = []
    with torch.no_grad():
        for start in range(0, len(data), batch):
            rows = slice(start, min(start + batch, len(data)))
            noise = Noise(data[rows].shape, seed, range(first + start, first + rows.stop), torch.float64, data.device)
            chain = _Chain(model, None if cond is None else cond[rows], kind, dtype, known)
            nats = chain.terms(data[rows], used, values, noise)
            check_finite(nats, first + start, "bound")
            bits = per_dim(nats, data[0].numel()).cpu()
            lams = [None, *(float(level.lam) if level.alpha > 0 else None for level in used), None]
            terms = (Term(*ends, value) for ends, value in zip(pairwise(lams), bits.mean(1).tolist(), strict=True))
            parts.append(Bound(bits.sum(0), tuple(terms), kind, DENSITY if values is None else DISCRETE))
    return Bound.cat(parts)


@torch.no_grad()
def errors(
    model: Any,
    x0: Tensor,
    levels: Sequence[Level],
    *,
    cond: Any = None,
    seed: int = 0,
    first: int = 0,
    batch: int = 256,
) -> Tensor:
    """The squared error of D per element of each sample, (n, steps), at the level from which each step of the chain
    starts: its mean over samples is the `variance` of `bound`, if these are not the samples to be bounded.

    Arguments and errors are as those of `bound`, and so is the noise.

    >>> from undiffuse import Gaussian, Spectrum, UniformLam, VP
    >>> model, x0 = Gaussian(Spectrum(torch.full((2,), 0.5), torch.zeros(2))), torch.full((3, 2), 0.5)
    >>> errors(model, x0, UniformLam()(VP(), 3)).tolist()
    [[0.0, 0.0], [0.0, 0.0], [0.0, 0.0]]
    """
    check_data(x0, cond, batch)
    used, data, out = falling(levels), x0.double(), []
    for start in range(0, len(data), batch):
        rows = slice(start, min(start + batch, len(data)))
        noise = Noise(data[rows].shape, seed, range(first + start, first + rows.stop), torch.float64, data.device)
        chain = _Chain(model, None if cond is None else cond[rows], "small", x0.dtype)
        parts = [(data[rows] - chain.predict(now.diffuse(data[rows], noise()), now)) ** 2 for now in used[:-1]]
        out.append(torch.stack([part.flatten(1).mean(1) for part in parts], 1).cpu())
        check_finite(out[-1].T, first + start, "error")
    return torch.cat(out)


class _Chain(NamedTuple):
    """The reverse chain of one batch: the model, its condition, the kind of variance, and the model's dtype."""

    model: Any
    cond: Any
    variance: str
    dtype: torch.dtype
    known: Tensor | None = None

    def terms(self, x0: Tensor, levels: tuple[Level, ...], values: Tensor | None, noise: Noise) -> Tensor:
        """All terms in nats (terms, n)."""
        start, last = levels[0], levels[-1]
        nats = [(0.5 * (start.alpha / start.sigma * x0) ** 2).flatten(1).sum(1)]
        for i, (now, then) in enumerate(pairwise(levels)):
            nats.append(self.divergence(x0, now.diffuse(x0, noise()), now, then, i).flatten(1).sum(1))
        eps, s = noise(), last.sigma / last.alpha
        if values is not None:
            minus_log_p = eps**2 / 2 + _log_sum(values, x0 + s * eps, s)
        else:
            minus_log_p = reconstruction(last, (x0 - self.predict(last.diffuse(x0, eps), last)) ** 2)
        return torch.stack([*nats, minus_log_p.flatten(1).sum(1)])

    def predict(self, x: Tensor, level: Level) -> Tensor:
        """D(x) in float64."""
        answer: Tensor = self.model(x.to(self.dtype), level, self.cond)
        return answer.double()

    def divergence(self, x0: Tensor, x: Tensor, now: Level, then: Level, i: int) -> Tensor:
        """KL(q(x_then | x, x0) || p(x_then | x)) per element, both Gaussian with independent elements."""
        if self.variance == "learned":
            mean, var = (part.double() for part in self.model.reverse(x.to(self.dtype), now, then, self.cond))
        else:
            mean, var = self.predict(x, now), reverse_bounds(now, then)[self.variance == "large"]
            if self.known is not None:
                var = var + reverse_transition(now, then)[1] ** 2 * self.known[i].to(var.device)
        return reverse_divergence(now, then, (x0 - mean) ** 2, var)
