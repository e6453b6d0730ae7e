"""The same network, levels and noise give what diffusers and k-diffusion give; their known defects are named."""

import math

import pytest
import torch
from torch import nn

from tests.peers import load_diffusers, load_k_diffusion, run_scheduler
from undiffuse import (
    DDIM,
    DDPM,
    EDM,
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
    Karras,
    Level,
    Mixture,
    Noise,
    Spectrum,
    UniformT,
    V,
    from_x0,
    trajectory,
)

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

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
def k(monkeypatch):
    """k-diffusion's samplers."""
    return load_k_diffusion()


def noise(seed=0, shape=SHAPE):
    """A source of noise; equal seeds give equal draws."""
    return Noise(shape, seed, dtype=torch.float64)


def run(denoise, x, levels, solver, draws=None):
    """Our sample from x at the first level."""
    for state in trajectory(denoise, x, levels, solver, draws):
        x = state.x
    return x


def gap(a, b):
    """The largest difference, relative where values exceed 1."""
    return float((a - b).abs().max() / b.abs().max().clamp(min=1))


def from_sigmas(sigmas, space="vp"):
    """Levels from a peer's list of sigma / alpha, the last of which may be 0."""
    return [Level.at(-s.double().log(), space) for s in sigmas]


def ratios(levels):
    """sigma / alpha of each level."""
    return torch.stack([level.sigma / level.alpha for level in levels])


def mixture(dim):
    """The exact denoiser of two Gaussians."""
    means = (-0.5, 1.0)
    return Mixture([Spectrum(torch.full((dim,), m), torch.full((dim,), 0.1)) for m in means]).double()


# diffusers


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
@pytest.mark.parametrize("steps", [200, 25, 1])
def test_ddpm(diffusers, variance, kind, head, steps):
    """DDPM with fixed variance is diffusers' DDPMScheduler, on the whole chain and respaced."""
    T = 200
    scheduler = diffusers["DDPMScheduler"](T, variance_type=kind, prediction_type=head, clip_sample=False)
    scheduler.set_timesteps(steps)
    x, net, table = noise(1)(), Net(), Discrete.linear(T)
    theirs = run_scheduler(scheduler, net, x, generator=noise())
    ours = Denoiser(net, HEADS[head](clock=Index(table)))
    assert gap(run(ours, x, Indexed("leading", T)(table, steps), DDPM(variance), noise()), theirs) < 1e-10


@pytest.mark.parametrize("steps", [200, 25])
def test_ddpm_with_learned_variance(diffusers, steps):
    """The second half of the channels interpolates the log variance as in diffusers' learned_range."""
    T = 200
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
    print(kind, gap(theirs, ours))
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
