"""Scores of sets of features against closed forms, exact expectations and their own intervals' promises."""

import math

import pytest
import scipy.stats
import torch

from undiffuse import InputError
from undiffuse.data import load_data
from undiffuse.evals import distances, estimate, frechet, kernel, memory, support
from undiffuse.evals.distances import (
    frechet_estimate,
    frechet_unbiased,
    kernel_estimate,
    sliced,
    sliced_estimate,
    sliced_unbiased,
)
from undiffuse.evals.estimate import Estimate, blocks, features, interval, jackknife, mean, share, some
from undiffuse.evals.memory import authentic, copy_ratio, copy_ratio_estimate, ct, near_copies, suspects
from undiffuse.evals.metrics import MEMORY, METRICS
from undiffuse.evals.support import (
    classes,
    coverage,
    density,
    nearest,
    precision,
    radii,
    recall,
    vendi,
    vendi_ratio,
)


def normal(*shape, seed=0):
    """Standard normal numbers in float64."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def shuffled(x, seed=5):
    """The rows of x in another order."""
    return x[torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))]


def holds(found, truth=0.0):
    """Whether the interval holds the truth."""
    return found.low <= truth <= found.high


@pytest.fixture(scope="module")
def digits():
    """Pixels of the digits (1797, 64)."""
    return load_data("digits").x.double().flatten(1)


# intervals


@pytest.mark.parametrize(("hits", "n"), [(0, 10), (3, 10), (10, 10), (250, 1000)])
def test_share_is_wilsons_interval(hits, n):
    expected = scipy.stats.binomtest(hits, n).proportion_ci(method="wilson")
    found = share(torch.arange(n) < hits)
    assert found == pytest.approx((hits / n, expected.low, expected.high), abs=1e-12)
    assert found.low <= found.value <= found.high


def test_mean_is_students_interval():
    x = normal(12)
    low, high = scipy.stats.t.interval(0.95, 11, float(x.mean()), scipy.stats.sem(x.numpy()))
    assert mean(x) == pytest.approx((float(x.mean()), low, high), rel=1e-12)
    assert interval(2.0, 1.0) == pytest.approx((2, 2 - 1.959964, 2 + 1.959964), abs=1e-6)


def test_jackknife_of_a_mean_is_its_standard_error_and_of_a_square_is_unbiased():
    """Without one row at a time both are identities; mean(x)^2 is biased by exactly var / n."""
    x = normal(20, 1)
    found = jackknife(lambda x: float(x.mean()), x, seed=0, count=20)
    assert (found.error, found.freedom) == (pytest.approx(float(x.std()) / math.sqrt(20)), 19)
    square = jackknife(lambda x: float(x.mean() ** 2), x, seed=0, count=20)
    assert square.unbiased == pytest.approx(float(x.mean() ** 2 - x.var() / 20), rel=1e-10)


def test_blocks_are_even_seeded_and_follow_their_rows():
    x = normal(70, 3)
    block, order = blocks(x, seed=4)[0], torch.randperm(70)
    assert block.bincount().tolist() == [3] * 6 + [2] * 26
    assert torch.equal(blocks(x[order], seed=4)[0], block[order])
    assert not torch.equal(blocks(x, seed=5)[0], block)
    assert not torch.equal(*blocks(x, x, seed=4))
    assert not any(torch.equal(*blocks(x[:, :1], x[:, :1], seed=k)) for k in range(8))
    assert int(blocks(normal(70, 600), seed=4)[0].max()) == 7
    assert blocks(normal(5, 2), normal(70, 2), seed=4)[1].bincount().tolist() == [14] * 5


def test_blocks_are_random_within_a_sorted_set():
    """Blocks that followed the order along some direction would be too alike, and the error too small."""
    x = torch.arange(3200.0, dtype=torch.float64)[:, None]
    means = torch.stack([x[blocks(x, seed=1)[0] == j].mean() for j in range(32)])
    assert float(means.std()) == pytest.approx(float(x.std()) / 10, rel=0.4)


def test_some_rows_are_the_same_however_sorted():
    x = normal(50, 3)
    order = torch.randperm(50)
    assert torch.equal(x[some(x, 20, 1)], x[order][some(x[order], 20, 1)])
    assert len(some(x, 20, 1).unique()) == 20
    assert some(x, 50, 1).tolist() == some(x, 60, 1).tolist() == list(range(50))


# Frechet


def halves(pool, n, seed):
    """Two disjoint random parts of n rows."""
    rows = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))
    return pool[rows[:n]], pool[rows[n : 2 * n]]


@pytest.mark.parametrize("which", ["digits", "gauss"])
def test_halves_of_one_set_have_no_frechet_distance(which, digits):
    """100 random splits: 0 lies within the 95 % interval of at least 90, and the mean is near 0 where the plain
    distance's is far from it."""
    unbiased, plain = [], []
    for seed in range(100):
        a, b = halves(digits if which == "digits" else normal(800, 32, seed=1000 + seed), 400, seed)
        unbiased.append(frechet_unbiased(a, b, seed))
        plain.append(frechet(a, b))
    assert sum(holds(found) for found in unbiased) >= 90
    assert abs(sum(found.value for found in unbiased)) < 0.05 * sum(plain)
    assert min(plain) > max(found.value for found in unbiased)
    assert sum(found.value < 0 for found in unbiased) > 20


