"""The objective: its value, gradient, levels and weights against closed forms; the error per level bin."""

import math

import pytest
import torch
from torch import nn

from tests.cases import SCHEDULE_CASES, diagonal
from undiffuse import (
    EDM,
    HEADS,
    VP,
    X0,
    Cosine,
    Denoiser,
    Discrete,
    EDMPrecond,
    Eps,
    Flow,
    Gaussian,
    InputError,
    Level,
    Score,
    V,
    zero_terminal_snr,
)
from undiffuse.precond import target
from undiffuse.train import LEVELS, WEIGHTS, LevelBins, Objective
from undiffuse.train.objective import EDMWeight, LogNormal, SNRWeight, UniformTime

SPACES = {"vp": VP(), "flow": Flow(), "ve": EDM()}
LAMS = torch.linspace(-4, 4, 9, dtype=torch.float64)
SD, MEAN = 0.7, 0.4
SIGNS = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]], dtype=torch.float64)


def moments(variances, mean=MEAN):
    """Four pairs (x0, eps) that have the first and second moments of Gaussian data and noise exactly: the average of a
    quadratic over them is its expectation."""
    std = torch.as_tensor(variances, dtype=torch.float64).sqrt()
    return mean + SIGNS[:, :1] * std, SIGNS[:, 1:].expand(4, len(std)).contiguous()


def every_pair(lam, space, variances):
    """Those pairs at each of the levels, one row a pair."""
    x0, eps = moments(variances)
    level = Level.at(torch.as_tensor(lam, dtype=torch.float64).repeat_interleave(4), space)
    return x0.repeat(len(level.alpha) // 4, 1), eps.repeat(len(level.alpha) // 4, 1), level


def silent(head):
    return Denoiser(lambda x, time, cond: torch.zeros_like(x), head)


def textbook(name, lam, second):
    """(c_out^2, E|F*|^2) of a head at lam, in the coordinates of its paper; `second` is E x0^2."""
    lv = Level.at(lam, "flow" if name == "flow" else "vp")
    a2, s2, n2 = lv.alpha**2, lv.sigma**2, lv.alpha**2 * SD**2 + lv.sigma**2
    return {
        "eps": (s2 / a2, torch.ones_like(a2)),
        "score": (s2**2 / a2, 1 / s2),
        "x0": (torch.ones_like(a2), torch.full_like(a2, second)),
        "v": (s2, a2 + s2 * second),
        "flow": (s2, torch.full_like(a2, 1 + second)),
        "edm": (s2 * SD**2 / n2, (s2 * second / SD**2 + lv.alpha**2 * SD**2) / n2),
    }[name]


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("name", HEADS)
def test_the_loss_of_a_silent_network_is_analytic(name, weight, space):
    head = EDMPrecond(SD) if name == "edm" else HEADS[name]()
    objective = Objective(SPACES[space], weight=WEIGHTS[weight](), sigma_data=SD)
    x0, eps, level = every_pair(LAMS, space, [SD**2])
    got = objective(silent(head), x0, eps, level)
    out2, square = textbook(name, LAMS, SD**2 + MEAN**2)
    snr = torch.exp(2 * LAMS)
    on_x0 = snr if weight == "simple" else snr + 1 / SD**2
    assert torch.allclose(got.mse.reshape(9, 4).mean(1), out2 * square, rtol=1e-12)
    assert torch.allclose(got.loss.reshape(9, 4).mean(1), on_x0 * out2 * square, rtol=1e-12)
    assert torch.allclose(got.lam[::4], LAMS, atol=1e-12)


class Affine(nn.Module):
    """The exact Gaussian denoiser at one level as a network: F = gain x + shift with (D - c_skip x) / c_out = F."""

    def __init__(self, head, spectrum, level, off=0.0):
        super().__init__()
        skip, out = head.skip_out(level)
        best = level.alpha * spectrum.variances / (level.alpha**2 * spectrum.variances + level.sigma**2)
        self.gain = nn.Parameter((best - skip) / out / head.c_in(level) + off)
        self.shift = nn.Parameter((spectrum.mean - level.alpha * best * spectrum.mean) / out)

    def forward(self, x, time, cond):
        return self.gain * x + self.shift


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("name", HEADS)
def test_the_exact_denoiser_is_stationary_and_its_error_is_the_linear_loss(name, space):
    spectrum, head = diagonal(0.1, 1.0, 3.0, mean=MEAN), HEADS[name]()
    objective = Objective(SPACES[space], weight=EDMWeight(), sigma_data=1.0)
    for lam in (-3.0, -0.5, 1.0, 3.0):
        x0, eps, levels = every_pair([lam], space, spectrum.variances)
        level = Level(levels.alpha[0], levels.sigma[0])
        slopes = []
        for off in (0.0, 0.05):
            model = Denoiser(Affine(head, spectrum, level, off), head)
            got = objective(model, x0, eps, levels)
            got.loss.mean().backward()
            slopes.append(torch.cat([p.grad for p in model.parameters()]).norm())
            if not off:
                assert torch.allclose(model(x0, level), Gaussian(spectrum)(x0, level), rtol=1e-9)
                assert float(got.mse.detach().mean()) == pytest.approx(float(spectrum.linear_loss(level)), rel=1e-5)
            else:
                assert got.mse.mean() > spectrum.linear_loss(level)
        assert slopes[0] < 1e-4 * slopes[1]


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("name", HEADS)
def test_mse_is_the_plain_error_of_x0(name, space):
    model = Denoiser(lambda x, time, cond: (x + time.reshape(-1, 1, 1)).sin(), HEADS[name]())
    g = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 9, 3, 5, generator=g)
    level = Level.at(LAMS, space)
    wide = level.reshape(-1, 1, 1)
    error = (model(wide.diffuse(x0, eps).double(), wide) - x0).square().flatten(1).mean(1)
    assert torch.allclose(Objective(SPACES[space])(model, x0, eps, level).mse.double(), error, rtol=1e-3)


