"""Draws of levels that follow the losses: their density, weights and variance in closed form; exact resume."""

import math

import pytest
import torch

from tests.group import together
from tests.runs import Scaled
from undiffuse import VP, Denoiser, InputError, V
from undiffuse.train import EMA, Checkpoints, Engine, Gradient, Objective, Plan, Processes, train
from undiffuse.train.draws import DRAWS, Adaptive, Stratified, _Learner, warp
from undiffuse.train.objective import Drawn

SHARES = torch.tensor([0.3, 0.05, 0.4, 0.05, 0.2], dtype=torch.float64)
SIZES = torch.tensor([1.0, 1.0, 2.0, 4.0], dtype=torch.float64)  # of losses in four bins


def learned(sizes=SIZES, **settings):
    """A drawer that has seen many losses of these sizes in its bins."""
    drawer = Adaptive(bins=len(sizes), **settings).start()
    u = (torch.arange(len(sizes)) + 0.5).double() / len(sizes)
    for _ in range(drawer.settings.memory):
        drawer.learn(u, sizes)
    return drawer


def noisy(drawn, half, seed):
    """Losses of those sizes times 1 +- half."""
    signs = torch.rand(len(drawn.u), generator=torch.Generator().manual_seed(seed)).round() * 2 - 1
    return SIZES[(drawn.u * len(SIZES)).long()] * (1 + half * signs)


def test_the_warp_is_the_inverse_cdf_and_its_weight_the_derivative():
    """By a change of variables, E[weight f(u)] is then the integral of f: u rises from 0 to 1 with du/dv = weight."""
    v = torch.linspace(0, 1, 20_001, dtype=torch.float64)[1:-1].requires_grad_()
    u, weight = warp(v, SHARES)
    inside = ((v[:, None] - SHARES.cumsum(0)).abs() > 1e-9).all(1)
    assert torch.allclose(torch.autograd.grad(u.sum(), v)[0][inside], weight[inside], rtol=1e-9)
    assert (u.diff() > 0).all()
    corners = torch.cat([torch.zeros(1), SHARES.cumsum(0)[:-1], torch.ones(1)]).double()
    assert torch.allclose(warp(corners, SHARES).u, torch.arange(6).double() / 5, atol=1e-12)
    assert torch.allclose(warp(v, torch.full((5,), 0.2).double()).u, v, atol=1e-12)


