"""Tableaux: structure, files, closed-form moments."""

import itertools

import pytest
import torch
from safetensors.torch import save_file

from tests.cases import SOLVER_CASES, at, diagonal, drain
from undiffuse import (
    DDIM,
    DDPM,
    VP,
    Adams,
    DPMpp2M,
    Gaussian,
    InputError,
    Level,
    Mixture,
    Noise,
    Spectral,
    Tableau,
    UniformLam,
    trace,
    trajectory,
)

LEVELS = UniformLam()(VP(), 6)


def test_ddim_by_hand():
    """Two steps: x1 = s1/s0 x + (a1 - s1/s0 a0) D1, x2 = a2 D2."""
    l0, l1, l2 = at([-1.0, 0.5, float("inf")])
    table, ratio = trace(DDIM(), [l0, l1, l2]), l1.sigma / l0.sigma
    expected = torch.tensor([[1, 0, 0], [ratio, l1.alpha - ratio * l0.alpha, 0]], dtype=torch.float64)
    assert torch.allclose(table.points, expected, atol=1e-15)
    assert torch.allclose(table.out, torch.tensor([0, 0, 1], dtype=torch.float64), atol=1e-15)


@pytest.mark.parametrize("name", SOLVER_CASES)
def test_rows_reproduce_constant_and_noise_free_data(name):
    """If every prediction is the true x0, each deterministic point is alpha x0 + sigma eps: weights are consistent.

    A solver about a Gaussian is so on that Gaussian's predictions instead: each point keeps its place in units of std.
    """
    solver = SOLVER_CASES[name]
    table = trace(solver, LEVELS)
    x0, eps = 1.7, -0.4
    n = table.nfe
    if isinstance(solver, Spectral):
        std = (table.alpha**2 * solver.variance + table.sigma**2).sqrt()
        values = torch.cat([std[:1], table.alpha * solver.variance / std]) * x0
        assert torch.allclose(table.points @ values, std * x0, atol=1e-12)
        assert float(table.out @ values) == pytest.approx(solver.variance**0.5 * x0, abs=1e-12)
        return
    start = (LEVELS[0].alpha * x0 + LEVELS[0].sigma * eps).reshape(1)
    values = torch.cat([start, torch.full((n,), x0, dtype=torch.float64), torch.zeros(table.draws).double()])
    if table.draws == 0:
        assert torch.allclose(table.points @ values, table.alpha * x0 + table.sigma * eps, atol=1e-13)
    assert float(table.out @ values) == pytest.approx(x0, abs=1e-12)


@pytest.mark.parametrize("name", SOLVER_CASES)
def test_file_round_trip_is_exact(name, tmp_path):
    table = trace(SOLVER_CASES[name], LEVELS, name=name)
    table.save(tmp_path / "plan.safetensors")
    back = Tableau.load(tmp_path / "plan.safetensors")
    for part in ("alpha", "sigma", "points", "out", "start", "end"):
        assert torch.equal(getattr(table, part), getattr(back, part))
    assert back.name == name


def test_files_that_are_not_tableaux_are_refused(tmp_path):
    path = tmp_path / "plan.safetensors"
    table = trace(DDIM(), LEVELS)
    table.save(path)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(InputError, match="not a readable plan"):
        Tableau.load(path)
    save_file({"alpha": torch.ones(2)}, path)
    with pytest.raises(InputError, match="not a readable plan"):
        Tableau.load(path)
    with pytest.raises(InputError, match="not a readable plan"):
        Tableau.load(tmp_path / "missing.safetensors")
    later = table.points.clone()
    later[0, 3] = 1
    with pytest.raises(InputError, match="lower triangular"):
        Tableau(table.alpha, table.sigma, later, table.out, table.start, table.end)


def test_memory_of_a_banded_tableau_is_bounded():
    """No prediction outlives its last use: at most order + 2 states are alive at once."""
    alive, peak = set(), 0

    class Tracked(torch.Tensor):
        pass

    import weakref

    def denoise(x, level):
        nonlocal peak
        y = torch.tanh(x)
        alive.add(id(y))
        weakref.finalize(y, alive.discard, id(y))
        peak = max(peak, len(alive))
        return y

    for order in (1, 2, 3):
        peak = 0
        alive.clear()
        trace(Adams(order), UniformLam()(VP(), 30)).run(denoise, torch.randn(4, 3))
        assert peak <= order + 1


def test_noise_is_drawn_in_the_drivers_order():
    x, calls = torch.randn(2, 3, dtype=torch.float64), itertools.count()
    table = trace(DDPM(), LEVELS)

    def noise():
        return torch.full_like(x, float(next(calls)))

    by_table = table.run(lambda x, lv: torch.tanh(x), x, noise)
    calls = itertools.count()
    assert torch.allclose(by_table, drain(trajectory(lambda x, lv: torch.tanh(x), x, LEVELS, DDPM(), noise)))
    with pytest.raises(InputError, match="draws noise 5 times"):
        table.run(lambda x, lv: x, x)


def test_gaussian_moments_equal_a_large_sample():
    """The closed form against 200,000 draws, within five standard errors."""
    table, n = trace(DDIM(0.7), LEVELS), 200_000
    g = torch.Generator().manual_seed(0)
    x = LEVELS[0].sigma * torch.randn(n, 1, generator=g).double()
    out = table.run(Gaussian(diagonal(0.25, mean=0.5)), x, lambda: torch.randn(n, 1, generator=g).double())
    got = table.gaussian(torch.tensor([0.25]), torch.tensor([0.5]))
    assert float(out.mean()) == pytest.approx(float(got.mean), abs=5 * float(got.variance.sqrt()) / n**0.5)
    assert float(out.var()) == pytest.approx(float(got.variance), rel=5 * (2 / n) ** 0.5)


