"""The driver, per-sample noise, guidance."""

import math

import pytest
import torch

from tests.cases import SOLVER_CASES, at, diagonal, drain
from undiffuse import (
    CFG,
    DDIM,
    DDPM,
    EDM,
    VP,
    Cond,
    Counter,
    Denoiser,
    EDMPrecond,
    FixedRows,
    Flow,
    Gaussian,
    InputError,
    Label,
    Level,
    Mixture,
    Noise,
    UniformLam,
    sample,
    trajectory,
)
from undiffuse.nets import UNet

CLASSES = Mixture([diagonal(0.1, 0.1, mean=m) for m in (-1.0, 0.0, 2.0)], labels=[0, 1, 2])


@pytest.mark.parametrize("solver", SOLVER_CASES)
def test_sample_k_is_the_same_tensor_whatever_the_batch(solver):
    def draw(**kw):
        return sample(CLASSES, (64, 2), VP(), steps=5, solver=SOLVER_CASES[solver], seed=3, **kw)

    whole = draw()
    assert torch.equal(draw(batch=7), whole)
    assert torch.equal(draw(batch=1), whole)
    alone = sample(CLASSES, (1, 2), VP(), steps=5, solver=SOLVER_CASES[solver], seed=3, first=41)
    assert torch.equal(alone[0], whole[41])
    assert not torch.equal(draw(), sample(CLASSES, (64, 2), VP(), steps=5, solver=SOLVER_CASES[solver], seed=4))


def test_noise_depends_on_seed_and_index_alone():
    shuffled = Noise((3, 4), seed=1, indices=[5, 0, 9])
    first, second = shuffled(), shuffled()
    straight = Noise((10, 4), seed=1)
    a, b = straight(), straight()
    assert torch.equal(first, a[[5, 0, 9]])
    assert torch.equal(second, b[[5, 0, 9]])
    assert len({tuple(row.tolist()) for row in torch.cat([a, b])}) == 20
    assert torch.equal(Noise((10, 4), seed=1, dtype=torch.float64)().float(), a)


def test_noise_is_standard_normal_across_samples():
    z = torch.cat([Noise((20_000, 2), seed=s)() for s in range(3)])
    assert float(z.mean()) == pytest.approx(0, abs=0.02)
    assert float(z.var()) == pytest.approx(1, abs=0.02)
    assert float((z[:-1, 0] * z[1:, 0]).mean()) == pytest.approx(0, abs=0.02)


@pytest.mark.parametrize("schedule", [VP(), Flow(), EDM()])
def test_samples_of_a_gaussian_have_its_moments(schedule):
    x = sample(Gaussian(diagonal(0.25, 4.0, mean=1.0)), (20_000, 2), schedule, steps=30)
    assert torch.allclose(x.mean(0), torch.ones(2), atol=0.05)
    assert torch.allclose(x.var(0), torch.tensor([0.25, 4.0]), rtol=0.05)


def test_the_callers_break_stops_early_and_states_tell_the_story():
    count = Counter(CLASSES)
    for state in trajectory(count, torch.randn(2, 2), UniformLam()(VP(), 9), DDIM()):
        if state.i == 4:
            break
    assert (count.calls, count.rows, state.nfe) == (4, 8, 4)
    assert state.x0.shape == (2, 2)


def test_project_is_applied_after_every_step():
    def hold(x, level):
        return torch.cat([torch.full_like(x[:, :1], 7.0), x[:, 1:]], 1)

    x = drain(trajectory(CLASSES, torch.randn(2, 2), UniformLam()(VP(), 3), DDIM(), project=hold))
    assert (x[:, 0] == 7).all()


def test_guidance_off_is_bit_equal_and_costs_one_row():
    x, level, cond = torch.randn(3, 2), Level(0.6, 0.8), Label(3)([0, 1, 2])
    count = Counter(CLASSES)
    guided = CFG(1.0)(count, cond)(x, level)
    assert torch.equal(guided, CLASSES(x, level, cond))
    assert (count.calls, count.rows) == (1, 3)
    assert torch.equal(CFG(0.0)(count, cond)(x, level), CLASSES(x, level))
    assert (count.calls, count.rows) == (2, 6)
    CFG(2.0)(count, cond)(x, level)
    assert (count.calls, count.rows) == (3, 12)


@pytest.mark.parametrize("w", [0.0, 0.5, 2.0, 7.5])
def test_guidance_is_the_rule_and_batched_equals_unbatched(w):
    x, cond = torch.randn(3, 2).double(), Label(3)([0, 1, 2])
    for level in [*at([-2.0, 0.0, 3.0]), Level.at(torch.tensor([-1.0, 0.0, 1.0])).reshape(-1, 1)]:
        expected = CLASSES(x, level) + w * (CLASSES(x, level, cond) - CLASSES(x, level))
        assert torch.allclose(CFG(w)(CLASSES, cond)(x, level), expected, atol=1e-12)


def test_guidance_interval_acts_inside_only_and_saves_rows():
    guide, cond = CFG(3.0, lam_min=-1.0, lam_max=1.0), Label(3)([0, 1])
    x, inside, outside = torch.randn(2, 2), Level.at(0.5), Level.at(1.5)
    assert torch.equal(guide(CLASSES, cond)(x, outside), CLASSES(x, outside, cond))
    assert torch.equal(guide(CLASSES, cond)(x, inside), CFG(3.0)(CLASSES, cond)(x, inside))
    count = Counter(CLASSES)
    drain(trajectory(guide(count, cond), x, at([-3.0, -2.0, -0.5, 0.5, 2.0, 3.0]), DDIM()))
    assert (count.calls, count.rows) == (5, 2 * 3 + 4 * 2)


