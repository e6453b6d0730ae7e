"""The simulations of `benchmarks/scale` against closed forms, and its account of our order against the order."""

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks" / "scale"))
import clusters

from undiffuse.data import Windowed
from undiffuse.data.order import shard_of


@pytest.mark.parametrize("n", [1, 7, 1000])
def test_expected_maximum_of_known_distributions(n):
    uniform = clusters.expected_maximum(lambda t: np.clip(t, 0, 1), n)
    exponential = clusters.expected_maximum(lambda t: -np.expm1(-t), n)
    assert uniform == pytest.approx(n / (n + 1), abs=1e-3)
    assert exponential == pytest.approx(sum(1 / k for k in range(1, n + 1)), rel=1e-3)


@pytest.mark.parametrize(("cv", "share", "slow"), [(0.1, 0.0, 1.0), (0.05, 0.01, 1.3), (0.5, 0.0, 1.0)])
@pytest.mark.parametrize("n", [1, 64, 1024])
def test_straggling_simulated_is_the_integral(n, cv, share, slow):
    mean, error = clusters.simulated_inflation(n, cv, share, slow, steps=2000, seed=1)
    assert abs(mean - clusters.inflation(n, cv, share, slow)) < 4.5 * error


def test_one_rank_has_mean_one_and_slow_ranks_alone_have_a_closed_form():
    assert clusters.inflation(1, 0.3) == pytest.approx(1, abs=1e-4)
    assert clusters.inflation(1, 0.1, 0.2, 1.5) == pytest.approx(1.1, abs=1e-4)
    assert clusters.inflation(100, 1e-3, 0.01, 2.0) == pytest.approx(1 + (1 - 0.99**100), abs=5e-3)
    assert clusters.inflation(100, 0, 0.01, 2.0) == pytest.approx(1 + (1 - 0.99**100))


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize(("usual", "stall"), [(0.5, 2.0), (1.5, 3.0), (0.2, 0.3)])
def test_late_batches_cost_what_the_formula_says(depth, usual, stall):
    n, steps, share, work = 16, 20_000, 0.01, 1.0
    got = clusters.paced(clusters.stalls(n, steps, usual, stall, share), work, depth)
    some = 1 - (1 - share) ** n
    error = stall * math.sqrt(some * (1 - some) / steps)
    assert abs(got - clusters.paced_exactly(n, work, usual, stall, share, depth)) < 5 * error + 1e-3


def test_reading_far_ahead_hides_stalls_and_never_more_than_the_mean():
    n, steps = 8, 4000
    costs = [clusters.paced(clusters.stalls(n, steps, 0.5, 10.0, 0.01), 1.0, d) for d in (0, 1, 4, 16, 64, 1024)]
    assert costs == sorted(costs, reverse=True)
    assert costs[-1] == pytest.approx(clusters.paced_exactly(n, 1.0, 0.5, 10.0, 0.01, 1024), abs=0.01)
    slow = clusters.paced(clusters.stalls(n, steps, 1.5, 0.0, 0.0), 1.0, 64)
    assert slow == pytest.approx(1.5, abs=1e-3)  # a reader that is slower than the step sets the pace


def test_stalls_at_window_ends_add_up_unless_they_fall_together():
    n, period, stall, work = 10, 1000, 50.0, 1.0
    together = clusters.paced(clusters.boundaries(n, 5 * period, period, 0.1, stall, 0.0), work, 1)
    apart = clusters.paced(clusters.boundaries(n, 5 * period, period, 0.1, stall, 1.0), work, 1)
    assert together == pytest.approx(work + (stall + 0.1 - work) / period, rel=1e-3)
    assert apart == pytest.approx(work + n * (stall + 0.1 - work) / period, rel=1e-2)


@pytest.mark.parametrize(("cost", "restart", "mtbf"), [(60, 600, 86400), (300, 900, 7200), (60, 300, 600)])
@pytest.mark.parametrize("interval", [120, 1800])
def test_restarts_simulated_are_daly_s_formula(interval, cost, restart, mtbf):
    got = clusters.simulated_goodput(interval, cost, restart, mtbf, pieces=100_000)
    assert got == pytest.approx(clusters.goodput(interval, cost, restart, mtbf), rel=0.03)


@pytest.mark.parametrize(("cost", "mtbf"), [(1, 1e6), (60, 86400), (300, 900), (500, 400)])
def test_the_best_interval_is_the_best(cost, mtbf):
    best = clusters.best_interval(cost, mtbf)
    most = clusters.goodput(best, cost, 100, mtbf)
    assert all(clusters.goodput(best * f, cost, 100, mtbf) < most for f in (0.7, 0.97, 1.03, 1.4))
    if cost < mtbf / 1e3:  # Young's is the limit
        assert best == pytest.approx(clusters.young(cost, mtbf), rel=0.03)


def test_mixing_of_windows_is_that_of_our_order():
    shards, samples, window, lanes, batch = 64, 50, 4, 4, 32
    order = Windowed((samples,) * shards, 5, window, lanes)
    rows = torch.stack([order.rows(s, batch) for s in range(1, shards * samples // batch + 1)])
    shard = shard_of(order.counts, rows)
    whole = [b for k, b in enumerate(shard) if (k * batch // lanes) % (window * samples) <= window * samples - 8]
    mixed = np.mean([len(b.unique()) for b in whole])
    alike = np.mean([(b[:, None] == b).float().sum() - batch for b in whole]) / (batch * (batch - 1))
    assert mixed == pytest.approx(lanes * clusters.shards_mixed(batch // lanes, window, samples), rel=0.02)
    assert alike == pytest.approx(clusters.same_shard(batch, lanes, window, samples), rel=0.05)
    assert clusters.shards_mixed(1, 4, 50) == pytest.approx(1)
