"""Tuning: gradients against finite differences, optima against brute force, gains on noise that was not tuned on."""

import itertools
import math

import pytest
import torch

from tests.cases import diagonal
from undiffuse import (
    DDIM,
    EDM,
    IPNDM,
    VP,
    Adams,
    Adaptive,
    DPMpp2M,
    Eval,
    Flow,
    Gaussian,
    Heun,
    InputError,
    Karras,
    Level,
    Mixture,
    Modal,
    SASolver,
    Spectral,
    SpectralGrid,
    Spectrum,
    Tableau,
    UniformLam,
    UniPC,
    spectral,
    trace,
)
from undiffuse.grid import Restart
from undiffuse.tune.coefficients import Ends, Errors, endpoint, tune_coefficients
from undiffuse.tune.family import Family, Spacing, assembled, between, levels_of
from undiffuse.tune.gaussian import Modes, gaussian_error, tune_gaussian
from undiffuse.tune.ladder import VARIANCE, families, ladder, refusal
from undiffuse.tune.trajectory import Paths, jump_costs, shortest, tune_trajectory

D64 = torch.float64
SCHEDULES = {"edm": EDM(), "vp": VP(), "flow": Flow()}
G = torch.Generator().manual_seed(0)
BASIS = torch.linalg.qr(torch.randn(6, 6, generator=G, dtype=D64))[0]
MEAN = torch.randn(6, generator=G, dtype=D64)
VARIANCES = torch.tensor([4.0, 1.0, 0.3, 0.02, 1e-3, 1e-4], dtype=D64)
SPREAD = Spectrum(MEAN, VARIANCES, BASIS)
LOW = Spectrum(MEAN, VARIANCES[:3], BASIS[:3], 0.05)
FAMILIES = {
    "2m": Family(DPMpp2M()),
    "unipc": Family(UniPC(3)),
    "ipndm": Family(IPNDM(4)),
    "spectral": Family(Spectral(0.09)),
    "modal": Family(Spectral(), SPREAD, None),
    "modal low": Family(Spectral(order=2), LOW, None),
    "2m in a basis": Family(DPMpp2M(), SPREAD, 3),
}


def random_corrections(family, n, seed=0, size=0.2):
    g = torch.Generator().manual_seed(seed)
    return size * torch.randn(len(family.variances), n, n, generator=g, dtype=D64)


def wells(d=2):
    """Four narrow Gaussians on a circle: a small mixture with curved paths."""
    angle = torch.arange(4, dtype=D64) * math.pi / 2 + 0.3
    return Mixture([Spectrum(torch.stack([a.cos(), a.sin()]), torch.tensor([0.09, 0.04], dtype=D64)) for a in angle])


WELLS = wells()
OVERALL = Spectrum(torch.zeros(2), torch.full((2,), 0.5 + 0.065, dtype=D64))


def bind(indices):
    return lambda x, level, /: WELLS(x, level)


def accurate(denoise, x):
    return trace(Adams(3, corrector=True), UniformLam(lam_max=7.0)(EDM(), 100)).run(denoise, x)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_levels_keep_order_and_ends_whatever_their_parameters(schedule):
    schedule = SCHEDULES[schedule]
    start = UniformLam(lam_max=3.0)(schedule, 6)
    spacing = Spacing.around(schedule, start)
    again = spacing.levels(spacing.parameters(start))
    assert all(
        torch.allclose(a.sigma, b.sigma) and torch.allclose(a.alpha, b.alpha) for a, b in zip(again, start, strict=True)
    )
    for seed in range(5):
        g = torch.Generator().manual_seed(seed)
        levels = spacing.levels(4 * torch.randn(6, generator=g, dtype=D64))
        lams = [float(level.lam) for level in levels]
        assert lams == sorted(lams)
        assert lams[0] == float(schedule.level(1.0).lam)
        assert lams[-1] == math.inf
        assert lams[-2] <= float(schedule.level(0.0).lam)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_table_without_corrections_is_the_traced_solver(name, schedule):
    family, levels = FAMILIES[name], UniformLam()(SCHEDULES[schedule], 5)
    plan = family.plan(levels)
    if family.spectrum is None:
        due = [trace(family.solver, levels)]
    elif isinstance(family.solver, Spectral):
        due = spectral(family.spectrum, levels, family.solver.order, groups=family.groups).tables
    else:
        due = [trace(family.solver, levels)] * len(family.variances)
    found = [plan] if isinstance(plan, Tableau) else plan.tables
    for table, other in zip(found, due, strict=True):
        for part in ("alpha", "sigma", "points", "out", "start", "end"):
            assert torch.allclose(getattr(table, part), getattr(other, part), rtol=1e-10, atol=1e-12), part


