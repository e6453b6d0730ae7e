"""Tableaux in a basis: one table for all is that table, and the spectral solver is exact for Gaussian data."""

import itertools
import math

import pytest
import torch
from safetensors.torch import save_file

from tests.cases import INF, at, gaussian_flow
from tests.exact.test_tableau import Watched
from undiffuse import (
    DDPM,
    EDM,
    SCHEDULES,
    VP,
    Adams,
    DPMpp2M,
    Gaussian,
    InputError,
    Mixture,
    Modal,
    Noise,
    Spectral,
    SpectralGrid,
    Spectrum,
    UniformLam,
    UniformT,
    UniPC,
    spectral,
    trace,
)
from undiffuse.certify import graded, problem, run, slope, truth
from undiffuse.modal import grouped

D64 = torch.float64
G = torch.Generator().manual_seed(0)
BASIS = torch.linalg.qr(torch.randn(6, 6, generator=G, dtype=D64))[0]
MEAN = torch.randn(6, generator=G, dtype=D64)
VARIANCES = torch.tensor([4.0, 1.0, 0.3, 0.02, 1e-3, 1e-4], dtype=D64)
SPECTRA = {
    "full": Spectrum(MEAN, VARIANCES, BASIS, shape=(1, 2, 3)),
    "low-rank": Spectrum(MEAN, VARIANCES[:3], BASIS[:3], 0.05, shape=(1, 2, 3)),
    "diagonal": Spectrum(MEAN, VARIANCES, shape=(1, 2, 3)),
}
LEVELS = UniformLam()(VP(), 6)


def parts(s):
    """All six directions of a spectrum, and their variances."""
    k = len(s.variances)
    rows = torch.eye(6, dtype=D64) if s.basis is None else torch.cat([s.basis, BASIS[k:]])
    return rows, torch.cat([s.variances, torch.full((6 - k,), s.rest, dtype=D64)])


def flow(s, x, now, then):
    """The probability flow of Gaussian data of this spectrum."""
    rows, variances = parts(s)
    return (gaussian_flow(x.flatten(1) @ rows.T, now, then, rows @ s.mean, variances) @ rows).reshape(x.shape)


def mixture(s):
    """Two Gaussians of this spectrum's basis, about other means."""
    return Mixture([Spectrum(m, s.variances / 3, s.basis, s.rest / 3, s.shape) for m in (s.mean + 1, s.mean - 0.7)])


@pytest.mark.parametrize("kind", SPECTRA)
@pytest.mark.parametrize("solver", [DPMpp2M(), Adams(3, corrector=True), DDPM()])
def test_one_table_for_all_groups_is_that_table(kind, solver):
    s, table = SPECTRA[kind], trace(solver, LEVELS)
    group = torch.arange(len(s.variances) + (len(s.variances) < 6)) % 3
    plan = Modal(s, group, (table,) * 3)
    x = torch.randn(5, 1, 2, 3, dtype=D64)
    model = mixture(s)

    def noise():
        return Noise(x.shape, 1, dtype=D64)

    assert torch.allclose(plan.run(model, x, noise()), table.run(model, x, noise()), atol=1e-12)
    assert (plan.nfe, plan.draws) == (table.nfe, table.draws)


@pytest.mark.parametrize("kind", SPECTRA)
def test_each_direction_has_its_own_table(kind):
    """A denoiser that acts on each direction alone: the plan does there what the direction's table does."""
    s = SPECTRA[kind]
    rows, _ = parts(s)
    tables = (trace(Adams(1), LEVELS), trace(Adams(3, corrector=True), LEVELS))
    group = torch.arange(len(s.variances) + (len(s.variances) < 6)) % 2
    each = torch.cat([group[: len(s.variances)], group[-1].expand(6 - len(s.variances))])
    x, got = torch.randn(4, 1, 2, 3, dtype=D64), []

    def model(x, level):
        return (torch.tanh((x.flatten(1) - level.alpha * s.mean) @ rows.T) @ rows + s.mean).reshape(x.shape)

    found = (Modal(s, group, tables).run(model, x).flatten(1) - LEVELS[-1].alpha * s.mean) @ rows.T
    start = (x.flatten(1) - LEVELS[0].alpha * s.mean) @ rows.T
    for i in range(6):
        got.append(tables[each[i]].run(lambda x, level: torch.tanh(x), start[:, i]))
    assert torch.allclose(found, torch.stack(got, 1), atol=1e-12)


