"""Likelihoods against torch's densities, closed forms of Gaussians, and discrete data of known probabilities."""

import json
import math
from itertools import pairwise

import pytest
import scipy.stats
import torch
from torch.distributions import MultivariateNormal, Normal, kl_divergence

from tests.cases import at, diagonal
from undiffuse import (
    X0,
    Cond,
    Dataset,
    Denoiser,
    Gaussian,
    InputError,
    Label,
    Level,
    Mixture,
    Noise,
    Spectrum,
    UniformLam,
    V,
    reverse_transition,
)
from undiffuse.evals.bits import snapped
from undiffuse.evals.bound import Bound, bound, decode, errors
from undiffuse.evals.estimate import t_quantile
from undiffuse.evals.likelihood import Dequantiser, Likelihood, likelihood
from undiffuse.level import reverse_bounds
from undiffuse.nets import UNet
from undiffuse.schedule import VP

LN2 = math.log(2)


def normal(*shape, seed=0):
    """Standard normal numbers in float64."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def correlated(d, mean, low=0.05, high=0.5, seed=0):
    """A Gaussian with a full covariance."""
    basis = torch.linalg.qr(normal(d, d, seed=seed))[0]
    means = mean * (1 + torch.arange(d).double() / d)
    return Spectrum(means, torch.logspace(math.log10(low), math.log10(high), d, dtype=torch.float64), basis)


def draws(spectrum, n, seed=1):
    """Samples of a Gaussian."""
    z = normal(n, spectrum.mean.numel(), seed=seed) * spectrum.variances.sqrt()
    return spectrum.mean + (z if spectrum.basis is None else z @ spectrum.basis)


def covariance(spectrum):
    basis = torch.eye(spectrum.mean.numel()).double() if spectrum.basis is None else spectrum.basis
    return (basis.T * spectrum.variances) @ basis


def log_p(spectrum, x):
    """torch's own log-density."""
    return MultivariateNormal(spectrum.mean, covariance(spectrum)).log_prob(x)


def mixture(d, n):
    """Two correlated Gaussians with overlap: the model, samples, and their exact bits/dim."""
    parts, weights = [correlated(d, -0.6, seed=2), correlated(d, 0.6, seed=3)], torch.tensor([0.3, 0.7]).double()
    first = torch.rand(n, generator=torch.Generator().manual_seed(4)) < weights[0]
    x = torch.where(first[:, None], *(draws(part, n, seed=5 + i) for i, part in enumerate(parts)))
    log = torch.logsumexp(torch.stack([w.log() + log_p(part, x) for w, part in zip(weights, parts, strict=True)]), 0)
    return Mixture(parts, weights), x, -log / d / LN2


GAUSSIANS = {
    "diagonal-1": diagonal(0.05, mean=0.7),
    "diagonal-3": diagonal(0.02, 1.0, 4.0, mean=-1.0),
    "full-2": correlated(2, 1.0),
    "full-5": correlated(5, -0.5, 0.01, 2.0),
    "full-8": correlated(8, 0.3),
}


@pytest.mark.parametrize("name", GAUSSIANS)
@pytest.mark.parametrize("lam", [(-6.0, 7.0), (-1.0, 2.0)])
def test_flow_of_a_gaussian_is_its_closed_form_from_the_sampler_s_start(name, lam):
    """The flow keeps x~ - mu in units of its std, so N(0, s^2) at lam[0] becomes N(mu (1 - r), r^2 s^2)."""
    model, x = GAUSSIANS[name], draws(GAUSSIANS[name], 6)
    s, end = math.exp(-lam[0]), math.exp(-lam[1])
    r = ((model.variances + end**2) / (model.variances + s**2)).sqrt()
    basis = torch.eye(len(r)).double() if model.basis is None else model.basis
    expected = Normal((1 - r) * (basis @ model.mean), r * s).log_prob(x @ basis.T).sum(1)
    result = likelihood(Gaussian(model), x, lam=lam)
    assert torch.allclose(result.bits, -expected / len(r) / LN2, atol=2e-6, rtol=0)
    assert 0 <= result.integration < 1e-3


@pytest.mark.parametrize("name", GAUSSIANS)
def test_flow_of_a_gaussian_is_its_density(name):
    model, x = GAUSSIANS[name], draws(GAUSSIANS[name], 20)
    result = likelihood(Gaussian(model), x, lam=(-11.0, 9.0))
    assert torch.allclose(result.bits, -log_p(model, x) / x.shape[1] / LN2, atol=1e-4, rtol=0)
    assert result.unit == "bits/dim of the density"


