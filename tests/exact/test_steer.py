"""Particle steering against closed forms: solvers leave Gaussian data Gaussian, whose tilts by quadratics are known."""

import math

import pytest
import torch

from tests.cases import diagonal, drain
from undiffuse import (
    DDIM,
    DDPM,
    VP,
    Ancestral,
    Counter,
    DPMpp2M,
    Gaussian,
    InputError,
    Level,
    Noise,
    PredictorCorrector,
    Restart,
    SASolver,
    UniformLam,
    trajectory,
)
from undiffuse.restore import MMPS, Matrix, Problem, steer
from undiffuse.restore.steer import systematic
from undiffuse.sample import moments

PRIOR = Gaussian(diagonal(0.5, 1.5, mean=0.3))
LEVELS = UniformLam(lam_max=3.0)(VP(), 10)
SLOPE, CURVE = torch.tensor([1.0, -0.5]).double(), torch.tensor([0.8, 0.0]).double()


def reward(x0):
    return (SLOPE * x0 - 0.5 * CURVE * x0**2).sum(1)


def tilted(mean, variance):
    """(log E[exp(reward)], mean of the tilted Gaussian) for independent elements."""
    wide = 1 + CURVE * variance
    log_norm = -0.5 * wide.log() + (SLOPE * mean + SLOPE**2 * variance / 2 - CURVE * mean**2 / 2) / wide
    return log_norm.sum(), (mean + SLOPE * variance) / wide


def steered(n, k, solver, levels=LEVELS, first=0, **kw):
    noise = Noise((n * k, 2), 7, range(first * k, (first + n) * k), torch.float64)
    kw = {"reward": reward} | kw
    return steer(PRIOR, levels[0].sigma * noise(), levels, solver, noise, particles=k, first=first, **kw)


def plain(rows):
    return lambda: torch.randn(rows, 2).double()


def chain(solver, levels):
    start = torch.zeros(2).double(), (levels[0].sigma ** 2).expand(2)
    return moments(PRIOR, levels, solver, 60, *start)