@pytest.mark.parametrize(
    ("head", "weight", "sd"), [(Eps(), SNRWeight(), 0.5), (EDMPrecond(SD), EDMWeight(), SD)], ids=["eps", "edm"]
)
def test_the_papers_own_pairs_have_unit_weight(head, weight, sd):
    """DDPM's equation 14 on eps; EDM's lambda(sigma) c_out^2 = 1 (Karras et al. 2022, section 5)."""
    net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 5))
    model = Denoiser(lambda x, time, cond: net(x), head)
    x0, eps = torch.randn(2, 9, 5)
    level = Level.at(LAMS)
    wide = level.reshape(-1, 1)
    answer = net((head.c_in(wide) * wide.diffuse(x0, eps)).float())
    plain = (answer - target(head, x0, eps, wide)).square().mean(1)
    if isinstance(head, Eps):
        assert torch.allclose(plain, (answer - eps).square().mean(1), rtol=1e-5)
    loss = Objective(VP(), weight=weight, sigma_data=sd)(model, x0, eps, level).loss
    assert torch.allclose(loss, plain, rtol=1e-5)


def test_the_network_reads_the_same_time_and_x_under_autocast():
    seen = []

    class Spy(nn.Linear):
        def forward(self, x, time, cond):
            seen.append((x, time))
            return super().forward(x)

    model, (x0, eps) = Denoiser(Spy(5, 5), EDMPrecond()), torch.randn(2, 9, 5)
    level = Level.at(LAMS + 1e-4)
    plain = Objective(VP())(model, x0, eps, level).loss
    with torch.autocast("cpu", torch.bfloat16):
        half = Objective(VP())(model, x0, eps, level).loss
    assert not torch.equal(plain, half)
    assert half.dtype == torch.float32
    for a, b in zip(*seen, strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, b)


def test_the_level_goes_to_the_device_of_the_data():
    """The `meta` device stands for a GPU: it, too, refuses tensors of the CPU that are not 0-dim."""
    x0, eps = torch.zeros(2, 9, 5, device="meta")
    model = Denoiser(nn.Linear(5, 5, device="meta"), V())
    model.net.forward = lambda x, time, cond: nn.functional.linear(x, model.net.weight)
    got = Objective(VP())(model, x0, eps, Level.at(LAMS))
    assert got.loss.device.type == got.mse.device.type == "meta"
    assert torch.allclose(got.lam, LAMS)


def uniform(objective, level):
    """The u in (0, 1) from which the inverse CDF made these levels."""
    if isinstance(objective.levels, LogNormal):
        return torch.special.ndtr((-level.lam - objective.levels.mean) / objective.levels.std)
    low = objective.levels.t_min
    return (objective.schedule.time(level.lam) - low) / (1 - low)