@pytest.mark.parametrize("d", [1, 2, 4, 8])
def test_flow_of_a_mixture_is_its_density(d):
    model, x, exact = mixture(d, 60)
    result = likelihood(model, x, lam=(-8.0, 7.0))
    assert result.mean == pytest.approx(float(exact.mean()), abs=1e-4)
    finer = likelihood(model, x, lam=(-11.0, 7.0), steps=64, checked=0)
    assert torch.allclose(finer.bits, exact, atol=3e-4, rtol=0)
    assert finer.integration is None


def test_integration_error_is_seen():
    """With too few steps the check of half the steps is no smaller than the true error."""
    model, x, _ = mixture(4, 8)
    true = likelihood(model, x, steps=100).bits
    rough = likelihood(model, x, steps=10, method="rk4", checked=8)
    worst = float((rough.bits - true).abs().max())
    assert 1e-3 < worst < rough.integration


def test_classes_have_their_own_likelihood():
    parts = [diagonal(0.5, 1.5, mean=-0.5), diagonal(1.0, 0.5, mean=0.5)]
    model, x = Mixture(parts, labels=[0, 1]), draws(parts[0], 4)
    labels = [0, 1, 0, 1]
    result = likelihood(model, x, lam=(-11.0, 7.0), cond=Label(2)(labels), batch=3)
    expected = torch.stack([log_p(parts[k], x[i]) for i, k in enumerate(labels)])
    assert torch.allclose(result.bits, -expected / 2 / LN2, atol=1e-4, rtol=0)
    assert float((likelihood(model, x).bits - result.bits).abs().min()) > 0.01
    assert result.integration < 1e-3


def test_signs_are_exact_for_independent_elements():
    """v^T J v is the trace for every v of signs where J is diagonal."""
    model, x = Gaussian(GAUSSIANS["diagonal-3"]), draws(GAUSSIANS["diagonal-3"], 5)
    exact, probed = likelihood(model, x), likelihood(model, x, probes=3)
    assert torch.allclose(probed.bits, exact.bits, atol=1e-10, rtol=0)
    assert probed.interval < 1e-10
    assert exact.interval == 0.0


@pytest.mark.parametrize(("n", "probes"), [(1, 12), (3, 4), (8, 2)])
def test_hutchinson_interval_holds_the_exact_trace_95_times_in_100(n, probes):
    """2000 independent runs of n samples, as the samples of one: 95 % +- 3 standard errors of 0.5 %."""
    runs, model = 2000, Gaussian(correlated(6, 0.5, 0.05, 2.0))
    x = draws(correlated(6, 0.5, 0.05, 2.0), n)
    exact = likelihood(model, x, steps=8).mean
    rows = likelihood(model, x.repeat(runs, 1), steps=8, probes=probes, batch=n * runs, seed=2, checked=0)
    each = [
        rows._replace(bits=rows.bits[i : i + n], probe_error=rows.probe_error[i : i + n]) for i in range(0, n * runs, n)
    ]
    off = torch.tensor([run.mean - exact for run in each]).double()
    half = torch.tensor([run.interval for run in each]).double()
    covered = (off.abs() <= half).double()
    assert 0.935 <= float(covered.mean()) <= 0.965
    assert abs(float(off.mean())) < 4 * float(off.std()) / math.sqrt(runs)
    ideal = t_quantile(n * (probes - 1)) * float(off.std())
    assert 0.8 < float(half.mean()) / ideal < 1.2
    assert float(off.std()) > 0.01


def test_probe_intervals_use_the_degrees_of_freedom_of_unequal_variances():
    """One sample that holds all the variance has K - 1; more that share it have more."""
    base = likelihood(Gaussian(correlated(3, 0.0)), draws(correlated(3, 0.0), 4), probes=5, steps=4)
    single = base._replace(probe_error=torch.tensor([0.2, 0, 0, 0]).double())
    assert single.interval == pytest.approx(t_quantile(4) * 0.2 / 4)
    equal = base._replace(probe_error=torch.full((4,), 0.2).double())
    assert t_quantile(4 * 6 - 2) * 0.2 / 2 == pytest.approx(equal.interval)
    one = likelihood(Gaussian(correlated(3, 0.0)), draws(correlated(3, 0.0), 2), probes=1, steps=4)
    assert (one.interval, one.probe_error) == (None, None)


