"""The solvers beyond `test_parity.py` against diffusers and k-diffusion: equal network, levels and noise, float64."""
# ruff: noqa: F811 (fixtures are imported)

import importlib
import itertools
import math
from dataclasses import dataclass

import pytest
import torch

from tests.cases import INF, at
from tests.peers import run_scheduler
from tests.test_parity import (  # noqa: F401  fixtures
    DDPM_TABLE,
    Net,
    defect,
    diffusers,
    edm_levels,
    gap,
    k,
    mixture,
    noise,
    ratios,
    run,
    ve_model,
)
from undiffuse import (
    EDM,
    GRIDS,
    SOLVERS,
    Adams,
    Denoiser,
    Discrete,
    DPMpp2M,
    Eps,
    Euler,
    Index,
    Indexed,
    InputError,
    Level,
    from_x0,
)
from undiffuse.grid import AYS, AYS_LEVELS, Beta, Exponential, beta_quantile
from undiffuse.solvers import (
    DEIS,
    IPNDM,
    LMS,
    Consistency,
    DPM2Ancestral,
    DPMpp2S,
    DPMpp2SAncestral,
    DPMpp3M,
    DPMSolver,
    EulerAncestral,
    RungeKutta,
    SASolver,
    Start,
    UniPC,
)
from undiffuse.solvers.exponential import halved, weights
from undiffuse.solvers.pndm import PseudoRungeKutta

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:__array:DeprecationWarning"),
]

UNEVEN = [-2.5, -2.1, -1.4, -0.9, -0.1, 0.4, 1.3, 2.0]
BETAS = {"beta_start": 1e-4, "beta_end": 0.02}


def on(scheduler, levels):
    """The scheduler, set to these levels in VP form."""
    scheduler.set_timesteps(len(levels) - 1)
    scheduler.sigmas = ratios(levels)
    scheduler.set_begin_index(0)
    return scheduler


def difference(scheduler, solver, levels, kind="eps", ours=None, theirs=None):
    """The gap of the two samples. The network is exact for two Gaussians, and our levels are shown to theirs: the two
    must ask it equally often. `ours` and `theirs` are the noise."""
    model, x, seen = mixture(32), noise(1)(), []

    def denoise(x, level):
        seen.append(level)
        return model(x, level)

    mine = run(denoise, x, levels, solver, ours or noise())
    steps = iter(seen)

    def net(x, time):
        level = next(steps)
        return from_x0(kind, model(x, level), x, level)

    other = run_scheduler(scheduler, net, x, **({"generator": theirs} if theirs else {}))
    assert next(steps, None) is None
    return gap(other, mine)


@dataclass(frozen=True)
class Halved(Adams):
    """Two evaluations weighed as in the papers' "midpoint" form."""

    def weigh(self, nodes, h, kappa):
        return halved(nodes, h, kappa)


# diffusers


@pytest.mark.parametrize(("algorithm", "options", "solver"), [
    ("dpmsolver", {}, Halved(2, prediction="eps")),
    ("dpmsolver", {}, UniPC(2, corrector=False, prediction="eps")),
    ("dpmsolver", {"solver_type": "heun"}, Adams(2, prediction="eps")),
    ("sde-dpmsolver", {"solver_order": 1}, Adams(1, 1.0, prediction="eps")),
    ("sde-dpmsolver", {}, Halved(2, 1.0, prediction="eps")),
    ("sde-dpmsolver", {"solver_type": "heun"}, Adams(2, 1.0, prediction="eps")),
    ("sde-dpmsolver++", {}, DPMpp2M(1.0)),
])  # fmt: skip
def test_dpmsolver_multistep(diffusers, algorithm, options, solver):
    """Multistep on eps and with noise, "midpoint" (the slope counts half) and "heun" (its exact integral)."""
    scheduler = diffusers["DPMSolverMultistepScheduler"](
        algorithm_type=algorithm, final_sigmas_type="sigma_min", lower_order_final=False, **options
    )
    levels = at(UNEVEN)
    assert difference(on(scheduler, levels), solver, levels, theirs=noise()) < 1e-10


