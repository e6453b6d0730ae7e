"""Every entry of SOLVERS: exactness, order, invariance, exact moments, equivalences, edges."""

import itertools

import pytest
import torch

from tests.cases import DETERMINISTIC, INF, SOLVER_CASES, STOCHASTIC, at, diagonal, drain, gaussian_flow
from undiffuse import (
    DDIM,
    DDPM,
    VP,
    Adams,
    Dataset,
    Discrete,
    DPMpp2M,
    Euler,
    Eval,
    Gaussian,
    Heun,
    InputError,
    Level,
    Mixture,
    Noise,
    PredictorCorrector,
    Spectral,
    Start,
    UniformLam,
    UniformT,
    trace,
    trajectory,
)
from undiffuse.certify import graded, order, problem, slope, truth, weak_order
from undiffuse.sample import moments
from undiffuse.solvers.exponential import moments as phi
from undiffuse.solvers.exponential import weights
from undiffuse.solvers.spectral import LIMIT, adams

D64 = torch.float64


def noise_like(x, seed=0):
    return Noise(x.shape, seed, dtype=x.dtype)


def errors_on_gaussian(solver, steps=(40, 80, 160)):
    """Distance to the closed-form flow of Gaussian data at lam = 2.5, from lam = -2, on a graded grid."""
    mean, variance = torch.tensor([0.7, -0.3], dtype=D64), torch.tensor([1.3, 0.05], dtype=D64)
    model = Gaussian(diagonal(1.3, 0.05))
    model.means.copy_(mean[None])
    x, out = torch.tensor([[0.4, -1.1]], dtype=D64), []
    for n in steps:
        u = torch.linspace(0, 1, n + 1, dtype=D64)
        levels = at(-2 + 4.5 * (0.7 * u + 0.3 * u**2))
        end = drain(trajectory(model, x, levels, solver))
        out.append(float((end - gaussian_flow(x, levels[0], levels[-1], mean, variance)).norm()))
    return out


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_measured_order_is_the_documented_order(name):
    """On a mixture, where no scheme is right by chance, with first steps 9 times the last.

    A fifth order meets float64's rounding before its slope has settled; its conditions are proved in test_families.
    """
    documented = SOLVER_CASES[name].global_order
    assert order(SOLVER_CASES[name]) == pytest.approx(documented, abs=0.1 if documented < 5 else 0.5)


@pytest.mark.parametrize("name", sorted(STOCHASTIC))
def test_the_output_std_converges_at_least_as_documented(name):
    solver = SOLVER_CASES[name]
    assert weak_order(solver) > solver.global_order - 0.1
    if solver.global_order == 0:
        assert weak_order(solver) < 0.2, "it does not converge, and says so"


def test_the_reference_of_the_orders_is_an_independent_solution():
    """scipy's DOP853 on z = x / sigma, dz = x0 d(alpha / sigma), against our fifth-order method on x / alpha."""
    from scipy.integrate import solve_ivp

    model, x = problem()
    first, last = graded(1)

    def slope_of(lam, z):
        level = Level.at(lam)
        return ((level.alpha / level.sigma) * model(torch.tensor(z).reshape(3, 2) * level.sigma, level)).flatten()

    z = (x / first.sigma).flatten().numpy()
    found = solve_ivp(slope_of, (float(first.lam), float(last.lam)), z, "DOP853", rtol=1e-12, atol=1e-13)
    assert torch.allclose(torch.tensor(found.y[:, -1]).reshape(3, 2) * last.sigma, truth(), atol=1e-11)


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_gaussian_data_are_followed_along_the_closed_form_flow(name):
    errors = errors_on_gaussian(SOLVER_CASES[name], (40, 80))
    assert errors[1] < 0.6 * errors[0] or errors[1] < 1e-9
    assert errors[1] < 0.1 / 8 ** SOLVER_CASES[name].global_order