def test_what_cannot_be_traced_says_so():
    with pytest.raises(InputError, match="cannot be traced"):
        trace(DDPM("learned"), LEVELS)
    with pytest.raises(InputError, match="0-dim"):
        trace(DDIM(), [Level(torch.ones(2, 1), torch.ones(2, 1)), Level(1, 0)])


def test_input_of_run_is_not_changed():
    x = torch.randn(2, 3)
    before = x.clone()
    trace(DPMpp2M(), LEVELS).run(lambda x, lv: torch.tanh(x), x)
    assert torch.equal(x, before)
    y = Noise((2, 3))
    assert y().shape == (2, 3)


MIXTURE = Mixture([diagonal(0.2, 0.05, mean=-1.0), diagonal(0.1, 0.3, mean=1.0)])


@pytest.mark.parametrize("name", SOLVER_CASES)
def test_parallel_converges_to_the_sequential_result(name):
    """Picard sweeps over all points or a window give `run` to 1e-6, in no more sweeps than evaluations."""
    table, x = trace(SOLVER_CASES[name], UniformLam()(VP(), 24)), torch.randn(4, 2, dtype=torch.float64)

    def noise():
        return Noise(x.shape, 1, dtype=torch.float64) if table.draws else None

    for window in (None, 7):
        got = table.parallel(MIXTURE, x, noise(), window)
        assert torch.allclose(got.x, table.run(MIXTURE, x, noise()), atol=1e-6)
        assert got.sweeps <= table.nfe
    assert table.parallel(MIXTURE, x, noise(), 1).sweeps == table.nfe, "a window of one is the sequential run"


def test_parallel_prints_sweeps_and_depth_saved():
    table, x = trace(DDIM(), UniformLam()(VP(), 100)), torch.randn(8, 2, dtype=torch.float64)
    got = table.parallel(MIXTURE, x)
    assert got.sweeps < 40
    assert str(got).startswith(
        f"{got.sweeps} sweeps instead of 100 evaluations in a row ({1 - got.sweeps / 100:.0%} of"
    )
    with pytest.raises(InputError, match="window"):
        table.parallel(MIXTURE, x, window=0)
    with pytest.raises(InputError, match="draws noise"):
        trace(DDPM(), LEVELS).parallel(MIXTURE, x)


def test_parallel_takes_conditions_in_the_rows_that_it_documents():
    from undiffuse import CFG, Label

    model = Mixture([diagonal(0.1, 0.1, mean=m) for m in (-1.0, 0.0, 2.0)], labels=[0, 1, 2])
    table, x, cond = trace(DDIM(), UniformLam()(VP(), 12)), torch.randn(3, 2), Label(3)([2, 0, 1])
    rows = torch.arange(3).repeat(5)
    got = table.parallel(CFG(2.0)(model, cond[rows]), x, window=5)
    assert torch.allclose(got.x, table.run(CFG(2.0)(model, cond), x), atol=1e-5)


@pytest.mark.parametrize("name", ["ddim", "dpmpp-2m", "dpm-solver", "unipc", "lms"])
def test_inverse_returns_to_the_start(name):
    levels = UniformLam()(VP(), 24)[:-1]
    x = torch.randn(16, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    table = trace(SOLVER_CASES[name], levels)
    assert torch.allclose(table.inverse(MIXTURE, table.run(MIXTURE, x)), x, atol=1e-6)


def test_inverse_says_what_has_none():
    x = torch.randn(2, 2, dtype=torch.float64)
    with pytest.raises(InputError, match="draws noise"):
        trace(DDPM(), LEVELS[:-1]).inverse(MIXTURE, x)
    with pytest.raises(InputError, match="sigma > 0"):
        trace(DDIM(), LEVELS).inverse(MIXTURE, x)
    with pytest.raises(InputError, match="did not settle"):
        trace(DDIM(), UniformLam()(VP(), 24)[:-1]).inverse(MIXTURE, x, sweeps=2)


class Watched(torch.Tensor):
    """A tensor that counts what would make the host wait for a device: reading a value of it."""

    reads = 0

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default):
            cls.reads += 1
        plain = torch.utils._pytree.tree_map(lambda v: v.plain if isinstance(v, Watched) else v, (args, kwargs or {}))
        out = func(*plain[0], **plain[1])
        if func.__name__ in ("add_", "mul_", "addcmul_", "addmm_"):  # in place: the same watched tensor goes on
            return args[0]
        return torch.utils._pytree.tree_map(lambda v: Watched.of(v) if isinstance(v, torch.Tensor) else v, out)

    @staticmethod
    def of(plain):
        watched = torch.Tensor._make_wrapper_subclass(Watched, plain.shape, dtype=plain.dtype, device=plain.device)
        watched.plain = plain
        return watched


@pytest.mark.parametrize("name", SOLVER_CASES)
def test_no_value_of_x_is_read_in_the_loop(name):
    """On a GPU each would be a synchronisation. The driver looks at x once, before its first step, for NaN."""
    levels, x = UniformLam()(VP(), 8), Watched.of(torch.randn(2, 3))

    def noise():
        return Watched.of(torch.randn(2, 3))

    Watched.reads = 0
    bool(torch.isfinite(x).all())
    assert Watched.reads == 1, "the watch works"
    end = trace(SOLVER_CASES[name], levels).run(lambda x, lv: torch.tanh(x), x, noise)
    assert isinstance(end, Watched)
    assert Watched.reads == 1
    for state in trajectory(lambda x, lv: torch.tanh(x), x, levels, SOLVER_CASES[name], noise):
        assert Watched.reads == 2, f"step {state.i}"