def test_frechet_interval_holds_the_distance_of_two_gaussians():
    d = 16
    root = torch.diag(torch.linspace(0.3, 1.5, d).double())
    other, shift = root + 0.3 * normal(d, d, seed=1) / d, 0.4 * normal(d, seed=2) / math.sqrt(d)
    a, b = root @ root.T, other @ other.T
    cross = scipy.linalg.sqrtm((a @ b).numpy()).real.trace()
    truth = float(shift.square().sum() + a.trace() + b.trace()) - 2 * cross
    found, plain = [], []
    for seed in range(100):
        x, y = normal(300, d, seed=2 * seed) @ root.T, normal(400, d, seed=2 * seed + 1) @ other.T + shift
        found.append(frechet_unbiased(x, y, seed))
        plain.append(frechet(x, y))
    assert sum(holds(f, truth) for f in found) >= 90
    bias, usual = sum(f.value for f in found) / 100 - truth, sum(plain) / 100 - truth
    assert abs(bias) < 0.1 * usual
    assert truth > 0.1
    spread = float(torch.tensor([f.value for f in found]).std())
    assert sum(f.high - f.low for f in found) / 100 < 1.6 * 2 * 1.96 * spread


def test_frechet_interval_shrinks_and_tells_different_sets_apart(digits):
    def width(n, shift):
        found = [frechet_unbiased(normal(n, 8, seed=i), normal(n, 8, seed=50 + i) + shift, i) for i in range(8)]
        return sum(f.high - f.low for f in found)

    assert 3 < width(200, 0) / width(800, 0) < 5.5  # 1 / n
    assert 1.6 < width(200, 1) / width(800, 1) < 2.6  # 1 / sqrt(n)
    a, b = halves(digits, 400, 0)
    assert frechet_unbiased(a, b + 0.1).low > 0
    assert frechet_unbiased(a, 1.1 * b).low > 0


def test_frechet_without_bias_needs_two_samples_a_feature():
    b = normal(200, 64, seed=1)
    with pytest.raises(InputError, match="127 samples are too few for 64 features: take 128"):
        frechet_unbiased(normal(127, 64), b)
    assert holds(frechet_unbiased(normal(128, 64), b))


def test_frechet_estimate_is_the_plain_one_within_the_spread_of_repeats():
    found = [frechet_estimate(normal(100, 8, seed=i), normal(100, 8, seed=100 + i), i) for i in range(40)]
    assert found[0].value == frechet(normal(100, 8), normal(100, 8, seed=100))
    centre = sum(f.value for f in found) / 40
    assert sum(holds(f, centre) for f in found) >= 36
    assert sum(f.low > 0 for f in found) >= 36


def test_frechet_with_few_samples_is_the_one_with_roots():
    """The nuclear norm of fewer rows than features agrees with the root of covariances, of no full rank."""
    a, b = normal(20, 64), normal(30, 64, seed=1) + 0.1
    covs = [torch.cov(x.T) for x in (a, b)]
    cross = torch.linalg.eigvals(covs[0] @ covs[1]).real.clamp(min=0).sqrt().sum()
    expected = (a.mean(0) - b.mean(0)).square().sum() + covs[0].trace() + covs[1].trace() - 2 * cross
    assert frechet(a, b) == pytest.approx(float(expected), rel=1e-6)
    flat = torch.cat([normal(100, 3), torch.ones(100, 5)], 1)  # constant features
    assert frechet(flat, 2 * flat) == pytest.approx(frechet(flat[:, :3], 2 * flat[:, :3]) + 5, rel=1e-10)


