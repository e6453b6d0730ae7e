"""Heads: one formula for output, target and weight, checked against the papers' own."""

import pytest
import torch

from tests.cases import at
from undiffuse import HEADS, Denoiser, EDMPrecond, Eps, Index, InputError, Level, Score, V, to_x0
from undiffuse.precond import loss_weight, target
from undiffuse.schedule import Discrete

SPACES = ["vp", "flow", "ve"]


def draw():
    g = torch.Generator().manual_seed(1)
    return torch.randn(2, 5, 4, generator=g, dtype=torch.float64)


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("name", HEADS)
def test_x0_from_the_ideal_answer_is_exact(name, space):
    (x0, eps), head = draw(), HEADS[name]()
    level = Level.at(torch.linspace(-4, 4, 5), space).reshape(-1, 1)
    x = level.diffuse(x0, eps)
    skip, out = head.skip_out(level)
    assert torch.allclose(skip * x + out * target(head, x0, eps, level), x0, atol=1e-12)


@pytest.mark.parametrize("name", ["eps", "x0", "v", "flow", "score"])
def test_target_is_the_textbook_one_in_the_heads_own_coordinates(name):
    (x0, eps), head = draw(), HEADS[name]()
    level = Level.at(torch.linspace(-4, 4, 5), head.space).reshape(-1, 1)
    textbook = {
        "eps": eps,
        "x0": x0,
        "v": level.alpha * eps - level.sigma * x0,
        "flow": eps - x0,
        "score": -eps / level.sigma,
    }[name]
    assert torch.allclose(target(head, x0, eps, level), textbook, atol=1e-11)
    assert torch.allclose(head.c_in(level), torch.ones_like(level.alpha), atol=1e-14)


def test_edm_is_table_1_of_karras_et_al():
    head, sd = EDMPrecond(0.5), 0.5
    for level in at([-4.0, -1.0, 0.0, 3.0], "ve"):
        s = level.sigma
        skip, out = head.skip_out(level)
        assert torch.allclose(skip, sd**2 / (s**2 + sd**2))
        assert torch.allclose(out, s * sd / (s**2 + sd**2).sqrt())
        assert torch.allclose(head.c_in(level), 1 / (s**2 + sd**2).sqrt())
        assert torch.allclose(head.time(level), s.log() / 4)


def test_edm_input_and_target_have_unit_variance():
    head, g = EDMPrecond(0.5), torch.Generator().manual_seed(0)
    x0, eps = 0.5 * torch.randn(200_000, generator=g).double(), torch.randn(200_000, generator=g).double()
    for level in at([-3.0, 0.0, 2.0]):
        x = level.diffuse(x0, eps)
        assert float((head.c_in(level) * x).var()) == pytest.approx(1, abs=0.02)
        assert float(target(head, x0, eps, level).var()) == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("name", HEADS)
def test_loss_weight_moves_an_x0_weight_to_the_answer(name):
    (x0, eps), head = draw(), HEADS[name]()
    level = Level.at(torch.linspace(-4, 4, 5)).reshape(-1, 1)
    x, guess = level.diffuse(x0, eps), x0 + 0.1 * eps
    in_x0 = 3.0 * (guess - x0) ** 2
    weight = loss_weight(head, level, torch.full_like(level.alpha, 3.0))
    skip, out = head.skip_out(level)
    answer = (guess - skip * x) / out
    assert torch.allclose(weight * (answer - target(head, x0, eps, level)) ** 2, in_x0)


def test_snr_weight_on_x0_is_ddpms_plain_loss_on_eps():
    level = Level.at(torch.linspace(-4, 4, 5))
    weight = loss_weight(Eps(), level, level.alpha**2 / level.sigma**2)
    assert torch.allclose(weight, torch.ones_like(weight))


@pytest.mark.parametrize("name", HEADS)
def test_a_network_gives_the_same_x0_in_every_coordinate_system(name):
    (x0, eps), head = draw(), HEADS[name]()
    net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 4)).double()
    model = Denoiser(lambda x, time, cond: net(x) + time[:, None], head)
    for lam in (-2.0, 0.0, 3.0):
        y = x0 + eps * torch.exp(torch.tensor(-lam))
        answers = [model(level.alpha * y, level) for level in (Level.at(lam, s) for s in SPACES)]
        assert torch.allclose(answers[0], answers[1], atol=1e-12)
        assert torch.allclose(answers[0], answers[2], atol=1e-12)


@pytest.mark.parametrize("name", HEADS)
def test_pure_noise_is_finite_or_refused(name):
    head, x = HEADS[name](), torch.randn(3, 4)
    model = Denoiser(lambda x, time, cond: 0.5 * x, head)
    if head.needs_alpha:
        with pytest.raises(InputError, match="cannot start at pure noise"):
            model(x, Level(0, 1))
    else:
        assert torch.isfinite(model(x, Level(0, 1))).all()
    assert torch.isfinite(model(x, Level(1, 0.001))).all()


def test_needs_alpha_is_declared_where_c_out_diverges():
    for head in (Eps(), Score()):
        assert head.needs_alpha
        assert not torch.isfinite(head.skip_out(Level(0, 1))[1])
    assert not V().needs_alpha
    assert torch.isfinite(V().skip_out(Level(0, 1))[1])


def test_index_clock_reads_the_trained_integers():
    schedule = Discrete.linear()
    clock = Index(schedule)
    for i in (0, 1, 500, 999):
        assert float(clock(schedule.index(i))) == pytest.approx(i, abs=1e-8)


def test_denoiser_agrees_with_the_algebra_per_sample_and_in_half_precision():
    (x0, eps) = draw()
    level = Level.at(torch.linspace(-4, 4, 5)).reshape(-1, 1)
    x = level.diffuse(x0, eps)
    model = Denoiser(lambda x, time, cond: x.sin(), V())
    rows = [model(x[i : i + 1], Level(level.alpha[i, 0], level.sigma[i, 0])) for i in range(5)]
    assert torch.allclose(model(x, level), torch.cat(rows), atol=1e-14)
    assert torch.allclose(model(x, level), to_x0("v", x.sin(), x, level), atol=1e-14)
    assert model(x.bfloat16(), level).dtype == torch.bfloat16
    times = []
    net = torch.nn.Linear(4, 4).bfloat16()
    half = Denoiser(lambda x, time, cond: times.append(time) or net(x.bfloat16()), V())
    half(x.float(), Level(0.8, 0.6))
    assert times[0].dtype == torch.float32
    assert torch.equal(times[0], V().time(Level(0.8, 0.6)).float().expand(5))
