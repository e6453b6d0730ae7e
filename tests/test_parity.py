"""The same network, levels and noise give what diffusers and k-diffusion give; their known defects are named."""

import math
from fractions import Fraction

import pytest
import torch
from torch import nn

from tests.cases import at, drain
from tests.peers import load_diffusers, load_k_diffusion, run_scheduler
from undiffuse import (
    DDIM,
    DDPM,
    EDM,
    SOLVERS,
    X0,
    Adams,
    Denoiser,
    Discrete,
    DPMpp2M,
    EDMPrecond,
    Eps,
    Euler,
    Flow,
    FlowVelocity,
    Heun,
    Index,
    Indexed,
    InputError,
    Karras,
    Level,
    Mixture,
    Noise,
    Spectrum,
    UniformT,
    V,
    from_x0,
    trajectory,
    zero_terminal_snr,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:__array:DeprecationWarning"),
]

SHAPE = (3, 2, 4, 4)
HEADS = {"epsilon": Eps, "v_prediction": V, "sample": X0}
DDPM_TABLE = Discrete.linear()


class Net(nn.Module):
    """Two convolutions with a time input; `time` arrives in float32, so it is read to 1/256, clear of its rounding."""

    def __init__(self, channels=SHAPE[1]):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.time, self.first = nn.Linear(2, 8), nn.Conv2d(SHAPE[1], 8, 3, padding=1)
            self.last = nn.Conv2d(8, channels, 3, padding=1)
        self.double().requires_grad_(False)

    def forward(self, x, time, cond=None):
        time = torch.round(256 * time.to(x.dtype)) / 256
        embedded = self.time(torch.stack([time / 1000, torch.sin(time)], 1))
        hidden = self.first(x) + embedded[:, :, None, None]
        return self.last(torch.tanh(hidden))


@pytest.fixture
def diffusers(monkeypatch):
    """diffusers' schedulers in float64."""
    return load_diffusers(monkeypatch)


@pytest.fixture
def k():
    """k-diffusion's samplers."""
    return load_k_diffusion()


def noise(seed=0, shape=SHAPE):
    """A source of noise; equal seeds give equal draws."""
    return Noise(shape, seed, dtype=torch.float64)


def run(denoise, x, levels, solver, draws=None):
    """Our sample from x at the first level."""
    return drain(trajectory(denoise, x, levels, solver, draws))


def gap(a, b):
    """The largest difference, relative where values exceed 1."""
    return float((a - b).abs().max() / b.abs().max().clamp(min=1))


def from_sigmas(sigmas):
    """VP levels from a peer's list of sigma / alpha, the last of which may be 0."""
    return [Level.at(-s.log()) for s in sigmas]


def ratios(levels):
    """sigma / alpha of each level."""
    return torch.stack([level.sigma / level.alpha for level in levels])


def mixture(dim):
    """The exact denoiser of two Gaussians."""
    means = (-0.5, 1.0)
    return Mixture([Spectrum(torch.full((dim,), m), torch.full((dim,), 0.1)) for m in means]).double()


# diffusers


def timesteps(diffusers, spacing, steps):
    """The timesteps of diffusers' DDIMScheduler."""
    scheduler = diffusers["DDIMScheduler"](timestep_spacing=spacing)
    scheduler.set_timesteps(steps)
    return scheduler.timesteps.tolist()


@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
@pytest.mark.parametrize("steps", [2, 3, 7, 10, 28, 30, 37, 50, 333, 1000])
def test_indices(diffusers, spacing, steps):
    """The integers visited are diffusers' timesteps."""
    assert Indexed(spacing).indices(steps) == timesteps(diffusers, spacing, steps)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(("spacing", "steps"), [("trailing", 10), ("leading", 10), ("leading", 30)])
def test_ddim(diffusers, spacing, steps, head, eta):
    """DDIM at any eta is diffusers' DDIMScheduler."""
    scheduler = diffusers["DDIMScheduler"](timestep_spacing=spacing, prediction_type=head, clip_sample=False)
    scheduler.set_timesteps(steps)
    x, net = noise(1)(), Net()
    theirs = run_scheduler(scheduler, net, x, eta=eta, generator=noise())
    ours = Denoiser(net, HEADS[head](clock=Index(DDPM_TABLE)))
    assert gap(run(ours, x, Indexed(spacing)(DDPM_TABLE, steps), DDIM(eta), noise()), theirs) < 1e-10