@pytest.mark.parametrize("kind", SPECTRA)
@pytest.mark.parametrize("lams", [[-4.0, INF], [-INF, INF], [-3.0, 1.0], [-INF, -2.0, 0.0, 3.0, INF]])
def test_gaussian_data_are_followed_exactly_in_any_number_of_steps(kind, lams):
    s, levels = SPECTRA[kind], at(lams)
    plan, x = spectral(s, levels, groups=None), torch.randn(5, 1, 2, 3, dtype=D64)
    due = flow(s, x, levels[0], levels[-1])
    assert torch.allclose(plan.run(Gaussian(s), x), due, atol=1e-12)
    out = plan.gaussian(exact_start=True)
    assert torch.allclose(out.mean, levels[-1].alpha * s.mean, atol=1e-12)
    assert torch.allclose(out.variances, levels[-1].alpha ** 2 * s.variances + levels[-1].sigma ** 2, rtol=1e-10)
    assert out.rest == pytest.approx(float(levels[-1].alpha ** 2 * s.rest + levels[-1].sigma ** 2) * (s.rest > 0))


@pytest.mark.parametrize("kind", SPECTRA)
@pytest.mark.parametrize("solver", [None, DDPM()])
@pytest.mark.parametrize("exact_start", [False, True])
def test_the_closed_form_output_is_that_of_runs(kind, solver, exact_start):
    """Data of another mean and other variances in the basis; a run is affine in its start and its draws."""
    s, levels = SPECTRA[kind], UniformLam()(VP(), 4)
    data = Spectrum(s.mean + 0.5, s.variances * 1.7 + 0.01, s.basis, s.rest * 2, s.shape)
    tables = [trace(solver or Spectral(v), levels) for v in (1.0, 0.1)]
    plan = Modal(s, torch.arange(len(s.variances) + (len(s.variances) < 6)) % 2, tuple(tables))
    (rows, _), (_, variances) = parts(s), parts(data)
    width = 6 * (1 + plan.draws)
    out = plan.gaussian(data, exact_start)
    a, std = (levels[0].alpha if exact_start else 0.0), levels[0].sigma
    spread = (a**2 * variances + std**2).sqrt()[:, None] * rows
    starts = torch.cat([torch.zeros(1, 6, dtype=D64), spread, torch.zeros(width - 6, 6, dtype=D64)]) + a * data.mean
    turn = iter(range(plan.draws))

    def noise():
        z, i = torch.zeros(width + 1, 6, dtype=D64), 7 + 6 * next(turn)
        z[i : i + 6] = rows
        return z.reshape(-1, 1, 2, 3)

    ends = plan.run(Gaussian(data), starts.reshape(-1, 1, 2, 3), noise if plan.draws else None).flatten(1)
    effect = (ends[1:] - ends[0]) @ rows.T
    assert torch.allclose(out.mean, ends[0], atol=1e-12)
    assert torch.allclose(parts(out)[1], (effect**2).sum(0), atol=1e-12)


def test_the_error_falls_with_groups_and_vanishes_with_one_a_direction():
    s = Spectrum(torch.zeros(64), torch.logspace(0.5, -3, 64))
    levels, std = UniformLam()(EDM(), 8), s.variances.sqrt()
    error = [
        float(((spectral(s, levels, groups=g).gaussian(exact_start=True).variances.sqrt() - std) / std).abs().max())
        for g in (1, 2, 4, 8, 16, None)
    ]
    assert all(b < 0.7 * a for a, b in itertools.pairwise(error)), error
    assert error[3] < 0.05
    assert error[-1] < 1e-10


