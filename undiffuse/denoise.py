"""Denoisers, x -> E[x0 | x]: a network with its head, and the exact ones of Gaussians, mixtures and finite data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from undiffuse.level import Level, interpolated, reverse_bounds, reverse_transition
from undiffuse.precond import Precond
from undiffuse.spectrum import Spectrum
from undiffuse.types import InputError


class Headed(nn.Module):
    """A network `net(x, time, cond)` asked through its head: F(c_in x, time), for x (b, *data) at a level."""

    def __init__(self, net: Callable[..., Tensor], head: Precond) -> None:
        super().__init__()
        self.net, self.head = net, head

    def answer(self, x: Tensor, level: Level, cond: Any) -> Tensor:
        """The network's own answer F at x."""
        time, each = self.head.time(level), torch.zeros(x.shape[0], device=x.device)
        # a number is added by the kernel; copied to the device it would be waited for
        time = each + (time.to(each).reshape(-1) if time.ndim else time)
        return self.net((self.head.c_in(level) * x).to(self._dtype(x)), time, cond)

    def _dtype(self, x: Tensor) -> torch.dtype:
        parameter = next(self.parameters(), None)
        return x.dtype if parameter is None else parameter.dtype


class Denoiser(Headed):
    """A network and its head as E[x0 | x].

    `net(x, time, cond)` takes x (b, *data) in float32, time (b,) and the condition, and returns x's shape; with
    `learned_variance` twice the channels, the second half being the log-space fraction of improved DDPM in [-1, 1].
    Coefficients are computed in float64 on the CPU, whatever the network's precision. Raises InputError at alpha = 0
    with a head that does not determine x0 there.

    >>> from undiffuse import Level, V
    >>> model = Denoiser(lambda x, time, cond: torch.zeros_like(x), V())
    >>> model(torch.ones(1, 2), Level(0.8, 0.6))
    tensor([[0.8000, 0.8000]])
    """

    def __init__(self, net: Callable[..., Tensor], head: Precond, learned_variance: bool = False) -> None:
        super().__init__(net, head)
        self.learned_variance = learned_variance

    def answer(self, x: Tensor, level: Level, cond: Any) -> Tensor:
        """The network's own answer F at x."""
        if self.head.needs_alpha and level.alpha.ndim == 0 and level.alpha == 0:
            name = type(self.head).__name__
            raise InputError(
                f"a {name} head cannot start at pure noise (alpha = 0): it does not determine x0 there. "
                "Sample on a schedule that ends at alpha > 0, or train with a v, flow, x0 or edm head"
            )
        return super().answer(x, level, cond)

    def forward(self, x: Tensor, level: Level, cond: Any = None) -> Tensor:
        """E[x0 | x] in the dtype of x."""
        answer = self.answer(x, level, cond)
        if self.learned_variance:
            answer = answer.chunk(2, 1)[0]
        return self._x0(answer, x, level)

    def _x0(self, answer: Tensor, x: Tensor, level: Level) -> Tensor:
        skip, out = self.head.skip_out(level)
        return (skip * x + out * answer.to(x.dtype)).to(x.dtype)

    def reverse(self, x: Tensor, now: Level, then: Level, cond: Any = None) -> tuple[Tensor, Tensor]:
        """(E[x0 | x], variance of x_then given x): log variance is interpolated between beta-tilde and beta by the
        network's second half (Nichol and Dhariwal 2021, equation 15). InputError without `learned_variance`."""
        if not self.learned_variance:
            raise InputError("this network predicts no variance: use DDPM(variance='small') or 'large'")
        mean, v = self.answer(x, now, cond).chunk(2, 1)
        return self._x0(mean, x, now), interpolated(v.to(x.dtype), *reverse_bounds(now, then))


def _rows(c: Tensor) -> Tensor:
    """A level's coefficient as 0-dim or (b, 1), to meet flattened samples."""
    return c if c.ndim == 0 else c.reshape(-1, 1)


