"""Inverse problems against their closed forms: Gaussian and mixture priors seen through linear operators."""

import math

import pytest
import torch

from undiffuse import (
    Gaussian,
    Level,
    Spectrum,
)
from undiffuse.restore import MMPS, Blur, Downsample, Gray, Mask, Matrix, Problem, simulate
from undiffuse.restore.krylov import gmres, ridge

D, M, STD = 5, 3, 0.3


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def covariance():
    """A dense covariance with eigenvalues from 0.05 to 2, and a mean."""
    basis = torch.linalg.qr(draw(D, D, seed=1)).Q
    variances = torch.tensor([2.0, 1.0, 0.4, 0.1, 0.05]).double()
    return draw(D, seed=2), basis.T @ torch.diag(variances) @ basis, Spectrum(draw(D, seed=2), variances, basis)


MEAN, COV, SPECTRUM = covariance()
PRIOR = Gaussian(SPECTRUM)
A = draw(M, D, seed=3)


def conditional(mean, cov, matrix, y, std):
    """(mean (b, d), covariance) of x0 ~ N(mean (b, d), cov) given y = matrix x0 + std noise."""
    gain = cov @ matrix.T @ torch.linalg.pinv(matrix @ cov @ matrix.T + std**2 * torch.eye(len(matrix)).double())
    return mean + (y - mean @ matrix.T) @ gain.T, cov - gain @ matrix @ cov


def posterior(x, level, matrix, y, std, mean=MEAN, cov=COV):
    """E[x0 | x_t, y]: both are linear observations of x0."""
    if level.alpha == 0:
        return conditional(mean.expand(len(x), -1), cov, matrix, y, std)[0]
    eye = torch.eye(len(mean)).double()
    seen, spread = conditional(mean.expand(len(x), -1), cov, level.alpha * eye, x, level.sigma)
    return conditional(seen, spread, matrix, y, std)[0]


CASES = {
    "mask": (Mask(share=0.6), (2, 4, 5)),
    "mask of channels": (Mask((draw(3, 1, 5) > 0).int()), (3, 4, 5)),
    "mask of a vector": (Mask(share=0.4, seed=3), (7,)),
    "downsample": (Downsample(2), (2, 4, 6)),
    "downsample 1-D": (Downsample(3), (2, 6)),
    "downsample 3-D": (Downsample(2), (1, 4, 2, 6)),
    "blur": (Blur(0.8), (2, 6, 7)),
    "blur with zeros": (Blur(1.5, "zero"), (2, 4, 5)),
    "blur 1-D": (Blur(0.5), (2, 6)),
    "blur 3-D": (Blur(0.4), (1, 4, 3, 5)),
    "blur by a kernel": (Blur(kernel=draw(3, 5)), (2, 4, 5)),
    "gray": (Gray(3), (3, 4, 5)),
    "matrix": (Matrix(draw(3, 8), (2, 4)), (2, 4)),
    "function": (lambda x0: x0.cumsum(1)[:, ::2], (6,)),
}


def as_matrix(operator, shape):
    """The operator written out (m, d)."""
    return operator(torch.eye(math.prod(shape)).double().reshape(-1, *shape)).flatten(1).T


@pytest.mark.parametrize("case", CASES)
def test_the_adjoint_of_an_operator_is_its_transpose(case):
    operator, shape = CASES[case]
    x0 = draw(2, *shape)
    problem = simulate(operator, x0, 0.1, draw(*operator(x0).shape, seed=1))
    r, matrix = draw(*problem.y.shape, seed=2), as_matrix(operator, shape)
    assert torch.allclose(problem.adjoint(r).flatten(1), r.flatten(1) @ matrix, atol=1e-12)
    assert torch.allclose((operator(x0) * r).sum(), (x0 * problem.adjoint(r)).sum(), atol=1e-12)
    assert problem.shape == shape
    assert problem.linear_for(MMPS()) is problem
    if hasattr(operator, "shape"):
        assert tuple(operator.shape(tuple(problem.y.shape[1:]))) == shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("std", [0.0, 0.3])