def test_groups_are_neighbours_in_variance():
    variances = torch.tensor([1e-3, 5.0, 4.0, 1.1e-3, 0.0, 0.1], dtype=D64)
    group, centres = grouped(variances, torch.ones(6, dtype=D64), 4)
    assert group[1] == group[2]
    assert group[0] == group[3]
    assert group[4] != group[1]
    due = (5**0.5 * math.log(5) + 2 * math.log(4)) / (5**0.5 + 2)
    assert float(centres[group[1]].log()) == pytest.approx(due)
    assert len(grouped(torch.ones(4, dtype=D64), torch.ones(4, dtype=D64), 8)[1]) == 1
    one, all_zero = grouped(torch.zeros(3, dtype=D64), torch.ones(3, dtype=D64), None)
    assert one.tolist() == [0, 0, 0]
    assert float(all_zero) > 0, "data without variance have a limit"


def test_data_without_variance_are_their_mean():
    s = Spectrum(torch.tensor([0.3, -2.0]), torch.zeros(2))
    x = torch.randn(3, 2, dtype=D64)
    end = spectral(s, LEVELS).run(Gaussian(s), x)
    assert torch.allclose(end, s.mean.expand(3, 2), atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_samples_keep_their_dtype_and_are_not_changed(dtype):
    s, seen = SPECTRA["low-rank"], []
    x = torch.randn(2, 1, 2, 3).to(dtype)
    before = x.clone()

    def model(x, level):
        seen.append(x.dtype)
        return torch.tanh(x)

    end = spectral(s, LEVELS).run(model, x)
    assert end.dtype == dtype
    assert set(seen) == {dtype}
    assert end.shape == x.shape
    assert torch.equal(x, before)
    exact = spectral(s, LEVELS).run(lambda x, level: torch.tanh(x), x.double())
    assert torch.allclose(end.double(), exact, atol=1e-5 if dtype == torch.float32 else 0.1)


@pytest.mark.parametrize("kind", SPECTRA)
def test_a_file_gives_the_same_plan(kind, tmp_path):
    plan = spectral(SPECTRA[kind], LEVELS, groups=2)
    plan.save(tmp_path / "plan.safetensors")
    back = Modal.load(tmp_path / "plan.safetensors")
    assert torch.equal(plan.group, back.group)
    assert back.name == plan.name
    assert back.spectrum.shape == (1, 2, 3)
    for ours, theirs in zip(plan.tables, back.tables, strict=True):
        assert ours.name == theirs.name
        for part in ("alpha", "sigma", "points", "out", "start", "end"):
            assert torch.equal(getattr(ours, part), getattr(theirs, part))
    x = torch.randn(2, 1, 2, 3, dtype=D64)
    assert torch.equal(plan.run(mixture(plan.spectrum), x), back.run(mixture(plan.spectrum), x))


def test_damaged_and_other_files_are_refused(tmp_path):
    path = tmp_path / "plan.safetensors"
    spectral(SPECTRA["full"], LEVELS).save(path)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(InputError, match="not a readable plan"):
        Modal.load(path)
    for other in (lambda: save_file({"alpha": torch.ones(2)}, path), lambda: trace(DPMpp2M(), LEVELS).save(path)):
        other()
        with pytest.raises(InputError, match="not a readable plan"):
            Modal.load(path)
    with pytest.raises(InputError, match="not a readable plan"):
        Modal.load(tmp_path / "missing.safetensors")


def test_parts_that_do_not_fit_are_refused():
    s, table = SPECTRA["low-rank"], trace(DPMpp2M(), LEVELS)
    for group, tables, message in (
        (torch.zeros(3), (table,), "4 group numbers"),
        (torch.zeros(4), (), "4 group numbers"),
        (torch.tensor([0, 1, 0, 2]), (table, table), "0 to 1"),
        (torch.zeros(4), (table, trace(DPMpp2M(), UniformT()(VP(), 6))), "same levels"),
        (torch.zeros(4), (table, trace(DDPM(), LEVELS)), "same levels"),
    ):
        with pytest.raises(InputError, match=message):
            Modal(s, group, tables)
    plan = Modal(s, torch.zeros(4), (table,))
    with pytest.raises(InputError, match="6"):
        plan.run(lambda x, level: x, torch.randn(2, 5))
    with pytest.raises(InputError, match="draws noise"):
        Modal(s, torch.zeros(4), (trace(DDPM(), LEVELS),)).run(lambda x, level: x, torch.randn(2, 6))
    with pytest.raises(InputError, match="basis"):
        plan.gaussian(SPECTRA["diagonal"])
    with pytest.raises(InputError, match="groups"):
        spectral(s, LEVELS, groups=0)


def test_show_names_every_group():
    text = spectral(SPECTRA["low-rank"], LEVELS[-3:], groups=None).show()
    assert text.startswith("spectral 3: 2 evaluations, 0 noise draws, 4 groups")
    assert "group 0, 3 directions, std 0.224 to 0.224" in text
    assert text.count("x_end") == 4


@pytest.mark.parametrize("kind", SPECTRA)
def test_no_value_of_x_is_read(kind):
    plan, x = spectral(SPECTRA[kind], LEVELS), Watched.of(torch.randn(2, 1, 2, 3))
    Watched.reads = 0
    end = plan.run(lambda x, level: torch.tanh(x), x)
    assert isinstance(end, Watched)
    assert Watched.reads == 0


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 2, 7, 40])
def test_the_grid_lies_within_the_schedule(name, steps):
    schedule = SCHEDULES[name]()
    levels = SpectralGrid(SPECTRA["low-rank"])(schedule, steps)
    lams = torch.stack([level.lam for level in levels])
    assert len(levels) == steps + 1
    assert levels[0].lam == schedule.level(1.0).lam
    assert (lams[1:] > lams[:-1]).all()
    assert (lams[:-1] <= schedule.level(0.0).lam).all()
    assert levels[-1].sigma == 0