@pytest.mark.parametrize("prediction", ["x0", "eps"])
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("corrector", [True, False])
@pytest.mark.parametrize("variant", ["bh1", "bh2"])
def test_unipc(diffusers, variant, corrector, order, prediction):
    """UniPC of orders 1 to 3, both B(h), on x0 and eps, with and without corrector."""
    scheduler = diffusers["UniPCMultistepScheduler"](
        solver_order=order, solver_type=variant, predict_x0=prediction == "x0", lower_order_final=False,
        disable_corrector=[] if corrector else list(range(10)),
    )  # fmt: skip
    levels, solver = at(UNEVEN), UniPC(order, corrector=corrector, prediction=prediction, variant=variant)
    assert difference(on(scheduler, levels), solver, levels) < 1e-10


@pytest.mark.parametrize(("order", "prediction"), [
    (1, "x0"),
    (2, "x0"),
    pytest.param(3, "x0", marks=defect("by design: diffusers also lowers the last but one step, ours only the last")),
    pytest.param(2, "eps", marks=defect(
        "diffusers 0.42.1 scheduling_unipc_multistep.py:952: on eps the step to sigma = 0 is 0 * inf, NaN, and accepted"
    )),
])  # fmt: skip
def test_unipc_to_clean_data(diffusers, order, prediction):
    """lower_order_final: the step to clean data has order 1, as ours has."""
    scheduler = diffusers["UniPCMultistepScheduler"](solver_order=order, predict_x0=prediction == "x0")
    levels = at([*UNEVEN, INF])
    assert difference(on(scheduler, levels), UniPC(order, prediction=prediction), levels) < 1e-10


@pytest.mark.parametrize("order", [1, 2, 3])
def test_deis_in_log_rho(diffusers, order):
    """diffusers' DEIS is a polynomial of eps in log rho = -lam: exponential Adams on eps."""
    levels = at(UNEVEN)
    scheduler = on(diffusers["DEISMultistepScheduler"](solver_order=order, lower_order_final=False), levels)
    assert difference(scheduler, Adams(order, prediction="eps"), levels) < 1e-10


def inner_halved(nodes, h, kappa):
    """`halved` for the second inner point of order 3, whose nodes are 0 and its middle; else `weights`."""
    inner = len(nodes) == 2 and abs(float(nodes[1] / h) - 0.5) < 1e-9
    return (halved if inner else weights)(nodes, h, kappa)


@pytest.mark.parametrize(("order", "weigh"), [(2, weights), (3, inner_halved), pytest.param(3, weights, marks=defect(
    "by design: algorithm 2 of arXiv 2206.00927 has the exact slope at the second inner point, diffusers the halved one"
))])  # fmt: skip
@pytest.mark.parametrize(("algorithm", "prediction"), [("dpmsolver", "eps"), ("dpmsolver++", "x0")])
def test_dpmsolver_singlestep(diffusers, monkeypatch, algorithm, prediction, order, weigh):
    """DPMSolver, on every second or third level of an even grid."""
    scheduler = diffusers["DPMSolverSinglestepScheduler"](
        solver_order=order, algorithm_type=algorithm, final_sigmas_type="sigma_min"
    )
    fine = at(torch.linspace(-2.5, 2, 6 * order + 1))
    monkeypatch.setattr("undiffuse.solvers.dpm.weights", weigh)
    assert difference(on(scheduler, fine), DPMSolver(order, prediction), fine[::order]) < 1e-10


@dataclass(frozen=True)
class ShortSA(SASolver):
    """Two evaluations weighed as in SA-Solver's code: the slope counts kappa h / 2 of it."""

    def weigh(self, nodes, h, kappa):
        return halved(nodes, h, kappa, kappa * h)