# kernel


def test_kernel_error_is_the_jackknife_of_single_rows():
    a, b = normal(9, 3), normal(7, 3, seed=1) + 0.5
    variance = 0.0
    for x, other in ((a, b), (b, a)):
        n = len(x)
        without = torch.tensor([kernel(torch.cat([x[:i], x[i + 1 :]]), other) for i in range(n)], dtype=torch.float64)
        variance += (n - 1) / n * float((without - without.mean()).square().sum())
    found = kernel_estimate(a, b)
    assert found == pytest.approx(interval(kernel(a, b), math.sqrt(variance)), rel=1e-9)
    assert math.isnan(kernel_estimate(a[:2], b).low)


def test_kernel_is_the_same_in_chunks(monkeypatch):
    a, b = normal(50, 3), normal(41, 3, seed=1)
    whole = kernel_estimate(a, b)
    monkeypatch.setattr(distances_module(), "_CHUNK", 41 * 3)
    assert kernel_estimate(a, b) == pytest.approx(whole, rel=1e-10)


def distances_module():
    """The module, which the package's function of the same name hides."""
    import importlib

    return importlib.import_module("undiffuse.evals.distances")


def test_kernel_interval_holds_zero_for_halves(digits):
    found = [kernel_estimate(*halves(digits, 300, seed)) for seed in range(100)]
    assert sum(holds(f) for f in found) >= 90
    assert abs(sum(f.value for f in found)) < 0.1 * sum(f.high for f in found)
    a, b = halves(digits, 300, 0)
    assert kernel_estimate(a, b + 0.1).low > 0


# sliced


def test_sliced_distance_of_a_translation():
    """Every projection moves by the projection of m: |m|^2 / d in expectation over directions."""
    x, m = normal(40, 6), normal(6, seed=1)
    directions = distances_module()._directions(6, 512, 3)
    assert torch.allclose(directions.norm(dim=0), torch.ones(512).double())
    assert sliced(x, x + m, seed=3) == pytest.approx(float((m @ directions).square().mean()), rel=1e-10)
    assert sliced(x, x + m, directions=20000) == pytest.approx(float(m.square().sum()) / 6, rel=0.03)


def test_sliced_distance_in_one_dimension_and_of_scaled_sets():
    x = normal(30, 1)
    y = normal(30, 1, seed=1) + 1
    assert sliced(x, y) == pytest.approx(float((x.sort(0).values - y.sort(0).values).square().mean()), rel=1e-10)
    assert sliced(x, 3 * x, directions=1) == pytest.approx(4 * float(x.square().mean()), rel=1e-10)
    x = normal(30, 4)
    assert sliced(2 * x, 2 * x.square()) == pytest.approx(4 * sliced(x, x.square()), rel=1e-10)


@pytest.mark.parametrize(("n", "m"), [(6, 4), (7, 5), (3, 9), (1, 5)])
def test_sliced_distance_of_sets_of_different_size(n, m):
    """Repeating every row leaves the distribution as it is, and makes the sets equally large."""
    a, b = normal(max(n, 2), 3)[: max(n, 2)], normal(m, 3, seed=1)
    same = sliced(a.repeat_interleave(m, 0), b.repeat_interleave(len(a), 0), seed=2)
    assert sliced(a, b, seed=2) == pytest.approx(same, rel=1e-10)
    assert sliced(b, a, seed=2) == pytest.approx(same, rel=1e-10)
    assert same > 0.1


def test_sliced_distance_of_gaussians():
    """Projections of N(0, s^2) are N(0, s^2) along every direction: (s - t)^2."""
    assert sliced(normal(20000, 3), 2 * normal(20000, 3, seed=1), directions=32) == pytest.approx(1, abs=0.03)


