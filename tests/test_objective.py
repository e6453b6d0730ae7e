"""The objective: its value, gradient, levels and weights against closed forms; the error per level bin."""

import math
import re

import pytest
import scipy.integrate
import scipy.stats
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
from undiffuse.level import from_x0
from undiffuse.precond import target
from undiffuse.train import DRAWS, LEVELS, WEIGHTS, LevelBins, Objective
from undiffuse.train.draws import Independent, Stratified
from undiffuse.train.objective import (
    EDMWeight,
    FlowWeight,
    LogitNormal,
    LogNormal,
    MinSNRWeight,
    Mode,
    P2Weight,
    SigmoidWeight,
    SNRWeight,
    TruncatedSNRWeight,
    UniformInLam,
    UniformTime,
    VWeight,
    X0Weight,
)

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


def on_x0(weight, lam):
    """The weight on x0's error at lam that the papers' own weights on other predictions amount to."""
    snr, r = torch.exp(2 * lam), torch.exp(lam)
    return {
        "simple": snr,
        "edm": snr + 1 / SD**2,
        "x0": torch.ones_like(lam),
        "v": 1 + snr,
        "flow": 1 + 2 * r + snr,
        "truncated-snr": torch.where(snr > 1, snr, 1.0),
        "min-snr": torch.where(snr < 5, snr, 5.0),
        "p2": snr / (1 + snr),
        "sigmoid": snr / (1 + snr * math.exp(-2)),
    }[weight]


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("name", HEADS)
def test_the_loss_of_a_silent_network_is_analytic(name, weight, space):
    head = EDMPrecond(SD) if name == "edm" else HEADS[name]()
    objective = Objective(SPACES[space], weight=WEIGHTS[weight](), sigma_data=SD)
    x0, eps, level = every_pair(LAMS, space, [SD**2])
    got = objective(silent(head), x0, eps, level)
    out2, square = textbook(name, LAMS, SD**2 + MEAN**2)
    assert torch.allclose(got.error.reshape(9, 4).mean(1), out2 * square, rtol=1e-12)
    assert torch.allclose(got.loss.reshape(9, 4).mean(1), on_x0(weight, LAMS) * out2 * square, rtol=1e-12)
    assert torch.allclose(got.lam[::4], LAMS, atol=1e-12)


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("name", HEADS)
def test_the_whole_objective_of_a_silent_network_is_its_integral_over_lam(name, weight):
    """E w |x0_hat - x0|^2 / d over levels, data and noise against quadrature; the levels of one large batch, a slice
    each, leave an error of b^(-3/2)."""
    head, b = EDMPrecond(SD) if name == "edm" else HEADS[name](), 4096
    objective = Objective(VP(), UniformInLam(-3.0, 2.5), WEIGHTS[weight](), SD)
    x0, eps = (part.T.expand(b, 4) for part in (MEAN + SD * SIGNS[:, :1], SIGNS[:, 1:]))
    got = objective(silent(head), x0, eps, objective.draw(b).level).loss.mean()

    def integrand(lam):
        lam = torch.tensor(lam, dtype=torch.float64)
        out2, square = textbook(name, lam, SD**2 + MEAN**2)
        return float(on_x0(weight, lam) * out2 * square) / 5.5

    assert float(got) == pytest.approx(scipy.integrate.quad(integrand, -3.0, 2.5)[0], rel=1e-4)


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
                assert float(got.error.detach().mean()) == pytest.approx(float(spectrum.linear_loss(level)), rel=1e-5)
            else:
                assert got.error.mean() > spectrum.linear_loss(level)
        assert slopes[0] < 1e-4 * slopes[1]


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("name", HEADS)
def test_the_exact_denoiser_of_gaussian_data_is_the_minimum_under_every_weight(name, weight):
    """F -> (1 + a) F + b: the loss is quadratic in a and b, so that central differences are its derivatives. They
    vanish at a = b = 0 and rise to either side by W c_out^2 times the mean square of F, or of 1."""
    spectrum, head, h = diagonal(0.1, 1.0, 3.0, mean=MEAN), HEADS[name](), 0.5
    objective = Objective(VP(), weight=WEIGHTS[weight](), sigma_data=SD)
    for lam in (-3.0, 0.3, 3.0):
        x0, eps, levels = every_pair([lam], "vp", spectrum.variances)
        level = Level(levels.alpha[0], levels.sigma[0])
        best = Affine(head, spectrum, level)

        def loss(a, b, best=best, pairs=(x0, eps, levels)):
            model = Denoiser(lambda x, time, cond: (1 + a) * best(x, time, cond) + b, head)
            return float(objective(model, *pairs).loss.detach().mean())

        answer = best(head.c_in(level) * level.diffuse(x0, eps), None, None).detach()
        scale = float(on_x0(weight, level.lam) * head.skip_out(level)[1] ** 2)
        for steps, square in (((h, 0), float(answer.square().mean())), ((0, h), 1.0)):
            up, down, least = loss(*steps), loss(*(-s for s in steps)), loss(0, 0)
            curve = scale * square * h**2
            assert abs(up - down) < 1e-5 * (curve + least)
            assert (up + down) / 2 - least == pytest.approx(curve, rel=1e-5, abs=1e-5 * least)


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("name", HEADS)
def test_mse_is_the_plain_error_of_x0(name, space):
    model = Denoiser(lambda x, time, cond: (x + time.reshape(-1, 1, 1)).sin(), HEADS[name]())
    g = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 9, 3, 5, generator=g)
    level = Level.at(LAMS, space)
    wide = level.reshape(-1, 1, 1)
    error = (model(wide.diffuse(x0, eps).double(), wide) - x0).square().flatten(1).mean(1)
    assert torch.allclose(Objective(SPACES[space])(model, x0, eps, level).error.double(), error, rtol=1e-3)


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


