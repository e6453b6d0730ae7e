"""Distances against closed forms of Gaussians and exact identities of U-statistics; the reader of digits."""

import itertools
import math

import numpy as np
import pytest
import scipy.linalg
import torch

from undiffuse import InputError
from undiffuse.data import Data, load_data
from undiffuse.evals import Distances, Reader, distances, frechet, kernel


def normal(*shape, seed=0):
    """Standard normal numbers in float64."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def exactly(mean, cov, n=60, seed=0):
    """Samples (n, d) whose sample mean and covariance are exactly these: whitened noise, coloured."""
    z = normal(n, len(mean), seed=seed)
    z = z - z.mean(0)
    z = torch.linalg.solve_triangular(torch.linalg.cholesky(z.T @ z / (n - 1)), z.T, upper=False).T
    return z @ torch.linalg.cholesky(cov).T + mean


def positive(d, seed):
    """A random positive definite matrix."""
    a = normal(d, d, seed=seed)
    return a @ a.T / d + 0.1 * torch.eye(d).double()


def rotation(d, seed=9):
    """A random orthogonal matrix."""
    return torch.linalg.qr(normal(d, d, seed=seed))[0]


def test_samples_have_the_moments_asked_for():
    mean, cov = torch.tensor([1.0, -2.0, 0.5]).double(), positive(3, 1)
    x = exactly(mean, cov)
    assert torch.allclose(x.mean(0), mean, atol=1e-12)
    assert torch.allclose(torch.cov(x.T), cov, atol=1e-12)


@pytest.mark.parametrize("d", [2, 3, 8])
def test_frechet_of_commuting_covariances_is_the_distance_of_means_and_stds(d):
    q, a, b = rotation(d), torch.linspace(0.1, 3, d).double(), torch.linspace(2, 0.5, d).double()
    mean = normal(d, seed=3)
    x, y = (exactly(m, q @ torch.diag(s**2) @ q.T, seed=i) for i, (m, s) in enumerate(((0 * mean, a), (mean, b))))
    expected = float(mean.square().sum() + (a - b).square().sum())
    assert frechet(x, y) == pytest.approx(expected, rel=1e-10)


def test_frechet_in_one_dimension():
    x, y = (exactly(torch.tensor([m]).double(), torch.tensor([[s**2]]).double()) for m, s in ((1.0, 2.0), (4.0, 0.5)))
    assert frechet(x, y) == pytest.approx(3**2 + 1.5**2, rel=1e-12)


@pytest.mark.parametrize("d", [2, 5, 16])
def test_frechet_is_the_formula_with_a_matrix_square_root(d):
    a, b = positive(d, 1), positive(d, 2)
    x, y = exactly(normal(d, seed=5), a), exactly(normal(d, seed=6), b, n=80, seed=1)
    root = scipy.linalg.sqrtm((a @ b).numpy()).real
    expected = float((x.mean(0) - y.mean(0)).square().sum() + a.trace() + b.trace()) - 2 * np.trace(root)
    assert not torch.allclose(a @ b, b @ a, atol=1e-2)
    assert frechet(x, y) == pytest.approx(expected, rel=1e-8)


def test_frechet_is_the_cost_of_the_optimal_map():
    """A positive definite linear map is optimal transport between Gaussians (Brenier), so its cost is the distance."""
    x, t, shift = normal(50, 4), positive(4, 7), normal(4, seed=8)
    rest = torch.eye(4).double() - t
    expected = float((x.mean(0) @ rest - shift).square().sum() + (rest @ torch.cov(x.T) @ rest).trace())
    assert frechet(x, x @ t + shift) == pytest.approx(expected, rel=1e-9)


def test_frechet_with_fewer_samples_than_features():
    """With C = Y^T Y the cross term tr (C_a C_b)^(1/2) is the nuclear norm of Y_a Y_b^T, whatever the rank."""
    x, y = normal(5, 40), 1.5 * normal(7, 40, seed=1)
    a, b = ((z - z.mean(0)) / math.sqrt(len(z) - 1) for z in (x, y))
    cross = torch.linalg.matrix_norm(a @ b.T, "nuc")
    expected = (x.mean(0) - y.mean(0)).square().sum() + a.square().sum() + b.square().sum() - 2 * cross
    assert frechet(x, y) == pytest.approx(float(expected), rel=1e-6)


def test_frechet_is_a_distance_of_moments():
    x, y, q = normal(40, 3), 2 * normal(30, 3, seed=1) + 1, rotation(3)
    value = frechet(x, y)
    assert frechet(x, x) == pytest.approx(0, abs=1e-7)
    assert frechet(y, x) == pytest.approx(value, rel=1e-10)
    assert frechet(x.flip(0), y) == pytest.approx(value, rel=1e-10)
    assert frechet(x @ q + 5, y @ q + 5) == pytest.approx(value, rel=1e-9)
    assert frechet(3 * x, 3 * y) == pytest.approx(9 * value, rel=1e-10)
    z = normal(50, 3, seed=2) - 2
    assert math.sqrt(frechet(x, z)) <= math.sqrt(value) + math.sqrt(frechet(y, z)) + 1e-9
    assert value > 1


def test_kernel_is_its_double_loop():
    x, y = normal(5, 3), normal(7, 3, seed=1) + 0.5

    def k(u, v):
        return (float(u @ v) / 3 + 1) ** 3

    def within(z):
        return np.mean([k(z[i], z[j]) for i in range(len(z)) for j in range(len(z)) if i != j])

    expected = within(x) + within(y) - 2 * np.mean([k(u, v) for u in x for v in y])
    assert kernel(x, y) == pytest.approx(expected, rel=1e-10)


def test_kernel_is_unbiased():
    """Over all splits of one set in two, all pairs occur equally often within and across: the mean is exactly 0."""
    pool = normal(7, 2)
    values = []
    for rows in itertools.combinations(range(7), 3):
        inside = torch.zeros(7, dtype=torch.bool)
        inside[list(rows)] = True
        values.append(kernel(pool[inside], pool[~inside]))
    assert np.mean(values) == pytest.approx(0, abs=1e-10)
    assert np.std(values) > 0.1
    assert min(values) < 0


def test_kernel_of_moments():
    """In one dimension (x y + 1)^3 compares the first three moments with weights 3, 3, 1, here over all pairs."""
    a, b = normal(400, 1), 0.5 * normal(500, 1, seed=1) + 1
    moments = torch.stack([(a**j).mean() - (b**j).mean() for j in (1, 2, 3)])
    biased = float((torch.tensor([3.0, 3.0, 1.0]).double() * moments**2).sum())
    diagonal = sum(float(((1 + z**2) ** 3).mean() - ((z @ z.T + 1) ** 3).mean()) / (len(z) - 1) for z in (a, b))
    assert kernel(a, b) == pytest.approx(biased - diagonal, rel=1e-9)


def test_kernel_is_symmetric_and_invariant_to_rotation_and_order():
    x, y, q = normal(20, 4), normal(30, 4, seed=1) + 1, rotation(4)
    value = kernel(x, y)
    assert kernel(y, x) == pytest.approx(value, rel=1e-10)
    assert kernel(x.flip(0), y) == pytest.approx(value, rel=1e-10)
    assert kernel(x @ q, y @ q) == pytest.approx(value, rel=1e-10)
    assert value > kernel(x, y - 1) + 0.5


def test_distances_are_both_of_flattened_samples_in_float64():
    x, y = normal(20, 2, 3, 1).float(), normal(30, 2, 3, 1, seed=1).float()
    flat = x.double().reshape(20, 6), y.double().reshape(30, 6)
    assert distances(x, y) == Distances(frechet(*flat), kernel(*flat))


@pytest.mark.parametrize("distance", [frechet, kernel, distances])
@pytest.mark.parametrize(
    ("a", "b", "why"),
    [
        (torch.zeros(1, 3), torch.zeros(5, 3), r">= 2 features of one width, got \(1, 3\), \(5, 3\)"),
        (torch.zeros(5, 3), torch.zeros(0, 3), r"\(0, 3\)"),
        (torch.zeros(5, 3), torch.zeros(5, 4), r"\(5, 3\), \(5, 4\)"),
        (torch.zeros(5, 3), torch.full((5, 3), math.nan), "NaN or infinite"),
        (torch.full((5, 3), math.inf), torch.zeros(5, 3), "NaN or infinite"),
        pytest.param(torch.zeros(5), torch.zeros(5), "width"),
    ],
)
def test_unusable_features_are_refused(distance, a, b, why):
    with pytest.raises(InputError, match=why):
        distance(a, b)


@pytest.fixture(scope="module")
def halves():
    """Digits that the reader learns from, digits that it has not seen, and the reader."""
    unseen, seen = load_data("digits").split(600)
    return unseen, Reader(seen)


def test_reader_reads_unseen_digits(halves):
    unseen, reader = halves
    assert reader.accuracy(unseen.x, unseen.labels) >= 0.97
    assert (reader.read(unseen.x) == unseen.labels.numpy()).mean() == reader.accuracy(unseen.x, unseen.labels)


def test_reader_sees_the_picture_and_not_the_order(halves):
    unseen, reader = halves
    order = torch.randperm(len(unseen), generator=torch.Generator().manual_seed(0))
    assert (reader.read(unseen.x[order]) == reader.read(unseen.x)[order]).all()
    assert reader.accuracy(unseen.x[order], unseen.labels) < 0.2
    assert reader.accuracy(normal(300, 1, 8, 8), unseen.labels[:300]) < 0.3


def test_reader_reads_what_a_picture_can_show(halves):
    """Values outside [-1, 1] are read as they would be drawn."""
    unseen, reader = halves
    loud = 3 * unseen.x
    assert (reader.read(loud) == reader.read(loud.clamp(-1, 1))).all()
    assert reader.accuracy(loud, unseen.labels) > 0.8


def test_reader_needs_labels():
    with pytest.raises(InputError, match="labels"):
        Reader(Data(load_data("digits").x))
