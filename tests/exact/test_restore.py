"""Inverse problems against their closed forms: Gaussian and mixture priors seen through linear operators."""

import math
from itertools import pairwise

import pytest
import torch

from tests.cases import at, diagonal, drain
from undiffuse import (
    DDIM,
    DDPM,
    EDM,
    VP,
    Cosine,
    Denoiser,
    DPMpp2M,
    EDMPrecond,
    FixedRows,
    Flow,
    Gaussian,
    InputError,
    Label,
    Level,
    Mixture,
    Noise,
    Spectrum,
    UniformLam,
    reverse_transition,
    trace,
    trajectory,
)
from undiffuse.nets import UNet
from undiffuse.restore import (
    DAPS,
    DPS,
    MMPS,
    OPERATORS,
    RESTORERS,
    TMPD,
    Blur,
    DiffPIR,
    Downsample,
    Gray,
    Mask,
    Matrix,
    PiGDM,
    Problem,
    restore,
    simulate,
)
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


def test_mmps_at_pure_noise_is_the_posterior_of_the_prior():
    """No derivative tells the prior covariance at alpha = 0: it is taken at lam = -5, where it differs by e^-10."""
    x, y = draw(4, D, seed=5), draw(4, M, seed=6)
    found = MMPS(iterations=6)(PRIOR, Problem(Matrix(A), y, STD))(x, Level(0.0, 1.0))
    expected = posterior(x, Level(0.0, 1.0), A, y, STD)
    assert torch.allclose(found, expected, atol=3e-3)
    assert not torch.allclose(PRIOR(x, Level(0.0, 1.0)), expected, atol=0.1)
    mixed = Level(torch.tensor([0.0, 0.5, 0.0, 0.9]), torch.ones(4)).reshape(-1, 1)
    found = MMPS(iterations=6)(PRIOR, Problem(Matrix(A), y, STD))(x, mixed)
    assert torch.allclose(found[::2], expected[::2], atol=3e-3)
    half = posterior(x, Level(0.5, 1.0), A, y, STD)
    assert torch.allclose(found[1], half[1], atol=1e-8)


def test_few_iterations_of_mmps_come_near():
    """The residual that is left falls with every product."""
    x, y, level = draw(4, D, seed=5), draw(4, M, seed=6), Level.at(0.0)
    expected = posterior(x, level, A, y, STD)
    gaps = [
        float((MMPS(iterations=i)(PRIOR, Problem(Matrix(A), y, STD))(x, level) - expected).norm()) for i in (1, 2, 3)
    ]
    assert gaps[0] > 2 * gaps[1] > 4 * gaps[2]
    assert gaps[2] < 1e-8


SPREADS = torch.tensor([0.1, 0.5, 1.0, 2.0, 4.0]).double()


@pytest.mark.parametrize("std", [0.0, STD])
def test_tmpd_is_exact_for_independent_elements_of_which_some_are_seen(std):
    x, y, mask = draw(4, D, seed=5), draw(4, D, seed=6), torch.tensor([1, 0, 1, 1, 0])
    restored = TMPD()(Gaussian(Spectrum(MEAN, SPREADS)), Problem(Mask(mask), y, std))
    for level in LEVELS:
        expected = posterior(x, level, torch.diag(mask.double())[mask == 1], y[:, mask == 1], std, MEAN, SPREADS.diag())
        assert torch.allclose(restored(x, level), expected, atol=1e-8), level


def test_tmpd_takes_the_sums_of_rows():
    x, y, level = draw(4, D, seed=5), draw(4, M, seed=6), Level.at(0.3)
    seen, spread = conditional(MEAN.expand(4, -1), COV, level.alpha * torch.eye(D).double(), x, level.sigma)
    rows = (A @ spread @ A.T).sum(1).clamp(min=0) + STD**2
    expected = seen + ((y - seen @ A.T) / rows) @ A @ spread
    assert torch.allclose(TMPD()(PRIOR, Problem(Matrix(A), y, STD))(x, level), expected, atol=1e-10)