def test_sliced_leaves_blocks_out_as_the_jackknife_does():
    a, b = normal(50, 3), normal(41, 3, seed=1)
    found = jackknife(lambda x, y: sliced(x, y, 16, seed=7), a, b, seed=7)
    assert sliced_unbiased(a, b, 16, 7) == pytest.approx(interval(found.unbiased, found.error, found.freedom), rel=1e-9)
    assert sliced_estimate(a, b, 16, 7) == pytest.approx(interval(found.whole, found.error, found.freedom), rel=1e-9)
    assert sliced_estimate(a, b, 16, 7).value == pytest.approx(sliced(a, b, 16, 7), rel=1e-12)


def test_sliced_interval_holds_zero_for_halves(digits):
    found = [sliced_unbiased(*halves(digits, 300, seed), 64, seed) for seed in range(100)]
    plain = sum(sliced(*halves(digits, 300, seed), 64, seed) for seed in range(100))
    assert sum(holds(f) for f in found) >= 90
    assert abs(sum(f.value for f in found)) < 0.2 * plain
    a, b = halves(digits, 300, 0)
    assert sliced_unbiased(a, b + 0.1, 64).low > 0


# precision, recall, density, coverage


def test_nearest_is_the_sorted_distance():
    x, y = normal(9, 4), normal(13, 4, seed=1)
    every = (x[:, None] - y).norm(dim=2).sort(dim=1)
    for k in (1, 2, 5):
        distance, row = nearest(x, y, k)
        assert torch.allclose(distance, every.values[:, k - 1], atol=1e-12)
        assert torch.equal(row, every.indices[:, k - 1])
    assert torch.allclose(radii(x, 2), (x[:, None] - x).norm(dim=2).sort(dim=1).values[:, 2], atol=1e-12)


def test_wide_features_have_the_same_distances():
    x, y = normal(20, 700) + 30, normal(30, 700, seed=1) + 30
    assert torch.allclose(nearest(x, y)[0], (x[:, None] - y).norm(dim=2).amin(1), rtol=1e-10)
    assert precision(y, y).value == 1


def test_supports_of_two_segments():
    """Fakes fill the left half of the real segment: all look real, and nearly half of the real data is out of reach."""
    real, fake = torch.arange(40.0)[:, None], torch.arange(20.0)[:, None] + 0.25
    assert precision(real, fake).value == 1
    assert recall(real, fake).value == pytest.approx(23 / 40)  # up to 19.25 + 3
    assert coverage(real, fake).value == pytest.approx(23 / 40)  # 20, 21 and 22 are within 3 of 19.25
    assert precision(real, fake + 100).value == recall(real, fake + 100).value == 0


def test_the_edge_of_a_neighbourhood_belongs_to_precision_only():
    real = torch.tensor([[0.0], [1.0], [2.0]])
    fake = torch.tensor([[3.0], [3.0]])
    assert precision(real, fake, k=1).value == 1
    assert density(real, fake, k=1).value == coverage(real, fake, k=1).value == 0


@pytest.mark.parametrize("d", [1, 5])
def test_density_and_coverage_of_equal_distributions(d):
    """A sample is nearer than the k-th of n - 1 neighbours with probability k / n, so the density is 1 on average; all
    k nearest of n - 1 + m are real with probability prod (n - 1 - i) / (n - 1 + m - i), and else covered."""
    n, m, k = 60, 40, 5
    sets = [(normal(n, d, seed=2 * i), normal(m, d, seed=2 * i + 1)) for i in range(200)]
    dense = torch.tensor([density(*pair).value for pair in sets])
    covered = torch.tensor([coverage(*pair).value for pair in sets])
    expected = 1 - math.prod((n - 1 - i) / (n - 1 + m - i) for i in range(k))
    for values, truth in ((dense, 1.0), (covered, expected)):
        error = float(values.std()) / math.sqrt(200)
        assert float(values.mean()) == pytest.approx(truth, abs=4 * error)
        assert error < 0.02


def test_recall_is_precision_of_exchanged_sets_and_intervals_are_wilsons():
    a, b = normal(50, 2), normal(60, 2, seed=1) * 0.7
    assert recall(a, b) == precision(b, a)
    inside = round(precision(a, b).value * 60)
    assert precision(a, b) == share(torch.arange(60) < inside)
    assert recall(a, b).value < precision(a, b).value < 1