@pytest.mark.parametrize("tau", [0.6, 3.0])
def test_truncated_normal_has_its_density(tau):
    """Against quadrature of exp(-u^2 / 2) within +-tau: density, quantiles and entropy."""
    noise = Dequantiser("truncated-normal", 0.25, 0.25 / tau)
    u = torch.linspace(-0.25, 0.25, 100_001, dtype=torch.float64)
    p = torch.exp(-((u / noise.s) ** 2) / 2)
    p = p / torch.trapezoid(p, u)
    assert torch.allclose(noise.log_q(u), p.log(), atol=1e-8)
    z, phi = 2 * scipy.stats.norm.cdf(tau) - 1, scipy.stats.norm.pdf(tau)
    entropy = math.log(noise.s * z * math.sqrt(2 * math.pi * math.e)) - tau * phi / z
    assert -float(torch.trapezoid(p * noise.log_q(u), u)) == pytest.approx(entropy, abs=1e-7)
    share = torch.cumulative_trapezoid(p, u)[[9_999, 49_999, 79_999]]
    assert torch.allclose(noise(share), u[[10_000, 50_000, 80_000]], atol=1e-6)


def test_uniform_noise_fills_the_bin():
    noise, u = Dequantiser("uniform", 0.25, 1.0), torch.tensor([0.0, 0.5, 0.75, 1.0])
    assert noise(u).tolist() == [-0.25, 0.0, 0.125, 0.25]
    assert noise.log_q(u).exp().tolist() == pytest.approx([2.0] * 4)


ATOMS = {
    1: [[-1.0], [-1.0], [-1.0], [0.5], [1.0]],
    2: [[-1.0, 0.0]] * 4 + [[0.5, 0.0], [0.5, 0.0], [0.5, -1.0]],
    3: [[0.0, 0.0, 0.0]] * 2 + [[1.0, 0.0, -1.0]] * 5 + [[1.0, 0.5, -1.0]],
}


def atoms(d, repeat):
    """Points of a grid of spacing 0.5, some several times: the model, `repeat` copies, and exact bits/dim."""
    points = torch.tensor(ATOMS[d], dtype=torch.float64)
    same = (points[:, None] == points[None]).all(-1).double().mean(1)
    return Dataset(points), points.repeat(repeat, 1), (-same.log2() / d).repeat(repeat)


@pytest.mark.parametrize("d", [1, 2, 3])
def test_dequantised_likelihood_is_just_above_the_probability(d):
    """In bins that do not overlap the truncated normal costs -log2 Z, whatever is drawn."""
    model, x0, exact = atoms(d, 20)
    tight = likelihood(model, x0, step=0.5, steps=64)
    gap, expected = tight.bits - exact, -math.log2(math.erf(3 / math.sqrt(2)))
    assert tight.lam[1] == pytest.approx(math.log(12.0))
    assert float(gap.mean()) == pytest.approx(expected, abs=5e-4)
    assert float((gap - expected).abs().max()) < 0.02
    tighter = likelihood(model, x0, step=0.5, tau=4.0)
    assert -1e-3 < float((tighter.bits - exact).mean()) < 1.5e-3
    loose = likelihood(model, x0, step=0.5, dequantise="uniform", lam=(-6.0, 4.0), checked=0)
    assert loose.mean > tight.mean + 10
    assert {tight.unit, loose.unit} == {"bits/dim of the discrete data"}


def test_uniform_dequantisation_of_one_point_in_closed_form():
    """-log2 p of N(x0, s^2) at x0 + U(-1/4, 1/4) on average, less log2 of the step."""
    model, x0 = Dataset(torch.tensor([[0.5]]).double()), torch.full((4000, 1), 0.5).double()
    result = likelihood(model, x0, step=0.5, dequantise="uniform", lam=(-7.0, 2.0), batch=4000)
    s = math.exp(-2.0)
    expected = (math.log(s * math.sqrt(2 * math.pi)) + 0.25**2 / 3 / (2 * s**2) - math.log(0.5)) / LN2
    assert abs(result.mean - expected) < 4 * result.error
    assert result.error < 0.05


def test_range_of_the_model_limits_the_start():
    """Where lam[1] is noisier than the bins, truncation is stronger and the bound still holds."""
    model, x0, exact = atoms(2, 100)
    result = likelihood(model, x0, step=0.5, lam=(-6.0, 1.0))
    assert result.lam == (-6.0, 1.0)
    assert float((result.bits - exact).mean()) > 0.1


# ---------------------------------------------------------------- the bound


def snr(level):
    return float((level.alpha / level.sigma) ** 2)


