"""Other libraries' samplers in float64 behind one call, each with every spacing that it offers."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from targets import SCHEDULES
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.peers import SCHEDULERS, Promoted, load_k_diffusion
from undiffuse import EDM, Counter, Denoise, Discrete, Flow, Level
from undiffuse.schedule import Schedule

Draws = Callable[[], Tensor]
Grid = Sequence[Level]
VERSIONS: dict[str, str] = {}
for _name in ("diffusers", "k-diffusion", "azula", "smalldiffusion"):
    with contextlib.suppress(PackageNotFoundError):
        VERSIONS[_name] = version(_name)
ADAPTOR = 1


def ratio(level: Level) -> float:
    """sigma / alpha."""
    return float(level.sigma / level.alpha)


@contextlib.contextmanager
def in_double() -> Iterator[None]:
    """New tensors are float64, warnings are quiet."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_default_dtype(before)


@dataclass(frozen=True)
class Case:
    """One sampler of a peer with one spacing: `walk(z, denoise, schedule, steps, draws, grid)` gives x at its end.

    `nfe(steps)` foretells the evaluations, `order` is the order that the peer's documentation or paper claims, `grid`
    replaces its levels by others (VP, noisiest first) for measuring that order.
    """

    name: str
    spacing: str
    walk: Callable[..., Tensor] = field(repr=False)
    supports: Callable[[Schedule], bool] = field(repr=False)
    nfe: Callable[[int], int] = field(repr=False, default=lambda n: n)
    stochastic: bool = False
    order: int = 1
    least: int = 1

    def run(
        self, z: Tensor, denoise: Denoise, schedule: Schedule, steps: int, draws: Draws | None = None
    ) -> tuple[Tensor, int]:
        """(x at the end, evaluations) from the unit noise z, i.e. from x / alpha = (sigma / alpha) z."""
        counter = Counter(lambda x, level, cond=None: denoise(x, level))
        with in_double():
            x = self.walk(z, counter, schedule, steps, draws or _no_draws, None)
        return x, counter.calls

    def along(self, x: Tensor, denoise: Denoise, levels: Grid) -> Tensor:
        """x / alpha at the last of these levels from x / alpha at the first; schedulers of flows may need alpha > 0."""
        with in_double():
            return self.walk(x, denoise, None, len(levels) - 1, _no_draws, list(levels))

    def steps_for(self, budget: int) -> int | None:
        """The largest number of steps whose evaluations fit the budget, None where none does."""
        fitting = [n for n in range(self.least, budget + 1) if self.nfe(n) <= budget]
        return max(fitting, default=None)


def _no_draws() -> Tensor:
    raise RuntimeError("a deterministic sampler asked for noise")


def heun_nfe(steps: int) -> int:
    """Two evaluations a step, one in the last."""
    return 2 * steps - 1


# diffusers

