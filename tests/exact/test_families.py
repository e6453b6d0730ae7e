"""What each family of solvers promises beyond the generated tests: equivalences, exactness, limits."""

import itertools
import math

import pytest
import torch

from tests.cases import INF, at, diagonal, drain, gaussian_flow
from undiffuse import (
    DDIM,
    DEIS,
    LMS,
    PNDM,
    VP,
    Adams,
    Adaptive,
    AnalyticStart,
    Ancestral,
    Butcher,
    Consistency,
    Counter,
    DPMpp2M,
    DPMpp2S,
    DPMpp3M,
    DPMSolver,
    EulerAncestral,
    Flow,
    Gaussian,
    InputError,
    Label,
    Level,
    Mixture,
    Noise,
    PredictorCorrector,
    RungeKutta,
    SASolver,
    Start,
    UniformLam,
    UniPC,
    trace,
    trajectory,
)
from undiffuse.level import between
from undiffuse.sample import moments
from undiffuse.solvers import IPNDM
from undiffuse.solvers.butcher import METHODS
from undiffuse.solvers.exponential import halved, weights
from undiffuse.solvers.quadrature import gauss_legendre

D64 = torch.float64
MIXTURE = Mixture([diagonal(0.2, 0.05, mean=-1.0), diagonal(0.1, 0.3, mean=1.0)])
UNEVEN = [-1.0, -0.8, -0.5, -0.1, 0.15, 0.3, 0.75, 1.1]


def noise_like(x, seed=0):
    return Noise(x.shape, seed, dtype=x.dtype)


@pytest.mark.parametrize("space", ["vp", "ve", "flow"])
def test_the_level_between_two_keeps_their_form(space):
    for scale in (1.0, 2.5):
        now, then, want = at([-1.0, 2.0, 0.7], space)
        now, then = (Level(scale * lv.alpha, scale * lv.sigma) for lv in (now, then))
        got = between(now, then, want.lam)
        assert torch.allclose(got.alpha, scale * want.alpha, atol=1e-15)
        assert torch.allclose(got.sigma, scale * want.sigma, atol=1e-15)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (DPMpp3M(), Adams(3)),
        (UniPC(2, variant="vary"), Adams(2, corrector=True)),
        (UniPC(1, variant="vary"), Adams(1, corrector=True)),
        (UniPC(2, corrector=False), DPMpp2M()),
        (LMS(3), DEIS(3, "rho")),
        (EulerAncestral(0.7), DDIM(0.7)),
        (Ancestral(DPMpp2S(), 0.0), DPMpp2S()),
        (SASolver(eta=0.0), Adams(3, corrector=True)),
        (SASolver(eta=0.6, lam_min=-9, lam_max=9), Adams(3, 0.6, corrector=True)),
        (DPMSolver(1), DDIM()),
        (DPMSolver(1, "x0", 0.7), Adams(1, 0.7)),
        (DPMSolver(1, "eps", 0.7), Adams(1, 0.7, prediction="eps")),
        (DEIS(1), DDIM()),
        (IPNDM(1), DDIM()),
        (PredictorCorrector(corrections=0), DDIM(1.0)),
        (Start(DDIM(), Adams(2)), Adams(2)),
    ],
)
def test_equivalent_solvers(a, b):
    """Two names for one method, on even and uneven levels, with the same noise."""
    x = torch.randn(4, 2, dtype=D64, generator=torch.Generator().manual_seed(0))
    for levels in (UniformLam()(VP(), 9), at([-3.0, -1.0, 0.5, 2.0])):
        ends = [drain(trajectory(MIXTURE, x, levels, s, noise_like(x))) for s in (a, b)]
        assert torch.allclose(*ends, atol=1e-12)


def test_sa_solver_is_random_inside_its_window_only():
    """Draws happen, and the std of a step is Adams', exactly where lam lies inside."""
    levels = at([-2.0, -1.0, 0.0, 1.0, 2.0])
    table = trace(SASolver(2, eta=1.0, lam_min=-1.5, lam_max=0.5), levels)
    z = table.points[1:, 1 + table.nfe :] != 0
    assert z.tolist() == [[False, False], [True, False], [True, True]]
    std = float(levels[2].sigma) * math.sqrt(1 - math.exp(-2))
    assert float(table.points[2, 1 + table.nfe]) == pytest.approx(std)