def test_ddim_as_stable_diffusion_is_configured(diffusers):
    """Offset 1 and a last step to the cleanest level of the table, not to clean data."""
    table = Discrete.scaled_linear()
    scheduler = diffusers["DDIMScheduler"](
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1, set_alpha_to_one=False,
        clip_sample=False,
    )  # fmt: skip
    scheduler.set_timesteps(10)
    x, net = noise(1)(), Net()
    levels = [*Indexed("leading", offset=1)(table, 10)[:-1], table.index(0)]
    ours = run(Denoiser(net, Eps(clock=Index(table))), x, levels, DDIM())
    assert gap(ours, run_scheduler(scheduler, net, x)) < 1e-10


@pytest.mark.parametrize(("variance", "kind"), [("small", "fixed_small"), ("large", "fixed_large")])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("steps", [100, 20, 1])
def test_ddpm(diffusers, variance, kind, head, steps):
    """DDPM with fixed variance is diffusers' DDPMScheduler, on the whole chain and respaced."""
    T = 100
    scheduler = diffusers["DDPMScheduler"](T, variance_type=kind, prediction_type=head, clip_sample=False)
    scheduler.set_timesteps(steps)
    x, net, table = noise(1)(), Net(), Discrete.linear(T)
    theirs = run_scheduler(scheduler, net, x, generator=noise())
    ours = Denoiser(net, HEADS[head](clock=Index(table)))
    assert gap(run(ours, x, Indexed("leading", T)(table, steps), DDPM(variance), noise()), theirs) < 1e-10


@pytest.mark.parametrize("steps", [100, 20])
def test_ddpm_with_learned_variance(diffusers, steps):
    """The second half of the channels interpolates the log variance as in diffusers' learned_range."""
    T = 100
    scheduler = diffusers["DDPMScheduler"](T, variance_type="learned_range", clip_sample=False)
    scheduler.set_timesteps(steps)
    x, net, table = noise(1)(), Net(2 * SHAPE[1]), Discrete.linear(T)
    theirs = run_scheduler(scheduler, net, x, generator=noise())
    ours = Denoiser(net, Eps(clock=Index(table)), learned_variance=True)
    assert gap(run(ours, x, Indexed("leading", T)(table, steps), DDPM("learned"), noise()), theirs) < 1e-10


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
@pytest.mark.parametrize(("kind", "solver"), [("EulerDiscreteScheduler", Euler()), ("HeunDiscreteScheduler", Heun())])
def test_euler_and_heun(diffusers, kind, solver, spacing, head):
    """Euler and Heun in VP coordinates are diffusers' in VE coordinates."""
    betas = {"beta_start": 1e-4, "beta_end": 0.02}
    scheduler = diffusers[kind](timestep_spacing=spacing, prediction_type=head, **betas)
    scheduler.set_timesteps(10)
    x, net = noise(1)(), Net()
    theirs = run_scheduler(scheduler, net, x)
    ours = Denoiser(net, HEADS[head](clock=Index(DDPM_TABLE)))
    assert gap(run(ours, x, Indexed(spacing)(DDPM_TABLE, 10), solver), theirs) < 1e-10


@pytest.mark.parametrize(("kind", "solver"), [("EulerDiscreteScheduler", Euler()), ("HeunDiscreteScheduler", Heun())])
def test_euler_and_heun_on_karras_levels(diffusers, kind, solver):
    """Our Karras grid over a whole table is diffusers' use_karras_sigmas, and so are the samples on it."""
    scheduler = diffusers[kind](beta_start=1e-4, beta_end=0.02, use_karras_sigmas=True)
    scheduler.set_timesteps(12)
    x, model = noise(1)(), mixture(32)

    def net(x, time):
        level = Level.at(-scheduler.sigmas[scheduler.step_index].log())
        return from_x0("eps", model(x, level), x, level)

    ends = ratios([DDPM_TABLE.index(0), DDPM_TABLE.index(999)]).tolist()
    ours = run(model, x, Karras(sigma_min=ends[0], sigma_max=ends[1])(DDPM_TABLE, 12), solver)
    assert gap(ours, run_scheduler(scheduler, net, x)) < 1e-10


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("steps", [1, 2, 10, 20])
@pytest.mark.parametrize(
    ("options", "to_clean", "last"),
    [
        ({}, True, None),
        ({"lower_order_final": False}, True, None),
        ({"timestep_spacing": "trailing"}, True, None),
        ({"final_sigmas_type": "sigma_min", "lower_order_final": False}, False, None),
        ({"final_sigmas_type": "sigma_min", "euler_at_final": True}, False, DDIM()),
    ],
    ids=["zero", "zero-not-lowered", "trailing", "sigma-min", "sigma-min-euler-at-final"],
)
def test_dpmpp_2m(diffusers, options, to_clean, last, steps, head):
    """DPMpp2M is dpmsolver++ of order 2, midpoint; `last` takes the last step where diffusers lowers its order."""
    scheduler = diffusers["DPMSolverMultistepScheduler"](prediction_type=head, **options)
    scheduler.set_timesteps(steps)
    x, net = noise(1)(), Net()
    theirs = run_scheduler(scheduler, net, x)
    ours = Denoiser(net, HEADS[head](clock=Index(DDPM_TABLE)))
    levels = [
        *(DDPM_TABLE.index(int(t)) for t in scheduler.timesteps),
        Level(1, 0) if to_clean else DDPM_TABLE.index(0),
    ]
    if last is None:
        assert gap(run(ours, x, levels, DPMpp2M()), theirs) < 1e-10
    else:
        before = run(ours, x, levels[:-1], DPMpp2M()) if steps > 1 else x
        assert gap(run(ours, before, levels[-2:], last), theirs) < 1e-10