MODULES = {kind: name for name, kind in SCHEDULERS.items()} | {
    "EDMEulerScheduler": "edm_euler",
    "EDMDPMSolverMultistepScheduler": "edm_dpmsolver_multistep",
    "FlowMatchHeunDiscreteScheduler": "flow_match_heun_discrete",
}
BETAS: dict[int, dict[str, Any]] = {
    id(SCHEDULES["vp-linear"]): {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
    id(SCHEDULES["scaled-linear"]): {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    id(SCHEDULES["cosine"]): {"beta_schedule": "squaredcos_cap_v2"},
}
TIMESTEPS = {s: {"timestep_spacing": s} for s in ("trailing", "leading", "linspace")}
SIGMAS = {s: {f"use_{s}_sigmas": True} for s in ("karras", "exponential", "beta")}
LU = {"lu": {"use_lu_lambdas": True}}
FLOW = {"flow": {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}}


def diffusers_class(kind: str) -> Any:
    """A scheduler class of diffusers that computes in float64 and draws noise by calling its `generator`."""
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    module = importlib.import_module(f"diffusers.schedulers.scheduling_{MODULES[kind]}")
    if not isinstance(module.torch, Promoted):
        module.torch, module.np = Promoted(torch), Promoted(np)  # type: ignore[attr-defined]
        module.randn_tensor = lambda shape, generator, **_: generator()  # type: ignore[attr-defined]
    return getattr(module, kind)


def table_of(levels: Grid) -> tuple[float, ...]:
    """Betas of a table of ten times as many levels that runs through these lams, noisiest first, at every tenth."""
    lam = torch.stack([lv.lam for lv in levels]).flip(0)
    fine = lam[0] + (lam[1] - lam[0]) * torch.arange(10 * len(lam), dtype=torch.float64) / 10
    bar = torch.sigmoid(2 * fine)
    return tuple((1 - bar / torch.cat([torch.ones(1), bar[:-1]])).tolist())


def _interleave(s: Tensor) -> Tensor:
    return torch.cat([s[:1], s[1:-1].repeat_interleave(2), s[-1:]])


@dataclass(frozen=True)
class Scheduler:
    """Walks one diffusers class; `space` says in which coordinates it keeps x and how it names its levels."""

    kind: str
    space: str
    options: dict[str, Any]
    smooth: dict[str, Any]

    def __call__(
        self, z: Tensor, denoise: Denoise, schedule: Schedule | None, steps: int, draws: Draws, grid: Grid | None
    ) -> Tensor:
        s, step = self.prepare(schedule, steps, grid), {}
        if draws is _no_draws and "SASolver" in self.kind:
            draws = lambda: torch.zeros_like(z)  # noqa: E731  # drawn with a std of 0
        for name in ("generator", "eta"):
            if name in s.step.__code__.co_varnames[: s.step.__code__.co_argcount]:
                step[name] = draws if name == "generator" else self.options.get("eta", 0.0)
        x, end = None, grid[-1] if grid else None
        times = list(s.timesteps)
        if grid is not None and "KDPM2" in self.kind:
            times.append(times[-1])  # the second half of the last step, which is absent where it ends at sigma = 0
        for i, t in enumerate(times):
            level = self.level(s, t, i)
            if x is None:
                x = z * (level.sigma if grid is None else level.alpha)
            x0 = denoise(x, level)
            x = s.step(self.answer(s, x0, x, level), t, x, return_dict=False, **step)[0]
        assert x is not None
        return x if end is None or self.space in ("ve", "edm") else x / self.end_alpha(end)

    def end_alpha(self, end: Level) -> Tensor:
        """alpha of the level that has this one's sigma / alpha, in the scheduler's coordinates."""
        return Level.at(end.lam, "flow" if self.space == "flow" else "vp").alpha

    def prepare(self, schedule: Schedule | None, steps: int, grid: Grid | None) -> Any:
        """The scheduler with its timesteps set."""
        options = {k: v for k, v in self.options.items() if k != "eta"}
        if isinstance(schedule, Discrete) and self.space != "ipndm":
            options |= BETAS[id(schedule)]
        elif isinstance(schedule, Flow) and self.space != "ipndm":
            options |= {"flow_shift" if "use_flow_sigmas" in options else "shift": schedule.shift}
        elif isinstance(schedule, EDM):
            options |= {"sigma_min": schedule.sigma_min, "sigma_max": schedule.sigma_max}
        if grid is not None:
            options |= self.smooth
        if self.space == "table" and grid is not None:
            betas = table_of(grid)
            options |= {"trained_betas": betas, "num_train_timesteps": len(betas), "timestep_spacing": "leading"}
            steps = len(grid)
        if self.space == "ipndm" and (grid is not None or options.pop("ours", False)):
            levels = grid or [schedule.level(1 - i / steps) for i in range(steps + 1)]  # type: ignore[union-attr]
            options["trained_betas"] = [float(lv.sigma) for lv in levels]
        options.pop("ours", None)
        s = diffusers_class(self.kind)(**options)
        s.set_timesteps(steps)
        if grid is not None and self.space not in ("table", "ipndm"):
            ratios = torch.tensor([ratio(lv) for lv in grid])
            sigmas = ratios / (1 + ratios) if self.space == "flow" else ratios
            s.sigmas = _interleave(sigmas) if "Heun" in self.kind else sigmas
            if "KDPM2" in self.kind:
                middle = (sigmas.log() + sigmas.roll(1).log()).div(2).exp()
                s.sigmas = torch.cat([sigmas[:1], sigmas[1:].repeat_interleave(2), sigmas[-1:]])
                s.sigmas_interpol = torch.cat([middle[:1], middle[1:].repeat_interleave(2), middle[-1:]])
        return s

    def level(self, s: Any, t: Tensor, i: int) -> Level:
        """The level that the scheduler's next update believes x to be at."""
        if self.space == "table":
            bar = s.alphas_cumprod[int(t)]
            return Level(bar.sqrt(), (1 - bar).sqrt())
        if self.space == "ipndm":
            return Level(s.alphas[i], s.betas[i])
        if s.step_index is None:
            s._init_step_index(t)
        second = "KDPM2" in self.kind and not s.state_in_first_order
        shift = 1 if "Ancestral" in self.kind else 0
        sigma = s.sigmas_interpol[s.step_index - shift] if second else s.sigmas[s.step_index]
        if self.space == "vp":
            return Level(*s._sigma_to_alpha_sigma_t(sigma))
        if self.space == "flow":
            return Level(1 - sigma, sigma)
        s.is_scale_input_called = True
        return Level(1.0, sigma)

    def answer(self, s: Any, x0: Tensor, x: Tensor, level: Level) -> Tensor:
        """What a network would have to answer for the scheduler to read x0 from it."""
        eps = (x - level.alpha * x0) / level.sigma
        if self.space == "flow" or "use_flow_sigmas" in self.options:
            return eps - x0
        if self.space == "ipndm":
            return level.alpha * eps - level.sigma * x0
        if self.space == "edm":
            data = s.config.sigma_data
            total = level.sigma**2 + data**2
            return (x0 - data**2 / total * x) * total.sqrt() / (level.sigma * data)
        return eps


def _is_table(schedule: Schedule) -> bool:
    return isinstance(schedule, Discrete)


def _is_edm(schedule: Schedule) -> bool:
    return isinstance(schedule, EDM)


def _is_flow(schedule: Schedule) -> bool:
    return isinstance(schedule, Flow)


def _is_finite(schedule: Schedule) -> bool:
    return not isinstance(schedule, Flow)


def _diffusers() -> list[Case]:
    cases: list[Case] = []

    def add(
        name: str, kind: str, space: str, spacings: dict[str, dict[str, Any]], supports: Callable[[Schedule], bool],
        options: dict[str, Any] | None = None, smooth: dict[str, Any] | None = None, **rest: Any,
    ) -> None:  # fmt: skip
        for spacing, more in spacings.items():
            fits = _is_flow if spacing == "flow" else supports
            walk = Scheduler(kind, space, {**(options or {}), **more}, smooth or {})
            cases.append(Case(name, spacing, walk, fits, **rest))

    plain = {"clip_sample": False}
    smooth_ddim = {"set_alpha_to_one": False}
    add("DDIM", "DDIMScheduler", "table", TIMESTEPS, _is_table, plain, smooth_ddim)
    add("DDIM eta=1", "DDIMScheduler", "table", TIMESTEPS, _is_table, plain | {"eta": 1.0}, stochastic=True)
    for variance in ("fixed_small", "fixed_large"):
        options = plain | {"variance_type": variance}
        add(f"DDPM {variance}", "DDPMScheduler", "table", TIMESTEPS, _is_table, options, stochastic=True)
    add("PNDM (PLMS)", "PNDMScheduler", "table", TIMESTEPS, _is_table,
        {"skip_prk_steps": True, "set_alpha_to_one": True}, smooth_ddim, nfe=lambda n: n + 1, order=2,
        least=2)  # fmt: skip
    add("PNDM (PRK)", "PNDMScheduler", "table", TIMESTEPS, _is_table,
        {"set_alpha_to_one": True}, smooth_ddim, nfe=lambda n: n + 9, order=2, least=4)  # fmt: skip
    every = TIMESTEPS | SIGMAS
    no_final = {"lower_order_final": False, "final_sigmas_type": "sigma_min"}
    for algorithm in ("dpmsolver++", "dpmsolver"):
        for order in (1, 2, 3):
            for solver in ("midpoint", "heun") if order == 2 else ("midpoint",):
                options = {"algorithm_type": algorithm, "solver_order": order, "solver_type": solver}
                if algorithm == "dpmsolver":
                    options["final_sigmas_type"] = "sigma_min"
                kind = "DPMSolverMultistepScheduler"
                label = f"{algorithm} {order}M" + (" heun" if solver == "heun" else "")
                flow = FLOW if algorithm == "dpmsolver++" else {}
                add(label, kind, "vp", every | LU | flow, _is_table, options, no_final, order=order)
    for order, solver in ((1, "midpoint"), (2, "midpoint"), (2, "heun"), (3, "midpoint")):
        options = {"algorithm_type": "sde-dpmsolver++", "solver_order": order, "solver_type": solver}
        label = f"sde-dpmsolver++ {order}M" + (" heun" if solver == "heun" else "")
        add(label, "DPMSolverMultistepScheduler", "vp", every | LU | FLOW, _is_table, options, stochastic=True)
    shipped: dict[str, dict[str, Any]] = {"linspace": {}}
    for order in (2, 3):
        options = {"solver_order": order, "lower_order_final": True}
        kind = "DPMSolverSinglestepScheduler"
        add(f"dpmsolver++ {order}S", kind, "vp", shipped | SIGMAS | FLOW, _is_table, options, no_final, order=order)
        for solver in ("bh1", "bh2"):
            options = {"solver_order": order, "solver_type": solver}
            if solver == "bh1":  # B(h) = h is infinite in a step to sigma = 0
                options["final_sigmas_type"] = "sigma_min"
            add(f"UniPC-{order} {solver}", "UniPCMultistepScheduler", "vp", every | FLOW, _is_table, options,
                {"lower_order_final": False, "final_sigmas_type": "sigma_min"}, order=order + 1)  # fmt: skip
        add(f"DEIS-{order}", "DEISMultistepScheduler", "vp", every | FLOW, _is_table, {"solver_order": order},
            {"lower_order_final": False}, order=order)  # fmt: skip
        options = {"predictor_order": order, "corrector_order": order}
        add(f"SASolver-{order}", "SASolverScheduler", "vp", every | FLOW, _is_table, options, stochastic=True)
        add(f"SASolver-{order} tau=0", "SASolverScheduler", "vp", every | FLOW, _is_table,
            options | {"tau_func": lambda t: 0}, {"lower_order_final": False}, order=order)  # fmt: skip
    add("Euler", "EulerDiscreteScheduler", "ve", every, _is_table)
    add("Euler", "EulerDiscreteScheduler", "ve", SIGMAS, _is_edm)
    add("Heun", "HeunDiscreteScheduler", "ve", every, _is_table, nfe=heun_nfe, order=2)
    add("KDPM2", "KDPM2DiscreteScheduler", "ve", every, _is_table, nfe=heun_nfe, order=2)
    add("LMS", "LMSDiscreteScheduler", "ve", every, _is_table, order=4)
    add("Euler ancestral", "EulerAncestralDiscreteScheduler", "ve", TIMESTEPS, _is_table, stochastic=True)
    add("KDPM2 ancestral", "KDPM2AncestralDiscreteScheduler", "ve", every, _is_table, nfe=heun_nfe, stochastic=True)
    add("IPNDM", "IPNDMScheduler", "ipndm", {"its own": {}}, lambda s: not _is_edm(s), order=4)
    add("IPNDM", "IPNDMScheduler", "ipndm", {"uniform-t": {"ours": True}}, _is_table, order=4)
    edm = {s: {"sigma_schedule": s} for s in ("karras", "exponential")}
    add("EDM Euler", "EDMEulerScheduler", "edm", edm, _is_edm)
    for order in (1, 2, 3):
        for solver in ("midpoint", "heun") if order == 2 else ("midpoint",):
            options = {"solver_order": order, "solver_type": solver}
            label = f"EDM dpmsolver++ {order}M" + (" heun" if solver == "heun" else "")
            add(label, "EDMDPMSolverMultistepScheduler", "edm", edm, _is_edm, options, no_final, order=order)
    options = {"algorithm_type": "sde-dpmsolver++"}
    add("EDM sde-dpmsolver++ 2M", "EDMDPMSolverMultistepScheduler", "edm", edm, _is_edm, options, stochastic=True)
    flow: dict[str, dict[str, Any]] = {"shifted": {}, **SIGMAS}
    add("flow Euler", "FlowMatchEulerDiscreteScheduler", "flow", flow, _is_flow)
    options = {"stochastic_sampling": True}
    add("flow Euler stochastic", "FlowMatchEulerDiscreteScheduler", "flow", flow, _is_flow, options, stochastic=True)
    add("flow Heun", "FlowMatchHeunDiscreteScheduler", "flow", {"shifted": {}}, _is_flow, nfe=heun_nfe, order=2)
    return cases


# k-diffusion


def _k_sigmas(k: ModuleType, spacing: str, schedule: Schedule, n: int) -> Tensor:
    last = schedule.index(0) if isinstance(schedule, Discrete) else schedule.level(0.0)
    ends = ratio(last), ratio(schedule.level(1.0))
    if spacing == "model":  # external.DiscreteSchedule.get_sigmas: log sigma is linear between integers
        assert isinstance(schedule, Discrete)
        log = torch.tensor([ratio(schedule.index(i)) for i in range(schedule.T)]).log()
        t = torch.linspace(schedule.T - 1, 0, n)
        lo, hi = t.floor().long(), t.ceil().long()
        return k.append_zero(torch.lerp(log[lo], log[hi], t.frac()).exp())  # type: ignore[no-any-return]
    if spacing == "vp":
        return k.get_sigmas_vp(n)  # type: ignore[no-any-return]
    if spacing == "polyexponential-3":
        return k.get_sigmas_polyexponential(n, *ends, rho=3.0)  # type: ignore[no-any-return]
    return getattr(k, f"get_sigmas_{spacing}")(n, *ends)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class KDiffusion:
    """Walks one of k-diffusion's `sample_*`, which keep x / alpha."""

    function: str
    spacing: str
    options: dict[str, Any]

    def __call__(
        self, z: Tensor, denoise: Denoise, schedule: Schedule | None, steps: int, draws: Draws, grid: Grid | None
    ) -> Tensor:
        k, options = K, dict(self.options)
        if options.pop("noise", False):
            options["noise_sampler"] = lambda *_: draws() if options.get("eta") else 0 * z

        def model(x: Tensor, sigma: Tensor) -> Tensor:
            return denoise(x, Level(1.0, sigma[0]))

        if grid is not None:
            sigmas = torch.tensor([ratio(level) for level in grid])
        else:
            assert schedule is not None
            sigmas = _k_sigmas(k, self.spacing, schedule, steps)
        if self.function == "dpm_fast":
            ends = (float(sigmas[sigmas > 0][-1]), float(sigmas[0]))
            x = z if grid is not None else ends[1] * z
            return k.sample_dpm_fast(model, x, *ends, steps, disable=True, **options)  # type: ignore[no-any-return]
        x = z if grid is not None else sigmas[0] * z
        return getattr(k, f"sample_{self.function}")(model, x, sigmas, disable=True, **options)  # type: ignore[no-any-return]


def _k_diffusion() -> list[Case]:
    def is_vp_linear(schedule: Schedule) -> bool:
        return schedule is SCHEDULES["vp-linear"]

    spacings: dict[str, Callable[[Schedule], bool]] = {
        "karras": _is_finite, "exponential": _is_finite, "polyexponential-3": _is_finite, "model": _is_table,
        "vp": is_vp_linear,
    }  # fmt: skip
    plain = {"eta": 0.0, "noise": True}
    noisy = {"eta": 1.0, "noise": True}
    functions: list[tuple[str, str, dict[str, Any], dict[str, Any]]] = [
        ("euler", "euler", {}, {"order": 1}),
        ("heun", "heun", {}, {"order": 2, "nfe": heun_nfe}),
        ("dpm_2", "dpm_2", {}, {"order": 2, "nfe": heun_nfe}),
        ("lms", "lms", {}, {"order": 4}),
        ("dpmpp_2m", "dpmpp_2m", {}, {"order": 2}),
        ("dpmpp_2s eta=0", "dpmpp_2s_ancestral", plain, {"order": 2, "nfe": heun_nfe}),
        ("dpmpp_sde eta=0", "dpmpp_sde", plain, {"order": 2, "nfe": heun_nfe}),
        ("dpmpp_2m_sde eta=0", "dpmpp_2m_sde", plain, {"order": 2}),
        ("dpmpp_2m_sde heun eta=0", "dpmpp_2m_sde", plain | {"solver_type": "heun"}, {"order": 2}),
        ("dpmpp_3m_sde eta=0", "dpmpp_3m_sde", plain, {"order": 3}),
        ("euler_ancestral", "euler_ancestral", noisy, {"stochastic": True}),
        ("dpm_2_ancestral", "dpm_2_ancestral", noisy, {"stochastic": True, "nfe": heun_nfe}),
        ("dpmpp_2s_ancestral", "dpmpp_2s_ancestral", noisy, {"stochastic": True, "nfe": heun_nfe}),
        ("dpmpp_sde", "dpmpp_sde", noisy, {"stochastic": True, "nfe": heun_nfe}),
        ("dpmpp_2m_sde", "dpmpp_2m_sde", noisy, {"stochastic": True}),
        ("dpmpp_2m_sde heun", "dpmpp_2m_sde", noisy | {"solver_type": "heun"}, {"stochastic": True}),
        ("dpmpp_3m_sde", "dpmpp_3m_sde", noisy, {"stochastic": True}),
    ]
    cases = [
        Case(name, spacing, KDiffusion(function, spacing, options), fits, **rest)
        for name, function, options, rest in functions
        for spacing, fits in spacings.items()
    ]
    fast = KDiffusion("dpm_fast", "exponential", dict(plain))
    return [*cases, Case("dpm_fast", "uniform-lam", fast, _is_finite, order=3, least=3)]


# azula


def _bare(package: str, names: Sequence[str], module: str, stubs: dict[str, dict[str, Any]]) -> ModuleType:
    """`module` of a package whose own __init__ files are skipped, with stand-ins for what sampling never calls."""
    spec = importlib.util.find_spec(package)
    assert spec is not None, f"{package} is not installed"
    assert spec.submodule_search_locations is not None
    root = Path(next(iter(spec.submodule_search_locations)))
    for name in names:
        bare = ModuleType(name)
        bare.__path__ = [str(root.joinpath(*name.split(".")[1:]))]
        sys.modules[name] = bare
    added = [name for name in stubs if importlib.util.find_spec(name) is None]
    for name in added:
        sys.modules[name] = ModuleType(name)
        vars(sys.modules[name]).update(stubs[name])
    try:
        return importlib.import_module(module)
    finally:
        for name in added:
            del sys.modules[name]


@dataclass(frozen=True)
class Azula:
    """Walks one of azula's samplers on equal steps of our schedule's time.

    Its formulas need alpha > 0, and most need sigma > 0, at both ends: with `floor` the schedule is raised as azula
    raises its own, sigma^2 + 1e-6 for VP and VE, 1e-3 at either end of a flow.
    """

    sampler: str
    floor: bool
    options: dict[str, Any]

    def __call__(
        self, z: Tensor, denoise: Denoise, schedule: Schedule | None, steps: int, draws: Draws, grid: Grid | None
    ) -> Tensor:
        def levels(t: Tensor) -> tuple[Tensor, Tensor]:
            if grid is not None:
                level = Level.at(grid[0].lam + (1 - t) * (grid[-1].lam - grid[0].lam))
                return level.alpha, level.sigma
            assert schedule is not None
            level = schedule.level(t)
            if not self.floor:
                return level.alpha, level.sigma
            if isinstance(schedule, Flow):
                return 1e-3 + 0.999 * level.alpha, 1e-3 + 0.999 * level.sigma
            return level.alpha, (level.sigma**2 + 1e-6).sqrt()

        class Exact(AZULA_DENOISE.Denoiser):  # type: ignore[name-defined, misc]
            """The exact denoiser as azula's."""

            def __init__(self) -> None:
                super().__init__()
                self.schedule = levels

            def forward(self, x: Tensor, t: Tensor, **_: Any) -> Any:
                return AZULA_DENOISE.DiracPosterior(denoise(x, Level(*levels(t))))

        AZULA.torch = _Drawing(torch, draws)  # type: ignore[attr-defined]
        sampler = getattr(AZULA, self.sampler)(Exact(), steps=steps, silent=True, dtype=torch.float64, **self.options)
        alpha, sigma = levels(torch.ones(()))
        x = sampler(z * (sigma if grid is None else alpha))
        return x if grid is None else x / levels(torch.zeros(()))[0]


class _Drawing:
    """torch whose `randn_like` takes the next draw."""

    def __init__(self, module: ModuleType, draws: Draws) -> None:
        self._module, self.randn_like = module, lambda x: 0 * x if draws is _no_draws else draws()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _azula() -> list[Case]:
    samplers: list[tuple[str, str, dict[str, Any], dict[str, Any]]] = [
        ("DDIM", "DDIMSampler", {}, {}),
        ("Euler", "EulerSampler", {}, {}),
        ("Heun", "HeunSampler", {}, {"order": 2, "nfe": lambda n: 2 * n}),
        ("DDIM eta=1", "DDIMSampler", {"eta": 1.0}, {"stochastic": True}),
        ("DDPM", "DDPMSampler", {}, {"stochastic": True}),
        ("Ito", "ItoSampler", {}, {"stochastic": True}),
        ("PC", "PCSampler", {}, {"stochastic": True, "nfe": lambda n: 2 * n}),
    ]
    for kind in ("zAB", "vAB", "zEAB", "xEAB", "REAB"):
        for order in (1, 2, 3):
            samplers.append((f"{kind}-{order}", f"{kind}Sampler", {"order": order}, {"order": order}))

    def starts_noisy(schedule: Schedule) -> bool:
        return bool(schedule.level(1.0).alpha > 0)

    survives = ("DDIM", "DDPM", "Euler", "Ito", "zAB", "vAB")
    cases = []
    for name, sampler, options, rest in samplers:
        cases.append(Case(name, "uniform-t", Azula(sampler, True, options), lambda s: True, **rest))
        if name.startswith(survives):
            exact = Azula(sampler, False, options)
            fits = (lambda s: True) if name.startswith(("DDIM", "DDPM", "vAB")) else starts_noisy
            cases.append(Case(name, "uniform-t to sigma 0", exact, fits, **rest))
    return cases


# smalldiffusion


@dataclass(frozen=True)
class Small:
    """Walks smalldiffusion's `samples`, which keeps x / alpha, or x itself where sigma is the time of a flow."""

    gam: float
    mu: float
    spacing: str

    def __call__(
        self, z: Tensor, denoise: Denoise, schedule: Schedule | None, steps: int, draws: Draws, grid: Grid | None
    ) -> Tensor:
        flow = isinstance(schedule, Flow)

        def eps(x: Tensor, sigma: Tensor, *_: Any) -> Tensor:
            level = Level(1 - sigma, sigma) if flow else Level(1.0, sigma)
            return (x - denoise(x, level)) / sigma

        model = SimpleNamespace(
            eval=lambda: None, predict_eps_cfg=eps, rand_input=lambda b: 0 * z if draws is _no_draws else draws()
        )
        sigmas = torch.tensor([ratio(lv) for lv in grid]) if grid is not None else self.sigmas(schedule, steps)
        x = z if grid is not None else sigmas[0] * z
        cpu = SimpleNamespace(device="cpu")
        return list(SMALL.samples(model, sigmas, gam=self.gam, mu=self.mu, xt=x, accelerator=cpu))[-1]  # type: ignore

    def sigmas(self, schedule: Schedule | None, steps: int) -> Tensor:
        """Its own spacing of a schedule, or with the last value set to zero."""
        if isinstance(schedule, Flow):
            s = SMALL.ScheduleFlow().sample_sigmas(steps)
            return schedule.shift * s / (1 + (schedule.shift - 1) * s)  # type: ignore[no-any-return]
        if isinstance(schedule, EDM):
            own = SMALL.ScheduleLogLinear(1000, schedule.sigma_min, schedule.sigma_max)
        else:
            assert isinstance(schedule, Discrete)
            own = SMALL.Schedule(torch.tensor([ratio(schedule.index(i)) for i in range(schedule.T)]))
        s = own.sample_sigmas(steps)
        return torch.cat([s[:-1], torch.zeros(1)]) if self.spacing.endswith("sigma 0") else s


def _smalldiffusion() -> list[Case]:
    cases = []
    for spacing, fits in (("trailing", _is_finite), ("trailing to sigma 0", _is_finite), ("flow", _is_flow)):
        for name, gam, mu in (("DDIM gam=1", 1.0, 0.0), ("gam=2", 2.0, 0.0), ("DDPM gam=1 mu=.5", 1.0, 0.5)):
            cases.append(Case(name, spacing, Small(gam, mu, spacing), fits, stochastic=mu > 0))
    return cases


PEERS: dict[str, list[Case]] = {}
if "diffusers" in VERSIONS:
    PEERS["diffusers"] = _diffusers()
if "k-diffusion" in VERSIONS:
    K = load_k_diffusion()
    PEERS["k-diffusion"] = _k_diffusion()
if "azula" in VERSIONS:
    AZULA = _bare("azula", ("azula", "azula.nn"), "azula.sample", {})
    AZULA_DENOISE = sys.modules["azula.denoise"]
    PEERS["azula"] = _azula()
if "smalldiffusion" in VERSIONS:
    stubs = {"accelerate": {"Accelerator": None}}
    SMALL = _bare("smalldiffusion", ("smalldiffusion",), "smalldiffusion.diffusion", stubs)
    PEERS["smalldiffusion"] = _smalldiffusion()
