"""Scores against torchmetrics, torch-fidelity and prdc, given the same features."""

import importlib
import importlib.util
from types import SimpleNamespace

import pytest
import torch

from tests.peers import load_torch_fidelity
from undiffuse.data import load_data
from undiffuse.evals import frechet, kernel
from undiffuse.evals.support import coverage, density, precision, recall


@pytest.fixture(scope="module")
def fidelity():
    """torch-fidelity's metrics of features."""
    if importlib.util.find_spec("torch_fidelity") is None:
        pytest.skip("parity with torch-fidelity needs it: pip install --no-deps torch-fidelity")
    with load_torch_fidelity() as load:
        yield SimpleNamespace(**{name: load(f"metric_{name}") for name in ("fid", "kid", "prc")})


@pytest.fixture(scope="module")
def torchmetrics(fidelity):
    """torchmetrics' scores of images, whose network may be another; it imports torch-fidelity where that is there."""
    pytest.importorskip("torchmetrics")
    return importlib.import_module("torchmetrics.image")


@pytest.fixture(scope="module")
def compute_prdc():
    """prdc's only function."""
    return pytest.importorskip("prdc").compute_prdc


class Through(torch.nn.Module):
    """A network whose features are what it is given."""

    num_features = 64

    def forward(self, x):
        return x


@pytest.fixture(scope="module", params=["digits", "few", "gauss"])
def sets(request):
    """Real and other features: digits beside noisy ones, fewer of them than pixels, and two Gaussians."""
    draw = torch.Generator().manual_seed(0)
    if request.param == "gauss":
        a, b = (torch.randn(500, 64, generator=draw, dtype=torch.float64) for _ in range(2))
        return a, 1.1 * b + 0.1
    x = load_data("digits").x.double().flatten(1)
    n = {"digits": 600, "few": 50}[request.param]
    rows = torch.randperm(len(x), generator=draw)[: 2 * n]
    return x[rows[:n]], x[rows[n:]] + 0.1 + 0.1 * torch.randn(n, 64, generator=draw, dtype=torch.float64)


def test_frechet_is_torch_fidelitys(fidelity, sets):
    a, b = (fidelity.fid.fid_features_to_statistics(x) for x in sets)
    expected = fidelity.fid.fid_statistics_to_metric(a, b, False)["frechet_inception_distance"]
    assert frechet(*sets) == pytest.approx(expected, rel=1e-4)
    assert expected > 0.1


def test_frechet_is_torchmetrics(torchmetrics, sets):
    metric = torchmetrics.FrechetInceptionDistance(feature=Through())
    metric.set_dtype(torch.float64)
    for x, real in zip(sets, (True, False), strict=True):
        metric.update(x, real=real)
    assert frechet(*sets) == pytest.approx(float(metric.compute()), rel=1e-4)


def test_kernel_is_torch_fidelitys(fidelity, sets):
    """One subset of all rows; theirs differs in which of them it draws, not in how many."""
    found = fidelity.kid.kid_features_to_metric(*sets, kid_subsets=1, kid_subset_size=len(sets[0]), verbose=False)
    expected = found["kernel_inception_distance_mean"]
    assert kernel(*sets) == pytest.approx(expected, rel=1e-4)
    assert abs(expected) > 1e-3


def test_kernel_is_torchmetrics(torchmetrics, sets):
    metric = torchmetrics.KernelInceptionDistance(feature=Through(), subsets=1, subset_size=len(sets[0]))
    for x, real in zip(sets, (True, False), strict=True):
        metric.update(x, real=real)
    assert kernel(*sets) == pytest.approx(float(metric.compute()[0]), rel=1e-4)


def test_kernel_is_the_mean_over_subsets(fidelity):
    """Binkowski et al. average over subsets of rows; each is unbiased, so many of them approach that of all rows."""
    draw = torch.Generator().manual_seed(0)
    a, b = (torch.randn(200, 8, generator=draw, dtype=torch.float64) + i / 5 for i in range(2))
    found = fidelity.kid.kid_features_to_metric(a, b, kid_subsets=2000, kid_subset_size=100, verbose=False)
    error = found["kernel_inception_distance_std"] / 2000**0.5
    assert kernel(a, b) == pytest.approx(found["kernel_inception_distance_mean"], abs=4 * error)


@pytest.mark.parametrize("k", [1, 3, 5])
def test_supports_are_prdcs(compute_prdc, sets, k):
    expected = compute_prdc(*(x.numpy() for x in sets), nearest_k=k)
    found = {f.__name__: f(*sets, k).value for f in (precision, recall, density, coverage)}
    assert found == pytest.approx(expected, abs=1e-4)
    assert 0 < expected["precision"] <= 1


@pytest.mark.parametrize("k", [1, 3, 5])
def test_precision_and_recall_are_torch_fidelitys(fidelity, sets, k):
    real, fake = sets
    expected = fidelity.prc.calculate_precision_recall_full(fake, real, k)
    assert (precision(real, fake, k).value, recall(real, fake, k).value) == pytest.approx(expected, abs=1e-4)


def test_supports_of_sets_of_different_size(compute_prdc, sets):
    real, fake = sets[0], sets[1][:40]
    expected = compute_prdc(real.numpy(), fake.numpy(), nearest_k=3)
    found = {f.__name__: f(real, fake, 3).value for f in (precision, recall, density, coverage)}
    assert found == pytest.approx(expected, abs=1e-4)
