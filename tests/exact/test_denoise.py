"""Exact denoisers against numerical integration, Bayes' rule and each other."""

import math
import resource
import subprocess
import sys

import pytest
import torch

from tests.cases import at, diagonal
from undiffuse import (
    Cond,
    Counter,
    Dataset,
    Denoiser,
    Gaussian,
    InputError,
    Label,
    Level,
    Mixture,
    Spectrum,
    V,
    reverse_transition,
    transition,
)
from undiffuse.level import reverse_bounds

GRID = torch.linspace(-12, 12, 200_001, dtype=torch.float64)


def by_quadrature(density, x, level):
    """Mean and variance of p(x0 | x) on a fine 1-D grid."""
    log_p = density - (x - level.alpha * GRID) ** 2 / (2 * level.sigma**2)
    p = torch.softmax(log_p, 0)
    mean = (p * GRID).sum()
    return mean, (p * (GRID - mean) ** 2).sum()


@pytest.mark.parametrize("lam", [-3.0, -0.5, 1.0])
@pytest.mark.parametrize("space", ["vp", "flow", "ve"])
def test_mixture_mean_and_variance_are_bayes_rule(lam, space):
    level, means, variances = Level.at(lam, space), [-1.0, 0.5, 2.0], [0.2, 1.0, 0.05]
    weights = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    model = Mixture([diagonal(v, mean=m) for m, v in zip(means, variances, strict=True)], weights)
    parts = [w.log() + torch.distributions.Normal(m, math.sqrt(v)).log_prob(GRID)
             for w, m, v in zip(weights, means, variances, strict=True)]  # fmt: skip
    density = torch.logsumexp(torch.stack(parts), 0)
    for x in (-2.0, 0.1, 1.7):
        mean, var = model.posterior(torch.tensor([[x]], dtype=torch.float64), level)
        expected = by_quadrature(density, x, level)
        assert float(mean) == pytest.approx(float(expected[0]), rel=1e-6, abs=1e-9)
        assert float(var) == pytest.approx(float(expected[1]), rel=1e-5)


def correlated(d=5, rank=None):
    g = torch.Generator().manual_seed(3)
    x = torch.randn(400, d, generator=g).double() @ torch.randn(d, d, generator=g).double() + 1
    return x, Spectrum.measure(x, rank)


def test_spectrum_is_the_sample_covariance():
    x, s = correlated()
    assert torch.allclose((s.basis.T * s.variances) @ s.basis, torch.cov(x.T, correction=0))
    assert torch.allclose(s.basis @ s.basis.T, torch.eye(5, dtype=torch.float64), atol=1e-12)
    assert s.std == pytest.approx(math.sqrt(float(x.var(0, correction=0).mean())))


def test_low_rank_keeps_the_total_variance_and_equals_the_dense_formula():
    x, s = correlated(6, rank=2)
    cov = (s.basis.T * s.variances) @ s.basis + s.rest * (torch.eye(6) - s.basis.T @ s.basis)
    assert float(torch.trace(cov)) == pytest.approx(float(x.var(0, correction=0).sum()))
    level, z = Level(0.7, 0.4), x[:9]
    gain = level.alpha * cov @ torch.linalg.inv(level.alpha**2 * cov + level.sigma**2 * torch.eye(6))
    expected = s.mean + (z - level.alpha * s.mean) @ gain.T
    mean, var = Gaussian(s).posterior(z, level)
    assert torch.allclose(mean, expected)
    assert torch.allclose(var, torch.diagonal(cov - level.alpha * gain @ cov).expand(9, 6))


def test_the_leading_directions_of_a_spectrum_are_those_measured_with_that_rank():
    x = torch.randn(50, 2, 3) @ torch.diag(torch.tensor([3.0, 1.0, 0.2]))
    whole, part = Spectrum.measure(x), Spectrum.measure(x, 4)
    again = whole.leading(4)
    assert torch.allclose(again.variances, part.variances)
    assert torch.allclose(again.basis, part.basis)
    assert (again.rest, again.std) == pytest.approx((part.rest, whole.std))
    assert again.shape == (2, 3)
    assert whole.leading(5).leading(3).rest == pytest.approx(whole.leading(3).rest)
    assert whole.leading(6) is whole
    with pytest.raises(InputError, match="rank must be >= 1"):
        whole.leading(0)