@pytest.mark.parametrize("h", [0.1, 1.0])
def test_dpm_solver_2_is_the_papers_formula(h):
    """x' = alpha'/alpha x - sigma' (e^h - 1) eps(u), u the first-order point at half the step in lam."""
    now, mid, then = at([0.2, 0.2 + h / 2, 0.2 + h])
    x = torch.tensor([[0.3, -1.2]], dtype=D64)

    def eps(x, lv):
        return (x - lv.alpha * MIXTURE(x, lv)) / lv.sigma

    u = mid.alpha / now.alpha * x - mid.sigma * math.expm1(h / 2) * eps(x, now)
    expected = then.alpha / now.alpha * x - then.sigma * math.expm1(h) * eps(u, mid)
    assert torch.allclose(drain(trajectory(MIXTURE, x, [now, then], DPMSolver(2))), expected, atol=1e-14)


def quadrature(value, a, b):
    """int_a^b value(u) du by 60 Gauss points of numpy."""
    import numpy as np

    node, weight = np.polynomial.legendre.leggauss(60)
    u = a + (torch.tensor(node) + 1) / 2 * (b - a)
    return (value(u) * torch.tensor(weight)).sum() * (b - a) / 2


def test_gauss_legendre_is_numpys_rule():
    import numpy as np

    node, weight = np.polynomial.legendre.leggauss(48)
    ours = gauss_legendre(48)
    assert torch.allclose(ours[0], torch.tensor(node + 1) / 2, atol=1e-14)
    assert torch.allclose(ours[1], torch.tensor(weight) / 2, atol=1e-14)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", ["lam", "s", "t"])
def test_polynomials_of_eps_are_integrated_exactly(kind, order):
    """eps = c^p for p < order in the method's own coordinate c: every step past the start is the exact integral."""
    vp, levels = VP(), at(UNEVEN)
    solver = {"lam": Adams(order, prediction="eps"), "s": LMS(order), "t": DEIS(order)}[kind]
    coordinate = {"lam": lambda lam: lam, "s": lambda lam: torch.exp(-lam), "t": vp.time}[kind]
    for p in range(order):

        def denoise(x, lv, p=p):
            return (x - lv.sigma * coordinate(lv.lam) ** p) / lv.alpha

        states = list(trajectory(denoise, torch.zeros(1, dtype=D64), levels, solver))
        for i in range(order, len(levels) - 1):
            now, then = levels[i], levels[i + 1]
            area = quadrature(lambda lam, p=p: -torch.exp(-lam) * coordinate(lam) ** p, now.lam, then.lam)
            expected = then.alpha / now.alpha * states[i - 1].x + then.alpha * area
            assert torch.allclose(states[i].x, expected, atol=1e-9)


def test_every_third_order_method_integrates_the_square_exactly():
    """x0 = lam^2: half the second derivative must be weighed by the integral of u^2, not of u^2 / 2."""
    levels, x = at(UNEVEN), torch.zeros(1, dtype=D64)
    for solver, kappa in ((DPMpp3M(), 1.0), (DPMpp3M(1.0), 2.0), (UniPC(3, corrector=False), 1.0), (SASolver(), 1.0)):
        states = list(trajectory(lambda x, lv: lv.lam**2 + 0 * x, x, levels, solver, lambda: 0 * x))
        now, then = levels[5], levels[6]
        if isinstance(solver, SASolver):
            kappa = 2.0 if float(now.lam) <= solver.lam_max else 1.0
        decay = then.sigma / now.sigma * torch.exp(-(kappa - 1) * (then.lam - now.lam))
        area = quadrature(
            lambda lam, k=kappa, end=then.lam: k * torch.exp(-k * (end - lam)) * lam**2, now.lam, then.lam
        )
        assert torch.allclose(states[5].x, decay * states[4].x + then.alpha * area, atol=1e-10), solver


@pytest.mark.parametrize("kappa", [1.0, 2.0, -1.0])
def test_the_papers_shorter_weights_differ_by_third_order(kappa):
    gaps = []
    for h in (0.2, 0.1):
        h = torch.tensor(h, dtype=D64)
        nodes = [0 * h, -1.3 * h]
        w, v = halved(nodes, h, kappa), weights(nodes, h, kappa)
        assert torch.allclose(w.sum(), v.sum(), atol=1e-14)
        gaps.append(float((h * (w - v)).abs().max()))
    assert math.log2(gaps[0] / gaps[1]) == pytest.approx(3, abs=0.2)
    assert torch.equal(halved(nodes[:1], h, kappa), weights(nodes[:1], h, kappa))