@pytest.mark.parametrize(
    ("options", "solver"),
    [
        ({"solver_order": 1}, DDIM()),
        ({"solver_order": 1}, Adams(1)),
        ({"solver_type": "heun"}, Adams(2)),
        ({"solver_order": 1, "algorithm_type": "sde-dpmsolver++"}, DDIM(1.0)),
        ({"solver_order": 1, "algorithm_type": "sde-dpmsolver++"}, Adams(1, eta=1.0)),
        ({"solver_type": "heun", "algorithm_type": "sde-dpmsolver++"}, Adams(2, eta=1.0)),
    ],
)
def test_exponential_adams(diffusers, options, solver):
    """diffusers' "heun" weights of orders 1 and 2 are exponential Adams, for the ODE and for the SDE."""
    scheduler = diffusers["DPMSolverMultistepScheduler"](timestep_spacing="trailing", **options)
    scheduler.set_timesteps(10)
    x, net = noise(1)(), Net()
    theirs = run_scheduler(scheduler, net, x, generator=noise())
    ours = Denoiser(net, Eps(clock=Index(DDPM_TABLE)))
    assert gap(run(ours, x, Indexed("trailing")(DDPM_TABLE, 10), solver, noise()), theirs) < 1e-10


@pytest.mark.parametrize("solver", [Euler(), DDIM()])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_matching(diffusers, shift, solver):
    """Euler from pure noise on shifted rectified-flow levels is diffusers' FlowMatchEulerDiscreteScheduler."""
    scheduler = diffusers["FlowMatchEulerDiscreteScheduler"](shift=shift)
    scheduler.set_timesteps(sigmas=torch.linspace(1, 0.1, 10, dtype=torch.float64).tolist())
    x, net = noise(1)(), Net()
    ours = Denoiser(net, FlowVelocity(clock=lambda level: 1000 * level.sigma / (level.alpha + level.sigma)))
    levels = UniformT()(Flow(shift), 10)
    assert gap(run(ours, x, levels, solver), run_scheduler(scheduler, net, x)) < 1e-10


@pytest.mark.parametrize(
    ("kind", "options", "solver"),
    [
        ("DDIMScheduler", {"clip_sample": False}, DDIM()),
        ("DDPMScheduler", {"clip_sample": False}, DDPM()),
        ("EulerDiscreteScheduler", {}, Euler()),
        ("HeunDiscreteScheduler", {"beta_start": 1e-4, "beta_end": 0.02}, Heun()),
        ("DPMSolverMultistepScheduler", {}, DPMpp2M()),
    ],
)
def test_as_shipped(monkeypatch, kind, options, solver):
    """In float32, as it is installed, diffusers agrees with our float64 sample to float32's precision."""
    scheduler = load_diffusers(monkeypatch, promote=False)[kind](
        prediction_type="v_prediction", timestep_spacing="trailing", **options
    )
    scheduler.set_timesteps(10)
    x, net = noise(1)(), Net()
    draws = noise()
    single = {"generator": lambda: draws().float()} if kind == "DDPMScheduler" else {}
    ours = run(Denoiser(net, V(clock=Index(DDPM_TABLE))), x, Indexed("trailing")(DDPM_TABLE, 10), solver, noise())
    theirs = run_scheduler(scheduler, Net().float(), x.float(), **single)
    assert gap(theirs, ours) < 1e-5


# k-diffusion: x in VE coordinates and a denoiser of (x, sigma)


def edm_levels(steps=12):
    """Our Karras grid in VE coordinates, and the same as k-diffusion's sigmas."""
    levels = UniformT()(EDM(0.02, 20.0), steps)
    return levels, ratios(levels)