class _Exact(nn.Module):
    """Shared by the exact denoisers: `posterior` gives mean and variance of x0; forward and reverse follow from it."""

    log_w: Tensor  # (components,)
    membership: Tensor | None  # (components, classes), one-hot

    def _flat_posterior(self, x: Tensor, alpha: Tensor, sigma: Tensor, log_w: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def _log_likelihoods(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Iterator[Tensor]:
        """log q(x | component) (b, some components) up to a term that all components share, some after the others."""
        raise NotImplementedError

    def _log_weights(self, cond: Any, b: int, log_w: Tensor) -> Tensor:
        """(b, components): log prior weights given the condition; a zero vector is the null condition."""
        log_w = log_w.expand(b, -1)
        if cond is None or cond.vector is None:
            return log_w
        if self.membership is None:
            raise InputError("this exact denoiser has no classes: give `labels` when building it")
        vector = cond.vector.to(self.membership)
        if vector.shape != (b, self.membership.shape[1]):
            raise InputError(
                f"condition vectors of shape {tuple(vector.shape)}: expected ({b}, {self.membership.shape[1]}), "
                "one row a sample, one column a class"
            )
        allowed = vector @ self.membership.T
        return torch.where((vector == 0).all(1, keepdim=True), log_w, log_w + allowed.log())

    def posterior(self, x: Tensor, level: Level, cond: Any = None) -> tuple[Tensor, Tensor]:
        """(E[x0 | x], Var[x0 | x] per element), both of the shape and dtype of x, computed in float64."""
        flat = x.double().reshape(x.shape[0], -1)
        log_w = self._log_weights(cond, x.shape[0], self.log_w)
        mean, var = self._flat_posterior(flat, _rows(level.alpha), _rows(level.sigma), log_w)
        return mean.reshape(x.shape).to(x.dtype), var.reshape(x.shape).to(x.dtype)

    def forward(self, x: Tensor, level: Level, cond: Any = None) -> Tensor:
        """E[x0 | x]."""
        return self.posterior(x, level, cond)[0]

    def reverse(self, x: Tensor, now: Level, then: Level, cond: Any = None) -> tuple[Tensor, Tensor]:
        """(E[x0 | x], exact variance of x_then given x): beta-tilde plus c_x0^2 Var[x0 | x], the
        diagonal of the covariance, hence the whole of it where the elements are independent."""
        x0, var = self.posterior(x, now, cond)
        _, c_x0, std = reverse_transition(now, then)
        return x0, std**2 + c_x0**2 * var

    def classes(self, x: Tensor, level: Level) -> Tensor:
        """log p(c | x) (b, classes) in the dtype of x, computed in float64; -inf for a class without components.

        Its gradient is (alpha / sigma^2) (E[x0 | x, c] - E[x0 | x]), the exact one of classifier guidance (Dhariwal and
        Nichol 2021, arXiv 2105.05233, section 4). Raises InputError without classes.
        """
        if self.membership is None:
            raise InputError("this exact denoiser has no classes: give `labels` when building it")
        flat, start = x.double().reshape(x.shape[0], -1), 0
        parts: list[list[Tensor]] = [[] for _ in self.membership.T]
        for likelihood in self._log_likelihoods(flat, _rows(level.alpha), _rows(level.sigma)):
            which = slice(start, start := start + likelihood.shape[1])
            for part, members in zip(parts, self.membership[which].T.bool(), strict=True):
                if bool(members.any()):  # a sum of nothing would have no gradient
                    part.append((self.log_w[which] + likelihood)[:, members].logsumexp(1))
        none = torch.full_like(flat[:, 0], -math.inf)
        joint = [torch.stack(part, 1).logsumexp(1) if part else none for part in parts]
        return torch.stack(joint, 1).log_softmax(1).to(x.dtype)


def _one_hot(labels: Tensor | Sequence[int] | None, n: int) -> Tensor | None:
    if labels is None:
        return None
    labels = torch.as_tensor(labels).long()
    if labels.shape != (n,) or int(labels.min()) < 0:
        raise InputError(f"labels must be {n} whole numbers >= 0, got shape {tuple(labels.shape)}")
    return nn.functional.one_hot(labels).double()


class Mixture(_Exact):
    """Exact denoiser of a Gaussian mixture; every component is a `Spectrum` (full, diagonal or low-rank covariance).

    `weights` (components,) are prior weights (equal by default); `labels` (components,) make it class-conditional:
    a one-hot `Cond.vector` keeps the components of that class, a zero vector keeps all. Components must agree in
    rank and in having a basis or not. Raises InputError otherwise.
    """

    means: Tensor
    variances: Tensor
    bases: Tensor | None
    rest: Tensor
    log_w: Tensor

    def __init__(
        self,
        components: Sequence[Spectrum],
        weights: Tensor | Sequence[float] | None = None,
        labels: Tensor | Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        if not components or len({(c.variances.shape, c.basis is None, c.mean.shape) for c in components}) != 1:
            raise InputError("a mixture needs components of one dimension and rank, all with a basis or all without")
        n = len(components)
        w = torch.full((n,), 1 / n).double() if weights is None else torch.as_tensor(weights, dtype=torch.float64)
        if w.shape != (n,) or not bool((w > 0).all()):
            raise InputError(f"weights must be {n} numbers > 0, got {w.tolist()}")
        bases = [c.basis.double() for c in components if c.basis is not None]
        self.register_buffer("means", torch.stack([c.mean for c in components]))
        self.register_buffer("variances", torch.stack([c.variances for c in components]))
        self.register_buffer("bases", torch.stack(bases) if bases else None)
        self.register_buffer("rest", torch.tensor([c.rest for c in components], dtype=torch.float64)[:, None])
        self.register_buffer("log_w", (w / w.sum()).log())
        self.register_buffer("membership", _one_hot(labels, n))

    def _components(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean and variance of x0 given x and the component (b, components, d), and log q(x | component)."""
        if x.shape[1] != self.means.shape[1]:
            raise InputError(f"samples of {x.shape[1]} elements for a mixture in {self.means.shape[1]} dimensions")
        a, s = (c if c.ndim == 0 else c[..., None] for c in (alpha, sigma))  # (b, 1, 1) against (b, components, d)
        off = x[:, None] - a * self.means
        coords = off if self.bases is None else torch.einsum("bkd,krd->bkr", off, self.bases)

        def gains(v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            total = a**2 * v + s**2
            safe = torch.where(total > 0, total, 1.0)
            return a * v / safe, v * s**2 / safe, total.clamp(min=1e-300)

        gain, var, total = gains(self.variances)
        log_p = -0.5 * (total.log() + coords**2 / total).sum(-1)
        if self.bases is None:
            mean, variance = self.means + gain * coords, var.expand(coords.shape)
        else:
            rest = x.shape[1] - self.variances.shape[1]
            mean = torch.einsum("bkr,krd->bkd", gain * coords, self.bases)
            variance = torch.einsum("bkr,krd->bkd", var.expand(coords.shape), self.bases**2)
            if rest:
                gain_r, var_r, total_r = gains(self.rest)
                inside = torch.einsum("bkr,krd->bkd", coords, self.bases)
                mean = mean + gain_r * (off - inside)
                variance = variance + var_r * (1 - (self.bases**2).sum(1))
                beyond = (off - inside).square().sum(-1)
                log_p = log_p - 0.5 * (rest * total_r.log() + beyond[..., None] / total_r)[..., 0]
            mean = self.means + mean
        return mean, variance, log_p

    def _log_likelihoods(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Iterator[Tensor]:
        yield self._components(x, alpha, sigma)[2]

    def _flat_posterior(self, x: Tensor, alpha: Tensor, sigma: Tensor, log_w: Tensor) -> tuple[Tensor, Tensor]:
        mean, variance, log_p = self._components(x, alpha, sigma)
        resp = torch.softmax(log_w + log_p, 1)[..., None] if len(self.means) > 1 else torch.ones_like(mean[..., :1])
        x0 = (resp * mean).sum(1)
        return x0, (resp * (variance + (mean - x0[:, None]) ** 2)).sum(1)


class Gaussian(Mixture):
    """Exact (and best linear) denoiser of Gaussian data with this spectrum.

    x0 = mu + alpha Lambda / (alpha^2 Lambda + sigma^2) (x - alpha mu), per direction of the spectrum.

    >>> from undiffuse import Level
    >>> model = Gaussian(Spectrum(torch.zeros(1), torch.ones(1)))
    >>> float(model(torch.ones(1, 1).double(), Level(0.8, 0.6)))
    0.8
    """

    def __init__(self, spectrum: Spectrum) -> None:
        super().__init__([spectrum])


class Dataset(_Exact):
    """Exact denoiser of a finite data set: the ideal denoiser, which can only reproduce its points (n, *data).

    Chunked over the points with a running softmax in float64: 60,000 points of 784 elements stay under 1 GB.
    `labels` (n,) make it class-conditional as in `Mixture`. The variance is exact, too.
    """

    points: Tensor
    log_w: Tensor

    def __init__(self, points: Tensor, labels: Tensor | Sequence[int] | None = None, chunk: int = 4096) -> None:
        super().__init__()
        if points.ndim < 2 or len(points) == 0 or not bool(torch.isfinite(points).all()):
            raise InputError(f"a data set needs finite points (n, *data) with n >= 1, got shape {tuple(points.shape)}")
        self.chunk = chunk
        self.register_buffer("points", points.reshape(len(points), -1))
        self.register_buffer("log_w", torch.zeros(len(points), dtype=torch.float64))
        self.register_buffer("membership", _one_hot(labels, len(points)))

    def _chunks(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Some points after the others with log q(x | point)."""
        if x.shape[1] != self.points.shape[1]:
            raise InputError(f"samples of {x.shape[1]} elements for data of {self.points.shape[1]}")
        s2 = (sigma**2).clamp(min=1e-30)
        for points in torch.split(self.points, self.chunk):
            p = points.double()
            yield p, (alpha * (x @ p.T) - alpha**2 * p.square().sum(1) / 2) / s2

    def _log_likelihoods(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Iterator[Tensor]:
        return (likelihood for _, likelihood in self._chunks(x, alpha, sigma))

    def _flat_posterior(self, x: Tensor, alpha: Tensor, sigma: Tensor, log_w: Tensor) -> tuple[Tensor, Tensor]:
        top = torch.full((len(x), 1), -math.inf, dtype=torch.float64, device=x.device)
        mass, first, second = torch.zeros_like(top), torch.zeros_like(x), torch.zeros_like(x)
        weights = torch.split(log_w, self.chunk, 1)
        for (p, likelihood), weight in zip(self._chunks(x, alpha, sigma), weights, strict=True):
            logit = likelihood + weight
            new = torch.maximum(top, logit.amax(1, keepdim=True))
            old = torch.where(torch.isfinite(top), (top - new).exp(), 0.0)
            r = torch.where(torch.isfinite(logit), (logit - new).exp(), 0.0)
            mass, first = mass * old + r.sum(1, keepdim=True), first * old + r @ p
            second, top = second * old + r @ p.square(), new
        mean = first / mass
        return mean, (second / mass - mean.square()).clamp(min=0)


class Counter:
    """Wraps a model and counts: `calls` (sequential evaluations, the NFE) and `rows` (network rows in all).

    >>> from undiffuse import Level
    >>> model = Counter(Gaussian(Spectrum(torch.zeros(1), torch.ones(1))))
    >>> _ = model(torch.ones(5, 1), Level(0.8, 0.6))
    >>> model.calls, model.rows
    (1, 5)
    """

    def __init__(self, model: Any) -> None:
        self.model, self.calls, self.rows = model, 0, 0

    def _count(self, x: Tensor) -> None:
        self.calls, self.rows = self.calls + 1, self.rows + x.shape[0]

    def __call__(self, x: Tensor, level: Level, cond: Any = None) -> Tensor:
        self._count(x)
        out: Tensor = self.model(x, level, cond)
        return out

    def reverse(self, x: Tensor, now: Level, then: Level, cond: Any = None) -> tuple[Tensor, Tensor]:
        self._count(x)
        out: tuple[Tensor, Tensor] = self.model.reverse(x, now, then, cond)
        return out


class AnalyticStart:
    """Wraps a model so that at pure noise (alpha = 0) x0 is the data's mean, which is exact there, without a call.

    `mean` (*data) is that of all data, so a call with a condition goes to the model. Saves one evaluation on schedules
    that start at alpha = 0; elsewhere nothing changes. Raises InputError for a mean that is not of x's shape.

    >>> from undiffuse import DPMpp2M, Flow, UniformT, trajectory
    >>> count = Counter(Gaussian(Spectrum(torch.full((1,), 0.5), torch.ones(1))))
    >>> model = AnalyticStart(count, torch.tensor([0.5]))
    >>> for state in trajectory(model, torch.ones(4, 1), UniformT()(Flow(), 5), DPMpp2M()):
    ...     pass
    >>> count.calls
    4
    """

    def __init__(self, model: Any, mean: Tensor) -> None:
        self.model, self.mean = model, mean

    def __call__(self, x: Tensor, level: Level, cond: Any = None) -> Tensor:
        if cond is None and level.alpha.ndim == 0 and level.alpha == 0:
            if self.mean.shape != x.shape[1:]:
                raise InputError(f"the mean has shape {tuple(self.mean.shape)}, the data {tuple(x.shape[1:])}")
            return self.mean.to(x).expand(x.shape).clone()
        return self.model(x, level) if cond is None else self.model(x, level, cond)  # type: ignore[no-any-return]


class FixedRows:
    """Wraps a model so that every call has exactly `rows` rows, split and padded as needed.

    Matrix kernels round differently for different batch sizes; with this, a sample is the same tensor bit for bit
    whatever batch it is computed in, on one device with one number of threads. Raises InputError for rows < 1.

    >>> from undiffuse import Level
    >>> model = FixedRows(Gaussian(Spectrum(torch.zeros(1), torch.ones(1))), rows=4)
    >>> model(torch.ones(5, 1), Level(0.8, 0.6)).shape
    torch.Size([5, 1])
    """

    def __init__(self, model: Any, rows: int) -> None:
        if rows < 1:
            raise InputError(f"rows must be >= 1, got {rows}")
        self.model, self.rows = model, rows

    def _parts(self, n: int, *values: Any) -> Iterator[list[Any]]:
        """The arguments `rows` rows at a time, the last part padded with copies of the last row; 0-dim levels stay."""

        def pick(value: Any, rows: Tensor) -> Any:
            if isinstance(value, Level):
                return Level(value.alpha[rows], value.sigma[rows]) if value.alpha.ndim else value
            return None if value is None else value[rows]

        for start in range(0, n, self.rows):
            rows = torch.arange(start, start + self.rows).clamp(max=n - 1)
            yield [pick(value, rows) for value in values]

    def __call__(self, x: Tensor, level: Level, cond: Any = None) -> Tensor:
        return torch.cat([self.model(*part) for part in self._parts(len(x), x, level, cond)])[: len(x)]

    def reverse(self, x: Tensor, now: Level, then: Level, cond: Any = None) -> tuple[Tensor, Tensor]:
        pairs = [self.model.reverse(*part) for part in self._parts(len(x), x, now, then, cond)]
        mean, variance = (torch.cat(half)[: len(x)] for half in zip(*pairs, strict=True))
        return mean, variance