def squares(model, x0, eps):
    """The papers' own losses: mean squared errors of each prediction, in the coordinates in which it is defined."""
    wide = {space: Level.at(LAMS, space).reshape(-1, 1) for space in SPACES}
    x = wide["vp"].diffuse(x0, eps)
    guess = model(x, wide["vp"])

    def square(kind, space):
        lv = wide[space]
        return (from_x0(kind, guess, lv.diffuse(x0, eps), lv) - from_x0(kind, x0, lv.diffuse(x0, eps), lv)).square()

    return {
        "x0": (guess - x0).square().mean(1),
        "eps": ((x - wide["vp"].alpha * guess) / wide["vp"].sigma - eps).square().mean(1),
        "v": square("v", "vp").mean(1),
        "u": square("u", "flow").mean(1),
        "D": ((guess - x0) * (wide["ve"].sigma ** 2 + SD**2).sqrt() / (wide["ve"].sigma * SD)).square().mean(1),
    }


LOG_SNR = 2 * LAMS
SNR = LOG_SNR.exp()
PAPERS = {
    "simple": (SNRWeight(), "eps", 1.0),
    "edm": (EDMWeight(), "D", 1.0),
    "x0": (X0Weight(), "x0", 1.0),
    "v": (VWeight(), "v", 1.0),
    "flow": (FlowWeight(), "u", 1.0),
    "truncated-snr": (TruncatedSNRWeight(), "eps", torch.where(SNR < 1, 1 / SNR, 1.0)),
    "min-snr": (MinSNRWeight(), "eps", SNR.clamp(max=5) / SNR),
    "min-snr on x0": (MinSNRWeight(2.0), "x0", SNR.clamp(max=2)),
    "min-snr on v": (MinSNRWeight(2.0), "v", SNR.clamp(max=2) / (SNR + 1)),
    "p2": (P2Weight(), "eps", 1 / (1 + SNR)),
    "p2 with settings": (P2Weight(0.3, 0.5), "eps", (0.3 + SNR) ** -0.5),
    "p2 at gamma 0": (P2Weight(2.0, 0.0), "eps", 1.0),
    "sigmoid": (SigmoidWeight(), "eps", torch.sigmoid(2 - LOG_SNR)),
    "sigmoid with bias": (SigmoidWeight(-3.0), "eps", torch.sigmoid(-3 - LOG_SNR)),
}