def test_large_data_takes_the_low_rank_path():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(60, 3, generator=g) @ torch.randn(3, 2100, generator=g)
    s = Spectrum.measure(x, rank=5)
    assert s.basis.shape == (5, 2100)
    assert s.std**2 * 2100 == pytest.approx(float(x.double().var(0, correction=0).sum()), rel=1e-6)


def test_linear_loss_is_the_error_of_the_gaussian_denoiser():
    _, s = correlated(5, rank=3)
    for level in at([-2.0, 0.0, 3.0]):
        _, var = Gaussian(s).posterior(torch.zeros(1, 5).double(), level)
        assert float(s.linear_loss(level)) == pytest.approx(float(var.mean()))


def test_no_linear_denoiser_beats_linear_loss_on_its_data():
    x, s = correlated()
    level, g = Level(0.8, 0.6), torch.Generator().manual_seed(0)
    big = x.repeat(200, 1)
    noisy = level.diffuse(big, torch.randn(big.shape, generator=g).double())
    design = torch.cat([noisy, torch.ones(len(noisy), 1)], 1)
    best = torch.linalg.lstsq(design, big).solution
    error = float((design @ best - big).square().mean())
    assert error == pytest.approx(float(s.linear_loss(level)), rel=0.02)


def test_dataset_is_the_softmax_over_its_points_in_any_chunks():
    g = torch.Generator().manual_seed(0)
    points, level = torch.randn(50, 2, 3, generator=g), Level(0.8, 0.6)
    x = torch.randn(7, 2, 3, generator=g).double()
    distance = (x.flatten(1)[:, None] - level.alpha * points.flatten(1)).square().sum(-1)
    r = torch.softmax(-distance / (2 * level.sigma**2), 1)
    expected = (r @ points.flatten(1).double()).reshape(x.shape)
    second = (r @ points.flatten(1).double() ** 2).reshape(x.shape)
    for chunk in (1, 7, 50, 4096):
        mean, var = Dataset(points, chunk=chunk).posterior(x, level)
        assert torch.allclose(mean, expected, atol=1e-12)
        assert torch.allclose(var, second - expected**2, atol=1e-10)


def test_dataset_is_the_mixture_of_its_points():
    points, x = torch.randn(9, 4).double(), torch.randn(5, 4).double()
    mixture = Mixture([Spectrum(p, torch.zeros(4)) for p in points])
    for level in at([-3.0, 0.0, 3.0]):
        assert torch.allclose(Dataset(points)(x, level), mixture(x, level), atol=1e-9)


def test_both_ends_are_finite_and_right():
    points, x = torch.randn(9, 4).double(), torch.randn(5, 4).double()
    nearest = points[torch.cdist(x, points).argmin(1)]
    assert torch.allclose(Dataset(points)(x, Level(0, 1)), points.mean(0).expand(5, 4))
    assert torch.allclose(Dataset(points)(x, Level(1, 0)), nearest)
    gaussian = Gaussian(diagonal(1.0, 0.5, 0.0, 2.0, mean=0.3))
    assert torch.allclose(gaussian(x, Level(0, 1)), torch.full_like(x, 0.3))
    known = torch.tensor([True, True, False, True])
    assert torch.allclose(gaussian(x, Level(0.5, 0))[:, known], 2 * x[:, known])
    assert torch.isfinite(gaussian(x, Level(1, 0))).all()


@pytest.mark.parametrize("kind", ["mixture", "dataset"])
def test_a_class_condition_keeps_the_components_of_that_class(kind):
    points, labels = torch.randn(6, 3).double(), torch.tensor([0, 1, 1, 2, 0, 2])

    def build(rows, labels=None):
        if kind == "dataset":
            return Dataset(points[rows], labels)
        return Mixture([Spectrum(p, torch.full((3,), 0.1)) for p in points[rows]], labels=labels)

    x, level, every = torch.randn(3, 3).double(), Level(0.6, 0.8), torch.arange(6)
    model = build(every, labels)
    got = model(x, level, Label(3)([1, 0, 2]))
    for i, label in enumerate([1, 0, 2]):
        alone = build(every[labels == label])(x[i : i + 1], level)
        assert torch.allclose(got[i : i + 1], alone, atol=1e-12)
    assert torch.allclose(model(x, level, Label(3)([1, 0, 2]).null()), model(x, level))