@pytest.mark.parametrize(("order", "corrector"), [(1, False), (2, False), (3, False), (4, False), (2, True), (3, True)])
def test_adams_has_its_full_order_once_its_history_is_full(order, corrector):
    """Started from exact values, the global order is that of the polynomial."""

    def noiseless():
        raise AssertionError("a deterministic solver draws no noise")

    solver, variance, mean = (
        Adams(order, corrector=corrector),
        torch.tensor([1.3, 0.05], dtype=D64),
        torch.zeros(2).double(),
    )
    model, errors = Gaussian(diagonal(1.3, 0.05)), []
    for n in (80, 160):
        levels, x = at(torch.linspace(-2, 2.5, n + 1, dtype=D64)), torch.tensor([[0.4, -1.1]], dtype=D64)
        exact = [gaussian_flow(x, levels[0], level, mean, variance) for level in levels]
        past = [Eval(levels[i], exact[i], model(exact[i], levels[i])) for i in reversed(range(order))]
        x = exact[order]
        for now, then in itertools.pairwise(levels[order:]):
            x, new = solver.step(model, x, now, then, past, noiseless)
            past = [new, *past][: solver.history]
        errors.append(float((x - exact[-1]).norm()))
    assert slope(*errors[-2:]) == pytest.approx(order + corrector, abs=0.15)


def exact_integral(p, start, h, kappa):
    """kappa int_0^h e^(-kappa (h - u)) (start + u)^p du by Gauss-Legendre."""
    import numpy as np

    node, weight = np.polynomial.legendre.leggauss(60)
    u = torch.tensor((node + 1) / 2) * h
    return (kappa * torch.exp(-kappa * (h - u)) * (start + u) ** p * torch.tensor(weight) * h / 2).sum()


@pytest.mark.parametrize("order", range(1, 7))
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("corrector", [False, True])
def test_adams_integrates_polynomials_in_lam_exactly(order, eta, corrector):
    """x0 = lam^p for p below the order: after the start-up every step is the exact integral."""
    solver, kappa = Adams(order, eta, corrector), 1 + eta**2
    lams = torch.tensor([-1.0, -0.8, -0.5, -0.1, 0.15, 0.3, 0.75, 1.1, 1.3], dtype=D64)
    levels = at(lams)
    for p in range(order):
        states = list(trajectory(lambda x, lv, p=p: lv.lam**p + 0 * x, torch.zeros(1, dtype=D64), levels, solver,
                                 lambda: torch.zeros(1, dtype=D64)))  # fmt: skip
        for i in range(order, 7):
            now, then = levels[i], levels[i + 1]
            h = then.lam - now.lam
            decay = then.sigma / now.sigma * torch.exp(-(eta**2) * h)
            expected = decay * states[i - 1].x + then.alpha * exact_integral(p, now.lam, h, kappa)
            assert torch.allclose(states[i].x, expected, atol=1e-10)


@pytest.mark.parametrize("order", range(1, 6))
def test_corrector_is_exact_for_one_degree_more(order):
    """With the node at the step's end, x before the next prediction integrates lam^order exactly."""
    lams = torch.tensor([-1.0, -0.8, -0.5, -0.1, 0.15, 0.3, 0.75], dtype=D64)
    h = lams[6] - lams[5]
    w = weights([lams[6] - lams[5], *(lams[5 - j] - lams[5] for j in range(order))], h, 1.0)
    nodes = torch.stack([lams[6], *(lams[5 - j] for j in range(order))])
    assert torch.allclose((w * nodes**order).sum(), exact_integral(order, lams[5], h, 1.0), atol=1e-10)


@pytest.mark.parametrize("z", [1e-9, 1e-3, 0.3, 0.999, 1.001, 5.0, 40.0])
def test_phi_moments_match_quadrature(z):
    got = phi(torch.tensor(z, dtype=D64), 6)
    for p in range(6):
        expected = exact_integral(p, torch.tensor(0.0, dtype=D64), torch.tensor(1.0, dtype=D64), z)
        assert float(got[p]) == pytest.approx(float(expected), rel=1e-9)


@pytest.mark.parametrize("h", [0.4, 1e-3])
def test_adams_2_is_2m_to_its_own_order(h):
    """2M weighs the slope by h/2 (1 - e^-h) / ... instead of its exact integral: the gap is O(h^3)."""
    now, old, then = at([0.0, -h, h])
    gap = []
    for solver in (Adams(2), DPMpp2M()):
        levels = [old, now, then]
        gap.append(drain(trajectory(lambda x, lv: lv.lam + 0 * x, torch.zeros(1, dtype=D64), levels, solver)))
    assert float((gap[0] - gap[1]).abs()) < h**3