def test_every_weight_has_its_papers_loss():
    assert {type(weight) for weight, _, _ in PAPERS.values()} == set(WEIGHTS.values())
    assert all(isinstance(PAPERS[name][0], kind) for name, kind in WEIGHTS.items())


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("case", PAPERS)
@pytest.mark.parametrize("name", HEADS)
def test_weights_are_the_papers_losses_for_every_head(name, case, space):
    """Computed from the predictions themselves, float64 throughout but for the answer's own float32."""
    weight, kind, factor = PAPERS[case]
    g = torch.Generator().manual_seed(1)
    x0, eps = torch.randn(2, 9, 5, generator=g, dtype=torch.float64)
    model = Denoiser(lambda x, time, cond: (3 * x + time.reshape(-1, 1)).sin() + 0.2, HEADS[name]())
    got = Objective(SPACES[space], weight=weight, sigma_data=SD)(model, x0, eps, Level.at(LAMS, space)).loss
    assert torch.allclose(got, factor * squares(model, x0, eps)[kind], rtol=1e-5)


@pytest.mark.parametrize("case", PAPERS)
def test_weights_are_functions_of_the_snr_alone(case):
    weight, level = PAPERS[case][0], Level.at(LAMS)
    plain = weight(level, SD)
    assert plain.dtype == torch.float64
    for scale in (1e-3, 0.7, 40.0):
        assert torch.allclose(weight(Level(scale * level.alpha, scale * level.sigma), SD), plain, rtol=1e-12)


FAR = 14.0  # lam
TOP = math.exp(2 * FAR)
LIMITS = {
    "simple": (1 / TOP, TOP),
    "edm": (1 / SD**2, TOP),
    "x0": (1.0, 1.0),
    "v": (1.0, TOP),
    "flow": (1.0, TOP),
    "truncated-snr": (1.0, TOP),
    "min-snr": (1 / TOP, 5.0),
    "min-snr on x0": (1 / TOP, 2.0),
    "min-snr on v": (1 / TOP, 2.0),
    "p2": (1 / TOP, 1.0),
    "p2 with settings": (0.3**-0.5 / TOP, TOP**0.5),
    "p2 at gamma 0": (1 / TOP, TOP),
    "sigmoid": (1 / TOP, math.exp(2)),
    "sigmoid with bias": (1 / TOP, math.exp(-3)),
}


@pytest.mark.parametrize("case", PAPERS)
def test_limits_of_the_weights_at_much_noise_and_little(case):
    """And at pure noise itself, where no weight may be infinite or undefined."""
    weight, (noisy, clean) = PAPERS[case][0], LIMITS[case]
    got = weight(Level.at(torch.tensor([-FAR, FAR])), SD)
    assert got.tolist() == pytest.approx([noisy, clean], rel=1e-5)
    at_noise = float(weight(Level(0.0, 1.0), SD))
    assert at_noise == pytest.approx(noisy if noisy > 0.5 else 0.0, rel=1e-5, abs=0)


@pytest.mark.parametrize("gamma", [0.4, 5.0])
def test_min_snr_is_continuous_at_its_kink_and_flat_beyond(gamma):
    """W = e^(2 lam) below lam = log(gamma) / 2, so that its slope falls there from 2 gamma to 0."""
    kink, h = math.log(gamma) / 2, 1e-6
    level = Level.at(torch.tensor([kink - h, kink, kink + h], dtype=torch.float64))
    before, on, after = MinSNRWeight(gamma)(level, SD).tolist()
    assert on == pytest.approx(gamma, rel=1e-12)
    assert after == gamma
    assert (on - before) / h == pytest.approx(2 * gamma, rel=1e-4)