def test_the_weighted_mean_of_a_piecewise_linear_function_is_its_integral():
    """Within a bin weight f(u(v)) is linear in v, so that the mean over evenly spread v is exact; without the weight it
    is another number."""
    left, right = torch.rand(2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    n, starts = 8, SHARES.cumsum(0) - SHARES
    v = starts[:, None] + SHARES[:, None] * (torch.arange(n) + 0.5) / n
    u, weight = (part.reshape(5, n) for part in warp(v.flatten(), SHARES))
    f = left[:, None] + (right - left)[:, None] * (u * 5 - torch.arange(5)[:, None])
    integral = float((left + right).mean() / 2)
    assert float((SHARES * (weight * f).mean(1)).sum()) == pytest.approx(integral, rel=1e-12)
    assert float((SHARES * f.mean(1)).sum()) != pytest.approx(integral, rel=0.01)


@pytest.mark.parametrize("floor", [0.1, 0.5, 1.0])
def test_a_bins_share_is_the_root_of_its_mean_square_above_the_floor(floor):
    """Strata give a bin its share of every batch but for one at each end."""
    drawer, b = learned(floor=floor, memory=20), 400
    shares = floor / 4 + (1 - floor) * SIZES / SIZES.sum()
    assert torch.allclose(drawer.shares(), shares, rtol=1e-12)
    for step in (1, 2):
        u, weight = drawer(b, 0, step)
        bins = (u * 4).long()
        assert (torch.bincount(bins, minlength=4) - b * shares).abs().max() <= 1
        assert torch.allclose(weight, 1 / (4 * shares[bins]), rtol=1e-12)
        assert weight.max() <= 1 / floor + 1e-12


def test_shares_converge_to_the_closed_form_under_noise():
    drawer = Adaptive(bins=4, memory=2000).start()
    for step in range(1, 301):
        drawn = drawer(256, 0, step)
        drawer.learn(drawn.u, noisy(drawn, 0.5, step))
    assert torch.allclose(drawer.shares(), 0.1 / 4 + 0.9 * SIZES / SIZES.sum(), rtol=0.04)


def test_the_mean_square_weighs_the_last_losses_most():
    """d^i for the i-th last with d = 1 - 1 / memory, and the losses of one batch alike."""
    drawer, losses = Adaptive(bins=1, memory=10).start(), torch.rand(40, dtype=torch.float64)
    for loss in losses:
        drawer.learn(torch.tensor([0.5]).double(), loss[None])
    weights = 0.9 ** torch.arange(39, -1, -1).double()
    assert torch.allclose(drawer.moments[:, 0], torch.stack([weights @ losses**2, weights.sum()]), rtol=1e-12)
    before = drawer.moments.clone()
    drawer.learn(torch.full((3,), 0.5).double(), losses[:3])
    added = torch.stack([losses[:3].square().sum(), torch.tensor(3.0).double()])
    assert torch.allclose(drawer.moments[:, 0], 0.9**3 * before[:, 0] + added, rtol=1e-12)


def test_until_every_bin_is_known_all_are_alike():
    drawer, u = Adaptive(bins=4, memory=10).start(), torch.tensor([0.1, 0.3, 0.6]).double()
    for _ in range(50):
        drawer.learn(u, torch.tensor([1.0, 2.0, 3.0]))
    for _ in range(6):  # of 7 with sum 0.9^i >= 5
        drawer.learn(torch.tensor([0.9]).double(), torch.tensor([4.0]))
    assert torch.equal(drawer(8, 0, 1).weight, torch.ones(8).double())
    assert torch.allclose(drawer(8, 0, 1).u, Stratified()(8, 0, 1).u, atol=1e-12)
    drawer.learn(torch.tensor([0.9]).double(), torch.tensor([4.0]))
    assert drawer(8, 0, 1).weight.unique().numel() > 1


def test_losses_that_are_all_zero_leave_all_bins_alike():
    assert torch.equal(learned(torch.zeros(4).double()).shares(), torch.full((4,), 0.25).double())


def test_the_weighted_loss_keeps_its_mean_and_has_the_least_second_moment():
    """With m_k = E[loss^2] in bin k, E[(weight loss)^2] is (sum sqrt(m_k))^2 / K^2, against sum m_k / K of even draws:
    Cauchy and Schwarz. Of 20 000 losses the strata leave the noise of the losses alone."""
    n, half = 20_000, 0.5
    means, squares = [], []
    for drawer in (learned(floor=1e-9), Stratified()):
        drawn = drawer(n, 0, 1)
        weighted = drawn.weight * noisy(drawn, half, 0)
        assert float(weighted.mean()) == pytest.approx(2.0, abs=4 * half * 4 / math.sqrt(n))
        means.append(float(weighted.mean()))
        squares.append(float(weighted.square().mean()))
    m = SIZES**2 * (1 + half**2)
    assert squares[0] == pytest.approx(float(m.sqrt().sum() ** 2 / 16), rel=0.03)
    assert squares[0] / squares[1] == pytest.approx(float(m.sqrt().sum() ** 2 / (4 * m.sum())), rel=0.04)


def test_the_variance_of_the_batchs_loss_falls_by_the_closed_form():
    """Strata give bin k exactly b p_k losses of variance v_k = (half size_k)^2 here, so that the mean's variance is
    sum (v_k / p_k) / (b K^2): (sum size)^2 / (K sum size^2) of what even shares leave."""
    b, steps, half = 16, 4000, 0.5
    variances = []
    for drawer in (learned(floor=1e-9), Stratified()):
        drawn = [drawer(b, 0, step) for step in range(1, steps + 1)]
        means = torch.stack([(d.weight * noisy(d, half, i)).mean() for i, d in enumerate(drawn)])
        assert float(means.mean()) == pytest.approx(2.0, abs=4 * float(means.std()) / math.sqrt(steps))
        variances.append(float(means.var()))
    assert variances[1] == pytest.approx(float((half * SIZES).square().mean()) / b, rel=0.1)
    assert variances[0] / variances[1] == pytest.approx(float(SIZES.sum() ** 2 / (4 * SIZES.square().sum())), rel=0.13)


@pytest.mark.parametrize("micro", [1, 3, 8])
def test_the_gradient_has_the_weights_and_the_losses_have_not(micro):
    objective, model = Objective(VP()), Denoiser(Scaled(), V())
    x0, eps = torch.randn(2, 8, 3)
    drawn = objective.draw(8)
    drawn = Drawn(drawn.level, torch.linspace(0.2, 5.0, 8).double(), drawn.u)
    loss = objective(model, x0, eps, drawn.level).loss
    expected = torch.autograd.grad((drawn.weight.float() * loss).mean(), list(model.parameters()))
    work = Gradient(model, objective, "float32", Engine(micro=micro), Processes(), 0)
    found = work(x0, eps, drawn, None, torch.arange(8)).loss
    assert torch.allclose(found, loss, rtol=1e-5)
    for p, g in zip(model.parameters(), expected, strict=True):
        assert torch.allclose(p.grad, g, rtol=1e-5)


QUICK = Adaptive(bins=4, floor=0.2, memory=4)  # knows all bins after a few steps
PLAN = Plan(steps=12, batch=8, lr=1e-2, warmup=2, every=3)


def run(draws=QUICK, root=None, stop=None, plan=PLAN):
    """The losses and levels by step of a run, to its end or to step `stop`."""
    x = torch.randn(16, 3, generator=torch.Generator().manual_seed(1))
    checkpoints, found = None if root is None else Checkpoints(root), {}
    model = Denoiser(Scaled(), V())
    for state in train(
        model, x, Objective(VP(), draws=draws), plan, seed=3, checkpoints=checkpoints, ema=EMA(model),
        processes=Processes.start("cpu"),
    ):  # fmt: skip
        found[state.step] = (state.loss, state.grad_norm, state.lam.tolist())
        if state.step == stop:
            break
    return found


def files(root):
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


@pytest.mark.parametrize("stop", [2, 3, 7, 10])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path, stop):
    straight = run(root=tmp_path / "straight")
    run(root=tmp_path / "parts", stop=stop)
    rest = run(root=tmp_path / "parts")
    assert min(rest) == stop // 3 * 3 + 1
    assert rest == {step: straight[step] for step in rest}
    assert files(tmp_path / "parts") == files(tmp_path / "straight")