@pytest.mark.parametrize("name", SOLVER_CASES)
def test_one_x0_path_in_every_coordinate_system(name):
    """x / alpha and the predictions agree in VP, VE and flow form."""
    model = Mixture([diagonal(0.2, 0.05, mean=-1.0), diagonal(0.1, 0.3, mean=1.0)])
    paths, y = {}, torch.randn(3, 2, generator=torch.Generator().manual_seed(0)).double() * 5
    for space in ("vp", "ve", "flow"):
        levels = [Level.at(lam, space) for lam in [-2.0, -1.5, -0.6, 0.1, 0.9, 2.2, INF]]
        states = trajectory(model, levels[0].alpha * y, levels, SOLVER_CASES[name], noise_like(y))
        paths[space] = torch.stack([s.x0 for s in states] + [s.x / s.level.alpha for s in trajectory(
            model, levels[0].alpha * y, levels, SOLVER_CASES[name], noise_like(y))])  # fmt: skip
    assert torch.allclose(paths["vp"], paths["ve"], atol=1e-10)
    assert torch.allclose(paths["vp"], paths["flow"], atol=1e-10)


@pytest.mark.parametrize("name", sorted(STOCHASTIC | set(DETERMINISTIC)))
def test_output_moments_of_the_tableau_equal_the_drivers(name):
    """Two exact routes: triangular solves on the traced table, and the driver on basis vectors."""
    variance, levels = torch.tensor([1.0, 0.0625, 0.0025], dtype=D64), UniformLam()(VP(), 12)
    solver, model = SOLVER_CASES[name], Gaussian(diagonal(1.0, 0.0625, 0.0025, mean=0.4))
    mean = torch.full((3,), 0.4, dtype=D64)
    table = trace(solver, levels)
    got = table.gaussian(variance, mean)
    start = levels[0].sigma ** 2 * torch.ones(3, dtype=D64)
    expected = moments(model, levels, solver, table.draws, torch.zeros(3, dtype=D64), start)
    assert torch.allclose(got.mean, expected[0], atol=1e-12)
    assert torch.allclose(got.variance, expected[1], atol=1e-12)


@pytest.mark.parametrize(
    ("solver", "tolerance"),
    [
        (Adams(1, eta=1.0), 0.02),
        (Adams(2, eta=1.0), 3e-4),
        (Adams(2, eta=0.5, corrector=True), 3e-5),
        (DDIM(1.0), 0.02),
    ],
)
def test_stochastic_solvers_reach_the_datas_moments(solver, tolerance):
    """On Gaussian data the exact output mean and variance at 400 steps are the data's, started at the true marginal."""
    levels = at(torch.linspace(-3, 5, 401, dtype=D64))
    got = trace(solver, levels).gaussian(torch.tensor([1.0, 0.25, 0.01]), torch.tensor([0.5] * 3), exact_start=True)
    end = levels[-1]
    variance = end.alpha**2 * torch.tensor([1.0, 0.25, 0.01], dtype=D64) + end.sigma**2
    assert torch.allclose(got.mean, end.alpha * torch.full((3,), 0.5, dtype=D64), rtol=tolerance)
    assert torch.allclose(got.variance, variance, rtol=tolerance)