@pytest.mark.parametrize("bias", [-3.0, 0.0, 2.0])
def test_the_sigmoid_is_p2_with_k_at_its_bias(bias):
    """sigmoid(b - log SNR) = e^b / (e^b + SNR)."""
    level, k = Level.at(LAMS), math.exp(bias)
    assert torch.allclose(SigmoidWeight(bias)(level, SD), k * P2Weight(k)(level, SD), rtol=1e-12)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        *((MinSNRWeight, {"gamma": bad}) for bad in (0.0, -5.0, 1e300, math.inf, math.nan)),
        *((P2Weight, {"k": bad}) for bad in (0.0, -1.0, 1e300, math.inf, math.nan)),
        *((P2Weight, {"gamma": bad}) for bad in (-0.5, 1e300, math.inf, math.nan)),
        *((SigmoidWeight, {"bias": bad}) for bad in (-101.0, math.inf, math.nan)),
        *((LogNormal, {"std": bad}) for bad in (0.0, -1.0, 1e300, math.inf, math.nan)),
        *((LogitNormal, {"std": bad}) for bad in (0.0, -1.0, 1e300, math.inf, math.nan)),
        *((kind, {"mean": bad}) for kind in (LogNormal, LogitNormal) for bad in (1e300, -math.inf, math.nan)),
        *((Mode, {"s": bad}) for bad in (-1.001, 1.76, math.nan)),
        *((UniformTime, {"t_min": bad}) for bad in (0.0, 1.0, math.nan)),
        *((UniformInLam, {"lam_min": bad}) for bad in (7.5, 8.0, -1e300, -math.inf, math.nan)),
        *((UniformInLam, {"lam_max": bad}) for bad in (-7.5, 1e300, math.inf, math.nan)),
    ],
)
def test_impossible_settings_are_refused_by_name_and_value(kind, settings):
    ((name, bad),) = settings.items()
    with pytest.raises(InputError, match=rf"(levels|weight)\..*{name}.* must be .*got .*{re.escape(str(bad))}"):
        kind(**settings)


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
    assert got.loss.device.type == got.error.device.type == "meta"
    assert torch.allclose(got.lam, LAMS)


def below(levels, t):
    """The share of a distribution over time that lies at or below t, its CDF."""
    if isinstance(levels, LogitNormal):
        return torch.special.ndtr((torch.logit(t) - levels.mean) / levels.std)
    if isinstance(levels, UniformTime):
        return (t - levels.t_min) / (1 - levels.t_min)
    low, high = torch.zeros_like(t), torch.ones_like(t)
    for _ in range(60):
        v = (low + high) / 2
        less = v + levels.s * (torch.cos(math.pi / 2 * (1 - v)).square().neg() + v) < t
        low, high = torch.where(less, v, low), torch.where(less, high, v)
    return (low + high) / 2


def uniform(objective, lam):
    """The u in (0, 1) from which the inverse CDF made the levels with this lam: the CDF itself."""
    levels, schedule = objective.levels, objective.schedule
    if isinstance(levels, LogNormal):
        return torch.special.ndtr((-lam - levels.mean) / levels.std)
    if isinstance(levels, UniformInLam):
        low, high = bounds(levels, schedule)
        return (high - lam) / (high - low)
    return below(levels, schedule.time(lam))


def bounds(levels, schedule):
    """Of lam: those asked for, or the schedule's own where they are closer."""
    first = schedule.index(0) if isinstance(schedule, Discrete) else schedule.level(0.0)
    return max(levels.lam_min, float(schedule.level(1.0).lam)), min(levels.lam_max, float(first.lam))


OTHERS = {
    **{name: kind() for name, kind in LEVELS.items()},
    "uniform-time-late": UniformTime(0.4),
    "log-normal-noisy": LogNormal(0.6, 1.7),
    "logit-normal-noisy": LogitNormal(0.7, 1.3),
    "logit-normal-narrow": LogitNormal(-0.5, 0.4),
    "mode-ends": Mode(-0.6),
    "mode-most": Mode(1.75),
    "uniform-lam-near": UniformInLam(-1.5, 2.0),
}