CLASSES = torch.tensor([0, 2, 2, 3, 0, 3, 2])  # none is of class 1


def told_apart(kind):
    """Seven components of three classes of four, in chunks that hold some classes only."""
    points = torch.randn(7, 3, generator=torch.Generator().manual_seed(1)).double()
    if kind == "dataset":
        return Dataset(points, CLASSES, chunk=3)
    variances = torch.linspace(0.1, 0.7, 7).double()
    return Mixture([Spectrum(p, v.expand(3)) for p, v in zip(points, variances, strict=True)], range(1, 8), CLASSES)


@pytest.mark.parametrize("kind", ["mixture", "dataset"])
@pytest.mark.parametrize("space", ["vp", "flow", "ve"])
def test_classes_are_bayes_rule(kind, space):
    """p(c) q(x | c) over its sum, the densities being those of torch's own mixtures."""
    model, x = told_apart(kind), torch.randn(6, 3).double()
    for lam in (-6.0, -1.0, 0.5, 2.0):
        level = Level.at(lam, space)
        means = model.points.double() if kind == "dataset" else model.means
        variances = torch.zeros(7, 3).double() if kind == "dataset" else model.variances
        q = torch.distributions.Normal(level.alpha * means, (level.alpha**2 * variances + level.sigma**2).sqrt())
        p = model.log_w.exp() * q.log_prob(x[:, None]).sum(-1).exp()
        joint = torch.stack([p[:, c == CLASSES].sum(1) for c in range(4)], 1)
        got = model.classes(x, level)
        assert torch.allclose(got, (joint / joint.sum(1, keepdim=True)).log(), rtol=1e-9, atol=1e-9)
        assert (got[:, 1] == -math.inf).all()