def order_conditions(a, b, order):
    """The residuals of Butcher's conditions up to order 5 (17 trees)."""
    n = len(b)
    A = torch.zeros(n, n, dtype=D64)
    for i, row in enumerate(a):
        A[i, : len(row)] = torch.tensor(row, dtype=D64)
    b, c = torch.tensor(b, dtype=D64), A.sum(1)
    trees = {
        1: [(torch.ones(n, dtype=D64), 1)],
        2: [(c, 2)],
        3: [(c**2, 3), (A @ c, 6)],
        4: [(c**3, 4), (c * (A @ c), 8), (A @ c**2, 12), (A @ A @ c, 24)],
        5: [(c**4, 5), (c**2 * (A @ c), 10), (c * (A @ c**2), 15), ((A @ c) ** 2, 20), (A @ c**3, 20),
            (c * (A @ A @ c), 30), (A @ (c * (A @ c)), 40), (A @ A @ c**2, 60), (A @ A @ A @ c, 120)],
    }  # fmt: skip
    return [abs(float(b @ tree) - 1 / density) for k in range(1, order + 1) for tree, density in trees[k]]


@pytest.mark.parametrize("name", METHODS)
def test_butcher_tableaux_fulfil_their_order_conditions(name):
    a, b, order, low = METHODS[name]
    assert max(order_conditions(a, b, order)) < 1e-14
    if low:
        assert max(order_conditions(a, low, order - 1)) < 1e-14
        if order < 5:
            assert max(order_conditions(a, low, order)) > 1e-3, "the embedded method has one order less"


@pytest.mark.parametrize("space", ["vp", "flow", "ve"])
@pytest.mark.parametrize("method", ["heun", "bogacki-shampine", "dormand-prince"])
def test_adaptive_keeps_its_tolerance(method, space):
    """Against the closed-form flow, and tighter tolerances cost more and err less."""
    mean, variance = torch.tensor([0.7, -0.3], dtype=D64), torch.tensor([1.3, 0.05], dtype=D64)
    model, levels = Gaussian(diagonal(1.3, 0.05)), at([-2.0, 2.5], space)
    model.means.copy_(mean[None])
    x = torch.tensor([[0.4, -1.1], [2.0, 0.3]], dtype=D64)
    errors, calls = [], []
    for tol in (1e-2, 1e-4, 1e-6):
        count = Counter(model)
        end = drain(trajectory(count, x * levels[0].sigma, levels, Adaptive(method, tol, tol)))
        exact = gaussian_flow(x * levels[0].sigma, levels[0], levels[1], mean, variance)
        errors.append(float((end - exact).abs().max()) / float(levels[1].alpha))
        calls.append(count.calls)
    assert errors[0] > errors[1] > errors[2]
    assert calls[0] < calls[1] < calls[2]
    assert all(error < 30 * tol for error, tol in zip(errors, (1e-2, 1e-4, 1e-6), strict=True)), errors


def test_adaptive_chooses_for_every_sample_alone():
    x, levels = torch.randn(5, 2, dtype=D64), [*at([-INF, -4.0, 4.0], "flow"), Level(1, 0)]
    together = drain(trajectory(MIXTURE, x, levels, Adaptive()))
    for i in range(5):
        alone = drain(trajectory(MIXTURE, x[i : i + 1], levels, Adaptive()))
        assert torch.allclose(alone, together[i : i + 1], atol=1e-13)
    image = drain(
        trajectory(lambda x, lv: torch.tanh(x), torch.randn(2, 1, 4, 4), levels, Adaptive(rtol=0.1, atol=0.1))
    )
    assert image.shape == (2, 1, 4, 4)
    assert image.dtype == torch.float32


def test_adaptive_says_what_it_cannot_do():
    with pytest.raises(InputError, match="cannot be traced"):
        trace(Adaptive(), at([-1.0, 1.0]))
    with pytest.raises(InputError, match="did not arrive"):
        drain(trajectory(MIXTURE, torch.randn(2, 2).double(), at([-3.0, 3.0]), Adaptive(max_steps=3)))
    with pytest.raises(InputError, match="embedded pair"):
        Adaptive("rk4")