def test_supports_are_the_same_in_chunks(monkeypatch):
    a, b = normal(50, 2), normal(60, 2, seed=1)
    measured = [f(a, b) for f in (precision, recall, density, coverage)]
    monkeypatch.setattr(support, "_CHUNK", 130)
    assert [f(a, b) for f in (precision, recall, density, coverage)] == measured


# Vendi, classes


def test_vendi_counts_what_differs():
    q = torch.linalg.qr(normal(12, 12))[0]
    assert vendi(q[:7]) == pytest.approx(7, rel=1e-10)
    assert vendi(q[:4].repeat(9, 1)) == pytest.approx(4, rel=1e-6)
    assert vendi(3 * q[:1].repeat(9, 1)) == pytest.approx(1, rel=1e-6)
    share_of = torch.tensor([0.75, 0.25]).double()
    expected = math.exp(-float((share_of * share_of.log()).sum()))
    assert vendi(q[[0, 0, 0, 1]]) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("shape", [(5, 9), (9, 5)])
def test_vendi_is_the_entropy_of_cosines(shape):
    x = normal(*shape)
    cosines = torch.nn.functional.cosine_similarity(x[:, None], x, dim=2)
    p = torch.linalg.eigvalsh(cosines / len(x)).clamp(min=1e-300)
    assert vendi(x) == pytest.approx(math.exp(-float((p * p.log()).sum())), rel=1e-8)
    assert vendi(x * torch.arange(1, len(x) + 1)[:, None]) == pytest.approx(vendi(x), rel=1e-10)


def test_vendi_ratio_holds_one_for_halves_and_falls_for_repeats(digits):
    centred = digits - digits.mean(0)
    pairs = [halves(centred, 200, seed) for seed in range(40)]
    assert sum(holds(vendi_ratio(*pair), 1) for pair in pairs) >= 36
    a, b = pairs[0]
    assert vendi_ratio(a, b[:100].repeat(2, 1)).value < 0.99
    assert vendi_ratio(a, b[:20].repeat(10, 1)).high < 0.8
    assert vendi_ratio(a, b[:50]).value > 0.95 > 0.9 > vendi(b[:50]) / vendi(a)
    with pytest.raises(InputError, match="1 of 200 features are 0"):
        vendi_ratio(torch.cat([a[:-1], 0 * a[:1]]), b)


def test_classes_are_compared_by_their_shares():
    real, fake = torch.tensor([0, 0, 1, 4] * 10), torch.tensor([0, 1, 1, 1] * 20)
    found = classes(real, fake)
    assert found.real.tolist() == [0.5, 0.25, 0, 0, 0.25]
    assert found.fake.tolist() == [0.25, 0.75, 0, 0, 0]
    assert found.distance == 0.5
    table = torch.tensor([[20, 10, 10], [20, 60, 0]]).double()
    expected = table.sum(1, keepdim=True) * table.sum(0) / table.sum()
    statistic = float(((table - expected) ** 2 / expected).sum())
    assert found.p_value == pytest.approx(scipy.stats.chi2.sf(statistic, 2), rel=1e-9)
    assert classes(real, real)[2:] == (0, pytest.approx(1))
    two = classes(torch.tensor([0, 1] * 20), torch.tensor([0, 1, 1, 1] * 10))
    assert two.p_value == pytest.approx(scipy.stats.chi2.sf(80 * (20 * 30 - 20 * 10) ** 2 / (40 * 40 * 30 * 50), 1))
    assert classes(real * 0, fake * 0)[2:] == (0, 1)


def test_classes_by_chance_have_uniform_p_values():
    draw = torch.Generator().manual_seed(0)
    p = [classes(*torch.randint(10, (2, 500), generator=draw)).p_value for _ in range(300)]
    assert scipy.stats.kstest(p, "uniform").pvalue > 0.01


@pytest.mark.parametrize("bad", [torch.tensor([0.5]), torch.tensor([-1]), torch.tensor([[1]]), torch.tensor([]).long()])
def test_classes_are_whole_numbers(bad):
    with pytest.raises(InputError, match="whole numbers"):
        classes(torch.tensor([1]), bad)


# memory