@pytest.fixture
def ve_model():
    """One network with the EDM head: as our denoiser, and as k-diffusion's model(x, sigma)."""
    ours = Denoiser(Net(), EDMPrecond())
    return ours, lambda x, sigma: ours(x, Level(1, sigma[0]))


def test_karras_sigmas(k):
    """The levels of EDM and of the Karras grid are k-diffusion's get_sigmas_karras, which is float32."""
    theirs = k.get_sigmas_karras(12, 0.02, 20.0).double()
    karras = Karras(sigma_min=0.02, sigma_max=20.0)(EDM(0.02, 20.0), 12)
    assert gap(edm_levels()[1], theirs) < 1e-6
    assert gap(ratios(karras), edm_levels()[1]) < 1e-12


@pytest.mark.parametrize("options", [(0.0, 0.0, math.inf, 1.0), (3.0, 0.0, math.inf, 1.0), (40.0, 0.1, 5.0, 1.01)])
@pytest.mark.parametrize(("name", "solver"), [("sample_euler", Euler), ("sample_heun", Heun)])
def test_churn(k, ve_model, monkeypatch, name, solver, options):
    """Euler and Heun are k-diffusion's without churn, with it, and with its cap inside a range."""
    churn, low, high, s_noise = options
    ours, model = ve_model
    levels, sigmas = edm_levels()
    draws = noise()
    monkeypatch.setattr(torch, "randn_like", lambda x: draws())
    x = 20 * noise(1)()
    theirs = getattr(k, name)(model, x, sigmas, None, None, True, churn, low, high, s_noise)
    draws = noise()
    z = [draws() for _ in sigmas[:-1]]
    used = iter([z[i] for i, s in enumerate(sigmas[:-1]) if low <= s <= high])
    gamma = min(churn / 12, math.sqrt(2) - 1)
    assert gap(run(ours, x, levels, solver(gamma, low, high, s_noise), lambda: next(used)), theirs) < 1e-10


@pytest.mark.parametrize("steps", [1, 2, 12])
def test_k_dpmpp_2m(k, ve_model, steps):
    """DPMpp2M is k-diffusion's sample_dpmpp_2m."""
    ours, model = ve_model
    levels, sigmas = edm_levels(steps)
    x = 20 * noise(1)()
    assert gap(run(ours, x, levels, DPMpp2M()), k.sample_dpmpp_2m(model, x, sigmas, disable=True)) < 1e-10


@pytest.mark.parametrize(("eta", "solver"), [(0.0, DDIM()), (0.5, DDIM(0.5)), (1.0, DDIM(1.0)), (1.0, DDPM("small"))])
def test_euler_ancestral(k, ve_model, eta, solver):
    """DDIM(eta) is k-diffusion's sample_euler_ancestral; eta = 1 is DDPM with the small variance."""
    ours, model = ve_model
    levels, sigmas = edm_levels()
    x, draws = 20 * noise(1)(), noise()
    theirs = k.sample_euler_ancestral(model, x, sigmas, disable=True, eta=eta, noise_sampler=lambda *_: draws())
    assert gap(run(ours, x, levels, solver, noise()), theirs) < 1e-10


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_dpmpp_2m_sde(k, ve_model, eta):
    """Adams(2) with eta is k-diffusion's sample_dpmpp_2m_sde (heun), whose eta is the square of ours."""
    ours, model = ve_model
    levels, sigmas = edm_levels()
    x, draws = 20 * noise(1)(), noise()
    theirs = k.sample_dpmpp_2m_sde(
        model, x, sigmas, disable=True, eta=eta, noise_sampler=lambda *_: draws(), solver_type="heun"
    )
    assert gap(run(ours, x, levels, Adams(2, eta=math.sqrt(eta)), noise()), theirs) < 1e-10


# Known defects: each test asserts what would be right, fails today for the reason given, and has a test beside it
# that shows the cause or that this library is right.


def defect(reason, raises=AssertionError):
    """An expected failure that is reported as soon as the peer is mended."""
    return pytest.mark.xfail(strict=True, raises=raises, reason=reason)


def ddim_uneven(diffusers, spacing, steps):
    """A DDIMScheduler, its network and x, and our sample on the grid that it names."""
    scheduler = diffusers["DDIMScheduler"](timestep_spacing=spacing, clip_sample=False)
    scheduler.set_timesteps(steps)
    x, net = noise(1)(), Net()
    levels = Indexed(spacing)(DDPM_TABLE, steps)
    return scheduler, net, x, run(Denoiser(net, Eps(clock=Index(DDPM_TABLE))), x, levels, DDIM())


UNEVEN = pytest.mark.parametrize(("spacing", "steps"), [("linspace", 10), ("trailing", 30)])