def test_the_grid_of_one_variance_is_the_same_in_units_of_its_std():
    """From pure noise the levels are quantiles of sech, at angles that are even: tan phi = std e^lam."""
    for variance in (0.01, 1.0, 50.0):
        levels = SpectralGrid(Spectrum(torch.zeros(3), torch.full((3,), variance)))(SCHEDULES["cosine"](), 8)
        phi = torch.stack([torch.atan2(level.alpha * variance**0.5, level.sigma) for level in levels])
        assert torch.allclose(phi, torch.linspace(0, math.pi / 2, 9, dtype=D64), atol=1e-4)


def test_the_grid_refuses_steps_below_one():
    with pytest.raises(InputError, match="steps"):
        SpectralGrid(SPECTRA["full"])(VP(), 0)


@pytest.mark.parametrize(("order", "corrector"), [(1, False), (2, False), (2, True), (3, True)])
def test_the_order_on_a_mixture_is_the_solvers(order, corrector):
    model, x = problem()
    s = Spectrum(torch.zeros(2), torch.tensor([1.15, 1.175]))
    errors = [
        float((spectral(s, graded(n), order, corrector, groups=None).run(model, x) - truth()).norm()) for n in (80, 160)
    ]
    assert slope(*errors) == pytest.approx(Spectral(1.0, order, corrector).global_order, abs=0.15)


def test_few_evaluations_bring_a_mixture_nearer_than_multistep_solvers_do():
    """Twelve directions of stds 3 to 0.03 and two clusters: the residual is not small, and the grid is the same."""
    fine = UniformLam(lam_max=8.0)(EDM(sigma_min=1e-4), 400)
    std, shift = torch.logspace(0.5, -1.5, 12, dtype=D64), torch.linspace(1.5, -0.5, 12, dtype=D64)
    model = Mixture([Spectrum(m * std * shift, std**2 / 2) for m in (-1.0, 1.0)])
    x = 80 * torch.randn(64, 12, generator=torch.Generator().manual_seed(1), dtype=D64)
    s, due = Spectrum(torch.zeros(12), std**2 * (shift**2 + 0.5)), run(model, x, fine, UniPC(3))

    def far(plan):
        return float((plan.run(model, x) - due).norm(dim=1).median())

    for n in (6, 8, 10):
        levels = SpectralGrid(s)(EDM(), n)
        others = [far(trace(solver, levels)) for solver in (DPMpp2M(), UniPC(2), UniPC(3))]
        assert far(spectral(s, levels)) < 0.7 * min(others)