@pytest.mark.parametrize(
    ("d", "mutual"), [(1, 2 / 3), (2, 6 * math.pi / (8 * math.pi + 3 * math.sqrt(3)))], ids=["line", "plane"]
)
def test_authentic_share_of_fresh_draws(d, mutual):
    """A fresh draw is not authentic where it and its nearest training sample are nearest to each other, which in
    small sets and large is as likely as for the points of a Poisson process (Pickard 1982)."""
    draw = torch.Generator().manual_seed(0)
    found = [
        authentic(torch.rand(300, d, generator=draw), torch.rand(1000, d, generator=draw)).value for _ in range(40)
    ]
    assert sum(found) / 40 == pytest.approx(1 - mutual, abs=0.02)


def test_authentic_share_of_copies_and_far_samples():
    train = normal(50, 3)
    assert authentic(train, train).value == 0
    assert authentic(train[:10] + 1e-6, train).value == 0
    assert authentic(train + 100, train).value == 1
    half = authentic(torch.cat([train, train + 100]), train)
    assert half == share(torch.arange(100) < 50)


def test_ct_in_one_cell_is_the_mann_whitney_statistic():
    x, train, held_out = normal(60, 3), normal(80, 3, seed=1), normal(50, 3, seed=2) * 1.2
    far = [(z[:, None] - train).norm(dim=2).amin(1).numpy() for z in (x, held_out)]
    u, n, m = scipy.stats.mannwhitneyu(*far).statistic, 60, 50
    found = ct(x, train, held_out, cells=1)
    assert found.value == pytest.approx((u - n * m / 2) / math.sqrt(n * m * (n + m + 1) / 12), rel=1e-9)
    assert abs(found.value) > 1
    assert (found.high - found.low) / 2 == pytest.approx(1.959964, rel=1e-6)


def test_ct_counts_ties_by_half():
    x, y = torch.tensor([0, 0, 1, 2, 2]).double(), torch.tensor([0, 1, 1, 3, 3, 3]).double()
    p = scipy.stats.mannwhitneyu(x.numpy(), y.numpy(), use_continuity=False, method="asymptotic").pvalue
    assert memory._z(x, y) == pytest.approx(-scipy.stats.norm.isf(p / 2), rel=1e-9)
    assert memory._z(x * 0, y * 0) == 0


def test_ct_of_fresh_draws_is_standard_normal_and_its_interval_holds_zero():
    one, five = [], []
    for seed in range(100):
        x, train, held_out = (normal(150, 4, seed=3 * seed + i) for i in range(3))
        one.append(ct(x, train, held_out, cells=1, seed=seed).value)
        five.append(ct(x, train, held_out, cells=3, seed=seed))
    assert scipy.stats.kstest(one, "norm").pvalue > 0.01
    assert sum(holds(f) for f in five) >= 90
    assert all(abs(f.value) < 3 for f in five)


def test_ct_of_copies_and_of_samples_that_miss():
    x, train, held_out = normal(300, 4), normal(300, 4, seed=1), normal(300, 4, seed=2)
    assert ct(train, train, held_out).value < -10
    assert ct(train + 0.01, train, held_out).high < -5
    assert ct(2 * x, train, held_out).low > 3
    assert ct(torch.cat([train[:150], x[:150]]), train, held_out).high < 0


def test_ct_weighs_cells_by_held_out_data_and_leaves_small_ones_out():
    """Two far clusters: samples are copies in one, fresh in the other, and none in a third."""
    at = torch.tensor([[0.0], [100.0], [200.0]]).double()
    train = torch.cat([normal(100, 1, seed=i) + at[i] for i in range(3)])
    held_out = torch.cat([normal(n, 1, seed=5 + i) + at[i] for i, n in enumerate((30, 60, 40))])
    x = torch.cat([train[:50], normal(50, 1, seed=9) + at[1], at[2:].repeat(19, 1)])
    cells = [ct(x[i * 50 : i * 50 + 50], train, held_out[[0, 30][i] : [30, 90][i]], cells=1).value for i in range(2)]
    found = ct(x, train, held_out, cells=3)
    assert found.value == pytest.approx((30 * cells[0] + 60 * cells[1]) / 90, rel=1e-9)
    assert (found.high - found.low) / 2 == pytest.approx(1.959964 * math.sqrt(30**2 + 60**2) / 90, rel=1e-6)
    with pytest.raises(InputError, match="fewer cells"):
        ct(x, train, held_out, cells=3, fewest=61)