def distance(u):
    """Kolmogorov and Smirnov's statistic against the uniform distribution times sqrt(n): above 1.63 once in 100."""
    u, n = u.sort().values, len(u)
    rank = torch.arange(n, dtype=torch.float64)
    return float(torch.maximum((rank + 1) / n - u, u - rank / n).max() * math.sqrt(n))


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("space", SPACES)
def test_stratified_levels_are_one_a_slice_in_random_order_with_the_same_marginal(space, levels):
    b = 16
    parts, plain = (Objective(SPACES[space], LEVELS[levels](), stratified=s) for s in (True, False))
    u = torch.stack([uniform(parts, parts.draw(b, 0, step)) for step in range(1, 401)])
    slices = (u * b - 1e-9).ceil() - 1
    assert torch.equal(slices.sort(1).values, torch.arange(b).double().expand(400, b))
    assert not torch.equal(slices[0], slices[1])
    assert distance(u[:, 0]) < 1.63
    assert distance((u * b).frac().flatten()) < 1.63
    assert distance(uniform(plain, plain.draw(4000))) < 1.63


@pytest.mark.parametrize("levels", LEVELS)
def test_stratified_levels_lower_the_variance_of_the_loss(levels):
    """Every row has the moments of the data exactly, so that the levels alone make the batch's loss vary."""
    x0, eps = (part.T for part in (MEAN + SD * SIGNS[:, :1], SIGNS[:, 1:]))

    def losses(stratified):
        objective = Objective(VP(), LEVELS[levels](), sigma_data=SD, stratified=stratified)
        batch = x0.expand(32, 4), eps.expand(32, 4)
        draws = [objective.draw(32, 0, step) for step in range(1, 301)]
        return torch.stack([objective(silent(V()), *batch, level).loss.mean() for level in draws])

    less, more = losses(True), losses(False)
    assert less.var() < 0.1 * more.var()
    assert float(less.mean()) == pytest.approx(float(more.mean()), abs=4 * float(more.std()) / math.sqrt(300))


@pytest.mark.parametrize("stratified", [True, False])
def test_draws_are_a_function_of_seed_and_step(stratified):
    objective = Objective(VP(), stratified=stratified)
    draws = [objective.draw(8, *at).lam for at in ((1, 1), (1, 1), (2, 1), (1, 2))]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert not torch.equal(draws[0], draws[3])


def test_draws_without_strata_are_those_of_the_global_index():
    """Two steps of 4 draw what one step of 8 does: a run's levels do not depend on how it is cut into batches."""
    objective = Objective(VP(), stratified=False)
    assert torch.equal(torch.cat([objective.draw(4, 7, step).lam for step in (1, 2)]), objective.draw(8, 7).lam)


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("name", SCHEDULE_CASES)
def test_rising_u_is_rising_noise_in_the_schedules_own_space(name, levels):
    schedule = SCHEDULE_CASES[name]
    level = LEVELS[levels]()(torch.linspace(1e-9, 1 - 1e-9, 3001, dtype=torch.float64), schedule)
    own = Level.at(level.lam, schedule.space)
    assert (level.lam[1:] <= level.lam[:-1]).all()
    assert level.lam[0] > level.lam[-1]
    assert torch.allclose(level.alpha, own.alpha, rtol=1e-7, atol=1e-12)
    assert torch.allclose(level.sigma, own.sigma, rtol=1e-7, atol=1e-12)


def test_uniform_time_on_a_table_hits_every_index_equally_often():
    table, draws = Discrete.linear(50), 7
    u = (torch.arange(50 * draws, dtype=torch.float64) + 0.5) / (50 * draws)
    lams = torch.stack([table.index(i).lam for i in range(50)])
    hits = torch.cat([UniformTime()(u, table).lam, Objective(table, UniformTime()).draw(50).lam])
    index = (hits[:, None] - lams).abs().argmin(1)
    assert torch.equal(hits, lams[index])
    assert torch.bincount(index[: len(u)]).tolist() == [draws] * 50
    assert index[len(u) :].sort().values.tolist() == list(range(50))