@defect("diffusers 0.42.1 scheduling_ddim.py:445: a step ends at t - T // n, not at the grid's next t; #11347")
@UNEVEN
def test_ddim_steps_along_its_grid(diffusers, spacing, steps):
    """DDIM's steps meet: each ends where the next begins."""
    scheduler, net, x, ours = ddim_uneven(diffusers, spacing, steps)
    assert gap(run_scheduler(scheduler, net, x), ours) < 1e-5


@UNEVEN
def test_ddim_agrees_once_its_steps_meet(diffusers, spacing, steps):
    """With T // n made equal to each gap of the grid, the same scheduler gives our sample."""
    scheduler, net, x, ours = ddim_uneven(diffusers, spacing, steps)
    t = scheduler.timesteps.tolist()
    for now, then in zip(t, [*t[1:], -1], strict=True):
        scheduler.num_inference_steps = Fraction(1000, now - then)
        x = scheduler.step(net(x, torch.full((len(x),), now)), now, x).prev_sample
    assert gap(x, ours) < 1e-10


@defect("diffusers 0.42.1 scheduling_ddim.py:375: arange(T, 0, -T / n) rounds to n + 1 entries, the last of them -1")
def test_trailing_timesteps_are_as_many_as_asked(diffusers):
    """61 steps are 61 timesteps, the last of them >= 0."""
    assert timesteps(diffusers, "trailing", 61) == Indexed("trailing").indices(61)


@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
def test_indices_are_as_many_as_asked(spacing):
    """For every number of steps the indices are that many, falling and inside the table."""
    for steps in range(1, 1001):
        index = Indexed(spacing).indices(steps)
        assert len(index) == steps
        assert index == sorted(set(index), reverse=True)
        assert index[-1] >= 0


def third_order(which, diffusers, k):
    """(sample, kappa): a third-order multistep sampler as a function of (denoise, x, levels), without noise."""
    zero = torch.zeros_like
    if which.startswith("ours"):
        eta = float(which == "ours, SDE")
        return (lambda denoise, x, lv: run(denoise, x, lv, Adams(3, eta=eta), lambda: zero(x))), 1 + eta
    if which.startswith("k-diffusion"):
        eta = float(which == "k-diffusion, SDE")

        def sample(denoise, x, levels):
            def model(x, sigma):
                level = Level.at(-sigma[0].log())
                return denoise(level.alpha * x, level)

            options = {"disable": True, "eta": eta, "noise_sampler": lambda *_: zero(x)}
            return levels[-1].alpha * k.sample_dpmpp_3m_sde(model, x / levels[0].alpha, ratios(levels), **options)

        return sample, 1 + eta

    def sample(denoise, x, levels):
        scheduler = diffusers["DPMSolverMultistepScheduler"](
            solver_order=3, algorithm_type=which, prediction_type="sample", lower_order_final=False,
            final_sigmas_type="sigma_min",
        )  # fmt: skip
        scheduler.set_timesteps(len(levels) - 1)
        scheduler.sigmas = ratios(levels)

        def net(x, t):
            return denoise(x, levels[scheduler.step_index or 0])

        return run_scheduler(scheduler, net, x, variance_noise=zero(x))

    return sample, 2 if which.startswith("sde") else 1


def local_error(sampler, degree, h=0.5):
    """The error of the last of three steps h, the first of third order, where E[x0 | x] = lam^degree.

    The truth is sigma'/sigma e^(-(kappa - 1) h) x + alpha' kappa int e^(-kappa (lam' - m)) m^degree dm over the step.
    """
    sample, kappa = sampler
    levels, seen = at([0.3, 0.3 + h, 0.3 + 2 * h, 0.3 + 3 * h]), []

    def denoise(x, level):
        seen.append(x)
        return level.lam**degree * torch.ones_like(x)

    def primitive(m):
        return (1.0, m - 1 / kappa, m**2 - 2 * m / kappa + 2 / kappa**2)[degree]

    x, (now, then) = sample(denoise, torch.ones(1, 1).double(), levels), levels[-2:]
    integral = primitive(then.lam) - math.exp(-kappa * h) * primitive(now.lam)
    truth = then.sigma / now.sigma * math.exp((1 - kappa) * h) * seen[-1] + then.alpha * integral
    return float((x - truth).abs().max())


def local_order(sampler):
    """How fast the error in lam^2 falls: 4 for a third-order method, 3 for a second-order one."""
    return math.log2(local_error(sampler, 2, 0.02) / local_error(sampler, 2, 0.01))


PEERS_3M = ["dpmsolver++", "sde-dpmsolver++", "k-diffusion", "k-diffusion, SDE"]