@pytest.mark.parametrize("levels", OTHERS)
@pytest.mark.parametrize("name", SCHEDULE_CASES)
def test_drawn_levels_have_the_stated_distribution(name, levels):
    """Kolmogorov and Smirnov against the closed form, for independent draws and for one a slice. A table's times are
    compared at its indices, where its CDF is exact."""
    schedule, levels = SCHEDULE_CASES[name], OTHERS[levels]
    table = isinstance(schedule, Discrete) and isinstance(levels, UniformTime | LogitNormal | Mode)
    plain, parts = (Objective(schedule, levels, draws=DRAWS[kind]()) for kind in ("independent", "stratified"))
    for level in (plain.draw(3000).level, parts.draw(3000).level):
        if table:
            t = torch.arange(1, schedule.T + 1).double() / schedule.T
            index = (schedule.time(level.lam) * schedule.T).round()
            share = (index[:, None] <= torch.arange(1, schedule.T + 1)).double().mean(0)
            whole = UniformTime(1e-300) if isinstance(levels, UniformTime) else levels
            assert float((share - below(whole, t)).abs().max()) * math.sqrt(3000) < 1.63
        else:
            assert scipy.stats.kstest(uniform(plain, level.lam).numpy(), "uniform").pvalue > 0.01


def test_another_distribution_is_told_apart():
    """What the test above would say of a mean that is off by 0.2, or of a bound by a twentieth of the range."""
    for told, drawn in ((LogitNormal(0.2), LogitNormal()), (UniformInLam(-1.0, 1.1), UniformInLam(-1.0, 1.0))):
        u = uniform(Objective(Flow(), told), Objective(Flow(), drawn, draws=Independent()).draw(3000).level.lam)
        assert scipy.stats.kstest(u.numpy(), "uniform").pvalue < 0.01


U = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000


@pytest.mark.parametrize("shift", [1.0, 3.0, 0.5])
def test_logit_normal_on_a_flow_is_log_normal(shift):
    """sigma / alpha = shift t / (1 - t) there, so that log(sigma / alpha) is normal with the mean m + log(shift)."""
    flow = Flow(shift)
    assert torch.allclose(
        LogitNormal(0.3, 0.8)(U, flow).lam, LogNormal(0.3 + math.log(shift), 0.8)(U, flow).lam, rtol=1e-9, atol=1e-9
    )


def test_modes_special_cases_and_its_density():
    """s = 0 is uniform, s = -1 the arcsine law with CDF 2 asin(sqrt(t)) / pi; at the ends of time the density is
    1 / (1 + s), in the middle 1 / (1 + s - s pi / 2)."""
    assert torch.allclose(Flow().time(Mode(0.0)(U, Flow()).lam), U, rtol=1e-9)
    t = Flow().time(Mode(-1.0)(U, Flow()).lam)
    assert torch.allclose(2 / math.pi * t.sqrt().asin(), U, rtol=1e-9)
    points = torch.tensor([1e-6, 2e-6, 0.5 - 1e-6, 0.5 + 1e-6], dtype=torch.float64)
    for s in (-0.6, 1.29):
        t = Flow().time(Mode(s)(points, Flow()).lam)
        assert float(1e-6 / (t[1] - t[0])) == pytest.approx(1 / (1 + s), rel=1e-4)
        assert float(2e-6 / (t[3] - t[2])) == pytest.approx(1 / (1 + s - s * math.pi / 2), rel=1e-4)


@pytest.mark.parametrize("levels", [LogitNormal(), LogitNormal(0.5, 2.0), Mode()])
def test_a_table_gives_an_index_the_share_of_its_slice_of_time(levels):
    table = Discrete.linear(10)
    index = (table.time(levels((torch.arange(100_000) + 0.5).double() / 100_000, table).lam) * 10).round().long()
    share = below(levels, torch.arange(11).double() / 10).diff()
    assert torch.allclose(torch.bincount(index, minlength=11)[1:] / 1e5, share.float(), atol=2e-5)


def test_uniform_lam_is_cut_to_the_schedule_and_refused_where_nothing_is_left():
    u = torch.tensor([1e-12, 1 - 1e-12], dtype=torch.float64)
    for schedule, low, high in (
        (VP(), float(VP().level(1.0).lam), 7.5),
        (Cosine(), -7.5, 7.5),
        (EDM(0.01, 50.0), -math.log(50), -math.log(0.01)),
        (Discrete.linear(), float(Discrete.linear().index(999).lam), float(Discrete.linear().index(0).lam)),
    ):
        assert UniformInLam()(u, schedule).lam.tolist() == pytest.approx([high, low], rel=1e-9)
    with pytest.raises(InputError, match=r"lam_min = 5.0 to lam_max = 6.0 .* -3.912 to 4.605"):
        UniformInLam(5.0, 6.0)(u, EDM(0.01, 50.0))