@pytest.mark.parametrize(("order", "corrector"), [(1, False), (2, False), (1, True), (2, True)])
def test_drift_of_stochastic_adams_keeps_its_order(order, corrector):
    """Exact output mean for Gaussian data: x / alpha - mu shrinks like (v + sigma^2 / alpha^2)^((1 + eta^2) / 2)."""
    model, eta, errors = Gaussian(diagonal(0.3, mean=1.0)), 0.5, []
    for n in (40, 80, 160):
        levels, x = at(torch.linspace(-2, 2.5, n + 1, dtype=D64)), torch.tensor([2.0], dtype=D64)
        mean, _ = moments(model, levels, Adams(order, eta, corrector), n, x, torch.zeros(1, dtype=D64))
        a, b = levels[0], levels[-1]
        ratio = (0.3 + torch.exp(-2 * b.lam)) / (0.3 + torch.exp(-2 * a.lam))
        exact = b.alpha * (1 + ratio ** ((1 + eta**2) / 2) * (x / a.alpha - 1))
        errors.append(float((mean - exact).abs()))
    assert slope(*errors[-2:]) == pytest.approx(order + corrector, abs=0.1)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_the_reverse_sdes_mean_is_exact(order):
    """At eta = 1 the prediction is a martingale: on Gaussian data its mean is constant, so every order is exact."""
    model, levels = Gaussian(diagonal(0.3, mean=1.0)), at(torch.linspace(-2, 2.5, 8, dtype=D64))
    x, (a, b) = torch.tensor([2.0], dtype=D64), (levels[0], levels[-1])
    mean, _ = moments(model, levels, Adams(order, eta=1.0), 8, x, torch.zeros(1, dtype=D64))
    joint = a.alpha / b.alpha * (b.alpha**2 * 0.3 + b.sigma**2)  # Cov(x_a, x_b) of the forward process
    exact = b.alpha + joint / (a.alpha**2 * 0.3 + a.sigma**2) * (x - a.alpha)
    assert torch.allclose(mean, exact, atol=1e-12)


@pytest.mark.parametrize("variance", ["small", "large", "learned"])
def test_ddpm_chain_of_1000_steps_on_gaussian_data(variance):
    """Exact output moments of the full chain. The learned (exact posterior) variance reproduces the data; beta-tilde is
    too narrow and beta too wide for data of variance below 1, by the amounts that these closed forms give."""
    levels = UniformT()(Discrete.linear(), 1000)
    data = torch.tensor([1.0, 0.25, 0.05], dtype=D64) ** 2
    mean, model = torch.full((3,), 0.5, dtype=D64), Gaussian(diagonal(*data.tolist(), mean=0.5))
    start = levels[0].alpha * mean, levels[0].alpha ** 2 * data + levels[0].sigma ** 2
    got_mean, got = moments(model, levels, DDPM(variance), 999, *start)
    assert torch.allclose(got_mean, mean, atol=1e-3)
    if variance == "learned":
        assert torch.allclose(got.sqrt(), data.sqrt(), atol=1e-3)
    elif variance == "large":
        assert float(got[0].sqrt()) == pytest.approx(1, abs=1e-3)
        assert (got[1:] > data[1:]).all()
    else:
        assert (got < data).all()


def test_ddpm_small_variance_is_exact_for_a_single_point_and_large_for_unit_variance():
    levels, start = UniformLam()(VP(), 7), torch.zeros(1, dtype=D64)
    point = moments(
        Gaussian(diagonal(0.0, mean=0.7)), levels[:-1], DDPM("small"), 9, start, levels[0].sigma ** 2 + start
    )
    assert torch.allclose(point[1], levels[-2].sigma ** 2)
    unit = moments(Gaussian(diagonal(1.0)), levels[:-1], DDPM("large"), 9, start, start + 1)
    assert torch.allclose(unit[1], torch.ones(1, dtype=D64))


MIXTURE = Mixture([diagonal(0.2, 0.05, mean=-1.0), diagonal(0.1, 0.3, mean=1.0)])


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (DDIM(0.0), Euler()),
        (DDIM(0.0), Adams(1)),
        (DDIM(1.0), DDPM("small")),
        (DDIM(1.0), Adams(1, eta=1.0)),
        (Heun(0.0), Heun(0.3, s_min=1e4, s_max=1e5)),
    ],
)
def test_equivalent_solvers(a, b):
    x = torch.randn(4, 2, dtype=D64)
    for levels in (UniformLam()(VP(), 9), at([-3.0, -1.0, 0.5, 2.0])):
        ends = [drain(trajectory(MIXTURE, x, levels, s, noise_like(x))) for s in (a, b)]
        assert torch.allclose(*ends, atol=1e-13)


