"""Learned variance in training: the bound's terms and their minimum against closed forms of Gaussian data."""

import math
import re

import pytest
import torch
from torch import nn

from tests.cases import diagonal
from tests.test_objective import MEAN, Affine, moments
from undiffuse import (
    EDM,
    HEADS,
    VE,
    VP,
    X0,
    Cosine,
    Denoiser,
    Discrete,
    EDMPrecond,
    Flow,
    Gaussian,
    InputError,
    Level,
    V,
    zero_terminal_snr,
)
from undiffuse.evals.bound import bound as evaluated
from undiffuse.level import interpolated, reverse_bounds
from undiffuse.nets import UNet
from undiffuse.sample import Noise
from undiffuse.train import Objective, Plan, train
from undiffuse.train.coupling import Immiscible
from undiffuse.train.objective import EDMWeight, LogNormal, MinSNRWeight, SNRWeight, UniformInLam, UniformTime
from undiffuse.train.variance import VARIANCES, VLB, Fixed, Hybrid, earlier

VARS = (0.05, 0.6, 1.0, 2.5)
SPECTRUM = diagonal(*VARS, mean=MEAN)
LEARNED = [name for name, kind in VARIANCES.items() if kind().learned]
CHAINS = {
    "iddpm": (Discrete.cosine(8), 8),
    "iddpm-strided": (Discrete.cosine(32), 8),
    "ddpm": (Discrete.linear(), 1000),
    "ddpm-zero-snr": (zero_terminal_snr(Discrete.linear(50)), 50),
    "vp": (VP(), 20),
    "cosine": (Cosine(), 1000),
    "flow": (Flow(2.0), 10),
    "edm": (EDM(0.01, 50.0), 12),
}