@pytest.mark.parametrize("levels", [*OTHERS.values(), LogitNormal(900.0, 1.0), LogitNormal(-900.0, 1.0)], ids=repr)
@pytest.mark.parametrize("name", SCHEDULE_CASES)
def test_the_last_quantiles_are_levels_with_noise(name, levels):
    """sigma > 0 for any u, even where the schedule ends in clean data, so that every head has a target."""
    level = levels(torch.tensor([1e-9, 1 - 1e-9], dtype=torch.float64), SCHEDULE_CASES[name])
    x0, eps = torch.ones(2, 3).double(), -torch.ones(2, 3).double()
    assert (level.sigma > 0).all()
    assert level.alpha.isfinite().all()
    assert level.sigma.isfinite().all()
    assert level.lam[0] >= level.lam[1]
    loss = Objective(SCHEDULE_CASES[name], levels, X0Weight())(silent(V()), x0, eps, level).loss
    assert loss.isfinite().all()
    size = torch.hypot(level.alpha, level.sigma)  # a silent v head predicts alpha x at unit size
    off = level.sigma / size * (level.sigma + level.alpha) / size
    assert torch.allclose(loss.double(), off**2, rtol=1e-5, atol=0)


@pytest.mark.parametrize("levels", LEVELS)
def test_strata_divide_the_variance_of_a_mean_by_the_square_of_their_number(levels):
    """var f / b without strata. With b of them f is close to linear within each, of variance (f'(u) / b)^2 / 12, which
    leaves mean(f'^2) / (12 b^3): the ratio is mean(f'^2) / (12 var f) / b^2, and 1 / b^2 for f = u itself."""
    b, steps, levels = 16, 1500, LEVELS[levels]()

    def f(level):
        return torch.sigmoid(2 * level.lam)

    fine = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    values = f(levels(fine, Cosine()))
    law = float((values.diff() * 200_000).square().mean() / values.var() / 12 / b**2)
    means = []
    for draws in (Stratified(), Independent()):
        objective = Objective(Cosine(), levels, draws=draws)
        means.append(torch.stack([f(objective.draw(b, 3, step).level).mean() for step in range(1, steps + 1)]))
    less, more = (float(m.var()) for m in means)
    assert more == pytest.approx(float(values.var()) / b, rel=0.12)
    assert less / more == pytest.approx(law, rel=0.15)
    assert law < 3 / b**2
    for mean, var in zip(means, (less, more), strict=True):
        assert float(mean.mean()) == pytest.approx(float(values.mean()), abs=3.5 * math.sqrt(var / steps))


def distance(u):
    """Kolmogorov and Smirnov's statistic against the uniform distribution times sqrt(n): above 1.63 once in 100."""
    u, n = u.sort().values, len(u)
    rank = torch.arange(n, dtype=torch.float64)
    return float(torch.maximum((rank + 1) / n - u, u - rank / n).max() * math.sqrt(n))


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("space", SPACES)
def test_stratified_levels_are_one_a_slice_in_random_order_with_the_same_marginal(space, levels):
    b = 16
    parts, plain = (Objective(SPACES[space], LEVELS[levels](), draws=d) for d in (Stratified(), Independent()))
    u = uniform(parts, torch.stack([parts.draw(b, 0, step).level.lam for step in range(1, 401)]))
    slices = (u * b - 1e-9).ceil() - 1
    assert torch.equal(slices.sort(1).values, torch.arange(b).double().expand(400, b))
    assert not torch.equal(slices[0], slices[1])
    assert distance(u[:, 0]) < 1.63
    assert distance((u * b).frac().flatten()) < 1.63
    assert distance(uniform(plain, plain.draw(4000).level.lam)) < 1.63