@pytest.mark.parametrize("variance", [1e-6, 0.25, 30.0])
@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("corrector", [False, True])
def test_spectral_is_exact_for_gaussian_data_of_its_variance(variance, order, corrector):
    """One step from any level to any other, and any number of steps, from pure noise to clean data included."""
    model, x = Gaussian(diagonal(variance)), torch.randn(4, 1, dtype=D64)
    for lams in ([-2.0, 1.0], [-INF, INF], [-INF, 0.0], [0.0, INF], [-9.0, 9.0], [-INF, -2.0, 0.5, 0.6, 4.0, INF]):
        for space in ("vp", "flow"):
            levels = at(lams, space)
            end = drain(trajectory(model, x, levels, Spectral(variance, order, corrector)))
            exact = gaussian_flow(x, levels[0], levels[-1], torch.zeros(1), torch.tensor(variance, dtype=D64))
            assert torch.allclose(end, exact, rtol=1e-12, atol=1e-14)


def test_spectral_weights_integrate_polynomials_and_extrapolate_no_further_than_their_limit():
    nodes = [torch.tensor(t, dtype=D64) for t in (0.5, 0.3, 0.2, 0.0)]
    powers = torch.arange(4)[:, None]
    inside = adams(nodes, nodes[1], nodes[0])
    at_powers = torch.stack(nodes) ** powers
    assert torch.allclose(
        at_powers @ inside, (0.5 ** (powers + 1) - 0.3 ** (powers + 1))[:, 0].double() / (powers + 1)[:, 0]
    )
    for end, kept in ((0.51, 4), (0.57, 3), (0.7, 2), (1.5, 1)):
        w = adams(nodes, nodes[0], torch.tensor(end, dtype=D64))
        some = min(kept + 1, 4)  # the first node that would go too far counts in part
        assert (w != 0).tolist() == [True] * some + [False] * (4 - some)
        assert w.abs().sum() <= LIMIT * (end - 0.5) * (1 + 1e-12)
        assert kept == 4 or float(w.abs().sum()) == pytest.approx(LIMIT * (end - 0.5))
        assert float(w @ torch.stack(nodes) ** (kept - 1)) == pytest.approx((end**kept - 0.5**kept) / kept)
    ends = torch.linspace(0.505, 1.5, 20001, dtype=D64)
    shape = ends.shape
    w = adams([n.expand(shape) for n in nodes], nodes[0].expand(shape), ends) / (ends - 0.5)[:, None]
    assert float(w.diff(dim=0).abs().max()) < 0.01  # continuous in the levels
    twice = adams([nodes[0], nodes[1], nodes[1]], nodes[0], torch.tensor(0.6, dtype=D64))
    assert torch.equal(twice[:2], adams(nodes[:2], nodes[0], torch.tensor(0.6, dtype=D64)))


def test_spectral_tends_to_ddim_as_the_variance_vanishes():
    x, levels = torch.randn(4, 2, dtype=D64), at([-2.0, -0.5, 0.7, INF])
    ends = [drain(trajectory(MIXTURE, x, levels, s)) for s in (Spectral(1e-12, 1, False), DDIM())]
    assert torch.allclose(*ends, atol=1e-5)


def test_spectral_steps_to_clean_data_for_some_samples_equal_a_loop():
    x, lams = torch.randn(2, 1, dtype=D64), [(-1.0, -1.5), (0.5, 0.0), (INF, 0.4)]
    rows = [
        Level(*(torch.stack([getattr(Level.at(lam), c) for lam in row]) for c in ("alpha", "sigma"))) for row in lams
    ]
    model, solver = Gaussian(diagonal(0.7)), Spectral(0.2, 1, False)
    together = drain(trajectory(model, x, [row.reshape(-1, 1) for row in rows], solver))
    alone = [drain(trajectory(model, x[k : k + 1], at([row[k] for row in lams]), solver)) for k in range(2)]
    assert torch.allclose(together, torch.cat(alone), atol=1e-12)


@pytest.mark.parametrize("name", SOLVER_CASES)
def test_tableau_equals_driver(name):
    x, levels = torch.randn(4, 2, dtype=D64) * 3, UniformLam()(VP(), 11)
    table = trace(SOLVER_CASES[name], levels)
    by_table = table.run(MIXTURE, x, noise_like(x))
    by_driver = drain(trajectory(MIXTURE, x, levels, SOLVER_CASES[name], noise_like(x)))
    assert (by_table - by_driver).abs().max() < 1e-12
    dense = table.points @ torch.zeros(len(table.out), dtype=D64)
    assert dense.shape == (table.nfe,)