def test_ancestral_is_a_longer_step_and_its_noise():
    """The inner solver's step to the lower level, then noise up to the next: variances add."""
    now, then = at([-0.5, 0.4])
    fresh = 1 - float(torch.exp(2 * (now.lam - then.lam)))
    down = Level(then.alpha, then.sigma * (1 - fresh) ** 0.5)
    x = torch.tensor([[0.3, -1.2]], dtype=D64)
    without = drain(trajectory(MIXTURE, x, [now, down], DPMSolver(2)))
    zero = drain(trajectory(MIXTURE, x, [now, then], Ancestral(DPMSolver(2)), lambda: torch.zeros_like(x)))
    one = drain(trajectory(MIXTURE, x, [now, then], Ancestral(DPMSolver(2)), lambda: torch.ones_like(x)))
    assert torch.allclose(zero, without, atol=1e-14)
    assert torch.allclose((one - zero) ** 2 + down.sigma**2, (then.sigma**2).expand(1, 2), atol=1e-14)


@pytest.mark.parametrize("snr", [0.1, 0.3])
def test_langevin_steps_settle_at_the_documented_variance(snr):
    """Many corrections at one level: T / (1 - d sigma^2 / (2 T)) for Gaussian data, T the true variance."""
    level, v, d = Level.at(-0.3), 0.4, 2 * snr**2
    true = float(level.alpha**2 * v + level.sigma**2)
    solver = PredictorCorrector(snr, corrections=2000, eta=0.0)
    _, got = moments(Gaussian(diagonal(v)), [level, Level.at(-0.3 + 1e-12)], solver, 2000,
                     torch.zeros(1, dtype=D64), torch.ones(1, dtype=D64))  # fmt: skip
    assert float(got) == pytest.approx(true / (1 - d * float(level.sigma**2) / (2 * true)), rel=1e-6)


def test_consistency_sampling_of_an_exact_consistency_model_is_exact():
    """With x0 = the end of the path, one step and five give the data's exact variance."""
    variance = torch.tensor([0.3], dtype=D64)

    def end_of_path(x, level):
        return gaussian_flow(x, level, Level(1, 0), torch.zeros(1, dtype=D64), variance)

    for lams in ([-9.0, INF], [-9.0, -2.0, -1.0, 0.0, 1.0, INF]):
        levels = at(lams)
        start = levels[0].alpha ** 2 * variance + levels[0].sigma ** 2
        mean, got = moments(end_of_path, levels, Consistency(), 9, torch.zeros(1, dtype=D64), start)
        # fresh noise has the variance sigma^2 + alpha^2 v only after its x0 is added
        assert torch.allclose(got, variance, rtol=1e-6)
        assert float(mean) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("prediction", ["x0", "eps"])
def test_singlestep_noise_lies_on_one_path(order, prediction):
    """With a constant prediction a step of any order is the exact solution of the SDE: one step's mean and variance."""
    now, then, x = *at([-0.5, 0.6]), torch.tensor([1.5], dtype=D64)

    def denoise(x, lv):
        return 0 * x + 0.7 if prediction == "x0" else (x - lv.sigma * 0.7) / lv.alpha

    got = moments(denoise, [now, then], DPMSolver(order, prediction, 0.8), 3, x, torch.zeros(1, dtype=D64))
    one = moments(denoise, [now, then], Adams(1, 0.8, prediction=prediction), 3, x, torch.zeros(1, dtype=D64))
    assert torch.allclose(got[0], one[0], atol=1e-12)
    assert torch.allclose(got[1], one[1], atol=1e-12)


def test_start_hands_over_when_the_history_is_full():
    levels, x = UniformLam()(VP(), 8), torch.randn(2, 2, dtype=D64)
    count = Counter(MIXTURE)
    nfe = [s.nfe for s in trajectory(count, x, levels, Start(DPMSolver(2, "x0"), Adams(3)))]
    assert nfe == [2, 4, 5, 6, 7, 8, 9, 10]
    flow = [s.nfe for s in trajectory(MIXTURE, x, UniformLam()(Flow(), 8), PNDM())]
    assert flow == [1, 5, 9, 13, 14, 15, 16, 17], "the step from pure noise counts for nothing"
    again = [s.nfe for s in trajectory(MIXTURE, x, at([-1.0, 0.0, 1.0, 2.0, 0.5, 1.0, 2.0]),
                                       Start(DPMSolver(2), Adams(2)), noise_like(x))]  # fmt: skip
    assert again == [2, 3, 4, 4, 6, 7], "and again after the noise has risen"


def test_a_finer_grid_and_a_higher_order_come_nearer_to_the_mixtures_flow():
    """At an equal number of evaluations the ranking that theory gives holds on a curved path."""
    x = torch.randn(64, 2, dtype=D64, generator=torch.Generator().manual_seed(1))

    def error(solver, steps):
        grid = at(torch.linspace(-2, 2, steps + 1, dtype=D64))
        return float((drain(trajectory(MIXTURE, x, grid, solver)) - truth).square().mean().sqrt())

    truth = drain(trajectory(MIXTURE, x, at(torch.linspace(-2, 2, 801, dtype=D64)), RungeKutta("dormand-prince")))
    ladder = [error(DDIM(), 24), error(DPMpp2M(), 24), error(UniPC(3), 24), error(Adams(4, corrector=True), 48)]
    assert all(a > 2 * b for a, b in itertools.pairwise(ladder)), ladder


