"""log p(x0) along the probability-flow ODE (Song et al. 2021, arXiv 2011.13456), and dequantisation of bytes."""

from __future__ import annotations

import math
from collections.abc import Sequence
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
from undiffuse.evals.estimate import t_quantile
from undiffuse.level import Level
from undiffuse.seeds import seed_of, uniform
from undiffuse.solvers.butcher import method_of
from undiffuse.types import InputError

Dequantise = Literal["truncated-normal", "uniform", "none"]
_NOISE, _PROBE = 1, 2  # which draw of a seed


class Likelihood(NamedTuple):
    """-log2 p(x0) / d for each sample, `bits` (n,) in float64; for dequantised data an upper bound on it on average.

    Three errors are told apart: `error`, of the mean over samples; `interval`, of Hutchinson's trace alone, from
    `probe_error` (n,), the standard error over the probes of each sample; `integration`, the largest change of the
    samples numbered below `checked` when half the steps are taken, of which the full number leaves a fraction. `unit`
    says whether p is the probability of discrete data or a density, whose bits may be negative; `lam` is where the ODE
    was solved.
    """

    bits: Tensor
    probe_error: Tensor | None
    integration: float | None
    probes: int
    dequantise: str
    lam: tuple[float, float]
    steps: int
    method: str
    unit: str

    @property
    def mean(self) -> float:
        """Over the samples."""
        return float(self.bits.mean())

    @property
    def error(self) -> float | None:
        """The standard error of `mean` over samples, their dequantisation and their probes; None for one sample."""
        return standard_error(self.bits)

    @property
    def interval(self) -> float | None:
        """Half the width of the 95 % interval around `mean` for the mean with exact traces: Student's t times the
        standard error over probes. 0 with exact traces; None with one probe, which shows no spread."""
        if self.probes == 0:
            return 0.0
        if self.probe_error is None:
            return None
        var = self.probe_error**2
        if not bool(var.any()):
            return 0.0
        # Welch and Satterthwaite's degrees of freedom with each squared variance estimated without bias: about
        # n (K - 1) for equal variances, and K - 1 where one sample has all
        dof = float(var.sum() ** 2 / (var**2).sum()) * (self.probes + 1) - 2
        return t_quantile(dof) * float(var.sum().sqrt()) / len(var)

    def summary(self) -> dict[str, Any]:
        """All but the rows, as JSON takes it."""
        kept = {name: value for name, value in self._asdict().items() if name not in ("bits", "probe_error")}
        derived = {"mean": self.mean, "error": self.error, "interval": self.interval, "samples": len(self.bits)}
        return {**derived, **kept, "lam": list(self.lam)}

    @staticmethod
    def cat(parts: Sequence[Likelihood]) -> Likelihood:
        """Those of several sets of samples as one; InputError unless they were computed with the same settings.

        >>> a = Likelihood(torch.zeros(1), None, 1e-6, 0, "none", (-6.0, 7.0), 32, "rk4", "bits/dim of the density")
        >>> Likelihood.cat([a, a._replace(bits=torch.full((3,), 4.0), integration=None)]).mean
        3.0
        """
        check_same(list(parts), ("probes", "dequantise", "lam", "steps", "method", "unit"))
        errors = [part.probe_error for part in parts if part.probe_error is not None]
        checked = [part.integration for part in parts if part.integration is not None]
        return parts[0]._replace(
            bits=torch.cat([part.bits for part in parts]),
            probe_error=torch.cat(errors) if errors else None,
            integration=max(checked, default=None),
        )


class Dequantiser(NamedTuple):
    """Noise that turns discrete data into continuous: x~ = x0 + noise of the density q, which never leaves its bin.

    By Jensen's inequality -log P(x0) <= E [log q(noise) - log p(x~)]. "truncated-normal" is N(0, s^2) within +-half
    (Zheng et al. 2023, arXiv 2305.03935), "uniform" is the uniform there (Theis et al. 2016, arXiv 1511.01844).
    """

    kind: Dequantise
    half: float  # of a bin
    s: float  # sigma / alpha where the ODE starts

    @property
    def inside(self) -> float:
        """Z = 2 Phi(tau) - 1, the share of N(0, s^2) within +-half; tau = half / s."""
        return math.erf(self.half / self.s / math.sqrt(2))

    def __call__(self, u: Tensor) -> Tensor:
        """Noise from draws u uniform in (0, 1)."""
        if self.kind == "uniform":
            return self.half * (2 * u - 1)
        noise: Tensor = self.s * torch.special.ndtri((1 + self.inside * (2 * u - 1)) / 2)
        return noise

    def log_q(self, noise: Tensor) -> Tensor:
        """log q per element. Of the truncated normal, -log q is the entropy log(s Z sqrt(2 pi e)) - tau phi(tau) / Z
        on average; taken at the noise itself it cancels most of what the noise does to log p."""
        if self.kind == "uniform":
            return torch.full_like(noise, -math.log(2 * self.half))
        return -((noise / self.s) ** 2) / 2 - math.log(self.s * self.inside * math.sqrt(2 * math.pi))