CASES = {
    "ddpm": (DDPM(), LEVELS, {}),
    "always": (DDPM("large"), LEVELS, {"threshold": 1.0}),
    "never": (DDPM(), LEVELS, {"threshold": 0.0}),
    "seldom": (DDIM(1.0), LEVELS, {"every": 3}),
    "history": (DPMpp2M(eta=1.0), LEVELS, {}),
    "more history": (SASolver(), LEVELS, {"threshold": 0.9}),
    "ancestral": (Ancestral(DPMpp2M()), LEVELS, {}),
    "langevin": (PredictorCorrector(), LEVELS, {}),
    "up and down": (DDPM(), Restart(low=0.3, high=2.0)(VP(), 10), {}),
    "without noise": (DPMpp2M(), LEVELS, {"threshold": 0.0}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_normaliser_is_unbiased_and_so_are_weighted_sums(case):
    """Over 400 runs, within 3 standard errors of the closed form of what the chain makes; no bias for few particles."""
    solver, levels, kw = CASES[case]
    found, (mean, variance) = steered(400, 8, solver, levels, **kw), chain(solver, levels)
    log_norm, tilted_mean = tilted(mean, variance)
    each = found.log_norm.exp()
    assert float(each.mean()) == pytest.approx(float(log_norm.exp()), abs=3 * float(each.std()) / 20)
    sums = each[:, None] * (found.log_weights.exp()[..., None] * found.x).sum(1)
    error = (sums.mean(0) - log_norm.exp() * tilted_mean) / (sums.std(0) / 20)
    assert float(error.abs().max()) < 3.5
    if kw.get("threshold", 0.5):
        assert found.resampled.any()


@pytest.mark.parametrize("solver", [DDPM(), DDPM("large"), DDIM(0.7), DPMpp2M(eta=1.0)])
@pytest.mark.parametrize("threshold", [0.0, 0.7])
def test_a_proposal_changes_the_steps_and_not_what_is_estimated(solver, threshold):
    """However wrong it is; also with a potential in the place of the reward on the way."""

    def proposal(x, level):
        return PRIOR(x, level) + 0.3 * level.sigma * torch.tensor([1.0, -0.5]).double()

    found = steered(
        400, 8, solver, threshold=threshold, proposal=proposal, potential=lambda x0, level: level.alpha * reward(x0)
    )
    log_norm, tilted_mean = tilted(*chain(solver, LEVELS))
    each = found.log_norm.exp()
    assert float(each.mean()) == pytest.approx(float(log_norm.exp()), abs=3 * float(each.std()) / 20)
    sums = each[:, None] * (found.log_weights.exp()[..., None] * found.x).sum(1)
    error = (sums.mean(0) - log_norm.exp() * tilted_mean) / (sums.std(0) / 20)
    assert float(error.abs().max()) < 3.5


def test_the_exact_posterior_as_proposal_leaves_all_weights_alike():
    """In the limit of small steps, which conditioned on y have the density p(y) / p(y | x0) times their own."""
    problem = Problem(Matrix(torch.tensor([[1.0, 1.0]]).double()), torch.tensor([[2.0]]).double().expand(512, -1), 0.4)

    def likelihood(x0):
        return -problem.residual(x0).square().sum(1) / (2 * problem.std**2)

    shares = {}
    for steps in (30, 120):
        levels, spread = UniformLam()(VP(), steps), []
        for proposal in (None, MMPS(iterations=1)(PRIOR, problem)):
            x = torch.randn(512, 2).double()
            noise = plain(512)
            kw = {"particles": 512, "threshold": 0.0, "proposal": proposal}
            spread.append(float(steer(PRIOR, x, levels, DDPM("large"), noise, likelihood, **kw).ess[-1]) / 512)
        shares[steps] = spread
    assert shares[30][1] > 2 * shares[30][0]
    assert shares[120][1] > max(0.8, shares[30][1])


def test_many_particles_are_a_sample_of_the_tilted_distribution():
    levels = UniformLam()(VP(), 30)
    found = steer(PRIOR, torch.randn(20_000, 2).double(), levels, DDPM(), plain(20_000), reward, particles=20_000)
    mean, variance = chain(DDPM(), levels)
    log_norm, tilted_mean = tilted(mean, variance)
    assert float(found.log_norm) == pytest.approx(float(log_norm), abs=0.05)
    weights = found.log_weights.exp()[0, :, None]
    assert torch.allclose((weights * found.x[0]).sum(0), tilted_mean, atol=0.05)
    spread = (weights * (found.x[0] - tilted_mean) ** 2).sum(0)
    assert torch.allclose(spread, variance / (1 + CURVE * variance), rtol=0.06)


def test_drawn_particles_follow_the_weights():
    found = steer(PRIOR, torch.randn(64_000, 2).double(), LEVELS, DDPM(), plain(64_000), reward, particles=16)
    _, tilted_mean = tilted(*chain(DDPM(), LEVELS))
    x = found.drawn(seed=1)
    assert x.shape == (4000, 2)
    assert torch.allclose(x.mean(0), tilted_mean, atol=0.07)
    assert bool((reward(found.best(reward)) >= reward(x)).all())


def test_without_resampling_weights_are_those_of_the_reward_at_the_end():
    """The changes of the reward from level to level telescope, whatever the denoiser said on the way."""
    found, noise = steered(5, 6, DDPM(), threshold=0.0), Noise((30, 2), 7, dtype=torch.float64)
    x = drain(trajectory(PRIOR, LEVELS[0].sigma * noise(), LEVELS, DDPM(), noise)).reshape(5, 6, 2)
    assert torch.equal(found.x, x)
    values = reward(x.flatten(0, 1)).reshape(5, 6)
    assert torch.allclose(found.log_weights, values.log_softmax(1), atol=1e-12)
    assert torch.allclose(found.log_norm, values.logsumexp(1) - math.log(6), atol=1e-12)
    assert torch.allclose(found.ess[-1], 1 / values.softmax(1).square().sum(1))


def test_a_group_depends_on_its_number_alone():
    whole, alone = steered(6, 8, DDPM(), threshold=1.0), steered(1, 8, DDPM(), first=4, threshold=1.0)
    assert whole.resampled[:, 4].any()
    assert torch.equal(whole.x[4], alone.x[0])
    assert torch.equal(whole.log_norm[4], alone.log_norm[0])
    assert torch.equal(whole.drawn(3)[4], alone.drawn(3, first=4)[0])
    other = steered(6, 8, DDPM(), seed=1, threshold=1.0)
    assert not torch.equal(whole.x, other.x)


def test_the_scale_multiplies_the_reward():
    double = steered(3, 8, DDPM(), reward=lambda x0: 2 * reward(x0))
    assert torch.equal(steered(3, 8, DDPM(), scale=2.0).x, double.x)


def test_a_constant_reward_changes_nothing():
    found, noise = steered(2, 4, DDPM(), reward=lambda x0: 0 * x0[:, 0] + 3.0), Noise((8, 2), 7, dtype=torch.float64)
    assert torch.equal(
        found.x.flatten(0, 1), drain(trajectory(PRIOR, LEVELS[0].sigma * noise(), LEVELS, DDPM(), noise))
    )
    assert torch.allclose(found.log_norm, torch.full((2,), 3.0).double())
    assert torch.allclose(found.ess, torch.full_like(found.ess, 4.0))


def test_no_graph_is_kept():
    weight = torch.ones(2, dtype=torch.float64, requires_grad=True)
    noise = Noise((8, 2), dtype=torch.float64)
    found = steer(lambda x, level: weight * PRIOR(x, level), noise(), LEVELS, DDPM(), noise, reward, particles=4)
    assert not found.x.requires_grad


def test_rewards_cost_no_evaluations():
    for solver, calls in ((DDPM(), 1), (DPMpp2M(eta=1.0), 1), (PredictorCorrector(corrections=2), 3)):
        count, noise = Counter(PRIOR), Noise((8, 2), dtype=torch.float64)
        steer(count, noise(), LEVELS, solver, noise, reward, particles=4)
        assert count.calls == calls * 10


def test_levels_per_sample_follow_their_particles():
    levels = [Level(level.alpha.expand(16, 1), level.sigma.expand(16, 1)) for level in LEVELS]
    assert torch.allclose(steered(2, 8, DDPM(), levels).x, steered(2, 8, DDPM()).x, atol=1e-12)


def test_systematic_resampling_copies_each_particle_as_its_weight_says():
    weights = torch.tensor([[0.1, 0.0, 0.25, 0.4, 0.25], [0.0, 1.0, 0.0, 0.0, 0.0]]).double()
    total = torch.zeros(2, 5)
    for u in (torch.arange(1000) + 0.5) / 1000:
        counts = torch.nn.functional.one_hot(systematic(weights, u.expand(2)), 5).sum(1)
        assert bool(((counts >= (5 * weights).floor()) & (counts <= (5 * weights).ceil())).all())
        total += counts
    assert torch.allclose(total / 1000, (5 * weights).float(), atol=2e-3)
    edge = systematic(
        torch.tensor([[1 / 3, 1 / 3, 1 / 3, 0.0]]).double() * (1 - 1e-9), torch.tensor([1 - 1e-12]).double()
    )
    assert edge[0, -1] == 2  # a particle of weight 0 is never taken


def test_bad_input_is_named():
    noise = Noise((8, 2), dtype=torch.float64)
    for change, why in [
        ({"particles": 3}, "whole groups of 3"),
        ({"particles": 0}, "particles"),
        ({"threshold": 2.0}, "threshold"),
        ({"every": 0}, "every"),
        ({"scale": math.inf}, "scale"),
        ({"reward": lambda x0: x0}, "finite numbers"),
        ({"reward": lambda x0: x0[:, 0] * math.nan}, "finite numbers"),
        ({"solver": DDIM()}, "stay copies"),
        ({"solver": PredictorCorrector(), "proposal": PRIOR}, "one evaluation a step"),
        ({"solver": DDIM(), "proposal": PRIOR, "threshold": 0.0}, "draws noise in every step"),
    ]:
        settings = {"solver": DDPM(), "reward": reward, "particles": 4} | change
        with pytest.raises(InputError, match=why):
            steer(PRIOR, noise(), LEVELS, noise=noise, **settings)