@pytest.mark.parametrize(("kind", "prediction", "order"), [
    *itertools.product([SASolver], ["eps"], [1, 2, 3]),
    *itertools.product([ShortSA], ["x0"], [1, 2, 3]),
    pytest.param(SASolver, "x0", 3, marks=defect(
        "by design: SA-Solver's code shortens the weights of two evaluations on x0, ours are exact"
    )),
])  # fmt: skip
def test_sa_solver(diffusers, kind, prediction, order):
    """SASolver with noise in a range of lam; diffusers draws in every step and scales by 0 outside the range."""
    solver = kind(order, prediction=prediction)
    scheduler = diffusers["SASolverScheduler"](
        predictor_order=order, corrector_order=order + 1, lower_order_final=False,
        algorithm_type="data_prediction" if prediction == "x0" else "noise_prediction",
        tau_func=lambda t: float(solver.lam_min <= DDPM_TABLE.index(int(t)).lam <= solver.lam_max),
    )  # fmt: skip
    scheduler.set_timesteps(10)
    levels, draw = [*(DDPM_TABLE.index(int(t)) for t in scheduler.timesteps), DDPM_TABLE.index(0)], noise()
    z = [draw() for _ in levels[:-1]]
    used = [z[i] for i, level in enumerate(levels[:-1]) if solver.lam_min <= level.lam <= solver.lam_max]
    assert 0 < len(used) < 10
    assert difference(scheduler, solver, levels, ours=iter(used).__next__, theirs=iter(z).__next__) < 1e-10


@pytest.mark.parametrize(("kind", "solver", "draws"), [
    ("EulerAncestralDiscreteScheduler", EulerAncestral(), True),
    ("KDPM2DiscreteScheduler", DPMSolver(2), False),
    ("KDPM2AncestralDiscreteScheduler", DPM2Ancestral(), True),
    ("LMSDiscreteScheduler", LMS(4), False),
])  # fmt: skip
@pytest.mark.parametrize(("spacing", "head"), [("linspace", ("epsilon", "eps")), ("trailing", ("v_prediction", "v"))])
def test_ve_schedulers(diffusers, kind, solver, draws, head, spacing):
    """diffusers' ports of k-diffusion, whose x is x / alpha."""
    scheduler = diffusers[kind](timestep_spacing=spacing, prediction_type=head[0], **BETAS)
    scheduler.set_timesteps(10)
    theirs = noise() if draws else None
    assert difference(scheduler, solver, Indexed(spacing)(DDPM_TABLE, 10), head[1], theirs=theirs) < 1e-10


@pytest.mark.parametrize("lams", [[*UNEVEN, INF], UNEVEN])
def test_ipndm(diffusers, lams):
    """IPNDM(4) is diffusers' IPNDMScheduler, whose "betas" are sigma and whose head is v."""
    levels = at(lams)
    scheduler = diffusers["IPNDMScheduler"](trained_betas=[float(level.sigma) for level in levels])
    scheduler.set_timesteps(len(levels) - 1)
    scheduler.set_begin_index(0)
    assert difference(scheduler, IPNDM(4), levels, "v") < 1e-10


@defect("diffusers 0.42.1 scheduling_ipndm.py:273: at its own first level alpha = 0, so x0 is 0 / 1e-8: answer unused")
def test_ipndm_uses_its_first_evaluation(diffusers):
    """On the scheduler's own grid, which starts at pure noise, one step gives the network's answer."""
    scheduler = diffusers["IPNDMScheduler"]()
    scheduler.set_timesteps(1)
    assert difference(scheduler, IPNDM(4), at([-INF, INF]), "v") < 1e-10


@dataclass(frozen=True)
class FirstStep(Start):
    """`first` takes the first step alone."""

    def step(self, denoise, x, now, then, past, noise):
        return (self.main if past else self.first).step(denoise, x, now, then, past, noise)


PLMS, PRK = FirstStep(RungeKutta("heun"), IPNDM(4)), Start(PseudoRungeKutta(DDPM_TABLE), IPNDM(4))