@pytest.mark.parametrize("space", ["vp", "flow", "ve"])
def test_steps_are_differences_of_snr_times_squared_errors(space):
    model, x0, _ = mixture(3, 5)
    levels = at([-3.0, -1.0, 0.2, 1.0, 2.5], space)
    result = bound(model, x0, levels, seed=7)
    noise, terms = Noise(x0.shape, 7, dtype=torch.float64), [0.5 * snr(levels[0]) * x0.square().sum(1)]
    for now, then in pairwise(levels):
        off = (x0 - model(now.diffuse(x0, noise()), now)).square().sum(1)
        terms.append(0.5 * (snr(then) - snr(now)) * off)
    s = 1 / math.sqrt(snr(levels[-1]))
    terms.append(-Normal(model(levels[-1].diffuse(x0, noise()), levels[-1]), s).log_prob(x0).sum(1))
    bits = torch.stack(terms) / 3 / LN2
    assert torch.allclose(result.bits, bits.sum(0), rtol=1e-12)
    assert [term.bits for term in result.terms] == pytest.approx(bits.mean(1).tolist(), rel=1e-12)
    assert [term.lam_then for term in result.terms[:-1]] == pytest.approx([-3.0, -1.0, 0.2, 1.0, 2.5])
    assert (result.terms[0].lam_now, result.terms[-1].lam_then) == (None, None)
    assert result.mean == pytest.approx(sum(term.bits for term in result.terms))


def test_prior_and_steps_are_divergences_of_normals():
    model, x0, _ = mixture(3, 4)
    now, then = at([-0.5, 0.7])
    x = now.diffuse(x0, Noise(x0.shape, dtype=torch.float64)())
    c_x, c_x0, std = reverse_transition(now, then)
    mean, var = model.reverse(x, now, then)
    wide = reverse_bounds(now, then)[1]
    for kind, variance in (("small", std**2), ("large", wide), ("learned", var)):
        result = bound(model, x0, [now, then], variance=kind)
        p = Normal(c_x * x + c_x0 * mean, variance.sqrt().expand(x.shape))
        expected = kl_divergence(Normal(c_x * x + c_x0 * x0, std), p).sum() / 4 / 3 / LN2
        assert result.terms[1].bits == pytest.approx(float(expected), rel=1e-9)
        assert result.variance == kind
    prior = kl_divergence(Normal(now.alpha * x0, now.sigma), Normal(0.0, now.sigma)).sum() / 4 / 3 / LN2
    assert result.terms[0].bits == pytest.approx(float(prior), rel=1e-9)


def expected_bound(levels, mean, v, shift=0.0):
    """The bound of Gaussian data (nats a dimension) for the denoiser of a mean that is off by `shift`."""

    def loss(level):
        return v / (1 + snr(level) * v) + (shift / (1 + snr(level) * v)) ** 2

    steps = sum(0.5 * (snr(then) - snr(now)) * loss(now) for now, then in pairwise(levels))
    last = snr(levels[-1])
    prior = 0.5 * snr(levels[0]) * (v + mean**2)
    return prior + steps + 0.5 * (last * loss(levels[-1]) + math.log(2 * math.pi / last))


def test_bound_of_a_gaussian_in_closed_form():
    v, mean, levels = 0.4, 0.8, at(torch.linspace(-2, 2, 13))
    x0 = draws(diagonal(v, v, mean=mean), 3000)
    result = bound(Gaussian(diagonal(v, v, mean=mean)), x0, levels, batch=3000)
    expected = expected_bound(levels, mean, v) / LN2
    assert abs(result.mean - expected) < 4 * result.error
    assert result.error < 0.04
    assert expected > 0.5 * math.log(2 * math.pi * math.e * v) / LN2 + 0.1


