"""Schedules invert, fall monotonically and end where they should; grids start and end right."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.cases import SCHEDULE_CASES
from undiffuse import EDM, GRIDS, VP, Cosine, Discrete, Flow, InputError, Level, Sigmoid, zero_terminal_snr
from undiffuse.grid import Explicit, Indexed, Karras, UniformLam, UniformT, check_levels

ENDS_IN_NOISE = {"cosine", "sigmoid", "flow", "flow-3", "ddpm-zero-snr", "vp-zero-snr", "scaled-linear-zero-snr"}


@pytest.mark.parametrize("name", SCHEDULE_CASES)
@given(t=st.floats(1e-4, 1 - 1e-4))
def test_time_inverts_level(name, t):
    schedule = SCHEDULE_CASES[name]
    assert math.isclose(float(schedule.time(schedule.level(t).lam)), t, rel_tol=1e-7, abs_tol=1e-9)


@pytest.mark.parametrize("name", SCHEDULE_CASES)
def test_lam_falls_and_the_level_lies_in_its_space(name):
    schedule = SCHEDULE_CASES[name]
    level = schedule.level(torch.linspace(0, 1, 1001, dtype=torch.float64))
    assert (level.lam.diff() < 0).all()
    own = Level.at(level.lam, schedule.space)
    assert torch.allclose(level.alpha, own.alpha, atol=1e-12)
    assert torch.allclose(level.sigma, own.sigma, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", SCHEDULE_CASES)
def test_ends(name):
    schedule = SCHEDULE_CASES[name]
    first, last = schedule.level(0.0), schedule.level(1.0)
    assert float(first.sigma) == pytest.approx({"edm": 0.002, "ve": 0.01}.get(name, 0.0), abs=1e-12)
    assert (float(last.alpha) == 0) == (name in ENDS_IN_NOISE)
    assert float(schedule.time(math.inf)) == 0
    assert float(schedule.time(-math.inf)) == 1
    assert torch.isfinite(torch.stack([first.alpha, first.sigma, last.alpha, last.sigma])).all()


@pytest.mark.parametrize("name", SCHEDULE_CASES)
def test_levels_for_every_sample_equal_single_ones(name):
    schedule, t = SCHEDULE_CASES[name], torch.tensor([[0.1], [0.5], [0.93]], dtype=torch.float64)
    many = schedule.level(t)
    assert many.alpha.shape == (3, 1)
    for i in range(3):
        assert many.alpha[i, 0] == schedule.level(t[i, 0]).alpha
        assert torch.allclose(schedule.time(many.lam)[i, 0], t[i, 0], rtol=1e-7)


def test_vp_satisfies_its_differential_equation():
    """d log alpha / dt = -beta(t) / 2."""
    t = torch.tensor(0.37, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(VP().level(t).alpha.log(), t)
    assert torch.allclose(slope, -(0.1 + 0.37 * 19.9) / 2 * torch.ones((), dtype=torch.float64))


def test_ddpm_table_is_exact_at_its_points_and_near_the_vp_sde():
    ddpm, bar = Discrete.linear(), (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)
    for i in (0, 1, 250, 998, 999):
        assert float(ddpm.index(i).alpha ** 2) == pytest.approx(float(bar[i]), rel=1e-14)
        assert float(ddpm.time(ddpm.index(i).lam) * 1000 - 1) == pytest.approx(i, abs=1e-8)
    gap = ddpm.level(torch.linspace(0.05, 1, 20)).lam - VP().level(torch.linspace(0.05, 1, 20)).lam
    assert gap.abs().max() < 0.05


def test_zero_terminal_snr_keeps_the_first_level_and_removes_the_last_signal():
    """Algorithm 1 of Lin et al. 2024: the first table entry is kept, the last has alpha = 0, the rest is affine."""
    base, new = Discrete.linear(), zero_terminal_snr(Discrete.linear())
    assert new.alphas_cumprod[-1] == 0
    assert new.alphas_cumprod[0] == pytest.approx(base.alphas_cumprod[0], rel=1e-14)
    a, b = (torch.tensor(s.alphas_cumprod, dtype=torch.float64).sqrt() for s in (base, new))
    slope = (b[0] - b[500]) / (a[0] - a[500])
    assert torch.allclose(b, b[0] + slope * (a - a[0]), atol=1e-14)
    with pytest.raises(InputError, match="ve form"):
        zero_terminal_snr(EDM())


@pytest.mark.parametrize(
    "broken",
    [
        lambda: VP(beta_min=0),
        lambda: VP(beta_min=3, beta_max=2),
        lambda: Cosine(s=0),
        lambda: Sigmoid(start=1, end=1),
        lambda: EDM(sigma_min=0),
        lambda: Flow(shift=0),
        lambda: Discrete((0.9, 0.9, 0.5)),
        lambda: Discrete((0.5, 0.9)),
        lambda: Discrete(()),
        lambda: VP().level(1.2),
        lambda: Discrete.linear().index(1000),
    ],
)
def test_impossible_schedules_are_refused(broken):
    with pytest.raises(InputError):
        broken()


@pytest.mark.parametrize("steps", [1, 2, 7, 50])
@pytest.mark.parametrize("grid", [name for name in GRIDS if name not in ("explicit", "restart", "ays")])
@pytest.mark.parametrize("name", SCHEDULE_CASES)
def test_grids_visit_falling_levels_from_the_schedules_start_to_clean_data(name, grid, steps):
    schedule = SCHEDULE_CASES[name]
    levels = check_levels(GRIDS[grid]()(schedule, steps)).levels
    assert len(levels) == steps + 1
    assert float(levels[0].alpha) == float(schedule.level(1.0).alpha)
    assert float(levels[0].sigma) == pytest.approx(float(schedule.level(1.0).sigma))
    assert float(levels[-1].sigma) == 0
    assert all(b.lam > a.lam for a, b in itertools.pairwise(levels))


def test_karras_is_equation_5():
    n, rho = 18, 7
    i = torch.arange(n, dtype=torch.float64)
    expected = (80 ** (1 / rho) + i / (n - 1) * (0.002 ** (1 / rho) - 80 ** (1 / rho))) ** rho
    for grid in (Karras(), UniformT()):
        sigmas = torch.stack([level.sigma for level in grid(EDM(), n)])
        assert torch.allclose(sigmas[:-1], expected)


def test_uniform_lam_has_equal_steps():
    lams = torch.stack([level.lam for level in UniformLam()(VP(), 11)])[:-1]
    assert torch.allclose(lams.diff(), lams.diff()[0].expand(10))
    assert float(lams[-1]) == pytest.approx(5.0)


def test_index_spacings_follow_table_2_of_lin_et_al():
    assert Indexed("trailing").indices(5) == [999, 799, 599, 399, 199]
    assert Indexed("leading", offset=1).indices(5) == [801, 601, 401, 201, 1]
    assert Indexed("linspace").indices(5) == [999, 749, 500, 250, 0]


@pytest.mark.parametrize("steps", [0, -3, 2.5, True, "10"])
def test_impossible_steps_are_refused(steps):
    for grid in (UniformT(), UniformLam(), Karras(), Indexed()):
        with pytest.raises(InputError, match="steps"):
            grid(VP(), steps)


def test_impossible_levels_are_refused_by_name():
    def at(*lams):
        return [Level.at(lam) for lam in lams]

    for bad, why in [
        (at(0.0), "at least 2"),
        (at(-1.0, 0.0, 0.0), "levels 1 and 2 are the same"),
        (at(math.inf, 0.0), "level 0 is clean"),
        ([Level(1, math.nan), *at(2.0)], "level 0 must have finite"),
        ([Level(1, 1), Level(0, 0)], "not both 0"),
        ([Level(1, 1), Level(-1, 0.5)], ">= 0"),
    ]:
        with pytest.raises(InputError, match=why):
            check_levels(bad)
    with pytest.raises(InputError, match="steps"):
        Explicit((-1.0, 0.0, 2.0))(VP(), 5)
    with pytest.raises(InputError, match="1000 levels"):
        Indexed()(VP(), 1001)