@pytest.mark.parametrize("std", [0.0, STD])
@pytest.mark.parametrize("prior_std", [1.0, 0.6])
def test_pigdm_is_exact_for_independent_elements_of_its_std(std, prior_std):
    x, y = draw(4, D, seed=5), draw(4, M, seed=6)
    variances = torch.full((D,), prior_std**2).double()
    restored = PiGDM(prior_std)(Gaussian(Spectrum(MEAN, variances)), Problem(Matrix(A), y, std))
    for level in LEVELS:
        expected = posterior(x, level, A, y, std, MEAN, variances.diag())
        assert torch.allclose(restored(x, level), expected, atol=1e-8), level


@pytest.mark.parametrize("std", [0.0, STD])
def test_diffpir_is_the_minimiser_of_its_two_squares(std):
    x, y, level = draw(4, D, seed=5), draw(4, M, seed=6), Level.at(0.7, "flow")
    found, x0 = DiffPIR(weight=3.0)(PRIOR, Problem(Matrix(A), y, std))(x, level), PRIOR(x, level)
    r2 = (level.sigma / level.alpha) ** 2 / 3.0
    if std:
        left = A.T @ A / std**2 + torch.eye(D) / r2
        assert torch.allclose(found, torch.linalg.solve(left, (y @ A / std**2 + x0 / r2).T).T, atol=1e-9)
    else:
        assert torch.allclose(found, x0 + (y - x0 @ A.T) @ torch.linalg.pinv(A).T, atol=1e-9)
    pure = DiffPIR()(PRIOR, Problem(Matrix(A), y, STD))(
        x, Level(0.0, 1.0)
    )  # no weight on the denoiser's x0 but its rest
    assert torch.allclose(pure @ A.T, y, atol=1e-9)


def by_hand(denoise, levels, x, noise, operator, y, zeta):
    """Algorithm 1 of Chung et al.: a DDPM step, then the gradient of the norm by autograd."""
    for now, then in pairwise(levels):
        x = x.detach().requires_grad_()
        x0 = denoise(x, now)
        (slope,) = torch.autograd.grad((y - operator(x0)).flatten(1).norm(dim=1).sum(), x)
        c_x, c_x0, std = reverse_transition(now, then)
        x = c_x * x.detach() + c_x0 * x0.detach()
        x = x - zeta * slope if then.is_clean else x + std * noise() - zeta * slope
    return x


@pytest.mark.parametrize("operator", [Matrix(A), lambda x0: x0.clamp(-0.5, 0.5) ** 3])
def test_dps_is_the_papers_algorithm(operator):
    levels, x0 = UniformLam()(Flow(), 12), draw(4, D, seed=8)
    problem = simulate(operator, x0, STD, draw(*operator(x0).shape, seed=9), linear=not callable(operator))
    x, method = draw(4, D, seed=5), DPS(0.4).prepared(levels)
    found = drain(trajectory(method(PRIOR, problem), x, levels, DDPM(), Noise(x.shape, dtype=x.dtype)))
    expected = by_hand(PRIOR, levels, x, Noise(x.shape, dtype=x.dtype), operator, problem.y, 0.4)
    assert torch.allclose(found, expected, atol=1e-10)
    plain = drain(trajectory(PRIOR, x, levels, DDPM(), Noise(x.shape, dtype=x.dtype)))
    assert not torch.allclose(found, plain, atol=0.1)


def test_dps_moves_by_zeta_after_a_step_of_any_single_step_solver():
    levels, y = at([-1.0, 0.0, 1.0]), draw(4, M, seed=6)
    x, zero = draw(4, D, seed=5), torch.zeros(4, D).double()
    for solver in (DDIM(), DDIM(0.5), DDPM("large")):
        restored = DPS(0.3).prepared(levels, solver)(PRIOR, Problem(Matrix(A), y, STD))
        moved = [solver.step(d, x, *levels[:2], [], lambda: zero)[0] for d in (PRIOR, restored)]
        at_x = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad((y - PRIOR(at_x, levels[0]) @ A.T).norm(dim=1).sum(), at_x)
        assert torch.allclose(moved[1] - moved[0], -0.3 * slope, atol=1e-10)