def test_copy_ratio_interval_holds_one_for_fresh_draws():
    found = []
    for seed in range(100):
        x, train, held_out = (normal(n, 8, seed=3 * seed + i) for i, n in enumerate((200, 400, 200)))
        found.append(copy_ratio_estimate(x, train, held_out, seed))
    assert sum(holds(f, 1) for f in found) >= 90
    assert sum(f.value for f in found) / 100 == pytest.approx(1, abs=0.02)
    x, train, held_out = (normal(200, 8, seed=i) for i in range(3))
    assert copy_ratio_estimate(x, train, held_out).value == pytest.approx(copy_ratio(x, train, held_out), rel=1e-6)
    assert copy_ratio_estimate(torch.cat([train[:150], x[:50]]), train, held_out).high < 0.9


def test_copy_ratio_leaves_blocks_out_of_all_sets():
    x, train, held_out = (normal(40, 2, seed=i) for i in range(3))
    found = jackknife(copy_ratio, x, train, held_out, seed=6)
    expected = interval(found.whole, found.error, found.freedom)
    assert copy_ratio_estimate(x, train, held_out, 6) == pytest.approx(expected, rel=1e-6)


def test_suspects_are_the_copies():
    x, train = normal(40, 4), normal(90, 4, seed=1)
    x[[3, 30]] = train[[80, 7]] + torch.tensor([[1e-6], [1e-4]]).double()
    train[11] = train[80]  # twice there, which hides nothing
    found = suspects(x, train, count=3)
    assert found.sample[:2].tolist() == [3, 30]
    assert found.train[:2].tolist() == [11, 7]
    assert found.distance[:2].tolist() == pytest.approx([2e-6, 2e-4], rel=1e-4)
    own = (train - train[7]).norm(dim=1).sort().values[1]
    assert float(found.ratio[1]) == pytest.approx(2e-4 / float(own), rel=1e-4)
    assert bool((found.ratio.diff() >= 0).all())
    assert len(found.ratio) == 3
    every = suspects(x, train, count=100)
    assert sorted(every.sample.tolist()) == list(range(40))
    assert torch.allclose((x[every.sample] - train[every.train]).norm(dim=1), every.distance, atol=1e-12)
    assert every.rows()[0] == {
        "sample": 3,
        "train": 11,
        "distance": float(every.distance[0]),
        "ratio": float(every.ratio[0]),
    }


# the table

REAL, FAKE, HELD = normal(80, 4), 1.1 * normal(70, 4, seed=1) + 0.2, normal(75, 4, seed=2)
MEASURES = [pytest.param(m.measure, (REAL, FAKE), id=name) for name, m in METRICS.items()] + [
    pytest.param(m.measure if name != "ct" else lambda x, a, b, s: ct(x, a, b, 2, 5, s), (FAKE, REAL, HELD), id=name)
    for name, m in MEMORY.items()
]


@pytest.mark.parametrize(("measure", "sets"), MEASURES)
def test_measures_know_neither_order_nor_chance(measure, sets):
    found = measure(*sets, 3)
    assert isinstance(found, Estimate)
    assert found.low <= found.value < found.high
    assert measure(*sets, 3) == found
    assert measure(*(x.float().double() for x in sets), 3) == pytest.approx(found, rel=1e-4)
    assert measure(*(shuffled(x, seed=i) for i, x in enumerate(sets)), 3) == pytest.approx(found, rel=1e-7, abs=1e-10)


@pytest.mark.parametrize(("measure", "sets"), MEASURES)
@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda x: x.clone().fill_(math.nan), "NaN or infinite"),
        (lambda x: torch.cat([x[:-1], x[:1] / 0]), "NaN or infinite"),
        (lambda x: x[:, :3], "of one width"),
        (lambda x: x[:1], "of >= [2-6] features"),
        (lambda x: x[:0], "of >= [2-6] features"),
        (lambda x: x[:, 0], "width"),
    ],
)
def test_measures_refuse_unusable_features(measure, sets, spoil, why):
    with pytest.raises(InputError, match=why):
        measure(sets[0], spoil(sets[1]), *sets[2:], 0)
    with pytest.raises(InputError, match=why):
        measure(spoil(sets[0]), *sets[1:], 0)