@pytest.mark.parametrize(("solver", "spacing", "head"), [
    (PLMS, "leading", ("epsilon", "eps")),
    (PRK, "leading", ("epsilon", "eps")),
    pytest.param(PLMS, "linspace", ("epsilon", "eps"), marks=defect(
        "diffusers 0.42.1 scheduling_pndm.py:363: a step ends at t - T // n, not at the grid's next t"
    )),
    pytest.param(PLMS, "leading", ("v_prediction", "v"), marks=defect(
        "diffusers 0.42.1 scheduling_pndm.py:435: v answers of several levels are added, then read as one level's"
    )),
])  # fmt: skip
def test_pndm(diffusers, solver, spacing, head):
    """PNDM with its Runge-Kutta start, and PLMS, which starts with one step of Heun."""
    scheduler = diffusers["PNDMScheduler"](
        skip_prk_steps=solver is PLMS, set_alpha_to_one=True, timestep_spacing=spacing, prediction_type=head[0]
    )
    scheduler.set_timesteps(10)
    assert difference(scheduler, solver, Indexed(spacing)(DDPM_TABLE, 10), head[1]) < 1e-10


@pytest.mark.parametrize("steps", [1, 4])
def test_lcm(diffusers, steps):
    """Consistency with the consistency function of an LCM, c_out x0 + c_skip x, is diffusers' LCMScheduler."""
    scheduler, table = diffusers["LCMScheduler"](), Discrete.scaled_linear()
    scheduler.set_timesteps(steps)
    clock, x, net = Index(table), noise(1)(), Net()
    x0 = Denoiser(net, Eps(clock=clock))

    def denoise(x, level):
        skip, out = scheduler.get_scalings_for_boundary_condition_discrete(clock(level).round().long())
        return out * x0(x, level) + skip * x

    levels = [*(table.index(int(t)) for t in scheduler.timesteps), Level(1, 0)]
    theirs = run_scheduler(scheduler, net, x, generator=noise())
    assert gap(run(denoise, x, levels, Consistency(), noise()), theirs) < 1e-10


# k-diffusion


def k_difference(k, ve_model, name, solver, draws=None, **options):
    """The gap of the two samples on 12 Karras levels; a `draws` is the noise of both unless theirs is in `options`."""
    ours, model = ve_model
    levels, sigmas = edm_levels()
    x, draw = 20 * noise(1)(), noise()
    if draws:
        options = {"noise_sampler": lambda *_: draw(), **options}
    theirs = getattr(k, name)(model, x, sigmas, disable=True, **options)
    return gap(run(ours, x, levels, solver, noise()), theirs)


@pytest.mark.parametrize(("name", "solver"), [("sample_dpm_2", DPMSolver(2)), ("sample_lms", LMS(4))])
def test_k_deterministic(k, ve_model, name, solver):
    """DPMSolver(2) on eps is sample_dpm_2; DEIS in rho is sample_lms."""
    assert k_difference(k, ve_model, name, solver) < 1e-10


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(("name", "kind"), [
    ("sample_euler_ancestral", EulerAncestral),
    ("sample_dpm_2_ancestral", DPM2Ancestral),
    ("sample_dpmpp_2s_ancestral", DPMpp2SAncestral),
])  # fmt: skip
def test_k_ancestral(k, ve_model, name, kind, eta):
    """The ancestral samplers."""
    assert k_difference(k, ve_model, name, kind(eta), draws=True, eta=eta) < 1e-10


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_k_dpmpp_2m_sde_midpoint(k, ve_model, eta):
    """DPMpp2M with eta is sample_dpmpp_2m_sde (midpoint), whose eta is the square of ours."""
    assert k_difference(k, ve_model, "sample_dpmpp_2m_sde", DPMpp2M(math.sqrt(eta)), draws=True, eta=eta) < 1e-10