@pytest.mark.parametrize(
    "broken",
    [
        lambda: DPMSolver(4), lambda: DPMSolver(2, "v"), lambda: DPMSolver(2, eta=1.5), lambda: DPMpp2M(-1.0),
        lambda: UniPC(3, variant="bh3"), lambda: UniPC(3, eta=0.5), lambda: UniPC(0), lambda: Adams(2, prediction="v"),
        lambda: SASolver(lam_min=1.0, lam_max=0.0), lambda: SASolver(eta=2.0), lambda: DEIS(0), lambda: DEIS(3, "x"),
        lambda: IPNDM(5), lambda: RungeKutta("rk5"), lambda: RungeKutta(own=Butcher(((), (1.0,)), (0.5, 0.6), 2)),
        lambda: RungeKutta(own=Butcher(((1.0,), (1.0,)), (0.5, 0.5), 2)),
        lambda: RungeKutta(own=Butcher(((), (2.0,)), (0.75, 0.25), 2)),
        lambda: RungeKutta(own=Butcher(((), (1.0,)), (0.5, 0.5), 7)),
        lambda: RungeKutta(own=Butcher(((), (math.nan,)), (0.5, 0.5), 2)), lambda: Adaptive(atol=0.0),
        lambda: Ancestral(DDIM(), 1.5), lambda: PredictorCorrector(snr=0.0), lambda: PredictorCorrector(corrections=-1),
    ],
)  # fmt: skip
def test_impossible_hyperparameters_are_refused(broken):
    with pytest.raises(InputError):
        broken()


def test_deis_beyond_its_schedules_end_uses_the_times_that_differ():
    """Two levels noisier than the schedule's first have one time there: no polynomial goes through both."""
    levels = [*at(torch.linspace(-8, 3, 16, dtype=D64)), Level(1, 0)]
    table = trace(DEIS(4), levels)
    assert torch.isfinite(table.out).all()
    kept = float(table.gaussian(torch.tensor([0.25])).variance.sqrt()) / 0.5
    assert kept == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize("wrapped", [Ancestral(Adaptive(), 0.0), Start(Adaptive(), Adams(3))])
def test_a_wrapped_adaptive_solver_cannot_be_traced_either(wrapped):
    with pytest.raises(InputError, match="cannot be traced"):
        trace(wrapped, at([-1.0, 1.0]))
    x, levels = torch.tensor([[0.3, -0.7]], dtype=D64), at([-1.0, 1.0])
    alone = drain(trajectory(MIXTURE, x, levels, Adaptive()))
    assert torch.equal(drain(trajectory(MIXTURE, x, levels, wrapped)), alone)


def test_the_analytic_start_is_exact_and_saves_a_call():
    mean, x, levels = torch.tensor([0.3, 0.3], dtype=D64), torch.randn(4, 2, dtype=D64), UniformLam()(Flow(), 6)
    count = Counter(Gaussian(diagonal(0.5, 0.2, mean=0.3)))
    plain = drain(trajectory(count, x, levels, DPMpp2M()))
    saved = drain(trajectory(AnalyticStart(count, mean), x, levels, DPMpp2M()))
    assert torch.allclose(plain, saved, atol=1e-14)
    assert count.calls == 6 + 5
    classes = Mixture([diagonal(0.1, 0.1, mean=m) for m in (-1.0, 2.0)], labels=[0, 1])
    cond, start = Label(2)([0, 1, 1, 0]), Level(0, 1)
    asked = AnalyticStart(classes, torch.full((2,), 0.5))(x, start, cond)
    assert torch.equal(asked, classes(x, start, cond)), "with a condition the mean is another"
    with pytest.raises(InputError, match="the mean has shape"):
        AnalyticStart(count, torch.zeros(3))(x, start)


@pytest.mark.parametrize("solver", [DDIM, "ddim", None])
def test_what_is_no_solver_is_named(solver):
    with pytest.raises(InputError, match="instance such as DPMpp2M"):
        drain(trajectory(MIXTURE, torch.zeros(1, 2), at([-1.0, 1.0]), solver))