def starts(name):
    """The first times of chains: all that a table has, and some of a continuous schedule's."""
    schedule, steps = CHAINS[name]
    if isinstance(schedule, Discrete):
        return [1 - i / schedule.T for i in range(schedule.T // steps)]
    return [1 - u / steps for u in (1e-6, 0.3, 0.9)]


def chain(name, start):
    """The levels (steps,) of a chain from `start`, noisiest first, each 1 / steps of time before the last."""
    schedule, steps = CHAINS[name]
    return schedule.level(start - torch.arange(steps, dtype=torch.float64) / steps)


def one(level, i):
    return Level(level.alpha[i], level.sigma[i])


class Exact(nn.Module):
    """The exact denoiser of Gaussian data and its exact log-space fraction for the step to `then`, as a network."""

    def __init__(self, head, now, then, spectrum=SPECTRUM):
        super().__init__()
        self.mean = Affine(head, spectrum, now)
        var = Gaussian(spectrum).reverse(torch.zeros(1, len(spectrum.mean)).double(), now, then)[1][0]
        small, large = reverse_bounds(now, then)
        clean = bool(then.sigma == 0)
        self.v = nn.Parameter(torch.zeros_like(var) if clean else 2 * (var / small).log() / (large / small).log() - 1)

    def forward(self, x, time, cond):
        return torch.cat([self.mean(x, time, cond), self.v.expand(len(x), -1)], 1)


def model_of(net, head):
    return Denoiser(net, head, learned_variance=True)


def repeated(level, b):
    return Level(level.alpha.repeat(b), level.sigma.repeat(b))


def exact_terms(name, start, variance, pairs):
    """The loss (rows, steps) of the exact reverse chain's model at each level, for one (x0, eps) a step."""
    schedule, steps = CHAINS[name]
    levels, head = chain(name, start), X0(schedule.space)
    thens = [one(levels, i) for i in range(1, steps)] + [Level(1.0, 0.0)]
    columns = []
    for i, (then, (x0, eps)) in enumerate(zip(thens, pairs, strict=True)):
        now = one(levels, i)
        model = model_of(Exact(head, now, then), head)
        got = Objective(schedule, weight=SNRWeight(), variance=variance)(model, x0, eps, repeated(now, len(x0)))
        columns.append(got.loss.detach())
    return torch.stack(columns, 1)


@pytest.mark.parametrize("name", CHAINS)
def test_earlier_is_the_next_level_of_the_chain_and_clean_data_at_its_end(name):
    schedule, steps = CHAINS[name]
    for start in starts(name):
        levels = chain(name, start)
        then = earlier(schedule, levels, steps)
        assert torch.allclose(then.alpha[:-1], levels.alpha[1:], rtol=1e-7)
        assert torch.allclose(then.sigma[:-1], levels.sigma[1:], rtol=1e-7)
        assert (float(then.alpha[-1]), float(then.sigma[-1])) == (1, 0)
        assert (then.sigma[:-1] > 0).all()


def test_levels_off_the_schedule_step_towards_data():
    for schedule in (VP(), EDM(0.01, 50.0), Discrete.linear()):
        now = Level.at(torch.tensor([-9.0, 9.0]), schedule.space)
        then = earlier(schedule, now, 100)
        assert (then.lam > now.lam).all()
        assert float(then.sigma[1]) == 0


@pytest.mark.parametrize("name", [name for name in CHAINS if "zero" not in name and name != "cosine"])
def test_the_exact_chain_leaves_only_prior_and_decoder(name):
    """Its reverse steps are the true ones, so that the bound is the entropy and two divergences of Gaussians:
    KL(q(x_T) || N(0, sigma_T^2)) and E KL(q(x0 | x) || N(E[x0 | x], s^2)), s = sigma / alpha at the last level."""
    v, steps = SPECTRUM.variances, CHAINS[name][1]
    for start in starts(name)[:3]:
        loss = exact_terms(name, start, VLB(steps), [moments(VARS)] * steps).double()
        levels = chain(name, start)
        first, last = one(levels, 0), one(levels, -1)

        def divergence(ratio, off=0.0):
            return 0.5 * (ratio + off - 1 - ratio.log())

        noisy = (first.alpha / first.sigma) ** 2
        entropy = 0.5 * (2 * math.pi * math.e * v).log()
        prior = divergence(noisy * v + 1, noisy * MEAN**2)
        s2 = (last.sigma / last.alpha) ** 2
        decoder = divergence(v / (v + s2))
        fixed = 0.5 * noisy * (v + MEAN**2)  # the prior's term, in which nothing is learned
        assert float(loss.mean()) == pytest.approx(float((entropy + prior + decoder - fixed).mean()), rel=2e-5)


@pytest.mark.parametrize("name", ["iddpm", "vp", "flow", "edm"])
def test_terms_are_those_of_the_evaluated_bound(name):
    """With the same noise, sample by sample, in bits."""
    steps, g = CHAINS[name][1], torch.Generator().manual_seed(3)
    x0 = SPECTRUM.mean + SPECTRUM.variances.sqrt() * torch.randn(50, len(VARS), generator=g, dtype=torch.float64)
    levels = chain(name, starts(name)[-1])
    noise = Noise(x0.shape, 0, range(len(x0)), torch.float64)
    ours = exact_terms(name, starts(name)[-1], VLB(steps), [(x0, noise()) for _ in range(steps)]) / steps / math.log(2)
    theirs = evaluated(Gaussian(SPECTRUM), x0, [one(levels, i) for i in range(steps)], variance="learned")
    for term, column in zip(theirs.terms[1:], ours.T, strict=True):
        assert float(column.mean()) == pytest.approx(term.bits, rel=1e-4, abs=1e-6)
    prior = (0.5 * (levels.alpha[0] / levels.sigma[0] * x0) ** 2).mean(1) / math.log(2)
    assert torch.allclose(ours.double().sum(1) + prior, theirs.bits, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["iddpm", "vp", "flow"])
def test_a_levels_loss_does_not_depend_on_the_others_in_the_batch(name):
    schedule, steps = CHAINS[name]
    levels, head = chain(name, starts(name)[0]), V(schedule.space)
    model = model_of(lambda x, time, cond: torch.cat([x.sin(), x.cos()], 1), head)
    x0, eps = torch.randn(2, steps, 1, 3, 2)
    objective = Objective(schedule, variance=Hybrid(0.3, steps))
    whole = objective(model, x0, eps, levels).loss
    rows = [objective(model, x0[i : i + 1], eps[i : i + 1], repeated(one(levels, i), 1)).loss for i in range(steps)]
    assert whole.dtype == torch.float32
    assert whole.isfinite().all()  # equal infinities would count as close below
    assert torch.allclose(whole, torch.cat(rows), rtol=1e-6)


def free(name, i, head, off, v):
    """A network of free mean and variance at the chain's level i, its level, and the exact mean and variance there."""
    levels = chain(name, starts(name)[0])
    now, then = one(levels, i), one(levels, i + 1)
    net = Exact(head, now, then)
    right = net.v.detach().clone()
    with torch.no_grad():
        net.mean.gain += off
        net.v.copy_(torch.full_like(net.v, v))
    x = now.diffuse(*moments(VARS))
    return net, now, then, right, x, Gaussian(SPECTRUM).reverse(x, now, then)


POINTS = [("iddpm", 0), ("iddpm", 4), ("iddpm", 6), ("vp", 3), ("vp", 16), ("flow", 1), ("flow", 7), ("edm", 5)]
POINTS = [*POINTS, ("ddpm", 500), ("ddpm-zero-snr", 0)]


@pytest.mark.parametrize("variance", LEARNED)
@pytest.mark.parametrize(("name", "i"), POINTS)
def test_the_exact_posterior_is_stationary(variance, name, i):
    """With the exact expectation the gradient in mean and variance vanishes there, and nowhere close by."""
    schedule, steps = CHAINS[name]
    head = V(schedule.space)
    kind = Hybrid(0.1, steps) if variance == "hybrid" else VLB(steps)
    slopes = []
    for off, shift in ((0.0, 0.0), (0.05, 0.0), (0.0, 0.2)):
        net, now, _, right, _, _ = free(name, i, head, off, 0.0)
        net.v.data.copy_(right + shift)
        Objective(schedule, variance=kind)(model_of(net, head), *moments(VARS), repeated(now, 4)).loss.mean().backward()
        slopes.append((net.mean.gain.grad, net.v.grad))
    (mean, v), (mean_off, _), (_, v_off) = slopes
    assert (mean.abs() < 1e-4 * mean_off.abs()).all()
    assert (v.abs() < 1e-4 * v_off.abs()).all()
    assert (v_off > 0).all()


@pytest.mark.parametrize("variance", LEARNED)
@pytest.mark.parametrize("at", [-0.8, 1.5])
@pytest.mark.parametrize(("name", "i"), POINTS)
def test_descent_in_the_variance_ends_in_the_exact_one(variance, at, name, i):
    schedule, steps = CHAINS[name]
    head = X0(schedule.space)
    net, now, then, _, x, (_, exact) = free(name, i, head, 0.0, at)
    kind = Hybrid(1.0, steps) if variance == "hybrid" else VLB(steps)
    objective, model = Objective(schedule, variance=kind), model_of(net, head)
    small, large = reverse_bounds(now, then)
    unit = float(2 / (large / small).log())  # of v in log variance, in which the loss has curvature 1/2 at its minimum
    for _ in range(60):
        net.v.grad = None
        objective(model, *moments(VARS), repeated(now, 4)).loss.mean().backward()
        slope = net.v.grad * unit * len(VARS) / steps  # (1 - exact / var) / 2
        net.v.data -= unit * torch.log(1 / (1 - 2 * slope).clamp(min=0.2))  # log var -> log exact
    assert torch.allclose(model.reverse(x, now, then)[1], exact, rtol=1e-5)


@pytest.mark.parametrize("variance", LEARNED)
@pytest.mark.parametrize(("name", "i"), [("iddpm", 4), ("vp", 10), ("flow", 4)])
def test_descent_in_both_ends_in_the_exact_mean_and_variance(variance, name, i):
    schedule, steps = CHAINS[name]
    head = V(schedule.space)
    net, now, then, _, x, (mean, exact) = free(name, i, head, 0.3, 0.5)
    kind = Hybrid(1.0, steps) if variance == "hybrid" else VLB(steps)
    objective, model = Objective(schedule, weight=SNRWeight(), variance=kind), model_of(net, head)
    optimiser = torch.optim.Adam(net.parameters(), 0.05, betas=(0.9, 0.99))
    rate = torch.optim.lr_scheduler.ExponentialLR(optimiser, 0.99)
    for _ in range(900):
        optimiser.zero_grad()
        objective(model, *moments(VARS), repeated(now, 4)).loss.mean().backward()
        optimiser.step()
        rate.step()
    got, var = model.reverse(x, now, then)
    assert torch.allclose(got, mean, rtol=1e-3, atol=1e-3)
    assert torch.allclose(var, exact, rtol=1e-3)


@pytest.mark.parametrize("weight", [EDMWeight(), SNRWeight(), MinSNRWeight()], ids=repr)
@pytest.mark.parametrize("name", HEADS)
def test_hybrid_leaves_the_means_gradient_alone(name, weight):
    """And adds the bound's term to the loss, whatever its weight; the plain objective is that of the first half."""
    head, g = HEADS[name](), torch.Generator().manual_seed(0)
    mean, v = (nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 5)) for _ in range(2))
    x0, eps = torch.randn(2, 6, 5, generator=g)
    level = VP().level(torch.tensor([0.001, 0.02, 0.3, 0.5, 0.9, 1.0]))
    plain = Objective(VP(), weight=weight)(Denoiser(lambda x, time, cond: mean(x), head), x0, eps, level)
    plain.loss.mean().backward()
    gradients = [p.grad.clone() for p in mean.parameters()]
    mean.zero_grad()
    model = model_of(lambda x, time, cond: torch.cat([mean(x), v(x)], 1), head)
    both = Objective(VP(), weight=weight, variance=Hybrid(0.7, 50))(model, x0, eps, level)
    both.loss.mean().backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(mean.parameters(), gradients, strict=True))
    assert all(p.grad.abs().max() > 0 for p in v.parameters())
    assert torch.equal(both.error, plain.error)
    alone = Objective(VP(), weight=weight, variance=VLB(50))(model, x0, eps, level)
    assert torch.allclose(both.loss, plain.loss + 0.7 * alone.loss, rtol=1e-6)
    assert torch.equal(alone.error, plain.error)