def test_dps_does_nothing_where_the_observations_are_met():
    levels, x = at([0.0, 1.0]), draw(2, D, seed=5)
    problem = Problem(Matrix(A), PRIOR(x, levels[0]) @ A.T, STD)
    assert torch.equal(DPS().prepared(levels)(PRIOR, problem)(x, levels[0]), PRIOR(x, levels[0]))


def affine(chain, width):
    """(mean, covariance) of a chain that is affine in its standard normal draws, run on their basis; no Monte Carlo."""
    count = [0]

    def first_pass():
        count[0] += 1
        return torch.zeros(1, width, dtype=torch.float64)

    chain(first_pass)
    rows, basis = 1 + count[0] * width, iter(range(count[0]))

    def noise():
        z = torch.zeros(rows, width, dtype=torch.float64)
        j = 1 + next(basis) * width
        z[j : j + width] = torch.eye(width)
        return z

    out = chain(noise)
    effect = out[1:] - out[0]
    return out[0], effect.T @ effect


@pytest.mark.parametrize("solver", [DPMpp2M(), DPMpp2M(eta=1.0)], ids=["ode", "sde"])
@pytest.mark.parametrize("schedule", [VP(), Flow(), EDM()])
def test_the_samples_of_mmps_have_the_moments_of_the_posterior(schedule, solver):
    y, levels = draw(1, M, seed=6), UniformLam()(schedule, 60)
    mean, cov = conditional(MEAN[None], COV, A, y, STD)

    def chain(noise):
        x = levels[0].sigma * noise()
        problem = Problem(Matrix(A), y.expand(len(x), -1), STD)
        return drain(trajectory(MMPS(iterations=3)(PRIOR, problem), x, levels, solver, noise))

    found_mean, found = affine(chain, D)
    assert torch.allclose(found_mean, mean[0], atol=0.01)
    assert torch.allclose(found, cov, atol=0.01)


@pytest.mark.parametrize("prior_std", [1.0, 0.5])
@pytest.mark.parametrize("schedule", [Flow(), Cosine()])
def test_daps_samples_the_posterior_where_its_assumption_holds(schedule, prior_std):
    """One ODE step, the exact draw and independent elements: every step keeps the marginals of the posterior."""
    y, levels = draw(1, M, seed=6), UniformLam()(schedule, 4)
    prior = Gaussian(Spectrum(torch.zeros(D), torch.full((D,), prior_std**2)))
    method = DAPS(ode_steps=1, exact=True, prior_std=prior_std)

    def chain(noise):
        x = levels[0].sigma * noise()
        solver = method.solver(Problem(Matrix(A), y.expand(len(x), -1), STD))
        return drain(trajectory(prior, x, levels, solver, noise))

    mean, cov = conditional(torch.zeros(1, D).double(), prior_std**2 * torch.eye(D).double(), A, y, STD)
    found_mean, found = affine(chain, D)
    assert torch.allclose(found_mean, mean[0], atol=1e-9)
    assert torch.allclose(found, cov, atol=1e-9)


def test_daps_estimates_x0_by_the_probability_flow():
    """The ODE's end for Gaussian data, in closed form: x scaled by std / std of x_t."""
    prior, x, now = Gaussian(Spectrum(torch.zeros(D), SPREADS)), draw(3, D, seed=5), Level.at(-0.5)
    seen = Problem(lambda x0: 0 * x0, torch.zeros(3, D).double(), 1.0)
    for steps, tol in ((5, 0.2), (40, 2e-3)):
        solver = DAPS(ode_steps=steps, exact=True).solver(seen)
        _, new = solver.step(prior, x, now, Level.at(1.0), [], Noise(x.shape, dtype=x.dtype))
        assert torch.allclose(new.x0, x * (SPREADS / (now.alpha**2 * SPREADS + now.sigma**2)).sqrt(), atol=tol)
        assert solver.calls == steps