def fine(steps, high):
    """A tenth of the steps below lam = -1.5, where little is learned, and the others up to `high`."""
    few = max(steps // 10, 1)
    return at(torch.cat([torch.linspace(-5, -1.5, few + 1)[:-1], torch.linspace(-1.5, high, steps - few + 1)]))


@pytest.mark.parametrize("case", ["gaussian", "mixture"])
def test_bound_lies_above_the_density_and_tightens_with_steps(case):
    if case == "gaussian":
        spectrum = diagonal(0.6, 1.0, mean=0.5)
        model, x0 = Gaussian(spectrum), draws(spectrum, 300)
        exact = -log_p(spectrum, x0) / 2 / LN2
    else:
        parts = [diagonal(0.5, 0.8, mean=-1.0), diagonal(0.8, 0.5, mean=1.0)]
        model, x0 = Mixture(parts), torch.cat([draws(part, 150, seed=i) for i, part in enumerate(parts)])
        exact = -torch.logaddexp(*(log_p(part, x0) - LN2 for part in parts)) / 2 / LN2

    def gap(steps, **kw):
        off = bound(model, x0, fine(steps, 1.5), batch=300, **kw).bits - exact
        return float(off.mean()), float(off.std() / math.sqrt(len(off)))

    gaps = [gap(steps) for steps in (10, 30, 100, 800)]
    assert all(after < before for (before, _), (after, _) in pairwise(gaps))
    assert gaps[0][0] > 0.2
    assert all(mean > -3 * error for mean, error in gaps)
    assert gaps[-1][0] < 0.01
    learned = gap(30, variance="learned")
    assert abs(learned[0]) < min(gaps[1][0] / 3, 0.02)


def test_learned_variance_makes_the_chain_of_a_gaussian_exact():
    """Each reverse step of the exact posterior is the true one, so three steps give what the decoder leaves."""
    v, levels = torch.tensor([0.3, 1.0]).double(), at([-6.0, 0.0, 2.0, 5.0])
    model, x0 = Gaussian(Spectrum(torch.zeros(2), v)), draws(diagonal(0.3, 1.0), 2000)
    off = bound(model, x0, levels, variance="learned", batch=2000).bits + log_p(diagonal(0.3, 1.0), x0) / 2 / LN2
    assert abs(float(off.mean())) < 4 * float(off.std()) / math.sqrt(2000)
    assert float(bound(model, x0, levels, batch=2000).mean) > 1 - float(log_p(diagonal(0.3, 1.0), x0).mean()) / 2 / LN2


def test_measured_errors_make_the_chain_of_a_white_gaussian_exact():
    """The posterior variance of x0 is the error of the exact denoiser, and there the same for all elements."""
    spectrum, levels = diagonal(0.25, 0.25, mean=0.3), at(torch.linspace(-3, 4, 6).double())
    x0, model = draws(spectrum, 3000), Gaussian(spectrum)
    exact = torch.stack([model.posterior(x0[:1], level)[1].mean() for level in levels[:-1]])
    assert torch.allclose(
        bound(model, x0, levels, variance=exact).bits, bound(model, x0, levels, variance="learned").bits
    )
    found = errors(model, x0, levels)
    assert torch.allclose(found.mean(0), exact, rtol=0.08)
    split = torch.cat([errors(model, x0[:7], levels, batch=3), errors(model, x0[7:], levels, first=7)])
    assert torch.allclose(split, found, rtol=1e-12)
    few = bound(model, x0, levels, variance=found.mean(0)).mean
    assert few < bound(model, x0, levels).mean - 0.1
    for wrong in (exact[:-1], -exact, exact * torch.nan):
        with pytest.raises(InputError, match="5 errors >= 0, one a step"):
            bound(model, x0, levels, variance=wrong)


def test_wrong_mean_costs_its_divergence():
    """KL = m^2 / (2 v) a dimension in the limit, and its sum over the steps before."""
    v, m, levels = 0.4, 0.3, at(torch.linspace(-5, 3, 40))
    x0 = draws(diagonal(v, mean=0.5), 2000)
    right, wrong = (bound(Gaussian(diagonal(v, mean=mean)), x0, levels, batch=2000) for mean in (0.5, 0.5 + m))
    rise = wrong.bits - right.bits

    def cost(levels):
        return (expected_bound(levels, 0.5, v, m) - expected_bound(levels, 0.5, v)) / LN2

    assert abs(float(rise.mean()) - cost(levels)) < 4 * float(rise.std()) / math.sqrt(2000)
    assert float(rise.std()) / math.sqrt(2000) < 0.15 * cost(levels)
    assert cost(at(torch.linspace(-5, 4, 1000))) == pytest.approx(m**2 / (2 * v) / LN2, rel=0.01)


def test_network_s_own_variance_is_used():
    """At fraction -1 the learned variance is beta-tilde, at 1 it is beta; it is the default where there is one."""
    x0, levels = 0.3 * normal(6, 2, 3), at([-2.0, 0.0, 1.0])
    for fraction, same in ((-1.0, "small"), (1.0, "large")):

        def net(x, time, cond, fraction=fraction):
            return torch.cat([0.1 * x, torch.full_like(x, fraction)], 1)

        plain = Denoiser(lambda x, time, cond: 0.1 * x, X0())
        own = bound(Denoiser(net, X0(), learned_variance=True), x0, levels)
        assert own.variance == "learned"
        assert torch.allclose(own.bits, bound(plain, x0, levels, variance=same).bits, rtol=1e-10)
    assert bound(plain, x0, levels).variance == "small"


def test_decoder_of_quantised_data_is_a_distribution_over_its_values():
    _, values = snapped(torch.zeros(1, 1), 1 / 8, (-1.0, 1.0))
    assert torch.allclose(values, torch.linspace(-1, 1, 17).double())
    z, s = 2 * normal(5, 3), torch.tensor(0.07).double()
    log = decode(values, z, s)
    assert torch.allclose(log.exp().sum(0), torch.ones(5, 3).double())
    assert torch.allclose(log, torch.log_softmax(Normal(values[:, None, None], s).log_prob(z), 0), atol=1e-9)


def test_reconstruction_of_quantised_data():
    x0 = torch.tensor([[-1.0, -0.5], [0.75, 1.0], [0.0, 0.125]])
    levels = at([-3.0, 0.0, 2.0])
    result = bound(Gaussian(diagonal(0.5, 0.5)), x0, levels, step=1 / 8)
    noise = Noise(x0.shape, dtype=torch.float64)
    z = [x0 + levels[-1].sigma / levels[-1].alpha * noise() for _ in range(3)][-1]
    _, values = snapped(x0, 1 / 8, (-1.0, 1.0))
    index = ((x0 + 1) * 8).long()
    expected = -decode(values, z, levels[-1].sigma / levels[-1].alpha).gather(0, index[None])[0].sum() / 3 / 2 / LN2
    assert result.terms[-1].bits == pytest.approx(float(expected), rel=1e-9)
    assert result.unit == "bits/dim of the discrete data"


def test_rounding_of_quantised_data_is_undone():
    """Bytes as [-1, 1] in single precision are the same bytes, and so is what misses them by a hundredth of a step."""
    whole = torch.tensor([[0, 1, 100], [254, 255, 7]]).double()
    x0, values = snapped((whole / 127.5 - 1).float(), 2 / 255, (-1.0, 1.0))
    assert torch.allclose(x0, whole / 127.5 - 1, atol=1e-15, rtol=0)
    assert torch.allclose(values, torch.arange(256).double() / 127.5 - 1, atol=1e-15, rtol=0)
    model, exact, rough = Gaussian(diagonal(0.5, 0.5, 0.5)), x0, x0 + 0.009 * 2 / 255
    for kw in ({"dequantise": "uniform"}, {}):
        a, b = (likelihood(model, x, step=2 / 255, steps=4, **kw).bits for x in (exact, rough))
        assert torch.equal(a, b)
    a, b = (bound(model, x, at([-2.0, 3.0]), step=2 / 255).bits for x in (exact, rough))
    assert torch.equal(a, b)


@pytest.mark.parametrize("d", [1, 2, 3])
def test_bound_of_discrete_data_is_just_above_the_probability(d):
    model, x0, exact = atoms(d, 100)
    off = bound(model, x0, at(torch.linspace(-4, 2.5, 300)), step=0.5, batch=1000).bits - exact
    error = float(off.std()) / math.sqrt(len(off))
    assert -3 * error < float(off.mean()) < 0.03 + 3 * error
    assert error < 0.03


def test_a_clean_end_and_pure_noise_are_no_levels_of_the_bound():
    model, x0, _ = mixture(2, 5)
    levels = at([-4.0, -1.0, 1.0])
    assert torch.equal(bound(model, x0, [*levels, Level(1.0, 0.0)]).bits, bound(model, x0, levels).bits)
    pure = bound(model, x0, [Level(0.0, 1.0), *levels])
    assert pure.terms[0].bits == 0
    assert pure.terms[1].lam_now is None
    assert len(bound(model, x0, UniformLam()(VP(), 10)).terms) == 1 + 9 + 1


# ---------------------------------------------------------------- both


def unet(seed=0):
    """A small network with random weights, its last layer too."""
    torch.manual_seed(seed)
    net = UNet(channels=1, width=8, mults=(1,)).eval()
    torch.nn.init.normal_(net.head.weight, std=0.05)
    return Denoiser(net, V())


def test_network_with_both_traces():
    x0 = 0.5 * normal(2, 1, 3, 3).float()
    exact = likelihood(unet(), x0, steps=4, lam=(-4.0, 4.0))
    probed = likelihood(unet(), x0, steps=4, lam=(-4.0, 4.0), probes=16)
    assert 0 < probed.interval < 0.2
    assert abs(probed.mean - exact.mean) < 1.5 * probed.interval
    assert bool(torch.isfinite(bound(unet(), x0, UniformLam()(VP(), 6)).bits).all())


def test_network_that_is_the_identity_in_x_has_a_trace_in_closed_form():
    """v = 0 gives D = alpha x in VP form: x stays, and log p(x~) falls by the logarithm of alpha."""
    zero = Denoiser(lambda x, time, cond: 0 * x, V())
    x0, lam = normal(3, 5), (-3.0, 4.0)
    alpha = [float(level.alpha) for level in at(list(lam))]
    expected = Normal(0.0, 1.0).log_prob(alpha[1] * x0).sum(1) + 5 * math.log(alpha[1])
    start = Normal(0.0, math.sqrt(1 - alpha[0] ** 2)).log_prob(alpha[1] * x0).sum(1) + 5 * math.log(alpha[1])
    result = likelihood(zero, x0, lam=lam)
    assert torch.allclose(result.bits, -start / 5 / LN2, atol=1e-6)
    assert torch.allclose(result.bits, -expected / 5 / LN2, atol=1e-2)


def test_results_do_not_depend_on_how_a_set_is_split():
    model, x0, _ = mixture(3, 7)
    levels = at([-3.0, -1.0, 0.5, 2.0])
    whole = bound(model, x0, levels, seed=3)
    flow = likelihood(model, x0, steps=6, probes=3, seed=3)
    for cuts in ([0, 1, 7], [0, 3, 7], [0, 2, 4, 7]):
        parts = [bound(model, x0[i:j], levels, seed=3, first=i) for i, j in pairwise(cuts)]
        joined = Bound.cat(parts)
        assert torch.allclose(joined.bits, whole.bits, rtol=1e-12)
        assert [t.bits for t in joined.terms] == pytest.approx([t.bits for t in whole.terms], rel=1e-12)
        flows = Likelihood.cat(
            [likelihood(model, x0[i:j], steps=6, probes=3, seed=3, first=i) for i, j in pairwise(cuts)]
        )
        assert torch.allclose(flows.bits, flow.bits, rtol=1e-12)
        assert torch.allclose(flows.probe_error, flow.probe_error, rtol=1e-9)
        assert flows.interval == pytest.approx(flow.interval, rel=1e-9)
        assert flows.integration == pytest.approx(flow.integration, rel=1e-9)
    assert likelihood(model, x0[4:], steps=6, first=4).integration is None
    assert torch.allclose(bound(model, x0, levels, seed=3, batch=2).bits, whole.bits, rtol=1e-12)
    assert torch.allclose(likelihood(model, x0, steps=6, probes=3, seed=3, batch=2).bits, flow.bits, rtol=1e-12)
    assert not torch.allclose(bound(model, x0, levels, seed=4).bits, whole.bits, rtol=1e-3)
    assert not torch.allclose(likelihood(model, x0, steps=6, probes=3, seed=4).bits, flow.bits, rtol=1e-6)
    assert not torch.equal(likelihood(model, x0[:1].repeat(2, 1), steps=6, probes=3).bits[0], flow.bits[0])


def test_split_dequantisation_is_the_same():
    model, x0, _ = atoms(2, 1)
    whole = likelihood(model, x0, step=0.5, dequantise="uniform", lam=(-4.0, 1.0), steps=6)
    parts = [
        likelihood(model, x0[i:j], step=0.5, dequantise="uniform", lam=(-4.0, 1.0), steps=6, first=i)
        for i, j in ((0, 3), (3, 7))
    ]
    assert torch.allclose(Likelihood.cat(parts).bits, whole.bits, rtol=1e-12)
    assert float(whole.bits[:4].std()) > 0.01  # four copies of one point, each with its own noise


def test_double_precision_is_kept_and_single_is_close():
    model, x0, _ = mixture(2, 4)
    double, single = (likelihood(model, x, steps=10) for x in (x0, x0.float()))
    assert double.bits.dtype == single.bits.dtype == torch.float64
    assert 0 < float((double.bits - single.bits).abs().max()) < 1e-4


def test_summaries_are_json():
    model, x0, _ = mixture(2, 3)
    both = (
        likelihood(model, x0, steps=4, probes=2).summary(),
        bound(model, x0, [Level(0.0, 1.0), *at([0.0, 1.0])]).summary(),
    )
    for summary in both:
        assert json.loads(json.dumps(summary, allow_nan=False)) == summary
        assert summary["samples"] == 3
    assert {"mean", "error", "interval", "integration", "probes", "unit", "dequantise"} <= both[0].keys()
    assert len(both[1]["terms"]) == 4
    assert bound(model, x0[:1], at([0.0, 1.0])).error is None


GOOD = torch.zeros(2, 2)
WRONG_DATA = [
    (torch.zeros(2, 2, dtype=torch.long), {}, "floating-point data .* of torch.int64"),
    (torch.zeros(0, 2), {}, r"n >= 1, got \(0, 2\)"),
    (torch.zeros(2), {}, r"got \(2,\)"),
    (torch.full((2, 2), math.nan), {}, "NaN or infinite"),
    (GOOD, {"batch": 0}, "batch"),
    (GOOD, {"cond": Cond(vector=torch.zeros(3, 2))}, "3 rows for 2 samples"),
    (GOOD, {"step": 0.0}, "must be > 0, got 0"),
    (GOOD, {"step": -0.5}, "must be > 0, got -0.5"),
    (GOOD, {"step": 0.3}, "not a whole number of steps"),
    (GOOD, {"step": 0.5, "span": (1.0, -1.0)}, "span"),
    (torch.tensor([[0.5, 0.2]]), {"step": 0.5}, "value 0.2, which is not one of -1"),
    (torch.tensor([[0.5, 1.5]]), {"step": 0.5}, "value 1.5"),
]


@pytest.mark.parametrize(("x0", "kw", "why"), WRONG_DATA)
def test_unusable_data_are_refused(x0, kw, why):
    model = Gaussian(diagonal(1.0, 1.0))
    with pytest.raises(InputError, match=why):
        bound(model, x0, at([0.0, 1.0]), **kw)
    with pytest.raises(InputError, match=why):
        likelihood(model, x0, **kw)


@pytest.mark.parametrize(
    ("kw", "why"),
    [
        ({"lam": (7.0, -6.0)}, "rising order"),
        ({"lam": (-math.inf, 7.0)}, "finite"),
        ({"lam": (3.0, 7.0), "step": 0.5}, "start lower"),
        ({"probes": -1}, "probes"),
        ({"steps": 1}, "steps"),
        ({"checked": -1}, "checked"),
        ({"tau": 0.0}, "tau"),
        ({"method": "euler"}, "unknown Runge-Kutta method"),
        ({"dequantise": "uniform"}, "with step=None"),
        ({"dequantise": "none", "step": 0.5}, "'none' without"),
        ({"dequantise": "gaussian", "step": 0.5}, "'truncated-normal' or 'uniform'"),
    ],
)
def test_wrong_settings_of_the_flow_are_refused(kw, why):
    with pytest.raises(InputError, match=why):
        likelihood(Gaussian(diagonal(1.0, 1.0)), GOOD, **kw)


def test_wrong_levels_of_the_bound_are_refused():
    model = Gaussian(diagonal(1.0, 1.0))
    for levels, why in (
        (at([0.0, 1.0, 0.5, 2.0]), "step 1 rises"),
        (at([1.0]), "at least 2 levels"),
        ([Level(0.0, 1.0), Level(1.0, 0.0)], "to reconstruct from"),
        ([Level.at(torch.tensor([[a], [a]])) for a in (0.0, 1.0)], "one a sample"),
    ):
        with pytest.raises(InputError, match=why):
            bound(model, GOOD, levels)
    with pytest.raises(InputError, match="must be 'small', 'large', 'learned' or a tensor"):
        bound(model, GOOD, at([0.0, 1.0]), variance="tiny")
    with pytest.raises(InputError, match="this one lacks"):
        bound(lambda x, level, cond: x, GOOD, at([0.0, 1.0]), variance="learned")


def test_answers_that_are_not_finite_are_explained():
    def broken(x, level, cond):
        return torch.where(x > 5, math.nan, x)

    x0 = torch.tensor([[0.0, 0.0], [9.0, 0.0]])
    with pytest.raises(InputError, match=r"bound of sample 4 \(1 of 2"):
        bound(broken, x0, at([3.0, 4.0]), first=3)
    with pytest.raises(InputError, match=r"log-density of sample 1 .* trained on"):
        likelihood(broken, x0, lam=(0.0, 4.0), steps=4)


def test_models_that_hide_from_autograd_are_refused():
    weight = torch.ones((), requires_grad=True)
    for model in (torch.no_grad()(Gaussian(diagonal(1.0, 1.0))), lambda x, level, cond: weight * x.detach()):
        for probes in (0, 2):
            with pytest.raises(InputError, match="does not follow x in autograd"):
                likelihood(model, GOOD, probes=probes)


def test_results_of_other_settings_are_not_joined():
    model, x0, _ = mixture(2, 2)
    with pytest.raises(InputError, match="different steps"):
        Likelihood.cat([likelihood(model, x0, steps=steps) for steps in (4, 6)])
    with pytest.raises(InputError, match="different variance"):
        Bound.cat([bound(model, x0, at([0.0, 1.0]), variance=kind) for kind in ("small", "large")])
    with pytest.raises(InputError, match="lams"):
        Bound.cat([bound(model, x0, at([0.0, end])) for end in (1.0, 2.0)])
    with pytest.raises(InputError, match="no results"):
        Bound.cat([])