def test_vlb_has_no_part_of_the_weight_and_trains_the_mean():
    net = nn.Linear(4, 8)
    model = model_of(lambda x, time, cond: net(x), V())
    x0, eps = torch.randn(2, 3, 4)
    level = VP().level(torch.tensor([0.02, 0.4, 0.9]))
    kinds = [Objective(VP(), weight=weight, variance=VLB(20)) for weight in (SNRWeight(), EDMWeight())]
    losses = [kind(model, x0, eps, level).loss for kind in kinds]
    assert torch.equal(*losses)
    losses[0].mean().backward()
    assert net.weight.grad[:4].abs().max() > 0


@pytest.mark.parametrize("variance", LEARNED)
@pytest.mark.parametrize("name", CHAINS)
def test_the_last_step_trains_no_variance_and_has_a_finite_gradient(name, variance):
    """Its term is Gaussian with the std sigma / alpha, whatever the fraction."""
    schedule, steps = CHAINS[name]
    level = one(chain(name, starts(name)[-1]), -1)
    head = X0(schedule.space)
    for fraction in (-1.0, 0.3, 1.0):
        guess = torch.tensor([[0.2, -0.4]], requires_grad=True)
        v = torch.full((1, 2), fraction, requires_grad=True)
        model = model_of(lambda x, time, cond, g=guess, v=v: torch.cat([g, v], 1), head)
        x0, eps = torch.tensor([[0.25, -0.3]]), torch.tensor([[1.0, -1.0]])
        kind = Hybrid(0.5, steps) if variance == "hybrid" else VLB(steps)
        got = Objective(schedule, weight=SNRWeight(), variance=kind)(model, x0, eps, repeated(level, 1))
        got.loss.sum().backward()
        decoder = torch.distributions.Normal(guess.detach().double(), level.sigma / level.alpha)
        vlb = -steps * decoder.log_prob(x0.double()).mean()
        plain = (level.alpha / level.sigma) ** 2 * (guess - x0).detach().square().mean()
        right = plain + 0.5 * vlb if variance == "hybrid" else vlb
        assert float(got.loss.detach()) == pytest.approx(float(right), rel=1e-5)
        assert torch.equal(v.grad, torch.zeros(1, 2))
        assert guess.grad.isfinite().all()
        share = 1 if variance == "hybrid" else steps / 2  # the bound holds the mean of hybrid
        slope = share * (level.alpha / level.sigma) ** 2
        assert torch.allclose(guess.grad, (slope * (guess - x0)).detach().float(), rtol=1e-4)
        assert guess.grad.abs().min() > 0