def test_the_langevin_steps_of_daps_have_the_moments_of_the_exact_draw():
    n, matrix = 20_000, A[:2] / torch.linalg.svdvals(A[:2])[0]
    x, y, now = draw(1, D, seed=5).expand(n, -1), draw(1, 2, seed=6).expand(n, -1), Level.at(0.2)
    r2 = now.sigma**2 / (now.alpha**2 + now.sigma**2)
    for method in (DAPS(1, langevin=400, rate=0.05), DAPS(1, exact=True)):
        solver = method.solver(Problem(Matrix(matrix), y, 0.4))
        x0, new = solver.step(PRIOR, x, now, Level(1.0, 0.0), [], lambda: torch.randn(n, D).double())
        mean, cov = conditional(new.x0[:1], r2 * torch.eye(D).double(), matrix, y[:1], 0.4)
        assert torch.allclose(x0.mean(0), mean[0], atol=0.025)
        assert torch.allclose(torch.cov(x0.T), cov, atol=0.03)


def test_daps_draws_from_the_posterior_of_a_nonlinear_operator():
    """Against quadrature: x0 in one dimension seen through its square, with two modes."""
    n, std, now, y = 20_000, 0.4, Level.at(-0.5), 1.0
    seen = Problem(lambda x0: x0**2 / 2, torch.full((n, 1), y).double(), std, linear=False)
    x = torch.full((n, 1), 0.3).double()
    solver = DAPS(1, langevin=1000, rate=0.05).solver(seen)
    prior = Gaussian(diagonal(1.0))
    x0, new = solver.step(prior, x, now, Level(1.0, 0.0), [], lambda: torch.randn(n, 1).double())
    grid, r2 = torch.linspace(-4, 4, 4001).double(), now.sigma**2 / (now.alpha**2 + now.sigma**2)
    log_p = -((grid - new.x0[0]) ** 2) / (2 * r2) - (y - grid**2 / 2) ** 2 / (2 * std**2)
    weights = log_p.softmax(0)
    assert float(x0.mean()) == pytest.approx(float((weights * grid).sum()), abs=0.06)
    assert float((x0 > 0).double().mean()) == pytest.approx(float(weights[grid > 0].sum()), abs=0.03)
    assert float(x0.square().mean()) == pytest.approx(float((weights * grid**2).sum()), abs=0.06)


METHODS = {name: kind() for name, kind in RESTORERS.items()}
METHODS |= {"daps-exact": DAPS(2, exact=True), "mmps-1": MMPS(iterations=1)}
LINEAR = [name for name in METHODS if name not in ("dps", "daps")]
TRANSFORMS = [name for name in METHODS if not name.startswith("daps")]
IMAGE = (2, 4, 4)


def picture_prior():
    """A dense Gaussian on small pictures."""
    d = math.prod(IMAGE)
    basis = torch.linalg.qr(draw(d, d, seed=11)).Q
    return Gaussian(Spectrum(0.3 * draw(d, seed=12), torch.linspace(0.02, 1.5, d), basis, shape=IMAGE))


def bound(name, problem, levels):
    method = METHODS[name]
    return (method.prepared(levels) if hasattr(method, "prepared") else method)(picture_prior(), problem)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", LINEAR)
