"""Noise assigned to the samples of a batch: a permutation, optimal, Gaussian, and transport in the limit."""

import itertools
import math

import pytest
import scipy.stats
import torch
from torch import nn

from undiffuse import VP, Cond, Denoiser, Label, V
from undiffuse.train import COUPLINGS, EMA, Objective, Plan, train
from undiffuse.train.coupling import Immiscible

COUPLE = Immiscible()


def batch(b, *shape, seed=0):
    """Gaussian data of mean 0.4 and std 0.7, and noise."""
    x0, eps = torch.randn(2, b, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return 0.4 + 0.7 * x0, eps


def distance(x0, eps):
    """The mean squared length of the paths."""
    return float((x0 - eps).flatten(1).square().sum(1).mean())


def rows(x):
    return sorted(x.flatten(1).tolist())


@pytest.mark.parametrize("kind", COUPLINGS)
@pytest.mark.parametrize("shape", [(1,), (3,), (2, 4, 4)])
def test_the_batch_has_the_same_noise_in_another_order(shape, kind):
    x0, eps = batch(12, *shape)
    for cond in (None, Label(3)(torch.arange(12) % 3)):
        found = COUPLINGS[kind]()(x0.float(), eps.float(), cond)
        assert rows(found) == rows(eps.float())
        assert torch.equal(found, COUPLINGS[kind]()(x0.float(), eps.float(), cond))
        assert torch.equal(found, eps.float()) == (kind == "independent")


@pytest.mark.parametrize("seed", range(8))
def test_no_permutation_has_shorter_paths(seed):
    x0, eps = batch(5, 3, seed=seed)
    least = min(distance(x0, eps[list(order)]) for order in itertools.permutations(range(5)))
    assert distance(x0, COUPLE(x0, eps)) == pytest.approx(least, rel=1e-12)
    assert least < distance(x0, eps)


def test_in_one_dimension_it_sorts():
    """The comonotone coupling: the k-th smallest noise meets the k-th smallest sample."""
    x0, eps = batch(100, 1)
    found = COUPLE(x0, eps)
    assert torch.equal(found[x0[:, 0].argsort(), 0], eps[:, 0].sort().values)


def test_each_condition_keeps_its_noise_and_is_matched_by_itself():
    x0, eps = batch(30, 2)
    labels = torch.arange(30) % 3
    found = COUPLE(x0, eps, Label(3)(labels))
    for label in range(3):
        mine = labels == label
        assert torch.equal(found[mine], COUPLE(x0[mine], eps[mine]))
    across = Immiscible(within_class=False)(x0, eps, Label(3)(labels))
    assert torch.equal(across, COUPLE(x0, eps))
    assert distance(x0, across) < distance(x0, found) < distance(x0, eps)


def test_conditions_are_the_same_when_all_their_parts_are():
    """Of vectors 0 0 1 1 and maps 0 0 0 1 only the first two samples have one condition."""
    x0, eps = torch.tensor([[0.0], [1.0], [2.0], [3.0]]), torch.tensor([[1.0], [0.0], [-1.0], [-2.0]])
    cond = Cond(vector=torch.tensor([[0.0], [0], [1], [1]]), spatial=torch.tensor([0.0, 0, 0, 1]).reshape(4, 1, 1, 1))
    assert COUPLE(x0, eps, cond).flatten().tolist() == [0.0, 1.0, -1.0, -2.0]


@pytest.mark.parametrize("within", [True, False])
def test_the_noise_of_a_sample_stays_gaussian(within):
    """Over many batches, that of one row: exchangeable samples get each of the batch's draws equally often."""
    cond, couple = Label(2)(torch.arange(8) % 2), Immiscible(within)
    noise = torch.stack([couple(*batch(8, 2, seed=seed), cond)[3] for seed in range(3000)])
    for element in (*noise.T, (noise[:, 0] + noise[:, 1]) / math.sqrt(2)):
        assert scipy.stats.kstest(element.numpy(), "norm").pvalue > 0.01
    assert torch.allclose(noise.T.cov(), torch.eye(2).double(), atol=4 * math.sqrt(2 / 3000))


@pytest.mark.parametrize(("within", "shift"), [(True, 0.0), (False, 1.0)])
def test_across_classes_noise_would_not_be_gaussian_given_the_class(within, shift):
    """Two far classes in one dimension: the right one would get the upper half of noise, of mean sqrt(2 / pi)."""
    labels, found = torch.arange(64) % 2, []
    for seed in range(60):
        eps = batch(64, 1, seed=seed)[1]
        x0 = 50.0 * labels[:, None] + batch(64, 1, seed=1000 + seed)[0]
        found.append(Immiscible(within)(x0, eps, Label(2)(labels))[labels == 1])
    mean = float(torch.cat(found).mean())
    assert mean == pytest.approx(shift * math.sqrt(2 / math.pi), abs=4 / math.sqrt(60 * 32))


def test_paths_tend_to_the_wasserstein_distance_of_gaussians():
    """x0 = m + s eps in the limit, of mean squared length m^2 + (s - 1)^2; independent pairs have m^2 + s^2 + 1."""
    pairs = [batch(300, 1, seed=seed) for seed in range(40)]
    coupled = [COUPLE(x0, eps) for x0, eps in pairs]
    length = sum(distance(x0, found) for (x0, _), found in zip(pairs, coupled, strict=True)) / 40
    assert length == pytest.approx(0.4**2 + 0.3**2, abs=0.04)
    assert sum(distance(x0, eps) for x0, eps in pairs) / 40 == pytest.approx(0.4**2 + 0.7**2 + 1, abs=0.05)
    x0, eps = (torch.cat(part) for part in ([x for x, _ in pairs], coupled))
    inner = eps.abs() < 1.5
    assert float((x0 - 0.4 - 0.7 * eps)[inner].square().mean()) < 0.03


class Spy(nn.Module):
    """Notes x and its condition; at lam = 0 in VP x is (x0 + eps) / sqrt(2)."""

    def __init__(self):
        super().__init__()
        self.w, self.seen = nn.Parameter(torch.zeros(1)), []

    def forward(self, x, time, cond):
        self.seen.append((x.detach().clone(), cond.vector))
        return self.w * x


@pytest.mark.parametrize("kind", COUPLINGS)
def test_the_loop_couples_by_conditions_that_are_not_dropped_yet(kind):
    """The network's x is that of the coupled noise, recovered from independent noise of the same seed."""
    x, labels = torch.randn(8, 3), torch.arange(8) % 2

    def seen(coupling):
        net = Spy()
        model = Denoiser(net, V())
        objective = Objective(VP(), coupling=COUPLINGS[coupling]())
        plan = Plan(steps=1, batch=8, cond_dropout=0.5)
        (state,) = train(model, x, objective, plan, cond=Label(2)(labels), seed=4, ema=EMA(model))
        level = VP().level(VP().time(state.lam))
        x0 = x[state.ids]
        return x0, (net.seen[0][0].double() - level.alpha[:, None] * x0) / level.sigma[:, None], state.ids

    x0, eps, ids = seen("independent")
    found = seen(kind)[1]
    assert torch.allclose(found, COUPLINGS[kind]()(x0, eps, Label(2)(labels[ids])), atol=1e-4)