@pytest.mark.parametrize("name", ["precision", "recall", "density", "coverage"])
def test_neighbourhoods_need_more_samples_than_neighbours(name):
    metric = METRICS[name]
    k = metric.settings["k"]
    metric.measure(REAL[: k + 1], FAKE, 0)
    with pytest.raises(InputError, match=f">= {k + 1} features"):
        metric.measure(REAL[:k], FAKE, 0)
    with pytest.raises(InputError, match="k >= 1"):
        getattr(support, name)(REAL, FAKE, 0)


@pytest.mark.parametrize("name", METRICS)
def test_metrics_prefer_the_better_samples(name):
    """Fresh draws beat shifted and narrowed ones in every score, in the direction that the table says."""
    metric, good = METRICS[name], normal(80, 4, seed=7)
    bad = {"precision": good + 5, "recall": 0.01 * good}.get(name, 0.2 * good + 1)
    a, b = (metric.measure(REAL, x, 0).value for x in (good, bad))
    assert {"lower": a < b, "higher": a > b, "one": abs(a - 1) < abs(b - 1)}[metric.better]


def test_the_table_says_what_was_measured():
    assert METRICS["precision"].measure(REAL, FAKE, 0) == precision(REAL, FAKE, k=METRICS["precision"].settings["k"])
    assert METRICS["coverage"].measure(REAL, FAKE, 0) == coverage(REAL, FAKE, k=METRICS["coverage"].settings["k"])
    count = METRICS["sliced"].settings["directions"]
    assert METRICS["sliced"].measure(REAL, FAKE, 5).value == pytest.approx(sliced(REAL, FAKE, count, 5), rel=1e-12)
    assert METRICS["frechet"].measure(REAL, FAKE, 0).value == frechet(REAL, FAKE)
    assert METRICS["kernel"].measure(REAL, FAKE, 0).value == kernel(REAL, FAKE)
    for metric in (*METRICS.values(), *MEMORY.values()):
        assert metric.title
        assert metric.better in ("lower", "higher", "one", "zero", "floor")


def test_seeds_draw_what_is_random():
    for name in ("frechet-unbiased", "sliced", "sliced-unbiased", "vendi"):
        assert METRICS[name].measure(REAL, FAKE, 0) != METRICS[name].measure(REAL, FAKE, 1)


def test_directions_and_cells_are_counted():
    with pytest.raises(InputError, match=">= 1 direction, got 0"):
        sliced(REAL, FAKE, directions=0)
    with pytest.raises(InputError, match=r"1 \.\. 80 cells"):
        ct(FAKE, REAL, HELD, cells=81)
    with pytest.raises(InputError, match="fewest >= 1"):
        ct(FAKE, REAL, HELD, fewest=0)


def test_features_are_flat_float64():
    a, b = features(torch.zeros(3, 2, 5).half(), torch.ones(4, 10, requires_grad=True))
    assert (a.shape, b.shape, a.dtype, b.requires_grad) == ((3, 10), (4, 10), torch.float64, False)
    with pytest.raises(InputError, match=r"got \(3, 0\), \(3, 0\)"):
        features(torch.zeros(3, 0), torch.zeros(3, 0))
    assert estimate.Estimate(1.0).value == 1
    assert math.isnan(Estimate(1.0).high)
    assert distances(REAL, FAKE) == (frechet(REAL, FAKE), kernel(REAL, FAKE))


def test_near_copies_are_counted():
    """Exact and noisy copies of training rows among fresh draws, and the share of fresh ones that chance makes."""
    train, x = normal(400, 8, seed=1), normal(400, 8, seed=2)
    chance = near_copies(x, train).value
    assert chance < 0.02
    x[:40], x[40:60] = train[:40], train[40:60] + 0.01 * normal(20, 8, seed=5)
    found = near_copies(x, train)
    assert 60 <= round(400 * found.value) <= 60 + 400 * chance
    assert near_copies(x, torch.cat([train, train])).value == found.value
    assert near_copies(x, train, times=1.5).value > found.value
    with pytest.raises(InputError, match="times > 1"):
        near_copies(x, train, times=1.0)