def test_the_interpolated_variance_has_its_ends_and_the_geometric_mean():
    small, large = torch.tensor(0.01).double(), torch.tensor(0.04).double()
    assert interpolated(torch.tensor([-1.0, 0.0, 1.0]), small, large).tolist() == pytest.approx([0.01, 0.02, 0.04])


def test_networks_and_variances_must_agree():
    plain, learned = (Denoiser(lambda x, time, cond: x, V(), learned_variance=wide) for wide in (False, True))
    with pytest.raises(InputError, match=r"fixed does not train: choose variance = hybrid or vlb.*learned_variance"):
        Objective(VP()).check(learned)
    for kind in (Hybrid(), VLB(100)):
        with pytest.raises(InputError, match=r"does not predict: build it with learned_variance = true.*fixed"):
            Objective(VP(), UniformTime(), variance=kind).check(plain)
        Objective(VP(), UniformTime(), variance=kind).check(learned)
        with pytest.raises(InputError, match=r"independent of the data.*Immiscible.*variance = fixed"):
            Objective(VP(), UniformTime(), coupling=Immiscible(), variance=kind).check(learned)
    Objective(VP(), variance=Fixed()).check(plain)


@pytest.mark.parametrize("name", CHAINS)
def test_vlb_needs_levels_uniform_in_time_and_hybrid_does_not(name):
    schedule, steps = CHAINS[name]
    model = Denoiser(lambda x, time, cond: x, V(), learned_variance=True)
    Objective(schedule, UniformTime(0.4 / steps), variance=VLB(steps)).check(model)
    Objective(schedule, LogNormal(), variance=Hybrid(steps=steps)).check(model)
    with pytest.raises(InputError, match=r"uniform in time.*choose levels=uniform-time.*t_min=.*hybrid"):
        Objective(schedule, LogNormal(), variance=VLB(steps)).check(model)