def test_noiseless_observations_are_met_exactly_at_the_end(name, dtype):
    mask = Mask(share=0.5, seed=1)
    problem = simulate(mask, draw(3, *IMAGE, seed=1).to(dtype), 0.0, torch.zeros(3, *IMAGE))
    method = MMPS(iterations=20) if name.startswith("mmps") else METHODS[name]
    x0 = restore(picture_prior(), problem, VP(), method=method, steps=12, dtype=dtype)
    assert x0.dtype == dtype
    assert float((x0 - mask(x0)).std()) > 0.1  # what was not seen is drawn
    exact = 1e-4 if dtype == torch.float32 else 1e-8
    near = name in ("tmpd", "pigdm")  # whose covariance is only right as sigma goes to 0
    assert torch.allclose(mask(x0), problem.y, atol=1e-3 if near else exact)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_levels_per_sample_are_those_of_each_alone(name):
    x, problem = draw(3, *IMAGE, seed=5), Problem(Downsample(2), draw(3, 2, 2, 2, seed=6), STD)
    levels, each = at([-1.0, 0.0, 1.0, 2.0]), Level.at(torch.tensor([-1.0, 0.0, 1.0])).reshape(-1, 1, 1, 1)
    restored = bound(name, problem, levels)
    alone = torch.cat([bound(name, problem[[k]], levels)(x[[k]], levels[k]) for k in range(3)])
    if name == "dps":  # one grid for all samples
        with pytest.raises(InputError, match="other levels"):
            restored(x, each)
        assert torch.allclose(restored(x, levels[1])[1], alone[1], atol=1e-10)
        return
    found = restored(x, each)
    assert torch.allclose(found, alone, atol=1e-8)
    assert found.dtype == x.dtype


@pytest.mark.parametrize("name", METHODS)
def test_float32_follows_float64_and_pure_noise_gives_numbers(name):
    problem = Problem(Blur(0.6), draw(3, *IMAGE, seed=6), STD)
    ends = [
        restore(picture_prior(), problem, schedule, method=METHODS[name], steps=8, dtype=dtype)
        for schedule in (Flow(), Cosine())
        for dtype in (torch.float32, torch.float64)
    ]
    assert all(bool(torch.isfinite(x0).all()) for x0 in ends)
    assert torch.allclose(ends[0].double(), ends[1], atol=2e-3)
    assert torch.allclose(ends[2].double(), ends[3], atol=2e-3)


@pytest.mark.parametrize("name", METHODS)
def test_samples_are_bit_equal_for_every_number_of_them(name):
    torch.manual_seed(0)
    net = UNet(2, width=32, vector=3)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.05)
    model, cond = Denoiser(net.eval(), EDMPrecond()), Label(3)(torch.arange(9) % 3)
    problem = Problem(Downsample(2), draw(9, 2, 2, 2, seed=6).float(), STD)

    def found(some, **kw):
        settings = {"method": METHODS[name], "steps": 2, "guidance": 2.0, "rows": 4, "first": some.start} | kw
        return restore(model, problem[some], Flow(), cond=cond[some], **settings)

    whole = found(slice(0, 9))
    assert whole.shape == (9, *IMAGE)
    assert torch.isfinite(whole).all()
    assert len({tuple(x.flatten().tolist()) for x in whole}) == 9
    assert torch.equal(found(slice(0, 9), batch=3), whole)
    assert torch.equal(found(slice(5, 8)), whole[5:8])
    assert torch.allclose(found(slice(2, 9), rows=None, batch=5), whole[2:], atol=1e-3)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_denoisers_of_fixed_rows_serve(name):
    x, problem = draw(3, *IMAGE, seed=5), Problem(Mask(), draw(3, *IMAGE, seed=6), STD)
    levels, method = at([0.0, 1.0]), METHODS[name]
    method = method.prepared(levels) if hasattr(method, "prepared") else method
    found = method(FixedRows(picture_prior(), 2), problem)(x, levels[0])
    assert torch.allclose(found, bound(name, problem, levels)(x, levels[0]), atol=1e-9)