@pytest.mark.parametrize(
    ("which", "degree"),
    [*((which, d) for which in ("ours", "ours, SDE") for d in (0, 1, 2)), *((w, d) for w in PEERS_3M for d in (0, 1))],
)
def test_third_order_steps_are_exact(diffusers, k, which, degree):
    """Adams(3) integrates 1, lam and lam^2 exactly; the peers' 3M integrate 1 and lam."""
    assert local_error(third_order(which, diffusers, k), degree) < 1e-13


HALF = "the weight of the second derivative multiplies half of it, so lam^2 is not integrated"


@pytest.mark.parametrize(
    "which",
    [
        pytest.param("dpmsolver++", marks=defect(f"diffusers 0.42.1 scheduling_dpmsolver_multistep.py:1123: {HALF}")),
        pytest.param("k-diffusion", marks=defect(f"k-diffusion 0.1.1 sampling.py:687-690: {HALF}")),
        pytest.param("k-diffusion, SDE", marks=defect(f"k-diffusion 0.1.1 sampling.py:687-690: {HALF}")),
    ],
)
def test_third_order_steps_of_peers_are_exact_in_lam_squared(diffusers, k, which):
    """A third-order method integrates lam^2 exactly."""
    assert local_error(third_order(which, diffusers, k), 2) < 1e-13


@pytest.mark.parametrize("which", ["dpmsolver++", "k-diffusion", "k-diffusion, SDE"])
def test_the_error_in_lam_squared_is_the_missing_half(diffusers, k, which):
    """What is missing is one half of the second derivative, (lam^2)'' / 2 = 1, times its weight."""
    sampler, h = third_order(which, diffusers, k), 0.5
    z, alpha = sampler[1] * h, Level.at(0.3 + 3 * h).alpha
    half = float(alpha * h**2 * abs((math.expm1(-z) + z) / z**2 - 0.5))
    assert local_error(sampler, 2, h) == pytest.approx(half, rel=1e-10)


@pytest.mark.parametrize(
    "which",
    [
        "dpmsolver++",
        "k-diffusion",
        "k-diffusion, SDE",
        pytest.param(
            "sde-dpmsolver++",
            marks=defect(
                "diffusers 0.42.1 scheduling_dpmsolver_multistep.py:1139: -0.5 where +0.5 belongs in the weight of the "
                "second derivative, so order 3 converges like order 1"
            ),
        ),
    ],
)
def test_third_order_steps_are_at_least_second_order(diffusers, k, which):
    """Even with half the second derivative, a step's error falls with the cube of its length."""
    assert local_order(third_order(which, diffusers, k)) > 2.9


@pytest.mark.parametrize("order", [1, 2, pytest.param(3, marks=defect(
    "diffusers 0.42.1 scheduling_dpmsolver_multistep.py:1117-1142: sde-dpmsolver of order 3 has no branch",
    UnboundLocalError,
))])  # fmt: skip
def test_every_order_of_sde_dpmsolver_runs(diffusers, order):
    """An algorithm and an order that the constructor accepts can take three steps."""
    scheduler = diffusers["DPMSolverMultistepScheduler"](
        solver_order=order, algorithm_type="sde-dpmsolver", final_sigmas_type="sigma_min", lower_order_final=False
    )
    scheduler.set_timesteps(3)
    assert run_scheduler(scheduler, Net(), noise(1)(), generator=noise()).isfinite().all()


@pytest.mark.parametrize("which", [
    pytest.param(which, marks=defect(
        f"k-diffusion 0.1.1 sampling.py:{line}: h is read after a last step that never sets it", UnboundLocalError
    ))
    for which, line in (("sample_dpmpp_2m_sde", 651), ("sample_dpmpp_3m_sde", 701))
])  # fmt: skip
def test_k_diffusion_sde_in_one_step(k, ve_model, which):
    """One step from noise to clean data is the denoiser's answer."""
    ours, model = ve_model
    x, sigmas = noise(1)(), torch.tensor([20.0, 0.0]).double()
    theirs = getattr(k, which)(model, x, sigmas, disable=True, noise_sampler=lambda *_: torch.zeros_like(x))
    assert gap(theirs, ours(x, Level(1, 20))) < 1e-10


# langevin moves x before it asks; spectral spreads its end by the variance that it is given
ONE_STEP = [kind() for name, kind in SOLVERS.items() if name not in ("langevin", "spectral")]


@pytest.mark.parametrize("solver", [*ONE_STEP, Adams(2, eta=1.0), Adams(3, eta=1.0)])
def test_every_solver_in_one_step(ve_model, solver):
    """One step from noise to clean data is the denoiser's answer, for every solver."""
    ours, x = ve_model[0], noise(1)()
    assert gap(run(ours, x, [Level(1, 20), Level(1, 0)], solver, noise()), ours(x, Level(1, 20))) < 1e-12


