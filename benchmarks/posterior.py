"""Coverage of credible sets: does a restorer sample the posterior? On priors whose posteriors are known.

`python benchmarks/posterior.py` (about 5 minutes on one core) writes its section. Problems (x0, y) are drawn from the
prior and the operator; for a calibrated method the truth is one more draw of the posterior, so among K samples its rank
is uniform in whatever is ranked (simulation-based calibration, Talts et al. 2018, arXiv 1804.06788).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from common import table, write
from torch import Tensor

from undiffuse import DDIM, DDPM, VP, DPMpp2M, Level, Mixture, Spectrum, UniformLam, trajectory
from undiffuse.restore import DAPS, DPS, MMPS, TMPD, Blur, DiffPIR, Mask, PiGDM, Problem, simulate, steer

D, STD, STEPS = 8, 0.2, 50
PROBLEMS, K = 2000, 9  # coverage of 90 % then has the standard error 0.7 points, and 9 of 10 ranks are 90 %
GROUPS, PARTICLES = 400, 64  # 1.5 points
LEVELS = UniformLam()(VP(), STEPS)


class Posterior(NamedTuple):
    """The posterior of a Gaussian mixture seen through a matrix: a mixture, of covariances that y does not move."""

    log_w: Tensor  # (b, k)
    means: Tensor  # (b, k, d)
    roots: Tensor  # (k, d, d), lower triangular

    @staticmethod
    def of(means: Tensor, covs: Tensor, log_w: Tensor, matrix: Tensor, noise: Tensor, seen: Tensor) -> Posterior:
        """Given seen (b, m) = matrix (m, d) x0 + noise of the variances (m,)."""
        spread = matrix @ covs @ matrix.mT + noise.diag()
        gain = covs @ matrix.mT @ torch.linalg.inv(spread)
        off = seen[:, None] - means @ matrix.mT
        moved = means + torch.einsum("kdm,bkm->bkd", gain, off)
        log_p = torch.distributions.MultivariateNormal(torch.zeros(len(matrix)).double(), spread).log_prob(off)
        left = covs - gain @ matrix @ covs
        roots = torch.linalg.cholesky((left + left.mT) / 2 + 1e-12 * torch.eye(D).double())
        return Posterior((log_w + log_p).log_softmax(1), moved, roots)

    @property
    def mean(self) -> Tensor:
        return torch.einsum("bk,bkd->bd", self.log_w.exp(), self.means)

    def density(self, x0: Tensor) -> Tensor:
        """log p(x0 | y) of x0 (b, n, d), as (b, n)."""
        off = x0[:, :, None] - self.means[:, None]
        white = torch.linalg.solve_triangular(self.roots, off[..., None], upper=False)[..., 0]
        size = torch.diagonal(self.roots, dim1=1, dim2=2).log().sum(1)
        return (self.log_w[:, None] - size - 0.5 * white.square().sum(-1)).logsumexp(2)

    def draw(self, n: int) -> Tensor:
        """(b, n, d)."""
        which = torch.multinomial(self.log_w.exp(), n, replacement=True)
        mean = self.means.gather(1, which[..., None].expand(-1, -1, D))
        return mean + torch.einsum("bnij,bnj->bni", self.roots[which], torch.randn(*which.shape, D).double())


class Case(NamedTuple):
    """A prior and an operator, with problems drawn from them."""

    name: str
    prior: Mixture
    means: Tensor
    covs: Tensor
    problem: Problem
    truth: Tensor  # (b, d)
    matrix: Tensor  # (m, d): what is seen of x0
    seen: Tensor  # (b, m): its part of y
    exact: Posterior

    def given(self, seen: Tensor, level: Level, x: Tensor) -> Posterior:
        """p(x0 | x, y) for x (n, d) at a level."""
        matrix = torch.cat([level.alpha * torch.eye(D).double(), self.matrix])
        noise = torch.cat([level.sigma.expand(D) ** 2, torch.full((len(self.matrix),), STD**2).double()])
        return Posterior.of(self.means, self.covs, self.prior.log_w, matrix, noise, torch.cat([x, seen], 1))


def case(kind: str, operator: Mask | Blur) -> Case:
    """Problems of a Gaussian or of three Gaussians of dense covariances, variances from 0.02 to 1.5."""
    k = 1 if kind == "Gaussian" else 3
    bases = [torch.linalg.qr(torch.randn(D, D).double()).Q for _ in range(k)]
    variances = torch.logspace(math.log10(0.02), math.log10(1.5), D).double() / (1 if k == 1 else 3)
    means = torch.randn(k, D).double() * (0.3 if k == 1 else 1.0)
    weights = torch.tensor([0.5, 0.3, 0.2][:k]) if k > 1 else None
    prior = Mixture([Spectrum(m, variances, b, shape=(1, D)) for m, b in zip(means, bases, strict=True)], weights)
    covs = torch.stack([b.T @ variances.diag() @ b for b in bases])
    which = torch.multinomial(prior.log_w.exp(), PROBLEMS, replacement=True)
    truth = means[which] + torch.einsum(
        "bij,bj->bi", torch.linalg.cholesky(covs)[which], torch.randn(PROBLEMS, D).double()
    )
    problem = simulate(operator, truth[:, None], STD, torch.randn(PROBLEMS, 1, D).double())
    matrix = operator(torch.eye(D).double()[:, None])[:, 0].T
    seen = matrix.abs().sum(1) > 0
    y, noise = problem.y[:, 0, seen], torch.full((int(seen.sum()),), STD**2).double()
    exact = Posterior.of(means, covs, prior.log_w, matrix[seen], noise, y)
    name = f"{kind}, {type(operator).__name__.lower()}"
    return Case(name, prior, means, covs, problem, truth, matrix[seen], y, exact)


def chains(one: Case, denoise: Callable[[Problem], object], solver: object = DPMpp2M(eta=1.0)) -> Tensor:
    """K samples of each posterior (b, K, d) by a denoiser that is bound to the repeated problem."""
    problem = one.problem.repeat(K)
    x = start = torch.randn(len(problem), 1, D).double() * LEVELS[0].sigma
    made = solver(problem) if callable(solver) else solver
    with torch.no_grad():
        for state in trajectory(denoise(problem), x, LEVELS, made, lambda: torch.randn_like(start)):
            x = state.x
    return x.reshape(PROBLEMS, K, D)


def oracle(one: Case) -> Tensor:
    """The chain with the exact E[x0 | x, y]."""
    seen = one.seen.repeat_interleave(K, 0)
    return chains(one, lambda _: lambda x, level: one.given(seen, level, x[:, 0]).mean[:, None])


def steered(one: Case, guided: bool) -> tuple[Tensor, Tensor]:
    """Particles (g, n, d) and their weights (g, n); with MMPS as the proposal and a likelihood that widens by r^2."""
    some = one.problem[:GROUPS].repeat(PARTICLES)
    gram = one.matrix @ one.matrix.T
    seen = one.seen[:GROUPS].repeat_interleave(PARTICLES, 0)

    def likelihood(x0: Tensor, variance: Tensor) -> Tensor:
        spread = STD**2 * torch.eye(len(gram)).double() + variance * gram
        off = seen - x0[:, 0] @ one.matrix.T
        return torch.distributions.MultivariateNormal(torch.zeros(len(gram)).double(), spread).log_prob(off)

    x = LEVELS[0].sigma * torch.randn(len(some), 1, D).double()
    weights = one.prior.log_w.exp()
    centre = weights @ one.means
    whole = torch.einsum("k,kd->d", weights, one.covs.diagonal(dim1=1, dim2=2) + (one.means - centre) ** 2)
    variance = float(whole.mean())
    with torch.no_grad():
        found = steer(
            one.prior,
            x,
            LEVELS,
            DPMpp2M(eta=1.0),
            lambda: torch.randn_like(x),
            lambda x0: likelihood(x0, torch.tensor(0.0).double()),
            particles=PARTICLES,
            proposal=MMPS(iterations=3)(one.prior, some) if guided else None,
            potential=lambda x0, level: likelihood(x0, level.sigma**2 / (level.alpha**2 + level.sigma**2 / variance)),
        )
    return found.x[:, :, 0], found.log_weights.exp()


METHODS: dict[str, Callable[[Case], Tensor | tuple[Tensor, Tensor]]] = {
    "the posterior itself": lambda one: one.exact.draw(K),
    "its exact denoiser": oracle,
    "MMPS": lambda one: chains(one, lambda p: MMPS(iterations=5)(one.prior, p)),
    "MMPS, 1 iteration": lambda one: chains(one, lambda p: MMPS(iterations=1)(one.prior, p)),
    "TMPD": lambda one: chains(one, lambda p: TMPD()(one.prior, p)),
    "PiGDM": lambda one: chains(one, lambda p: PiGDM()(one.prior, p)),
    "DPS": lambda one: chains(one, lambda p: DPS(0.3).prepared(LEVELS)(one.prior, p), DDPM()),
    "DiffPIR": lambda one: chains(one, lambda p: DiffPIR()(one.prior, p), DDIM(1.0)),
    "DAPS": lambda one: chains(one, lambda _: one.prior, lambda p: DAPS(exact=True).solver(p)),
    "steering": lambda one: steered(one, False),
    "steering with MMPS": lambda one: steered(one, True),
}


class Score(NamedTuple):
    """Shares of the 90 % sets that hold the truth, and distances to the posterior."""

    sets: float
    intervals: float
    mmse: float
    sliced: float


def score(one: Case, x: Tensor, weights: Tensor) -> Score:
    """x (b, n, d) with weights (b, n) of sum 1."""
    b, n, _ = x.shape
    exact = Posterior(one.exact.log_w[:b], one.exact.means[:b], one.exact.roots)
    truth, mean = one.truth[:b], exact.mean
    at_truth, direction = exact.density(truth[:, None]), torch.randn(b, D).double()

    def below(values: Tensor, value: Tensor) -> Tensor:  # a rank in (0, 1), of n samples and the truth
        share, effective = (weights * (values < value)).sum(1), 1 / weights.square().sum(1)
        return (share * effective + torch.rand(b)) / (effective + 1)

    sets = below(-exact.density(x), -at_truth) < 0.9
    ranks = below((x * direction[:, None]).sum(2), (truth * direction).sum(1, keepdim=True))
    found = (weights[..., None] * x).sum(1)
    inside = (weights[..., None] * (x - found[:, None]) ** 2).sum((1, 2))
    own = weights.square().sum(1)  # the sample mean's own error is taken off
    gap = ((found - mean).square().sum(1) - inside * own / (1 - own)).mean()
    size = (exact.draw(64) - mean[:, None]).square().sum(2).mean()
    pick = torch.multinomial(weights, K, replacement=n != K)
    joint = [
        torch.cat([s, one.problem.y[:b].expand(-1, K, -1)], 2).flatten(0, 1)
        for s in (x.gather(1, pick[..., None].expand(-1, -1, D)), exact.draw(K))
    ]
    lines = torch.nn.functional.normalize(torch.randn(2 * D, 100).double(), dim=0)
    sliced = ((joint[0] @ lines).sort(0).values - (joint[1] @ lines).sort(0).values).square().mean().sqrt()
    gap_share = float(gap.clamp(min=0) / size) ** 0.5
    return Score(
        float(sets.double().mean()), float(((ranks - 0.5).abs() < 0.45).double().mean()), gap_share, float(sliced)
    )


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    cases = [case(kind, op) for kind in ("Gaussian", "mixture") for op in (Mask(share=0.5), Blur(1.0))]
    rows, started = [], time.process_time()
    for name, method in METHODS.items():
        scores, before = [], time.process_time()
        for one in cases:
            x = method(one)
            x, weights = x if isinstance(x, tuple) else (x, torch.full(x.shape[:2], 1 / K).double())
            scores.append(score(one, x, weights))
        cells = [f"{100 * s.sets:.1f} / {100 * s.intervals:.1f}" for s in scores]
        cells += [" ".join(f"{getattr(s, k):.2f}" for s in scores) for k in ("mmse", "sliced")]
        rows.append([name, *cells, f"{time.process_time() - before:.0f}"])
        print(rows[-1], flush=True)
    header = ["method", *(f"{one.name}, %" for one in cases), "MMSE gap", "sliced W2", "CPU s"]
    text = (
        f"{PROBLEMS} problems of {D} elements, of a Gaussian and of a mixture of three, seen through a mask of half of "
        f"them or a blur, with noise of std {STD}; {K} samples of each posterior, VP, {STEPS} steps; steering: "
        f"{GROUPS} problems, {PARTICLES} particles. First the share of samples' 90 % highest-density sets that hold "
        "the truth, then that of their central 90 % intervals in random directions: 90 where samples are those of the "
        "posterior, less where they are too sure or elsewhere, more where they spread too much or, for the sets, lie "
        f"where the truth seldom is; standard error {100 * math.sqrt(0.09 / PROBLEMS):.1f} points (steering "
        f"{100 * math.sqrt(0.09 / GROUPS):.1f}). MMSE gap: distance of the mean from E[x0 | y] in units of the "
        "posterior's std. Sliced W2: of (x0, y), whose floor the first row shows. Both in the order of the columns. "
        "Transforms and steering run on DPM-Solver++(2M) with eta = 1, DPS (zeta = 0.3) on DDPM, DiffPIR on "
        "DDIM(1); DAPS draws exactly.\n\n"
    )
    write("Calibration of posteriors", "make bench-posterior", text + table(header, rows))
    print(f"{time.process_time() - started:.0f} CPU seconds")


if __name__ == "__main__":
    main()