@pytest.mark.parametrize("name", [name for name in TRANSFORMS if name != "dps"])
def test_tableaux_run_restorers_as_the_driver_does(name):
    x, problem, levels = draw(3, *IMAGE, seed=5), Problem(Mask(), draw(3, *IMAGE, seed=6), STD), UniformLam()(VP(), 6)
    restored = bound(name, problem, levels)
    expected = drain(trajectory(restored, x, levels, DPMpp2M()))
    assert torch.allclose(trace(DPMpp2M(), levels).run(restored, x), expected, atol=1e-8)


def test_restore_walks_the_method_along_the_grid_with_the_noise_of_the_samples():
    problem, seen = Problem(Downsample(2), draw(3, 2, 2, 2, seed=6), STD), []
    found = restore(
        picture_prior(),
        problem,
        VP(),
        steps=5,
        seed=4,
        first=7,
        dtype=torch.float64,
        progress=lambda s: seen.append(s.nfe),
    )
    noise, levels = Noise((3, *IMAGE), 4, range(7, 10), torch.float64), UniformLam()(VP(), 5)
    x = levels[0].sigma * noise()
    assert torch.equal(found, drain(trajectory(MMPS()(picture_prior(), problem), x, levels, DPMpp2M(eta=1.0), noise)))
    assert seen == [1, 2, 3, 4, 5]
    daps, noise = DAPS(2, exact=True), Noise((3, *IMAGE), 4, range(7, 10), torch.float64)
    found = restore(picture_prior(), problem, VP(), method=daps, steps=5, seed=4, first=7, dtype=torch.float64)
    x = levels[0].sigma * noise()
    assert torch.equal(found, drain(trajectory(picture_prior(), x, levels, daps.solver(problem), noise)))


def test_daps_cannot_be_traced():
    with pytest.raises(InputError, match="DAPSSolver chooses its steps from the data: it cannot be traced"):
        trace(DAPS(exact=True).solver(Problem(Matrix(A), draw(1, M), STD)), at([0.0, 1.0]))


def test_conditions_and_observations_act_together():
    """The class picks a Gaussian, whose exact posterior MMPS then samples."""
    priors = [Spectrum(MEAN, SPREADS), Spectrum(-MEAN, SPREADS.flip(0))]
    classes, problem, cond = (
        Mixture(priors, labels=[0, 1]),
        Problem(Matrix(A), draw(2, M, seed=6), STD),
        Label(2)([1, 0]),
    )

    def found(model, problem, **kw):
        return restore(model, problem, Flow(), steps=8, solver=DPMpp2M(), dtype=torch.float64, **kw)

    both = found(classes, problem, cond=cond)
    for row, prior in enumerate(reversed(priors)):
        assert torch.allclose(both[[row]], found(Gaussian(prior), problem[[row]], first=row), atol=1e-8)
    unconditional = found(classes, problem, cond=cond, guidance=0.0)
    assert torch.allclose(unconditional, found(classes, problem), atol=1e-8)
    assert not torch.allclose(unconditional, both, atol=0.01)


def test_problems_are_cut_put_together_and_repeated():
    problem = Problem(Matrix(A), draw(3, M, seed=6), STD)
    assert torch.equal(Problem.cat([problem[1:], problem[:1]]).y, problem.y[[1, 2, 0]])
    assert torch.equal(problem.repeat(2).y, problem.y[[0, 0, 1, 1, 2, 2]])
    unknown = Problem(Mask(torch.tensor([1, 0])), torch.tensor([[1.0, math.nan]]))
    assert unknown.y.tolist() == [[1.0, 0.0]]
    for table in (OPERATORS, RESTORERS):
        assert all(isinstance(kind, type) for kind in table.values())


def test_masks_of_a_share_know_that_share_and_follow_their_seed():
    known = Mask(share=0.3).known(torch.zeros(1, 3, 100, 100))
    assert known.shape == (100, 100)
    assert float(known.double().mean()) == pytest.approx(0.3, abs=0.02)
    assert torch.equal(known, Mask(share=0.3).known(torch.zeros(2, 1, 100, 100)))
    assert not torch.equal(known, Mask(share=0.3, seed=1).known(torch.zeros(1, 3, 100, 100)))


