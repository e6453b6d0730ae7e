"""Levels: algebra of predictions, forward steps, posteriors."""

import math

import pytest
import torch

from tests.cases import SCHEDULE_CASES, at
from undiffuse import InputError, Level, from_x0, reverse_transition, to_x0, transition
from undiffuse.level import PREDICTIONS

SPACES = ["vp", "flow", "ve"]


@pytest.mark.parametrize("space", SPACES)
def test_at_has_its_lam_and_lies_in_its_space(space):
    lams = torch.linspace(-9, 9, 37, dtype=torch.float64)
    level = Level.at(lams, space)
    invariant = {"vp": level.alpha**2 + level.sigma**2, "flow": level.alpha + level.sigma, "ve": level.alpha}[space]
    assert torch.allclose(level.lam, lams, atol=1e-12)
    assert torch.allclose(invariant, torch.ones_like(lams), atol=1e-14)


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("kind", PREDICTIONS)
def test_predictions_are_their_definitions_and_give_x0_back(kind, space):
    g = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 5, 3, generator=g, dtype=torch.float64)
    level = Level.at(torch.tensor([-3.0, -1, 0, 1, 4]), space).reshape(-1, 1)
    x = level.diffuse(x0, eps)
    expected = {
        "x0": x0,
        "eps": eps,
        "score": -eps / level.sigma,
        "v": level.alpha * eps - level.sigma * x0,
        "u": eps - x0,
    }[kind]
    assert torch.allclose(from_x0(kind, x0, x, level), expected, atol=1e-11)
    assert torch.allclose(to_x0(kind, expected, x, level), x0, atol=1e-11)


def test_score_is_the_gradient_of_the_log_density():
    x0, level = torch.tensor([0.3], dtype=torch.float64), Level(0.8, 0.6)
    x = torch.tensor([1.1], dtype=torch.float64, requires_grad=True)
    log_q = torch.distributions.Normal(level.alpha * x0, level.sigma).log_prob(x)
    (gradient,) = torch.autograd.grad(log_q, x)
    assert torch.allclose(from_x0("score", x0, x.detach(), level), gradient)


def test_undetermined_predictions_are_refused():
    with pytest.raises(InputError, match="alpha = 0"):
        to_x0("eps", torch.ones(1), torch.ones(1), Level(0, 1))
    with pytest.raises(InputError, match="sigma = 0"):
        from_x0("eps", torch.ones(1), torch.ones(1), Level(1, 0))
    assert to_x0("v", torch.full((1,), -2.0), torch.ones(1), Level(0, 1)) == 2
    assert to_x0("u", torch.full((1,), -1.0), torch.ones(1), Level(0, 1)) == 2


@pytest.mark.parametrize("name", SCHEDULE_CASES)
def test_single_steps_compose_to_the_marginal(name):
    """q(x_t | x_s) after q(x_s | x0) is q(x_t | x0): scales multiply, variances add."""
    schedule = SCHEDULE_CASES[name]
    clean, noisy = schedule.level(0.3), schedule.level(0.8)
    scale, std = transition(clean, noisy)
    assert torch.allclose(scale * clean.alpha, noisy.alpha)
    assert torch.allclose(scale**2 * clean.sigma**2 + std**2, noisy.sigma**2)


def test_ddpm_neighbours_step_by_their_beta():
    schedule = SCHEDULE_CASES["ddpm"]
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    for i in (1, 10, 500, 999):
        scale, std = transition(schedule.index(i - 1), schedule.index(i))
        assert math.isclose(float(std**2), float(betas[i]), rel_tol=1e-10)
        assert math.isclose(float(scale**2), 1 - float(betas[i]), rel_tol=1e-12)


@pytest.mark.parametrize("space", SPACES)
def test_posterior_is_bayes_rule(space):
    """q(x_s | x_t, x0) is proportional to q(x_t | x_s) q(x_s | x0): precisions add."""
    now, then = at([-1.3, 0.4], space)
    c_x, c_x0, std = reverse_transition(now, then)
    scale, step = transition(then, now)
    precision = scale**2 / step**2 + 1 / then.sigma**2
    assert torch.allclose(std**2, 1 / precision)
    assert torch.allclose(c_x, scale / step**2 / precision)
    assert torch.allclose(c_x0, then.alpha / then.sigma**2 / precision)


def test_posterior_at_both_ends_is_finite_and_right():
    c_x, c_x0, std = reverse_transition(Level(0, 1), Level(1, 0))
    assert (float(c_x), float(c_x0), float(std)) == (0, 1, 0)
    c_x, c_x0, std = reverse_transition(Level(0, 1), Level(0.6, 0.8))
    assert (float(c_x), float(c_x0), float(std)) == (0, float(Level(0.6, 0.8).alpha), float(Level(0.6, 0.8).sigma))