def test_vlb_takes_what_amounts_to_uniform_time_and_refuses_times_that_leave_out_the_last_step():
    model = Denoiser(lambda x, time, cond: x, V(), learned_variance=True)
    Objective(VE(), UniformInLam(-9.0, 9.0), variance=VLB(50)).check(model)
    with pytest.raises(
        InputError, match=r"levels\.t_min=0\.0004 .UniformTime; at most 0\.0005., fewer variance\.steps"
    ):
        Objective(VP(), UniformTime(1e-3), variance=VLB(1000)).check(model)


@pytest.mark.parametrize("kind", [Hybrid, VLB])
def test_steps_must_fit_the_table(kind):
    model = Denoiser(lambda x, time, cond: x, V(), learned_variance=True)
    with pytest.raises(
        InputError, match=r"divide the table's 50 levels .schedule\.T., got 1000: give variance\.steps=50, its own"
    ):
        Objective(Discrete.linear(50), UniformTime(), variance=kind(steps=1000)).check(model)
    Objective(Discrete.linear(50), UniformTime(), variance=kind(steps=25)).check(model)
    for steps in (1, 0, -3, 10**9):
        with pytest.raises(InputError, match=rf"steps must be from 2 to 1000000, got {steps}"):
            kind(steps=steps)


@pytest.mark.parametrize("weight", [0.0, -1.0, 1e300, math.inf, math.nan])
def test_an_impossible_weight_is_refused(weight):
    with pytest.raises(InputError, match=re.escape(f"got {weight}")):
        Hybrid(weight)


@pytest.mark.parametrize("variance", [Hybrid(1.0, 5), VLB(5)], ids=["hybrid", "vlb"])
def test_a_network_trains_on_white_gaussian_data(variance):
    """Its loss falls towards that of the exact chain, and its variance towards the exact one."""
    v, n = 0.02, 256
    x0 = math.sqrt(v) * torch.randn(n, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    head = EDMPrecond(math.sqrt(v))
    torch.manual_seed(0)
    model = Denoiser(UNet(1, width=16, mults=(1,), depth=1, learned_variance=True), head, learned_variance=True)
    objective = Objective(VP(), UniformTime(0.01), sigma_data=math.sqrt(v), variance=variance)
    exact = Gaussian(diagonal(*[v] * 16))

    def off():
        """Mean |log(variance / exact)| over the middle of the schedule."""
        model.eval()
        values = []
        with torch.no_grad():
            for t in (0.3, 0.5, 0.7):
                now, then = VP().level(t), VP().level(t - 0.2)
                x = now.diffuse(x0[:32], torch.randn(32, 1, 4, 4))
                right = exact.reverse(x.flatten(1), now, then)[1].reshape(x.shape)
                values.append((model.reverse(x, now, then)[1] / right).log().abs().mean())
        return float(torch.stack(values).mean())

    before = off()
    states = list(train(model, x0, objective, Plan(steps=120, batch=32, lr=4e-3, warmup=5)))
    losses = torch.tensor([state.loss for state in states])
    assert losses[-20:].mean() < losses[:20].mean()
    assert off() < 0.3 * before