@pytest.mark.parametrize("name", SOLVER_CASES)
def test_a_level_for_every_sample_equals_a_loop(name):
    solver, x = SOLVER_CASES[name], torch.randn(3, 2, dtype=D64)
    grids = [at(torch.linspace(lo, 2 + lo / 3, 6, dtype=D64)) for lo in (-3.0, -2.0, -1.0)]
    stacked = [
        Level(torch.stack([lv.alpha for lv in row]), torch.stack([lv.sigma for lv in row])).reshape(-1, 1)
        for row in zip(*grids, strict=True)
    ]
    together = drain(trajectory(MIXTURE, x, stacked, solver, noise_like(x)))
    for i in range(3):
        noise = Noise((1, 2), indices=[i], dtype=D64)
        alone = drain(trajectory(MIXTURE, x[i : i + 1], grids[i], solver, noise))
        assert torch.allclose(together[i : i + 1], alone, atol=1e-12)


@pytest.mark.parametrize("name", SOLVER_CASES)
def test_one_step_pure_noise_and_clean_end_are_finite(name):
    solver, model = SOLVER_CASES[name], Gaussian(diagonal(0.5, 0.2, mean=0.3))
    for lams in ([-INF, INF], [-INF, 0.0], [0.0, INF], [-INF, -1.0, 1.0, INF], [-INF, -3.0, 0.0, 2.0, 3.0, 4.0, INF]):
        for space in ("vp", "flow"):
            x = torch.randn(2, 2, dtype=D64)
            end = drain(trajectory(model, x, at(lams, space), solver, noise_like(x)))
            assert torch.isfinite(end).all(), (lams, space)
    one = drain(trajectory(model, x, at([-INF, INF]), solver, noise_like(x)))
    spread = solver.variance**0.5 if isinstance(solver, Spectral) else 0.0  # which knows the data's variance
    assert torch.allclose(one, 0.3 + spread * x, atol=1e-12), "one step from pure noise is the mean"


@pytest.mark.parametrize("name", SOLVER_CASES)
def test_the_last_step_adds_no_noise(name):
    x, levels = torch.randn(2, 2, dtype=D64), UniformLam()(VP(), 6)
    states = list(trajectory(MIXTURE, x, levels, SOLVER_CASES[name], noise_like(x)))
    if name.startswith(("deis", "lms", "ipndm", "pndm", "spectral")):  # integrated to sigma = 0: no jump to x0
        assert name in DETERMINISTIC
        assert not torch.allclose(states[-1].x, states[-1].x0, atol=1e-9)
    else:
        assert torch.allclose(states[-1].x, states[-1].x0, atol=1e-12)


@pytest.mark.parametrize("name", SOLVER_CASES)
@pytest.mark.parametrize("shape", [(1, 3), (2, 1, 5), (1, 2, 3, 5), (2, 1, 2, 3, 2), (3, 1)])
def test_data_of_any_rank(name, shape):
    x, levels = torch.randn(shape), UniformLam()(VP(), 4)
    end = drain(trajectory(lambda x, lv: torch.tanh(x), x, levels, SOLVER_CASES[name], noise_like(x)))
    assert end.shape == shape
    assert end.dtype == torch.float32


@pytest.mark.parametrize("name", SOLVER_CASES)
def test_half_precision_stays_half_precision(name):
    x, levels = torch.randn(2, 3).bfloat16(), UniformLam()(VP(), 5)
    end = drain(trajectory(lambda x, lv: torch.tanh(x), x, levels, SOLVER_CASES[name], noise_like(x)))
    assert end.dtype == torch.bfloat16
    assert torch.isfinite(end).all()