def repeated(diffusers):
    """A scheduler whose first two of distinct sigmas round to one timestep."""
    scheduler = diffusers["DPMSolverMultistepScheduler"](10, use_karras_sigmas=True, prediction_type="sample")
    scheduler.set_timesteps(50)
    assert scheduler.timesteps[0] == scheduler.timesteps[1]
    assert (scheduler.sigmas[:-1] > scheduler.sigmas[1:]).all()
    return scheduler


def sample_by_sigma(scheduler, x):
    """The scheduler's sample, and ours on its sigmas, with the exact denoiser of a mixture."""
    model, levels = mixture(32), from_sigmas(scheduler.sigmas)
    steps = iter(levels)
    return run_scheduler(scheduler, lambda x, t: model(x, next(steps)), x), run(model, x, levels, DPMpp2M())


@defect(
    "diffusers 0.42.1 scheduling_dpmsolver_multistep.py:1174: the first step takes the second match of a repeated "
    "timestep, skips a sigma and runs off the end; #12771", IndexError,
)  # fmt: skip
def test_levels_with_a_repeated_timestep(diffusers):
    """Distinct levels that round to one timestep are walked one by one."""
    theirs, ours = sample_by_sigma(repeated(diffusers), noise(1)())
    assert gap(theirs, ours) < 1e-10


def test_levels_with_a_repeated_timestep_walked_by_position(diffusers):
    """Told to begin at position 0, diffusers gives our sample; our solvers know levels only, never timesteps."""
    scheduler = repeated(diffusers)
    scheduler.set_begin_index(0)
    theirs, ours = sample_by_sigma(scheduler, noise(1)())
    assert gap(theirs, ours) < 1e-10


def test_repeated_levels_are_refused_by_name():
    """A level that is visited twice in a row is an error that says which."""
    with pytest.raises(InputError, match="levels 1 and 2 are the same"):
        run(mixture(32), noise(1)(), at([-2.0, 0.0, 0.0, 2.0]), DDIM())


def zero_snr(diffusers, kind, **options):
    """(their sample, our denoiser, levels, x) for a v head on the rescaled table, from pure noise."""
    scheduler = diffusers[kind](
        rescale_betas_zero_snr=True, timestep_spacing="trailing", prediction_type="v_prediction", **options
    )
    scheduler.set_timesteps(10)
    x, net, table = noise(1)(), Net(), zero_terminal_snr(DDPM_TABLE)
    levels = Indexed("trailing")(table, 10)
    return run_scheduler(scheduler, net, x), Denoiser(net, V(clock=Index(table))), levels, x


def test_zero_terminal_snr(diffusers):
    """From alpha = 0, DDIM is diffusers' DDIM, and DPMpp2M is finite; an eps head is refused there."""
    theirs, ours, levels, x = zero_snr(diffusers, "DDIMScheduler", clip_sample=False)
    assert levels[0].alpha == 0
    assert gap(run(ours, x, levels, DDIM()), theirs) < 1e-10
    assert run(ours, x, levels, DPMpp2M()).isfinite().all()
    early = levels[:3]  # no finite r yet: the steps are DDIM's
    assert torch.equal(run(ours, x, early, DPMpp2M()), run(ours, x, early, DDIM()))
    with pytest.raises(InputError, match="alpha = 0"):
        run(Denoiser(ours.net, Eps()), x, levels, DPMpp2M())


@defect("diffusers 0.42.1 scheduling_dpmsolver_multistep.py:299: alphas_cumprod is floored at 2**-24, so SNR is not 0")
def test_zero_terminal_snr_of_dpmsolver(diffusers):
    """With zero terminal SNR the first step starts from pure noise and is DDIM's."""
    theirs, ours, levels, x = zero_snr(diffusers, "DPMSolverMultistepScheduler")
    assert gap(theirs, run(ours, x, levels, DPMpp2M())) < 1e-5


def test_zero_terminal_snr_of_dpmsolver_on_its_floor(diffusers):
    """From the floored level, which the network is told is 999, our sampler gives what diffusers gives."""
    theirs, ours, levels, x = zero_snr(diffusers, "DPMSolverMultistepScheduler")
    floored, clock = Level(2**-12, math.sqrt(1 - 2**-24)), ours.head.clock
    told = Denoiser(ours.net, V(clock=lambda level: torch.tensor(999.0) if level is floored else clock(level)))
    assert gap(theirs, run(told, x, [floored, *levels[1:]], DPMpp2M())) < 1e-10