def likelihood(
    model: Any,
    x0: Tensor,
    *,
    lam: tuple[float, float] = (-6.0, 7.0),
    steps: int = 40,
    method: str = "dormand-prince",
    cond: Any = None,
    step: float | None = None,
    span: tuple[float, float] = (-1.0, 1.0),
    dequantise: Dequantise | None = None,
    tau: float = 3.0,
    probes: int = 0,
    checked: int = 4,
    seed: int = 0,
    first: int = 0,
    batch: int = 256,
) -> Likelihood:
    """-log2 p(x0) / d of data x0 (n, *data), p being what the probability-flow ODE makes of N(0, sigma^2) at lam[0].

    With x~ = x / alpha: dx~/dlam = D - x~ and d log p(x~)/dlam = d - tr dD/dx~, solved from lam[1] to lam[0] in `steps`
    equal steps of the Runge-Kutta `method`. Keep `lam` within the range that the model was trained on. p is what a
    sampler makes: blurred by e^-lam[1], and from a start that knows nothing of the data's mean, which costs a sample
    about mean * e^lam[0] nats a dimension, of either sign.

    The trace is exact with `probes` = 0, at the cost of one backward pass a dimension; else Hutchinson's estimate
    from so many random vectors of signs, fixed along the path, of one backward pass each.

    Quantised data of spacing `step` from span[0] to span[1], such as 2 / 255 for bytes as [-1, 1], are dequantised:
    "truncated-normal" (the default) starts at sigma / alpha = step / (2 tau), or at lam[1] where that is noisier, with
    the noise of that level truncated to the bin, as the model was trained to see it; tau = 3 costs -log2 Z = 0.004
    bits/dim where bins do not overlap. "uniform" adds U(-step / 2, step / 2) at lam[1]. The bits are then those of the
    discrete data, bounded from above on average.

    All draws depend on (seed, first + k) alone for sample k, and samples with numbers below `checked` are also solved
    with half the steps: parts computed apart `Likelihood.cat` to the same result. The model gets x in the dtype of x0,
    at most `batch` rows at once; put networks in eval mode. If y = k x0 + m was normalised to x0, the density of y has
    log2(k) more bits a dimension; discrete data have the same. Raises InputError for unusable data, settings or
    answers, and for models that cannot be differentiated.

    >>> from undiffuse import Gaussian, Spectrum
    >>> model, x0 = Gaussian(Spectrum(torch.zeros(2), torch.full((2,), 0.25))), torch.full((1, 2), 0.5).double()
    >>> exact = -float(torch.distributions.Normal(0.0, 0.5).log_prob(x0).sum()) / 2 / math.log(2)
    >>> abs(likelihood(model, x0).mean - exact) < 1e-4
    True
    """
    check_data(x0, cond, batch)
    _check_settings(lam, steps, tau, probes, checked)
    method_of(method, None)
    data, d = x0.double(), x0[0].numel()
    kind: Dequantise = dequantise or ("none" if step is None else "truncated-normal")
    if kind not in ("truncated-normal", "uniform", "none") or (kind == "none") != (step is None):
        raise InputError(
            f"dequantise={dequantise!r} with step={step}: use 'truncated-normal' or 'uniform' with the spacing of "
            "quantised data as `step`, and 'none' without `step` for continuous data"
        )
    lo, hi = float(lam[0]), float(lam[1])
    if step is not None:
        data, _ = snapped(data, step, span)
        if kind == "truncated-normal":
            hi = min(hi, math.log(2 * tau / step))
        if not lo < hi:
            raise InputError(f"lam starts at {lo} and steps of {step} end it at {hi:.3g}: start lower, or raise tau")
    dequantiser = None if step is None else Dequantiser(kind, step / 2, math.exp(-hi))
    parts = []
    for start in range(0, len(data), batch):
        rows = slice(start, min(start + batch, len(data)))
        numbers = torch.arange(first + start, first + rows.stop)[:, None] * d + torch.arange(d)
        x = data[rows]
        log_q = x.new_zeros(len(x))
        if dequantiser is not None:
            noise = dequantiser(uniform(seed_of(seed, _NOISE), numbers).reshape(x.shape)).to(x.device)
            x, log_q = x + noise, dequantiser.log_q(noise).flatten(1).sum(1)
        signs = [torch.where(uniform(seed_of(seed, _PROBE, k), numbers) < 0.5, -1.0, 1.0) for k in range(probes)]
        flow = _Flow(model, None if cond is None else cond[rows], x0.dtype, method, (hi, lo))
        vectors = torch.stack(signs).reshape(probes, *x.shape).to(data.device, x0.dtype) if probes else None
        nats = log_q - flow.log_p(x, vectors, steps)  # (probes or 1, n)
        check_finite(nats, first + start, "log-density")
        few, change = min(max(checked - first - start, 0), len(x)), None
        if few:
            fewer = flow._replace(cond=None if cond is None else cond[rows][:few])
            half = log_q[:few] - fewer.log_p(x[:few], None if vectors is None else vectors[:, :few], steps // 2)
            check_finite(half, first + start, "log-density in half the steps")
            change = float(per_dim((half.mean(0) - nats[:, :few].mean(0)).abs().max(), d))
        bits = per_dim(nats, d).cpu()
        spread = bits.std(0) / math.sqrt(probes) if probes > 1 else None
        unit = DENSITY if step is None else DISCRETE
        parts.append(Likelihood(bits.mean(0), spread, change, probes, kind, (lo, hi), steps, method, unit))
    return Likelihood.cat(parts)


def _check_settings(lam: tuple[float, float], steps: int, tau: float, probes: int, checked: int) -> None:
    if not -math.inf < lam[0] < lam[1] < math.inf:
        raise InputError(f"lam must be (noisiest, cleanest), two finite values in rising order, got {tuple(lam)}")
    if not isinstance(steps, int) or steps < 2:
        raise InputError(f"steps must be a whole number >= 2, got {steps}")
    if not 0 < tau < 8:
        raise InputError(f"tau, half a bin in units of the noise, must lie between 0 and 8, got {tau}")
    if not isinstance(probes, int) or probes < 0:
        raise InputError(f"probes must be a whole number >= 0 (0: exact traces), got {probes}")
    if checked < 0:
        raise InputError(f"checked, the number of samples solved twice, must be >= 0, got {checked}")


class _Flow(NamedTuple):
    """The ODE of one batch from lam[0] to lam[1], in VP form, where its right-hand side vanishes at both ends."""

    model: Any
    cond: Any
    dtype: torch.dtype
    method: str
    lam: tuple[float, float]

    def log_p(self, x0: Tensor, probes: Tensor | None, steps: int) -> Tensor:
        """log p(x~ = x0) at lam[0], (probes or 1, n), p being N(0, sigma^2) at lam[1]."""
        a, b, *_ = method_of(self.method, None)
        a = a[: max(j for j, w in enumerate(b) if w) + 1]
        (start, end), n = self.lam, len(x0)
        h, x = (end - start) / steps, Level.at(start).alpha * x0
        gain = x.new_zeros(1 if probes is None else len(probes), n)
        for i in range(steps):
            rates: list[tuple[Tensor, Tensor]] = []
            for row in a:
                inside = sum((w * rate for w, (rate, _) in zip(row, rates, strict=True) if w), torch.zeros_like(x))
                rates.append(self.rates(x + h * inside, start + (i + sum(row)) * h, probes))
            for w, (rate, growth) in zip(b, rates, strict=False):  # a last stage of weight 0 is not evaluated
                x, gain = x + h * w * rate, gain + h * w * growth
        level = Level.at(end)
        z = (x / level.sigma).flatten(1)
        d = z.shape[1]
        return -(z**2).sum(1) / 2 - d * (math.log(2 * math.pi) / 2 - level.lam) - gain

    def rates(self, x: Tensor, lam: float, probes: Tensor | None) -> tuple[Tensor, Tensor]:
        """dx/dlam = alpha (D - alpha x), and d log p(x / alpha)/dlam = d - alpha tr dD/dx for each probe."""
        alpha = Level.at(lam).alpha
        with torch.enable_grad():
            at = x.detach().to(self.dtype).requires_grad_()
            answer = self.model(at, Level.at(lam), self.cond)
            trace = _exact(answer, at) if probes is None else _hutchinson(answer, at, probes)
        return alpha * (answer.detach().double() - alpha * x), x[0].numel() - alpha * trace


def _backward(answer: Tensor, at: Tensor, vector: Tensor) -> Tensor:
    """J^T vector, row by row."""
    out = None
    if answer.requires_grad:
        (out,) = torch.autograd.grad(answer, at, vector, retain_graph=True, allow_unused=True)
    if out is None:
        raise InputError(
            "the model's answer does not follow x in autograd, so the ODE's divergence is unknown: let it run without "
            "detach, no_grad or inference_mode inside"
        )
    return out.double().flatten(1)


def _exact(answer: Tensor, at: Tensor) -> Tensor:
    """tr dD/dx (1, n), a row of the Jacobian at a time."""
    trace = torch.zeros(len(at), dtype=torch.float64, device=at.device)
    for i in range(at[0].numel()):
        unit = torch.zeros_like(answer).reshape(len(at), -1)
        unit[:, i] = 1
        trace = trace + _backward(answer, at, unit.reshape(answer.shape))[:, i]
    return trace[None]


def _hutchinson(answer: Tensor, at: Tensor, probes: Tensor) -> Tensor:
    """v^T (dD/dx) v (probes, n), whose mean over signs v is the trace (Hutchinson 1989)."""
    return torch.stack([(v.double().flatten(1) * _backward(answer, at, v)).sum(1) for v in probes])