@pytest.mark.parametrize("case", ["mask", "downsample", "blur", "gray", "matrix"])
def test_the_gain_is_that_of_the_dense_matrices(case, std, dtype):
    operator, shape = CASES[case]
    x0 = draw(3, *shape).to(dtype)
    problem = simulate(operator, x0, std, draw(*operator(x0).shape, seed=1).to(dtype))
    matrix = as_matrix(operator, shape)
    for g in (torch.tensor([0.2, 1.0, 30.0]).double(), torch.tensor(0.7).double()):
        r = problem.residual(torch.zeros_like(x0)).double().flatten(1)
        expected = [
            gi * matrix.T @ torch.linalg.pinv(std**2 * torch.eye(len(matrix)) + gi * matrix @ matrix.T) @ ri
            for gi, ri in zip(g.expand(3), r, strict=True)
        ]
        found = problem.gain(
            problem.residual(torch.zeros_like(x0)), g.reshape(-1, *(1 for _ in shape)) if g.ndim else g
        )
        assert found.dtype == dtype
        found, expected = found.double().flatten(1), torch.stack(expected)
        if dtype == torch.float32 and std == 0:  # the inverse of a blur is ill-conditioned: compare what is seen
            found, expected = found @ matrix.T, r
        assert torch.allclose(found, expected, atol=1e-8 if dtype == torch.float64 else 2e-3)


def test_gmres_solves_dense_systems_that_are_neither_symmetric_nor_regular():
    system, u = draw(4, 6, 6), draw(4, 6, seed=1)
    system[2] = torch.diag(torch.tensor([1.0, 2.0, 3.0, 0.0, 0.0, 0.0]).double())
    u[2, 3:] = 0
    u[3] = 0
    r = torch.einsum("bij,bj->bi", system, u)
    for iterations in (6, 9):
        found = gmres(lambda v: torch.einsum("bij,bj->bi", system, v), r, iterations)
        assert torch.allclose(found, u, atol=1e-9)
    few = gmres(lambda v: torch.einsum("bij,bj->bi", system, v), r, 2)
    span = torch.stack([r[0], system[0] @ r[0]], 1)
    best = span @ torch.linalg.lstsq(system[0] @ span, r[0][:, None]).solution
    assert torch.allclose(few[0], best[:, 0], atol=1e-9)


def test_conjugate_gradients_give_each_row_what_it_gets_alone():
    matrix, r = draw(4, 6), draw(5, 4, seed=1)
    r[1], r[2] = 0, 1e-6 * r[2]
    damping = torch.tensor([0.0, 1.0, 1e-3, 10.0, 1e3]).double().reshape(-1, 1)
    every = ridge(lambda x: x @ matrix.T, lambda y: y @ matrix, r, damping, 50, 1e-6)
    for k in range(5):
        alone = ridge(lambda x: x @ matrix.T, lambda y: y @ matrix, r[k : k + 1], damping[k : k + 1], 50, 1e-6)
        assert torch.allclose(alone[0], every[k], rtol=1e-12)


LEVELS = [
    *(Level.at(lam, space) for space in ("vp", "flow", "ve") for lam in (-4.0, -1.0, 0.0, 1.0, 4.0)),
    Level.at(0.5).reshape(-1, 1),
]


@pytest.mark.parametrize("std", [0.0, STD])
def test_mmps_is_exact_for_gaussian_data_at_every_level(std):
    x, y = draw(4, D, seed=5), draw(4, M, seed=6)
    restored = MMPS(iterations=6)(PRIOR, Problem(Matrix(A), y, std))
    for level in LEVELS:
        with torch.no_grad():
            found = restored(x, level)
        assert torch.allclose(found, posterior(x, level, A, y, std), atol=1e-8), level