@dataclass(frozen=True)
class HalfThird(Adams):
    """Adams(3) with half of the second derivative given half its weight, as k-diffusion does."""

    def weigh(self, nodes, h, kappa):
        w = weights(nodes, h, kappa)
        if len(nodes) < 3:
            return w
        z, (_, a, b) = kappa * h, nodes
        half = (torch.expm1(-z) + z - z**2 / 2) / z**2 * h**2  # minus the integral of u^2 / 2
        curve = torch.stack([1 / (a * b), 1 / (a * (a - b)), 1 / (b * (b - a))], -1)  # D'' / 2 from the three
        return w + half * curve


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("kind", [HalfThird, pytest.param(Adams, marks=defect(
    "k-diffusion 0.1.1 sampling.py:687-690: the weight of the second derivative multiplies half of it"
))])  # fmt: skip
def test_k_dpmpp_3m_sde(k, ve_model, kind, eta):
    """sample_dpmpp_3m_sde is DPMpp3M, once half of the second derivative is dropped from ours."""
    assert DPMpp3M(eta) == Adams(3, eta)
    assert k_difference(k, ve_model, "sample_dpmpp_3m_sde", kind(3, eta), draws=True, eta=eta) < 1e-10


@pytest.mark.parametrize("order", [1, 2, 3])
def test_k_dpm_solver(k, ve_model, order):
    """DPMSolver of orders 1 to 3 on eps is a step of k-diffusion's DPMSolver."""
    ours, model = ve_model
    levels, x = at([-2.0, -0.5], "ve"), 7 * noise(1)()
    theirs, _ = getattr(k.DPMSolver(model), f"dpm_solver_{order}_step")(x, levels[0].lam, levels[1].lam)
    assert gap(run(ours, x, levels, DPMSolver(order)), theirs) < 1e-10


def test_k_dpmpp_sde(k, ve_model):
    """DPMpp2S(1) is sample_dpmpp_sde, given the noise of whole steps that one path of the reverse SDE has."""
    draw, first = noise(), []

    def path(start, end):
        """The noise of half a step; then that of the whole step, made of its two halves."""
        if not first:
            first.append(draw())
            return first[0]
        keep = end / start  # e^-h: what the second half leaves of the first's variance
        return (keep.sqrt() * first.pop() + draw()) / (1 + keep).sqrt()

    assert k_difference(k, ve_model, "sample_dpmpp_sde", DPMpp2S(1.0), noise_sampler=path) < 1e-10


# grids


def test_exponential_sigmas(k):
    """Exponential is get_sigmas_exponential, and polyexponential with rho = 1; both are float32."""
    ours = ratios(Exponential(0.02, 20.0)(EDM(0.02, 20.0), 12))
    assert gap(k.get_sigmas_exponential(12, 0.02, 20.0).double(), ours) < 1e-6
    assert gap(k.get_sigmas_polyexponential(12, 0.02, 20.0, rho=1.0).double(), ours) < 1e-6


def test_ays_levels():
    """The "Align Your Steps" levels are those of diffusers' AysSchedules, whose last is 0."""
    pytest.importorskip("diffusers")
    known = importlib.import_module("diffusers.schedulers.scheduling_utils").AysSchedules
    names = {"sd15": "StableDiffusionSigmas", "sdxl": "StableDiffusionXLSigmas", "svd": "StableDiffusionVideoSigmas"}
    assert names.keys() == AYS_LEVELS.keys()
    for model, name in names.items():
        assert gap(ratios(AYS(model)(EDM(), 10)), torch.tensor(known[name]).double()) < 1e-6


def beta_sigmas(diffusers, steps=10):
    """A scheduler with beta sigmas, and its largest and smallest."""
    scheduler = diffusers["DPMSolverMultistepScheduler"](use_beta_sigmas=True)
    scheduler.set_timesteps(steps)
    return scheduler, *ratios([DDPM_TABLE.index(999), DDPM_TABLE.index(0)])


def test_beta_quantiles(diffusers):
    """The quantiles are scipy's, which diffusers spreads over sigma."""
    pytest.importorskip("scipy")
    scheduler, high, low = beta_sigmas(diffusers)
    u = torch.linspace(1, 0, 10, dtype=torch.float64)
    assert gap(low + beta_quantile(u, 0.6, 0.6) * (high - low), scheduler.sigmas[:-1]) < 1e-10


