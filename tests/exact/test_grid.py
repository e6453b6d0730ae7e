"""Grids against closed forms, scipy and the published constants."""

import itertools
import math

import pytest
import torch

from tests.cases import diagonal, drain
from undiffuse import (
    AYS,
    DDIM,
    EDM,
    VP,
    Beta,
    Discrete,
    Exponential,
    Flow,
    Gaussian,
    Heun,
    InputError,
    Karras,
    Noise,
    Polynomial,
    Quadratic,
    Restart,
    UniformT,
    trace,
    trajectory,
)
from undiffuse.grid import AYS_LEVELS, beta_quantile, check_levels

D64 = torch.float64


@pytest.mark.parametrize(("a", "b"), [(0.6, 0.6), (1.0, 1.0), (2.0, 0.3), (0.5, 5.0), (7.0, 3.0)])
def test_beta_quantiles_are_scipys(a, b):
    from scipy.stats import beta

    u = torch.linspace(0, 1, 41, dtype=D64)
    assert torch.allclose(beta_quantile(u, a, b), torch.tensor(beta.ppf(u.numpy(), a, b)), atol=1e-12)


def test_beta_1_1_and_polynomial_1_are_uniform_in_time():
    for grid in (Beta(1.0, 1.0), Polynomial(1.0)):
        for ours, want in zip(grid(Flow(3), 9), UniformT()(Flow(3), 9), strict=True):
            assert float(ours.lam) == pytest.approx(float(want.lam), abs=1e-9)


def test_quadratic_times():
    times = [float(Flow().time(level.lam)) for level in Quadratic()(Flow(), 4)]
    assert times == pytest.approx([1, 9 / 16, 1 / 4, 1 / 16, 0])


def test_exponential_is_geometric():
    levels = Exponential(0.01, 80.0)(EDM(0.01, 80.0), 6)[:-1]
    ratio = [float(b.sigma / a.sigma) for a, b in itertools.pairwise(levels)]
    assert ratio == pytest.approx([(0.01 / 80) ** (1 / 5)] * 5)


@pytest.mark.parametrize("model", AYS_LEVELS)
def test_ays_visits_the_published_levels_and_is_log_linear_between(model):
    known = AYS_LEVELS[model]
    ten = [float(level.sigma / level.alpha) for level in AYS(model)(VP(), 10)]
    assert ten == pytest.approx([*known[:-1], 0.0])
    twenty = [float(level.sigma / level.alpha) for level in AYS(model)(VP(), 20)]
    assert twenty[1] == pytest.approx(math.sqrt(known[0] * known[1]))


def test_restart_goes_back_up_as_often_as_asked():
    grid = Restart(sigma_min=0.01, low=0.06, high=0.3, times=3, inner=2)
    levels, rises = check_levels(grid(EDM(0.01, 80.0), 9))
    assert len(levels) == 10 + 3 * 3
    assert sum(rises) == 3
    ratio = [float(level.sigma / level.alpha) for level in levels]
    for i, up in enumerate(rises):
        if up:
            assert ratio[i] <= 0.06
            assert ratio[i + 1] == pytest.approx(0.3)
    base = [float(level.sigma / level.alpha) for level in Karras(sigma_min=0.01)(EDM(0.01, 80.0), 9)]
    assert all(any(r == pytest.approx(b, abs=1e-12) for r in ratio) for b in base)


def test_restart_brings_the_std_nearer_to_the_truth():
    """Exact output moments: fresh noise and a second descent mend the std that a short descent lost."""
    schedule, variance = EDM(0.01, 80.0), torch.tensor([0.04])
    plain = trace(DDIM(), Karras(sigma_min=0.01)(schedule, 8)).gaussian(variance).variance
    again = trace(DDIM(), Restart(sigma_min=0.01, low=0.1, high=0.6, times=4, inner=4)(schedule, 8)).gaussian(variance)
    assert abs(float(again.variance) - 0.04) < abs(float(plain) - 0.04)


def test_restart_runs_in_the_driver_and_needs_noise():
    model, x = Gaussian(diagonal(0.3)), torch.randn(3, 1, dtype=D64) * 80
    levels = Restart(sigma_min=0.01)(EDM(0.01, 80.0), 10)
    driven = drain(trajectory(model, x, levels, Heun(), Noise(x.shape, dtype=D64)))
    assert torch.allclose(driven, trace(Heun(), levels).run(model, x, Noise(x.shape, dtype=D64)), atol=1e-12)
    with pytest.raises(InputError, match="rises"):
        drain(trajectory(model, x, levels, Heun()))


@pytest.mark.parametrize(
    "broken",
    [lambda: Polynomial(0.0), lambda: Polynomial(math.inf), lambda: Beta(0.0, 1.0), lambda: Beta(1.0, -1.0),
     lambda: AYS("sd3"), lambda: Restart(low=0.3, high=0.1), lambda: Restart(times=0), lambda: Exponential(1.0, 0.5),
     lambda: Restart(low=1e-5, high=2e-5)(EDM(), 8), lambda: Restart()(EDM(), 1), lambda: Quadratic()(VP(), 0),
     lambda: Beta()(Discrete.linear(), -3)],
)  # fmt: skip
def test_impossible_grids_are_refused(broken):
    with pytest.raises(InputError):
        broken()