@pytest.mark.parametrize("name", SOLVER_CASES)
def test_levels_that_rise_renoise_by_the_forward_transition(name):
    """Restart: down, up, down. With exact moments the way up is the forward process."""
    solver, model = SOLVER_CASES[name], Gaussian(diagonal(0.4))
    levels = at([-2.0, -0.5, 1.0, -0.5, 1.0])
    table = trace(solver, levels)
    x = torch.randn(3, 1, dtype=D64)
    by_table = table.run(model, x, noise_like(x))
    by_driver = drain(trajectory(model, x, levels, solver, noise_like(x)))
    assert torch.allclose(by_table, by_driver, atol=1e-12)
    states = list(trajectory(model, x, levels, solver, lambda: torch.zeros_like(x)))
    assert torch.allclose(states[2].x, levels[3].alpha / levels[2].alpha * states[1].x)
    exact_up = trace(DDIM(), [levels[2], levels[3], INF_LEVEL]).gaussian(torch.tensor([0.4]), exact_start=True)
    assert torch.isfinite(exact_up.variance).all()


INF_LEVEL = Level(1, 0)


@pytest.mark.parametrize("name", SOLVER_CASES)
def test_a_solver_is_a_value(name):
    """Interleaved runs of one solver equal separate ones: it holds no state."""
    solver, levels = SOLVER_CASES[name], UniformLam()(VP(), 6)
    a, b = torch.randn(2, 2, dtype=D64), torch.randn(3, 2, dtype=D64)
    alone = [drain(trajectory(MIXTURE, x, levels, solver, noise_like(x))) for x in (a, b)]
    both = [trajectory(MIXTURE, x, levels, solver, noise_like(x)) for x in (a, b)]
    for s, t in zip(*both, strict=True):
        last = s.x, t.x
    assert torch.equal(last[0], alone[0])
    assert torch.equal(last[1], alone[1])
    assert hash(solver) == hash(SOLVER_CASES[name])


def test_nfe_and_declared_calls():
    x, levels = torch.zeros(1, 2), UniformLam()(VP(), 8)
    for name, solver in SOLVER_CASES.items():
        *_, last = trajectory(MIXTURE, x, levels, solver, noise_like(x))
        if isinstance(solver, Start):
            expected = solver.history * solver.first.calls + 8 - solver.history
        elif isinstance(solver, PredictorCorrector):  # it corrects before the last step, too
            expected = 8 * solver.calls
        else:
            expected = 7 * solver.calls + 1
        assert last.nfe == expected, name
        assert trace(solver, levels).nfe == expected


def test_churn_keeps_the_marginal():
    """After churn x has the variance of the raised level: alpha^2 v + sigma_hat^2."""
    now = Level.at(-0.5)
    x, raised = Euler(0.3).churn(torch.zeros(1, dtype=D64), now, lambda: torch.ones(1, dtype=D64))
    assert torch.allclose(x**2 + now.sigma**2, raised.sigma**2)
    assert raised.alpha == now.alpha


@pytest.mark.parametrize(
    "broken",
    [lambda: DDIM(-0.1), lambda: DDIM(1.5), lambda: DDPM("medium"), lambda: Adams(0), lambda: Adams(9),
     lambda: Adams(2, eta=2.0), lambda: Spectral(0.0), lambda: Spectral(order=5),
     lambda: Euler(gamma=1.0), lambda: Heun(0.1, s_min=2, s_max=1)],
)  # fmt: skip
def test_impossible_hyperparameters_are_refused(broken):
    with pytest.raises(InputError):
        broken()


def test_many_threads_share_one_solver():
    from concurrent.futures import ThreadPoolExecutor

    levels, xs = UniformLam()(VP(), 6), [torch.randn(2, 2, dtype=D64) for _ in range(32)]
    cases = list(itertools.islice(itertools.cycle(SOLVER_CASES.values()), 32))

    def run(i):
        return drain(trajectory(MIXTURE, xs[i], levels, cases[i], noise_like(xs[i])))

    serial = [run(i) for i in range(32)]
    with ThreadPoolExecutor(32) as pool:
        assert all(torch.equal(a, b) for a, b in zip(serial, pool.map(run, range(32)), strict=True))


def test_the_ideal_denoiser_lands_on_its_points():
    points = torch.randn(5, 3, dtype=D64)
    x = torch.randn(8, 3, dtype=D64)
    end = drain(trajectory(Dataset(points), x, UniformLam()(VP(), 20), DPMpp2M()))
    assert torch.cdist(end, points).amin(1).max() < 1e-6