@defect("diffusers 0.42.1 scheduling_dpmsolver_multistep.py:740: the quantiles are spread over sigma, not over time")
def test_beta_spaces_time(diffusers):
    """The Beta distribution spaces time (arXiv 2407.12173): half of the levels lie in each half of it."""
    pytest.importorskip("scipy")
    scheduler = beta_sigmas(diffusers)[0]
    ours = ratios(Beta()(DDPM_TABLE, 10))
    assert int((ours > ratios([DDPM_TABLE.index(499)])).sum()) in (5, 6)
    assert int((scheduler.timesteps > 499).sum()) in (5, 6)


# What our solvers must not share with known defects of others


ETAS, PREDICTIONS = (0.0, 0.5, 1.0, 2.0), ("x0", "eps", "v")
AXES = {
    "adams": {"order": range(8), "eta": ETAS, "corrector": (False, True), "prediction": PREDICTIONS},
    "dpm-solver": {"order": range(5), "eta": ETAS, "prediction": PREDICTIONS},
    "unipc": {"order": range(8), "eta": ETAS, "variant": ("bh1", "bh2", "vary", "bh3"), "prediction": PREDICTIONS},
    "sa-solver": {"order": range(8), "eta": ETAS, "corrector": (False, True), "prediction": PREDICTIONS},
    "deis": {"order": range(7), "coordinate": ("t", "rho", "lam")},
    **{name: {"order": range(7)} for name in ("lms", "ipndm")},
    **{name: {"eta": ETAS} for name in ("ddim", "dpmpp-2m", "dpmpp-2s", "dpmpp-3m", "langevin")},
    **{f"{name}-ancestral": {"eta": ETAS} for name in ("euler", "dpm2", "dpmpp-2s")},
}
HIGHEST = {"dpm-solver": 3, "deis": 5, "lms": 5, "ipndm": 4}


@pytest.mark.parametrize("name", AXES)
def test_every_cell_runs_or_is_refused(name):
    """A combination of order, noise and prediction without a formula is an InputError at construction; every other
    one gives finite samples, from pure noise to clean data."""
    model, x, levels = mixture(4), noise(1, (2, 4))(), at([-INF, *UNEVEN[::2], INF])
    for values in itertools.product(*AXES[name].values()):
        options = dict(zip(AXES[name], values, strict=True))
        eta_max = 0 if name == "unipc" else 1
        sound = 1 <= options.get("order", 1) <= HIGHEST.get(name, 6) and options.get("eta", 0) <= eta_max
        if sound and not {"v", "bh3", "lam"} & set(values):
            assert run(model, x, levels, SOLVERS[name](**options), noise(0, (2, 4))).isfinite().all(), options
        else:
            with pytest.raises(InputError):
                SOLVERS[name](**options)


@pytest.mark.parametrize("name", SOLVERS)
def test_one_step_from_pure_noise(name):
    """At alpha = 0 nothing is divided by alpha: one step to clean data is the network's answer.

    `spectral` knows the data's variance and spreads them about the answer by it.
    """
    x, levels = noise(1, (2, 4))(), at([-INF, INF])
    due = mixture(4)(x, levels[0]) + (0.5 * x if name == "spectral" else 0)
    assert gap(run(mixture(4), x, levels, SOLVERS[name](), lambda: 0 * x), due) < 1e-12


FIRST_ORDER = [Adams(1), Adams(1, prediction="eps"), DPMSolver(1), DEIS(1), LMS(1), IPNDM(1), UniPC(1, corrector=False)]


@pytest.mark.parametrize("name", sorted(GRIDS.keys() - {"explicit"}))
def test_first_order_solvers_agree_on_every_grid(name):
    """Steps end where the grid says: all first-order solvers are Euler on every grid, however uneven."""
    model, x, levels = mixture(4), noise(1, (2, 4))(), GRIDS[name]()(DDPM_TABLE, 10)
    euler = run(model, x, levels, Euler(), noise(0, (2, 4)))
    for solver in FIRST_ORDER:
        assert gap(run(model, x, levels, solver, noise(0, (2, 4))), euler) < 1e-10