@pytest.mark.parametrize("kind", ["mixture", "dataset"])
@pytest.mark.parametrize("space", ["vp", "flow", "ve"])
def test_the_gradient_of_a_class_is_the_pull_of_its_denoiser(kind, space):
    """grad log p(c | x) = (alpha / sigma^2) (E[x0 | x, c] - E[x0 | x]), down to levels where classes are certain."""
    model, c = told_apart(kind), torch.tensor([0, 2, 3, 3, 0, 2])
    for lam in (-6.0, -1.0, 0.5, 5.0):
        level, x = Level.at(lam, space), torch.randn(6, 3).double().requires_grad_()
        (got,) = torch.autograd.grad(model.classes(x, level)[range(6), c].sum(), x)
        pull = level.alpha / level.sigma**2 * (model(x, level, Label(4)(c)) - model(x, level))
        assert torch.isfinite(got).all()
        assert torch.allclose(got, pull, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("kind", ["mixture", "dataset"])
def test_classes_at_both_ends_at_many_levels_and_without_labels(kind):
    model, x = told_apart(kind), torch.randn(3, 3)
    prior = torch.stack([model.log_w.softmax(0)[c == CLASSES].sum() for c in range(4)]).log().float()
    assert torch.allclose(model.classes(x, Level(0, 1)), prior.expand(3, 4))
    lams = torch.tensor([-2.0, 0.0, 3.0])
    together = model.classes(x.double(), Level.at(lams).reshape(-1, 1))
    alone = [model.classes(x[i : i + 1].double(), Level.at(float(lam))) for i, lam in enumerate(lams)]
    assert torch.allclose(together, torch.cat(alone), atol=1e-12)
    nearest = Dataset(torch.tensor([[-1.0], [1.0], [1.5]]), [0, 1, 1]).classes(
        torch.tensor([[-0.2], [0.1]]), Level(1, 0)
    )
    assert nearest.exp().tolist() == [[1.0, 0.0], [0.0, 1.0]]
    with pytest.raises(InputError, match="no classes: give `labels`"):
        Gaussian(diagonal(1.0)).classes(torch.zeros(1, 1), Level(0.8, 0.6))


def test_reverse_variance_is_the_law_of_total_variance():
    """Data N(0, v): x_then given x_now is Gaussian with the covariance's Schur complement."""
    v, (now, then) = 0.3, at([-0.7, 0.9])
    model, x = Gaussian(diagonal(v)), torch.ones(1, 1).double()
    x0, var = model.reverse(x, now, then)
    scale, std = transition(then, now)
    marginal = then.alpha**2 * v + then.sigma**2
    expected = marginal - (scale * marginal) ** 2 / (scale**2 * marginal + std**2)
    assert float(var) == pytest.approx(float(expected), rel=1e-12)
    c_x, c_x0, _ = reverse_transition(now, then)
    mean = scale * marginal / (scale**2 * marginal + std**2) * x
    assert torch.allclose(c_x * x + c_x0 * x0, mean)


def test_learned_variance_interpolates_the_logarithms():
    """Equation 15 of Nichol and Dhariwal 2021: -1 is beta-tilde, +1 is beta."""
    now, then = at([-0.2, 0.1])
    small, large = reverse_transition(now, then)[2] ** 2, transition(then, now)[1] ** 2
    assert torch.allclose(torch.stack([small, large]), torch.stack(reverse_bounds(now, then)))
    for v, expected in [(-1.0, small), (1.0, large), (0.0, (small * large).sqrt())]:
        net = lambda x, time, cond, v=v: torch.cat([0 * x, torch.full_like(x, v)], 1)  # noqa: E731
        x0, var = Denoiser(net, V(), learned_variance=True).reverse(torch.ones(2, 3).double(), now, then)
        assert torch.allclose(var, expected.expand(2, 3))
        assert torch.allclose(x0, now.alpha * torch.ones(2, 3).double())


@pytest.mark.parametrize("model", [Gaussian(diagonal(1.0, 0.2)), Dataset(torch.randn(4, 2))])
def test_a_level_for_every_sample_equals_a_loop(model):
    x, lams = torch.randn(3, 2).double(), [-2.0, 0.0, 3.0]
    level = Level.at(torch.tensor(lams)).reshape(-1, 1)
    for a, b in zip(model.posterior(x, level), zip(*(model.posterior(x[i : i + 1], at([lam])[0])
                    for i, lam in enumerate(lams)), strict=True), strict=True):  # fmt: skip
        assert torch.allclose(a, torch.cat(b), atol=1e-12)


def test_wrong_shapes_and_conditions_are_refused():
    model = Mixture([diagonal(1.0, 1.0)] * 2, labels=[0, 1])
    with pytest.raises(InputError, match="3 elements"):
        model(torch.zeros(1, 3), Level(0.8, 0.6))
    with pytest.raises(InputError, match="one column a class"):
        model(torch.zeros(1, 2), Level(0.8, 0.6), Cond(vector=torch.ones(1, 3)))
    with pytest.raises(InputError, match="labels"):
        Gaussian(diagonal(1.0))(torch.zeros(1, 1), Level(0.8, 0.6), Cond(vector=torch.ones(1, 3)))
    with pytest.raises(InputError, match="weights"):
        Mixture([diagonal(1.0)] * 2, weights=[1.0, -1.0])
    with pytest.raises(InputError, match="one dimension"):
        Mixture([diagonal(1.0), diagonal(1.0, 2.0)])
    with pytest.raises(InputError, match="finite"):
        Dataset(torch.full((2, 2), math.nan))
    with pytest.raises(InputError, match="label 5"):
        Label(3)([1, 5])
    with pytest.raises(InputError, match="predicts no variance"):
        Denoiser(lambda x, t, c: x, V()).reverse(torch.zeros(1, 1), *at([0.0, 1.0]))


def test_counter_counts_calls_and_rows():
    model = Counter(Gaussian(diagonal(1.0)))
    model(torch.zeros(5, 1), Level(0.8, 0.6))
    model.reverse(torch.zeros(2, 1), *at([0.0, 1.0]))
    assert (model.calls, model.rows) == (2, 7)


@pytest.mark.skipif(not hasattr(resource, "RUSAGE_SELF"), reason="needs getrusage")
def test_sixty_thousand_images_stay_under_a_gigabyte():
    code = (
        "import resource, torch; from undiffuse import Dataset, Level\n"
        "points = torch.randn(60_000, 784); before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "Dataset(points)(torch.randn(64, 784), Level(0.8, 0.6))\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20 + points.numel() * 4 / 2**30)"
    )
    grown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(grown.stdout) < 1.0