@pytest.mark.parametrize("levels", LEVELS)
def test_stratified_levels_lower_the_variance_of_the_loss(levels):
    """Every row has the moments of the data exactly, so that the levels alone make the batch's loss vary."""
    x0, eps = (part.T for part in (MEAN + SD * SIGNS[:, :1], SIGNS[:, 1:]))

    def losses(draws):
        objective = Objective(VP(), LEVELS[levels](), sigma_data=SD, draws=draws)
        batch = x0.expand(32, 4), eps.expand(32, 4)
        drawn = [objective.draw(32, 0, step).level for step in range(1, 301)]
        return torch.stack([objective(silent(V()), *batch, level).loss.mean() for level in drawn])

    less, more = losses(Stratified()), losses(Independent())
    assert less.var() < 0.1 * more.var()
    assert float(less.mean()) == pytest.approx(float(more.mean()), abs=4 * float(more.std()) / math.sqrt(300))


@pytest.mark.parametrize("kind", DRAWS)
def test_draws_are_a_function_of_seed_and_step(kind):
    objective = Objective(VP(), draws=DRAWS[kind]())
    draws = [objective.draw(8, *at).level.lam for at in ((1, 1), (1, 1), (2, 1), (1, 2))]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert not torch.equal(draws[0], draws[3])


def test_draws_without_strata_are_those_of_the_global_index():
    """Two steps of 4 draw what one step of 8 does: a run's levels do not depend on how it is cut into batches."""
    objective = Objective(VP(), draws=Independent())
    parts = [objective.draw(4, 7, step).level.lam for step in (1, 2)]
    assert torch.equal(torch.cat(parts), objective.draw(8, 7).level.lam)


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
    hits = torch.cat([UniformTime()(u, table).lam, Objective(table, UniformTime()).draw(50).level.lam])
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
    with pytest.raises(InputError, match="lam_min"):
        Objective(EDM(0.01, 50.0), UniformInLam(5.0, 6.0)).check(silent(V()))


@pytest.mark.parametrize("sd", [0.0, -1.0, math.inf, math.nan])
def test_the_check_refuses_an_impossible_std_of_the_data(sd):
    with pytest.raises(InputError, match=f"sigma_data.*{sd}"):
        Objective(VP(), sigma_data=sd).check(silent(V()))


@pytest.mark.parametrize("value", [-1.0, math.inf, math.nan])
def test_the_check_refuses_a_weight_without_a_finite_value(value):
    def weight(level, sigma_data):
        return torch.where(level.lam < 0, value, 1.0)

    with pytest.raises(InputError, match=r"weight.* must be finite and >= 0 .*lam = .*choose another weight"):
        Objective(VP(), weight=weight).check(silent(V()))


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("name", SCHEDULE_CASES)
def test_the_check_passes_every_built_in_weight_on_every_built_in_levels(name, levels):
    for weight in WEIGHTS.values():
        Objective(SCHEDULE_CASES[name], LEVELS[levels](), weight()).check(silent(V()))


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("name", ["v", "x0", "flow", "edm"])
def test_a_level_of_pure_noise_trains(name, weight):
    """At alpha = 0 a silent flow head answers x = eps, the others 0; weights follow `on_x0`."""
    head = EDMPrecond(0.5) if name == "edm" else HEADS[name]()
    table = zero_terminal_snr(Discrete.linear(10))
    objective = Objective(table, UniformTime(), WEIGHTS[weight](), sigma_data=0.5)
    level = UniformTime()(torch.tensor([1 - 1e-9]).double(), table)
    assert level.alpha == 0
    x0, eps = torch.randn(2, 1, 6).double()
    got = objective(silent(head), x0, eps, level)
    answer = eps if name == "flow" else 0
    assert float(got.error) == pytest.approx(float((x0 - answer).square().mean()), rel=1e-9)
    share = 1 / 0.25 if weight == "edm" else float(on_x0(weight, torch.tensor(-math.inf)))
    assert float(got.loss) == pytest.approx(share * float(got.error), rel=1e-9)
    bins = LevelBins(diagonal(0.25))
    bins.add(got.lam, got.error)
    assert bins.rows() == [{"lam": -4.0, "count": 1, "mse": pytest.approx(float(got.error)), "linear": 0.25}]


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