@pytest.mark.parametrize("space", SPACES)
def test_log_normal_has_its_mean_and_std(space):
    u = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    level = LogNormal(-0.3, 1.7)(u, SPACES[space])
    log = (level.sigma / level.alpha).log()
    assert float(log.mean()) == pytest.approx(-0.3, abs=1e-6)
    assert float(log.std()) == pytest.approx(1.7, rel=1e-4)
    assert float((log + 0.3).pow(3).mean()) == pytest.approx(0, abs=1e-6)
    assert float(((log + 0.3) / 1.7).pow(4).mean()) == pytest.approx(3, rel=2e-3)


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("schedule", [Cosine(), Flow(), zero_terminal_snr(VP()), zero_terminal_snr(Discrete.linear())])
def test_heads_that_need_a_signal_are_refused_where_the_schedule_has_none(schedule, levels):
    objective = Objective(schedule, LEVELS[levels]())
    for head in (Eps(), Score()):
        with pytest.raises(InputError, match=type(head).__name__):
            objective.check(silent(head))
    for head in (V(), X0(), EDMPrecond(), HEADS["flow"]()):
        objective.check(silent(head))
    for other in (VP(), Discrete.linear(), EDM()):
        Objective(other, LEVELS[levels]()).check(silent(Eps()))


@pytest.mark.parametrize("sd", [0.0, -0.5, math.nan])
def test_an_impossible_sigma_data_is_refused(sd):
    with pytest.raises(InputError, match="sigma_data"):
        EDMPrecond(sd)


def test_learned_variance_and_impossible_levels_are_refused():
    with pytest.raises(InputError, match="learned_variance"):
        Objective(VP()).check(Denoiser(lambda x, time, cond: x, V(), learned_variance=True))
    for broken in (lambda: UniformTime(0), lambda: UniformTime(1), lambda: LogNormal(std=0)):
        with pytest.raises(InputError, match="levels"):
            broken()


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("name", ["v", "x0", "flow", "edm"])
def test_a_level_of_pure_noise_trains(name, weight):
    """At alpha = 0 a silent flow head answers x = eps, the others 0; DDPM's weight there is 0, EDM's 1 / sd^2."""
    head = EDMPrecond(0.5) if name == "edm" else HEADS[name]()
    table = zero_terminal_snr(Discrete.linear(10))
    objective = Objective(table, UniformTime(), WEIGHTS[weight](), sigma_data=0.5)
    level = UniformTime()(torch.tensor([1 - 1e-9]).double(), table)
    assert level.alpha == 0
    x0, eps = torch.randn(2, 1, 6).double()
    got = objective(silent(head), x0, eps, level)
    answer = eps if name == "flow" else 0
    assert float(got.mse) == pytest.approx(float((x0 - answer).square().mean()), rel=1e-9)
    assert float(got.loss) == pytest.approx(0.0 if weight == "simple" else float(got.mse) / 0.25, rel=1e-9)
    bins = LevelBins(diagonal(0.25))
    bins.add(got.lam, got.mse)
    assert bins.rows() == [{"lam": -4.0, "count": 1, "mse": pytest.approx(float(got.mse)), "linear": 0.25}]


def test_bins_by_hand():
    """Bins of width 2 from -2 to 2 for data of variances 1 and 3; the linear error is v / (1 + v e^(2 lam))."""
    bins = LevelBins(diagonal(1.0, 3.0), -2.0, 2.0, 2)

    def linear(lam):
        return sum(v / (1 + v * math.exp(2 * lam)) for v in (1, 3)) / 2

    bins.add(torch.tensor([-9.0, -0.5]).double(), torch.tensor([1.0, 0.5]))
    bins.add(torch.tensor([1.5, -1.0]).double(), torch.tensor([0.25, 0.9]))
    below, above = bins.rows()
    assert (below["lam"], below["count"], above["lam"], above["count"]) == (-1.0, 3, 1.0, 1)
    assert below["mse"] == pytest.approx((1.0 + 0.5 + 0.9) / 3)
    assert below["linear"] == pytest.approx((linear(-9.0) + linear(-0.5) + linear(-1.0)) / 3)
    assert above["mse"] == pytest.approx(0.25)
    assert above["linear"] == pytest.approx(linear(1.5))
    beyond = LevelBins(diagonal(1.0), -2.0, 2.0, 4)
    beyond.add(torch.tensor([40.0]).double(), torch.tensor([0.0]))
    assert [row["lam"] for row in beyond.rows()] == [1.5]