def test_interleaved_runs_share_a_solver():
    """One solver value serves two interleaved runs, bit for bit as it serves them one by one."""
    solver, model, levels = DPMpp2M(), mixture(32), at([-2.0, -1.0, 0.0, 1.0, 2.0])
    a, b = noise(1)(), noise(2)()
    for one, other in zip(*(trajectory(model, x, levels, solver) for x in (a, b)), strict=True):
        both = one.x, other.x
    assert torch.equal(both[0], run(model, a, levels, solver))
    assert torch.equal(both[1], run(model, b, levels, solver))


@defect(
    "diffusers 0.42.1 scheduling_dpmsolver_multistep.py:1281: step index and history live in the scheduler, so two "
    "runs that share it advance each other; #5749", IndexError,
)  # fmt: skip
def test_interleaved_runs_share_a_scheduler(diffusers):
    """One scheduler serves two interleaved runs."""
    scheduler, net = diffusers["DPMSolverMultistepScheduler"](), Net()
    scheduler.set_timesteps(4)
    both = [noise(1)(), noise(2)()]
    for t in scheduler.timesteps:
        both = [scheduler.step(net(x, t.expand(len(x))), t, x).prev_sample for x in both]
    for x, seed in zip(both, (1, 2), strict=True):
        scheduler.set_timesteps(4)
        assert torch.equal(x, run_scheduler(scheduler, net, noise(seed)()))


@defect("diffusers 0.42.1 scheduling_dpmsolver_multistep.py:792: [:, :3] assumes three channels", RuntimeError)
def test_dpmsolver_with_learned_variance_of_two_channels(diffusers):
    """A network with learned variance has twice the channels of x, whatever their number."""
    scheduler = diffusers["DPMSolverMultistepScheduler"](variance_type="learned_range", timestep_spacing="trailing")
    scheduler.set_timesteps(10)
    x, net = noise(1)(), Net(2 * SHAPE[1])
    ours = Denoiser(net, Eps(clock=Index(DDPM_TABLE)), learned_variance=True)
    assert gap(run_scheduler(scheduler, net, x), run(ours, x, Indexed()(DDPM_TABLE, 10), DPMpp2M())) < 1e-10


def test_learned_variance_of_two_channels():
    """DPMpp2M reads the mean of a network with learned variance: the sample of a network that has only the mean."""
    x, levels, head = noise(1)(), Indexed()(DDPM_TABLE, 10), Eps(clock=Index(DDPM_TABLE))
    whole = Net(2 * SHAPE[1])
    ours = run(Denoiser(whole, head, learned_variance=True), x, levels, DPMpp2M())
    half = Denoiser(lambda x, time, cond: whole(x, time)[:, : SHAPE[1]], head)
    assert gap(ours, run(half, x, levels, DPMpp2M())) < 1e-12


@pytest.mark.parametrize(("spacing", "steps"), [("leading", 10), pytest.param("trailing", 10, marks=defect(
    "diffusers 0.42.1 scheduling_ddpm.py:543: the last step is noiseless only at t = 0, so with trailing spacing the "
    "sample keeps noise of variance beta"
))])  # fmt: skip
def test_ddpm_ends_without_noise(diffusers, spacing, steps):
    """The last step goes to clean data and adds no noise."""
    scheduler = diffusers["DDPMScheduler"](variance_type="fixed_large", timestep_spacing=spacing, clip_sample=False)
    scheduler.set_timesteps(steps)
    x, net = noise(1)(), Net()
    ours = Denoiser(net, Eps(clock=Index(DDPM_TABLE)))
    levels = Indexed(spacing)(DDPM_TABLE, steps)
    theirs = run_scheduler(scheduler, net, x, generator=noise())
    assert gap(theirs, run(ours, x, levels, DDPM("large"), noise())) < 1e-5


@defect(
    "diffusers 0.42.1 scheduling_euler_discrete.py:772: churn is added to x after the network has read it, and the "
    "answer is used as if it belonged to the noisier x"
)
def test_euler_with_churn(diffusers):
    """Churn raises x to a noisier level and evaluates the network there."""
    scheduler = diffusers["EulerDiscreteScheduler"]()
    scheduler.set_timesteps(10)
    x, model, levels = noise(1)(), mixture(32), Indexed("linspace")(DDPM_TABLE, 10)

    def net(x, time):
        level = levels[scheduler.step_index]
        return from_x0("eps", model(x, level), x, level)

    theirs = run_scheduler(scheduler, net, x, s_churn=2.5, generator=noise())
    assert gap(theirs, run(model, x, levels, Euler(gamma=0.25), noise())) < 1e-5