def test_guided_learned_variance_uses_the_conditional_variance():
    cond, x, (now, then) = Label(3)([0, 1]), torch.randn(2, 2).double(), at([-0.5, 0.5])
    x0, variance = CFG(2.0)(CLASSES, cond).reverse(x, now, then)
    assert torch.equal(variance, CLASSES.reverse(x, now, then, cond)[1])
    assert torch.equal(x0, CFG(2.0)(CLASSES, cond)(x, now))
    end = drain(trajectory(CFG(2.0)(CLASSES, cond), x, [now, then], DDPM("learned"), Noise(x.shape)))
    assert torch.isfinite(end).all()


def test_conditioned_samples_lie_at_their_class():
    x = sample(CLASSES, (300, 2), VP(), steps=20, cond=Label(3)([0, 1, 2] * 100))
    assert torch.allclose(x[2::3].mean(0), torch.tensor([2.0, 2.0]), atol=0.1)
    assert torch.allclose(x[0::3].mean(0), torch.tensor([-1.0, -1.0]), atol=0.1)


def test_bad_input_is_named():
    levels, x = UniformLam()(VP(), 3), torch.zeros(1, 2)
    for call, why in [
        (lambda: drain(trajectory(CLASSES, torch.full((1, 2), math.nan), levels, DDIM())), "NaN"),
        (lambda: drain(trajectory(CLASSES, x, levels, DDPM())), "draws noise"),
        (lambda: drain(trajectory(lambda x, lv: x, x, levels, DDPM("learned"), Noise(x.shape))), "lacks"),
        (lambda: sample(CLASSES, (0, 2), VP()), "number of samples"),
        (lambda: sample(CLASSES, (2, 2), VP(), steps=0), "steps"),
        (lambda: sample(CLASSES, (2, 2), VP(), cond=Label(3)([0])), "1 rows for 2 samples"),
        (lambda: sample(CLASSES, (2, 2), VP(), guidance=2.0), "needs a condition"),
        (lambda: sample(CLASSES, (2, 2), VP(), batch=0), "batch"),
        (lambda: CFG(math.nan), "finite"),
        (lambda: CFG(2.0, lam_min=1, lam_max=0), "interval"),
        (lambda: Noise((2, 2), indices=[0]), "1 indices"),
    ]:
        with pytest.raises(InputError, match=why):
            call()


def test_cond_parts_drop_concatenate_and_select():
    cond = Cond(torch.ones(2, 3), torch.ones(2, 4, 5), torch.ones(2, 4, dtype=torch.bool), torch.ones(2, 1, 6, 6))
    dropped = cond.drop(torch.tensor([True, False]))
    for part in ("vector", "tokens", "tokens_mask", "spatial"):
        assert not getattr(dropped, part)[0].any()
        assert getattr(dropped, part)[1].all()
        assert not getattr(cond.null(), part).any()
    assert len(Cond.cat([cond, dropped])) == 4
    assert len(cond[:1]) == 1
    with pytest.raises(ValueError, match="vector"):
        Cond.cat([cond, Cond(tokens=cond.tokens)])


@pytest.mark.parametrize("w", [1.0, 2.0])
def test_fixed_rows_make_a_networks_samples_bit_equal_for_every_batch(w):
    """Matrix kernels round by batch size; calls of one size do not."""
    torch.manual_seed(0)
    net = UNet(1, width=32, vector=3)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.05)
    model, cond = Denoiser(net.eval(), EDMPrecond()), Label(3)(torch.arange(64) % 3)

    def draw(n=64, first=0, **kw):
        rows = cond[first : first + n]
        return sample(model, (n, 1, 6, 6), VP(), steps=2, cond=rows, guidance=w, first=first, rows=16, **kw)

    whole = draw()
    assert torch.isfinite(whole).all()
    assert float(whole.std()) > 0.01
    assert len({tuple(x.flatten().tolist()) for x in whole}) == 64
    for batch in (1, 7, 33):
        assert torch.equal(draw(batch=batch), whole)
    assert torch.equal(draw(n=1, first=41), whole[41:42])


def test_fixed_rows_change_nothing_but_the_calls():
    x, cond = torch.randn(5, 2), Label(3)([0, 1, 2, 0, 1])
    levels = Level.at(torch.tensor([-1.0, 0, 1, 2, 3])).reshape(-1, 1)
    for level in (Level.at(0.5), levels):
        counter = Counter(CLASSES)
        assert torch.allclose(FixedRows(counter, 2)(x, level, cond), CLASSES(x, level, cond), atol=1e-7)
        assert (counter.calls, counter.rows) == (3, 6)
    pairs = FixedRows(CLASSES, 2).reverse(x, *at([0.0, 1.0]), cond), CLASSES.reverse(x, *at([0.0, 1.0]), cond)
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(*pairs, strict=True))
    with pytest.raises(InputError, match="rows must be >= 1"):
        FixedRows(CLASSES, 0)