@pytest.mark.parametrize("name", ["2m", "unipc", "ipndm", "2m in a basis"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_corrections_integrate_constant_predictions_exactly(name, schedule):
    family, schedule = FAMILIES[name], SCHEDULES[schedule]
    levels = UniformLam()(schedule, 5)
    plan = family.plan(levels, random_corrections(family, 5))
    assert not torch.allclose(
        (plan if isinstance(plan, Tableau) else plan.tables[0]).out, trace(family.solver, levels).out
    )
    c, eps = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(1), dtype=D64)
    seen = []

    def constant(x, level, /):
        seen.append(float((x - (level.alpha * c + level.sigma * eps)).abs().max()))
        return c

    end = plan.run(constant, levels[0].alpha * c + levels[0].sigma * eps)
    assert max(seen) < 1e-9
    assert torch.allclose(end, c, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["spectral", "modal", "modal low"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_corrections_of_spectral_tables_sample_gaussian_data_exactly(name, schedule):
    family = FAMILIES[name]
    levels = UniformLam(lam_max=3.0)(SCHEDULES[schedule], 4)
    plan = family.plan(levels, random_corrections(family, 4))
    plain = family.plan(levels)
    assert not torch.allclose(*((p if isinstance(p, Tableau) else p.tables[0]).out for p in (plan, plain)))
    if isinstance(plan, Tableau):
        assert torch.allclose(
            plan.gaussian(torch.tensor([0.09]), exact_start=True).variance, torch.tensor([0.09]).double()
        )
    else:
        out = plan.gaussian(exact_start=True)
        assert torch.allclose(out.variances, family.spectrum.variances, rtol=1e-8)
        assert torch.allclose(out.mean, family.spectrum.mean, rtol=1e-8)
        assert math.isclose(out.rest, family.spectrum.rest, rel_tol=1e-8, abs_tol=1e-12)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_plan_of_the_family_gives_back_its_corrections(name, schedule):
    family = FAMILIES[name]
    corrections = random_corrections(family, 5)
    found = family.corrections(family.plan(UniformLam(lam_max=3.0)(SCHEDULES[schedule], 5), corrections))
    assert torch.allclose(found, corrections.tril(0 if isinstance(family.solver, Spectral) else -1), atol=1e-9)


def test_a_family_holds_all_plans_that_integrate_exactly_what_it_does():
    levels, plain = UniformLam(lam_max=3.0)(EDM(), 5), Family(DPMpp2M())
    g = torch.Generator().manual_seed(2)
    inside = [trace(solver, levels) for solver in (DDIM(), IPNDM(4), UniPC(3), Adams(3, prediction="eps"))]
    modal = Family(Spectral(), SPREAD)
    for family, plans in ((plain, inside), (modal, [spectral(SPREAD, levels, 1), spectral(SPREAD, levels, 2, False)])):
        for plan in plans:
            again = family.plan(levels, family.corrections(plan))
            x = 80 * torch.randn(3, 6 if isinstance(plan, Modal) else 2, generator=g, dtype=D64)
            denoise = Gaussian(diagonal(*[0.3] * 6)) if isinstance(plan, Modal) else WELLS
            assert torch.allclose(again.run(denoise, x), plan.run(denoise, x), rtol=1e-8, atol=1e-10)
    outside = (trace(Heun(), levels[:3] + levels[-1:]), trace(Spectral(0.3), levels), spectral(SPREAD, levels))
    assert [plain.corrections(plan) for plan in outside] == [None] * 3
    others = (inside[0], spectral(LOW, levels), spectral(SPREAD, levels, groups=2))
    assert [modal.corrections(plan) for plan in others] == [None] * 3


@pytest.mark.parametrize("name", ["2m", "modal"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_plans_between_two_guidances_are_exact_where_both_are(name, schedule):
    family, schedule = FAMILIES[name], SCHEDULES[schedule]
    ends = [
        (UniformLam(lam_max=lam)(schedule, 4), random_corrections(family, 4, seed))
        for seed, lam in ((0, 3.0), (1, 4.0))
    ]
    plans = {w: family.plan(*end) for w, end in zip((2.0, 5.0), ends, strict=True)}
    x, data = (
        float(ends[0][0][0].sigma) * torch.randn(3, 6, generator=torch.Generator().manual_seed(3), dtype=D64),
        SPREAD,
    )
    for w, due in plans.items():
        same = between(family, schedule, plans, w)
        assert torch.allclose(same.run(Gaussian(data), x), due.run(Gaussian(data), x), rtol=1e-8, atol=1e-10)
    plan = between(family, schedule, plans, 3.0)
    lams = [[float(level.lam) for level in levels_of(p)[1:-1]] for p in (plans[2.0], plan, plans[5.0])]
    assert all(math.isclose(m, (2 * low + high) / 3, rel_tol=1e-9) for low, m, high in zip(*lams, strict=True))
    if name == "modal":
        assert torch.allclose(plan.gaussian(exact_start=True).variances, data.variances, rtol=1e-8)
    else:
        c = torch.tensor([0.3, -2.0], dtype=D64)
        alpha, sigma = plan.start
        end = plan.run(lambda x, level, /: c.expand_as(x), (alpha * c + sigma).expand(1, 2))
        assert torch.allclose(end, c, atol=1e-9)
    for w in (1.9, 5.1):
        with pytest.raises(InputError, match="say nothing"):
            between(family, schedule, plans, w)
    with pytest.raises(InputError, match="of the family"):
        between(family, schedule, {2.0: plans[2.0], 5.0: trace(Heun(), UniformLam()(schedule, 2))}, 3.0)
    with pytest.raises(InputError, match="as many"):
        between(family, schedule, {2.0: plans[2.0], 5.0: family.plan(UniformLam()(schedule, 5))}, 3.0)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_differentiable_run_is_the_plans_run(name):
    family = FAMILIES[name]
    d = 6 if family.spectrum is not None else 2
    denoise = Gaussian(diagonal(*([0.3] * d), mean=0.4)) if d == 6 else WELLS
    levels, x = UniformLam(lam_max=3.0)(VP(), 5), torch.randn(4, d, generator=G, dtype=D64)
    corrections = random_corrections(family, 5)
    due = family.plan(levels, corrections).run(denoise, x)
    for save in (True, False):
        assert torch.allclose(endpoint(family, levels, corrections, denoise, x, save), due, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["2m", "spectral", "modal", "2m in a basis"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_gradient_through_the_run_is_that_of_finite_differences(name, schedule):
    family, schedule = FAMILIES[name], SCHEDULES[schedule]
    mixture = (
        WELLS
        if family.spectrum is None
        else Mixture([Spectrum(MEAN + s, 0.2 * VARIANCES + 0.01, BASIS) for s in (-0.7, 0.7)])
    )
    d = mixture.means.shape[1]
    spacing = Spacing.around(schedule, UniformLam(lam_max=3.0)(schedule, 4))
    place = (spacing.parameters(UniformLam(lam_max=3.0)(schedule, 4)) + 0.05 * torch.randn(4, generator=G)).detach()
    x = float(spacing.first.sigma) * torch.randn(3, d, generator=G, dtype=D64)
    target = torch.randn(3, d, generator=G, dtype=D64)

    def loss(place, corrections, save=False):
        end = endpoint(family, spacing.levels(place), corrections, lambda x, level, /: mixture(x, level), x, save)
        return (end - target).square().sum(1).log().sum()

    corrections = random_corrections(family, 4, size=0.05)
    a, b = place.clone().requires_grad_(), corrections.clone().requires_grad_()
    loss(a, b, True).backward()
    for seed in range(3):
        g = torch.Generator().manual_seed(seed)
        u, v = torch.randn(4, generator=g, dtype=D64), torch.randn(*corrections.shape, generator=g, dtype=D64)
        h = 1e-5
        slope = (loss(place + h * u, corrections + h * v) - loss(place - h * u, corrections - h * v)) / (2 * h)
        assert math.isclose(float((a.grad * u).sum() + (b.grad * v).sum()), float(slope), rel_tol=1e-4, abs_tol=1e-5)


# the closed form


def test_gaussian_error_is_the_wasserstein_distance_of_the_exact_output():
    """Against the closed form of linear algebra: W2^2 of two Gaussians, from the run's own map."""
    levels = UniformLam()(VP(), 4)
    table = trace(DPMpp2M(), levels)
    # the run is affine in x: its matrix and offset from the exact denoiser itself
    denoise = Gaussian(SPREAD)
    zero = table.run(denoise, torch.zeros(1, 6, dtype=D64))
    matrix = table.run(denoise, torch.eye(6, dtype=D64)) - zero
    covariance = float(levels[0].sigma) ** 2 * matrix.T @ matrix
    values = torch.linalg.eigvalsh(
        BASIS.T @ torch.diag(VARIANCES.sqrt()) @ BASIS @ covariance @ BASIS.T @ torch.diag(VARIANCES.sqrt()) @ BASIS
    )
    cross = values.clamp(min=0).sqrt().sum()
    due = (zero[0] - MEAN).square().sum() + covariance.trace() + VARIANCES.sum() - 2 * cross
    assert math.isclose(float(gaussian_error(table, Modes.of(SPREAD, None))) * 6, float(due), rel_tol=1e-8)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_gradient_of_gaussian_error_is_that_of_finite_differences(schedule):
    schedule, family, modes = SCHEDULES[schedule], Family(DPMpp2M()), Modes.of(SPREAD, None)
    start = UniformLam(lam_max=3.0)(schedule, 5)
    spacing = Spacing.around(schedule, start)

    def error(place):
        levels = spacing.levels(place)
        points, out = family.tables(levels)
        return gaussian_error(assembled(levels, points[0], out[0]), modes)

    place = spacing.parameters(start).requires_grad_()
    (slope,) = torch.autograd.grad(error(place), place)
    for i, e in enumerate(1e-5 * torch.eye(5, dtype=D64)):
        due = float(error(place.detach() + e) - error(place.detach() - e)) / 2e-5
        assert math.isclose(float(slope[i]), due, rel_tol=1e-4, abs_tol=1e-9)


def wasserstein(plan, spectrum):
    """W2^2 of a plan's output to the data from samples of its affine map, independent of `Tableau.gaussian`."""
    d, denoise = len(spectrum.mean), Gaussian(spectrum)
    zero = plan.run(denoise, torch.zeros(1, d, dtype=D64))
    gain = (plan.run(denoise, torch.eye(d, dtype=D64)) - zero).diagonal() * plan.start[1]
    return float(((gain.abs() - spectrum.variances.sqrt()) ** 2 + (zero[0] - spectrum.mean) ** 2).sum())


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_closed_form_betters_its_grid_on_a_spread_spectrum(schedule):
    schedule, family = SCHEDULES[schedule], Family(DPMpp2M())
    data = Spectrum(0.2 * torch.ones(4), torch.tensor([1.0, 0.1, 0.01, 0.001]))
    start = UniformLam()(schedule, 5)
    found = tune_gaussian(family, schedule, 5, data)
    before, after = (wasserstein(trace(DPMpp2M(), levels), data) for levels in (start, found.levels))
    assert after < 0.2 * before
    assert math.isclose(found.before, before / 4, rel_tol=1e-6)
    assert math.isclose(found.after, after / 4, rel_tol=1e-6)
    both = tune_gaussian(family, schedule, 5, data, start, coefficients=True)
    assert both.after < 0.2 * both.before
    assert bool(both.corrections.any())
    assert math.isclose(wasserstein(family.plan(both.levels, both.corrections), data) / 4, both.after, rel_tol=1e-6)


# the grid from paths


@pytest.mark.parametrize("seed", range(4))
def test_dynamic_programming_finds_the_cheapest_way(seed):
    m, g = 7, torch.Generator().manual_seed(seed)
    cost = torch.rand(m + 1, m + 1, m + 1, generator=g, dtype=D64)
    found = shortest(cost, m)

    def total(way):
        return sum(float(cost[h, i, j]) for h, i, j in zip([0, *way], way, way[1:], strict=False))

    for n in range(1, m + 1):
        ways = [(0, *inner, m) for inner in itertools.combinations(range(1, m), n - 1)]
        assert tuple(found[n]) == min(ways, key=total)


def test_a_jumps_cost_is_the_local_error_of_the_step():
    levels = UniformLam(lam_max=3.0)(VP(), 6)
    x = float(levels[0].sigma) * torch.randn(5, 2, generator=G, dtype=D64)
    paths = Paths.walk(lambda x, level, /: WELLS(x, level), x, levels, DPMpp2M())
    v = float(paths.x[-1].square().mean())
    for family in (Family(DPMpp2M()), Family(UniPC(3)), Family(Spectral(0.3))):
        cost = jump_costs(family, paths)
        for h, i, j in ((0, 0, 3), (0, 2, 4), (1, 3, 4), (1, 2, 6), (0, 0, 6)):
            # two steps of the driver, the first one replaced by the teacher's point
            solver = (
                family.solver
                if isinstance(family.solver, DPMpp2M)
                else type(family.solver)(**{**vars(family.solver), "corrector": False})
            )
            past = [Eval(levels[h], paths.x[h], paths.x0[h])] if h < i else []
            end, _ = solver.step(lambda x, level, /, i=i: paths.x0[i], paths.x[i], levels[i], levels[j], past, None)
            std = (levels[j].alpha ** 2 * v + levels[j].sigma ** 2).sqrt()
            due = (end - paths.x[j]).square().mean().sqrt() * math.sqrt(v) / std
            assert math.isclose(float(cost[h, i, j]), float(due), rel_tol=1e-5, abs_tol=1e-9)
        assert bool(torch.isinf(cost[2, 1]).all())
        assert bool(torch.isinf(cost[0, 3, :4]).all())


def test_costs_in_the_datas_directions_are_those_of_all_elements_together():
    """A solver without variance steps alike in every direction, and constants are exact: only the scale is left."""
    data = Spectrum(MEAN, torch.full((6,), 0.5, dtype=D64), BASIS)
    levels = UniformLam(lam_max=3.0)(VP(), 5)
    mixture = Mixture([Spectrum(MEAN + s, 0.2 * VARIANCES + 0.01, BASIS) for s in (-0.7, 0.7)])
    paths = Paths.walk(mixture, float(levels[0].sigma) * torch.randn(4, 6, generator=G, dtype=D64), levels)
    scale = (0.5 / paths.x[-1].square().mean()).sqrt()
    plain = jump_costs(Family(DPMpp2M()), Paths(levels, scale * paths.x, scale * paths.x0))
    finite = torch.isfinite(plain)
    cost = jump_costs(Family(DPMpp2M(), data), paths)
    assert bool((torch.isfinite(cost) == finite).all())
    assert torch.allclose(scale * cost[finite], plain[finite], rtol=1e-5, atol=1e-9)


def test_a_grid_from_paths_has_a_smaller_error_than_its_start():
    family, schedule = Family(DDIM()), EDM()
    noise = Ends.draw(bind, range(24), (2,), accurate, 80.0)
    found = tune_trajectory(family, bind(()), noise.noise[:8], schedule, 8, UniformLam(lam_max=4.0), 40)
    held = Ends.draw(bind, range(100, 140), (2,), accurate, 80.0)
    assert sorted(found) == list(range(1, 9))
    assert all(len(levels) == n + 1 for n, levels in found.items())
    for n in (5, 8):
        start = UniformLam(lam_max=4.0)(schedule, n)
        before, after = (held.errors(family.plan(levels).run, levels[0]).median for levels in (start, found[n]))
        assert after < 0.9 * before


# gradients


def test_errors_count_what_is_no_number():
    assert Errors.of(torch.tensor([1.0, 2.0, 3.0]), 0.5) == Errors(2.0, pytest.approx(math.sqrt(14 / 3)), 3.0, 0.5)
    assert Errors.of(torch.tensor([1.0, 1.0, math.nan])) == Errors(1.0, math.inf, math.inf, 1.0)


def test_the_variance_kept_is_that_of_the_ends():
    """Of ends scaled about their mean by c, c^2 is kept, and the error is |1 - c| of their distance from the mean."""
    held = Ends.draw(bind, range(50), (2,), accurate, 80.0)
    mean = held.end.mean(0)
    found = held.errors(lambda denoise, x: mean + 0.8 * (held.end - mean), EDM().level(1.0))
    assert math.isclose(found.kept, 0.64, rel_tol=1e-9)
    relative = 0.2 * (held.end - mean).norm(dim=1) / held.end.norm(dim=1)
    assert math.isclose(found.median, float(relative.median()), rel_tol=1e-9)
    assert math.isnan(held.errors(lambda denoise, x: x * math.nan, EDM().level(1.0)).kept)


def test_a_win_needs_every_measure():
    first = Errors(1.0, 2.0, 3.0, 0.95)
    assert not refusal(Errors(0.9, 2.0, 3.0, 1.05), first, first)
    assert not refusal(Errors(0.9, 2.0, 3.0, 1.0 - 0.99 * VARIANCE), first._replace(kept=1.0), first)
    for new, word in (
        (Errors(1.0, 1.0, 1.0, 1.0), "median"),
        (Errors(0.9, 2.01, 1.0, 1.0), "RMS"),
        (Errors(0.9, math.nan, 1.0, 1.0), "RMS"),
        (Errors(0.9, 1.0, 3.01, 1.0), "90th"),
        (Errors(0.9, 1.0, 1.0, 0.94), "loses variance"),
        (Errors(0.9, 1.0, 1.0, 1.06), "adds variance"),
        (Errors(0.9, 1.0, 1.0, math.nan), "variance"),
    ):
        assert word in refusal(new, first, first)
    best = Errors(0.5, 1.0, 1.0, 1.0)
    assert not refusal(Errors(0.2, 1.5, 1.5, 1.0), first, best)
    assert not refusal(Errors(0.6, 0.5, 1.0, 1.0), first, best)
    assert "below" in refusal(Errors(0.6, 1.0, 1.0, 1.0), first, best)


@pytest.mark.parametrize("name", ["plain", "spectral"])
def test_tuned_tables_have_a_smaller_median_error_on_held_out_noise(name):
    family = {"plain": Family(DPMpp2M()), "spectral": Family(Spectral(), OVERALL)}[name]
    start = SpectralGrid(OVERALL)(EDM(), 5)
    tuning, held = (Ends.draw(bind, r, (2,), accurate, 80.0) for r in (range(48), range(1000, 1064)))
    found = tune_coefficients(family, tuning, EDM(), start, seconds=60, iterations=60, save=False)
    assert found.after < found.before
    assert found.iterations <= 61
    before, after = (
        held.errors(plan.run, start[0]).median
        for plan in (family.plan(start), family.plan(found.levels, found.corrections))
    )
    assert after < 0.6 * before


def test_time_is_kept():
    tuning = Ends.draw(bind, range(8), (2,), accurate, 80.0)
    start = SpectralGrid(OVERALL)(EDM(), 5)
    found = tune_coefficients(Family(DPMpp2M()), tuning, EDM(), start, seconds=0.3, iterations=10**6)
    assert 0 < found.iterations < 10**4
    assert found.seconds < 10


def test_over_fitted_gradients_are_not_kept():
    """Tuned on two noises of one narrow Gaussian, coefficients say nothing about the mixture that is held out."""
    narrow = Gaussian(Spectrum(torch.tensor([1.0, 0.3]), torch.tensor([1e-3, 1e-2])))

    def planted(indices):
        return (lambda x, level, /: narrow(x, level)) if indices[0] < 2 else bind(indices)

    said = []
    report = ladder(
        planted,
        (2,),
        EDM(),
        (6,),
        OVERALL,
        tried={"spectral": Family(Spectral(), OVERALL)},
        reference=accurate,
        tuning=2,
        held_out=32,
        seconds=60,
        iterations=100,
        save=False,
        progress=lambda n, result: said.append(str(result)),
    )
    rungs = {rung.name: rung for rung in report.results[6].rungs}
    assert rungs["gradient"].tuned.median < 0.1 * rungs["first"].tuned.median
    assert rungs["gradient"].held_out.high > 1.2 * rungs["first"].held_out.high
    assert f"not kept: {rungs['gradient'].why}" in said[0]
    assert not rungs["gradient"].kept
    best = [rung for rung in report.results[6].rungs if rung.kept][-1]
    if best.name == "first":
        assert report.results[6].plan is report.results[6].first


def test_the_ladder_climbs_where_there_is_noise_enough():
    report = ladder(
        bind,
        (2,),
        EDM(),
        (4, 6),
        OVERALL,
        reference=accurate,
        tuning=48,
        held_out=48,
        seconds=60,
        iterations=50,
        save=False,
    )
    for n, result in report.results.items():
        assert isinstance(result.plan, Tableau | Modal)
        assert result.plan.nfe == n
        assert result.chosen.median < 0.8 * result.start.median
        assert result.chosen.rms <= result.start.rms
        fresh = Ends.draw(bind, range(96, 160), (2,), accurate, 80.0)
        for plan, errors in ((result.plan, result.chosen), (result.first, result.start)):
            assert fresh.errors(plan.run, EDM().level(1.0)) == errors
        family = {"spectral": Spectral, "dpmpp-2m": DPMpp2M}[result.family.split(" ")[0]]
        assert isinstance(families(OVERALL)[result.family].solver, family)
        again = families(OVERALL)[result.family].plan(result.levels, result.corrections)
        assert fresh.errors(again.run, EDM().level(1.0)) == result.chosen
    assert "6 evaluations" in str(report)


@pytest.mark.parametrize("name", ["ipndm", "spectral 2", "heun", "noisy start"])
def test_the_ladder_starts_from_the_plan_to_beat(name):
    """Its coefficients are those of a family's start where it has some, else its levels where they fall."""
    levels = UniformLam(lam_max=3.0)(EDM(), 6)
    plan = {
        "ipndm": lambda: trace(IPNDM(4), levels),
        "spectral 2": lambda: spectral(OVERALL, levels, 2, corrector=False),
        "heun": lambda: trace(Heun(), [levels[i] for i in (0, 2, 4, 6)]),
        "noisy start": lambda: trace(DPMpp2M(), [*levels[:-1], Level.at(9.0)]),
    }[name]()
    report = ladder(
        bind, (2,), EDM(), (plan.nfe,), OVERALL, first=lambda n: plan, reference=accurate,
        tuning=16, held_out=32, fresh=2, seconds=60, iterations=20, save=False,
    )  # fmt: skip
    result = report.results[plan.nfe]
    assert result.first is plan
    assert result.rungs[0].held_out == Ends.draw(bind, range(16, 48), (2,), accurate, 80.0).errors(plan.run, levels[0])
    kept = [rung.held_out for rung in result.rungs if rung.kept]
    assert all(not refusal(new, kept[0], old) for old, new in itertools.pairwise(kept))
    with_levels = {rung.family for rung in result.rungs if rung.name == "levels"}
    due = {"ipndm": {"spectral 1", "spectral 3"}, "spectral 2": {"dpmpp-2m"}}
    assert with_levels == due.get(name, set(families(OVERALL)))


def test_a_plan_that_loses_variance_is_not_kept():
    """Ends that have nothing to do with the noise are nearest to their mean: an error without variance is planted."""
    data = Spectrum(torch.zeros(8), torch.ones(8))
    found = ladder(
        lambda indices: Gaussian(data), (8,), EDM(), (4,), data,
        first=lambda n: trace(DPMpp2M(), UniformLam(lam_max=3.0)(EDM(), n)),
        tried={"dpmpp-2m": Family(DPMpp2M())}, reference=lambda denoise, x: x.roll(1, 0) / 80,
        seconds=60, iterations=40, save=False,
    ).results[4]  # fmt: skip
    first, last = found.rungs[0].held_out, found.rungs[-1].held_out
    assert last.median < first.median
    assert last.rms < first.rms
    assert last.high < first.high
    assert last.kept < 0.5 * first.kept
    assert "it loses variance" in found.rungs[-1].why
    assert "not kept: it loses variance" in str(found)
    assert abs(found.chosen.kept - 1) <= abs(found.start.kept - 1)


# wrong arguments


def test_mistakes_are_named():
    ends = Ends.draw(bind, range(2), (2,), accurate, 80.0)
    levels = UniformLam()(EDM(), 4)
    for solver in (Heun(), Adaptive()):
        with pytest.raises(InputError, match="one evaluation"):
            Family(solver)
    with pytest.raises(InputError, match="draws noise"):
        Family(SASolver()).plan(levels)
    with pytest.raises(InputError, match="groups"):
        Family(Spectral(), SPREAD, 0)
    with pytest.raises(InputError, match="fall from"):
        Spacing.around(EDM(), [*levels[:-1], Level(1.0, 0.1)])
    with pytest.raises(InputError, match="fall from"):
        Spacing.around(EDM(), levels[1:])
    with pytest.raises(InputError, match="fall from"):
        Spacing.around(EDM(), Restart()(EDM(), 18))
    with pytest.raises(InputError, match="no spectrum"):
        tune_gaussian(Family(Spectral(), SPREAD), EDM(), 4, SPREAD)
    with pytest.raises(InputError, match="levels"):
        tune_gaussian(Family(DPMpp2M()), EDM(), 5, SPREAD, levels)
    with pytest.raises(InputError, match="1 to 7"):
        shortest(torch.zeros(8, 8, 8), 8)
    with pytest.raises(InputError, match="teacher"):
        tune_trajectory(Family(DPMpp2M()), bind(()), ends.noise, EDM(), 30, teacher_steps=20)
    with pytest.raises(InputError, match="teacher"):
        Paths.walk(bind(()), ends.noise, Karras()(EDM(), 4), Heun())
    with pytest.raises(InputError, match="seconds"):
        tune_coefficients(Family(DPMpp2M()), ends, EDM(), levels, seconds=0)
    few = ({"nfe": (4,), part: 1} for part in ("tuning", "held_out", "fresh"))
    for bad in ({"nfe": ()}, {"nfe": (0,)}, {"nfe": (61,)}, *few):
        with pytest.raises(InputError, match="budgets"):
            ladder(bind, (2,), EDM(), bad.pop("nfe"), OVERALL, **bad)
    with pytest.raises(InputError, match="has 4"):
        ladder(bind, (2,), EDM(), (5,), OVERALL, first=lambda n: trace(DPMpp2M(), levels), reference=accurate)