def test_a_blur_keeps_the_mean_and_has_the_std_that_it_says():
    point = torch.zeros(1, 1, 41, 41).double()
    point[..., 20, 20] = 1
    spread = Blur(2.0)(point)[0, 0]
    off = torch.arange(-20, 21).double()
    assert float(spread.sum()) == pytest.approx(1, abs=1e-12)
    assert float((spread.sum(0) * off**2).sum()) == pytest.approx(4.0, rel=0.04)
    assert torch.allclose(Blur(1.0)(torch.ones(1, 2, 5, 6)), torch.ones(1, 2, 5, 6))


def test_bad_input_is_named():
    problem, levels = Problem(Matrix(A), draw(2, M), STD), at([0.0, 1.0])
    bent = Problem(lambda x0: x0**3, draw(2, D), STD, linear=False)
    for call, why in [
        (lambda: MMPS()(PRIOR, bent), "MMPS needs a linear operator"),
        (lambda: TMPD()(PRIOR, bent), "TMPD needs a linear operator"),
        (lambda: PiGDM()(PRIOR, bent), "PiGDM needs a linear operator"),
        (lambda: DiffPIR()(PRIOR, bent), "DiffPIR needs a linear operator"),
        (lambda: DAPS(exact=True).solver(bent), "DAPS needs a linear operator"),
        (lambda: MMPS()(PRIOR, Problem(lambda x0: x0 + 1, draw(2, D))), "the operator is not linear"),
        (lambda: MMPS()(PRIOR, Problem(lambda x0: x0.abs(), draw(2, D))), "the operator is not linear"),
        (lambda: MMPS()(lambda x, lv: x.detach(), problem)(draw(2, D), levels[0]), "differentiates the denoiser"),
        (lambda: DPS()(PRIOR, problem), "prepared"),
        (lambda: DPS().prepared(levels, DPMpp2M()), "one evaluation a step"),
        (lambda: DPS().prepared(levels)(PRIOR, problem)(draw(2, D), Level.at(0.5)), "other levels"),
        (lambda: DAPS().solver(Problem(Matrix(A), draw(2, M))), "std = 0"),
        (lambda: restore(PRIOR, problem, Flow(), method=DAPS(prior_std=math.inf)), "prior_std"),
        (
            lambda: restore(PRIOR, Problem(Matrix(30 * A), draw(2, M), STD), VP(), method=DAPS(langevin=500)),
            "lower rate",
        ),
        (lambda: restore(PRIOR, problem, VP(), method=DAPS(), solver=DDIM()), "DAPS is a solver"),
        (lambda: restore(PRIOR, problem, VP(), method=MMPS), "instance"),
        (lambda: restore(PRIOR, problem, VP(), batch=-1), "batch"),
        (lambda: restore(PRIOR, problem, VP(), cond=Label(2)([0])), "1 rows for 2"),
        (lambda: Problem(Matrix(A), draw(2, M), -1.0), "std"),
        (lambda: Problem(Matrix(A), draw(2, 4)), "the operator makes"),
        (lambda: Problem(Matrix(A), torch.full((2, M), math.nan)), "finite"),
        (lambda: Problem(Matrix, draw(2, M)), "instance"),
        (lambda: Problem.cat([problem, bent]), "same operator"),
        (lambda: Mask(torch.tensor([0.5])), "values 0"),
        (lambda: Downsample(2)(draw(1, 1, 5)), "divides"),
        (lambda: Blur(2.0)(draw(1, 1, 5)), "too small"),
        (lambda: Blur(kernel=torch.ones(2)), "odd size"),
        (lambda: Blur()(draw(1, 5)), "dimensions"),
        (lambda: Matrix(A, (2, 2)), "does not act"),
    ]:
        with pytest.raises(InputError, match=why):
            call()