def test_levels_follow_the_losses_once_they_are_known():
    even, adaptive = run(Stratified()), run()
    assert adaptive[1][2] == pytest.approx(even[1][2], abs=1e-9)
    assert adaptive[12][2] != pytest.approx(even[12][2], abs=0.1)


def test_the_loop_teaches_losses_without_their_weights(monkeypatch):
    taught, learn = [], _Learner.learn
    monkeypatch.setattr(_Learner, "learn", lambda self, u, loss: (taught.append((u, loss)), learn(self, u, loss)))
    losses, replay = run(), QUICK.start()
    for step, (u, loss) in enumerate(taught, 1):
        drawn = replay(8, 3, step)
        assert torch.equal(drawn.u, u)
        assert float((drawn.weight * loss).mean()) == losses[step][0]
        learn(replay, u, loss)
    assert drawn.weight.unique().numel() > 1


def test_the_loops_loss_estimates_the_same_objective():
    """A network that stays: means over steps agree, though the levels, once known, are others."""
    plan = Plan(steps=600, batch=8, lr=1e-30, every=0)
    means = []
    for draws in (Stratified(), Adaptive(bins=8, floor=0.3, memory=20)):
        losses = torch.tensor([loss for loss, *_ in run(draws, plan=plan).values()])
        means.append((float(losses.mean()), float(losses.var()) / len(losses)))
    (even, a), (adaptive, b) = means
    assert adaptive == pytest.approx(even, abs=4 * math.sqrt(a + b))


def test_a_checkpoint_without_what_was_learned_is_of_another_run(tmp_path):
    run(Stratified(), root=tmp_path, stop=3)
    before = files(tmp_path)
    with pytest.raises(InputError, match=r"step-3 belongs to a run with other settings: it has no draws\.moments"):
        run(root=tmp_path)
    assert files(tmp_path) == before


def test_a_checkpoint_of_other_bins_is_of_another_run(tmp_path):
    run(root=tmp_path, stop=3)
    with pytest.raises(InputError, match=r"it has no draws\.moments of these shapes"):
        run(Adaptive(bins=8), root=tmp_path)


def test_two_processes_draw_what_one_does():
    one, (first, second) = run(), together(run)
    assert first == second
    for step, (loss, norm, lam) in one.items():
        assert first[step][0] == pytest.approx(loss, rel=1e-4)
        assert first[step][1] == pytest.approx(norm, rel=1e-4)
        assert first[step][2] == pytest.approx(lam, abs=1e-4)


@pytest.mark.parametrize(
    "settings",
    [
        *({"bins": bad} for bad in (0, 100_000_000)),
        *({"floor": bad} for bad in (0.0, 1.1, math.nan)),
        *({"memory": bad} for bad in (0, 10**9)),
    ],
)
def test_settings_out_of_range_are_refused(settings):
    name, value = next(iter(settings.items()))
    with pytest.raises(InputError, match=rf"draws\.{name} must be .*, got {value}"):
        Adaptive(**settings)


@pytest.mark.parametrize("kind", DRAWS)
def test_runs_share_nothing(kind):
    settings = DRAWS[kind]()
    first, second = settings.start(), settings.start()
    for _ in range(200):
        first.learn((torch.arange(32) + 0.5).double() / 32, torch.arange(32.0))
    drawn = second(64, 0, 1)
    assert torch.equal(drawn.weight, torch.ones(64).double())
    assert torch.equal(drawn.u, settings.start()(64, 0, 1).u)
