"""Known defects of peers, each shown by a small experiment: `python benchmarks/solvers/defects.py`."""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parents[1])]

import peers  # noqa: E402
from common import table, write  # noqa: E402
from ours import Plan  # noqa: E402
from peers import PEERS, VERSIONS, Case, KDiffusion, Scheduler, diffusers_class, in_double  # noqa: E402
from run import moments  # noqa: E402
from targets import GAUSSIAN, SCHEDULES, TARGETS  # noqa: E402

from undiffuse import DDIM, Indexed, Level  # noqa: E402

Row = tuple[str, str, str]
NO_FINAL = {"lower_order_final": False, "final_sigmas_type": "sigma_min"}
SIGMA_MIN = {"algorithm_type": "sde-dpmsolver", "solver_order": 3, "final_sigmas_type": "sigma_min"}


def find(lib: str, name: str, spacing: str | None = None) -> Case:
    """A case by name."""
    return next(c for c in PEERS[lib] if c.name == name and spacing in (None, c.spacing))


def global_slope(walk: Callable[..., Tensor]) -> float:
    """Order on Gaussian data between 80 and 160 equal steps in lam."""
    mixture, z, errors = GAUSSIAN.mixture, torch.linspace(-2, 2, 32).double()[:, None].expand(32, 3), []
    for n in (80, 160):
        levels = [Level.at(lam) for lam in torch.linspace(-7, 3, n + 1, dtype=torch.float64)]
        ends = [mixture.means[0] + (mixture.variances[0] + torch.exp(-2 * levels[i].lam)).sqrt() * z for i in (0, -1)]
        with in_double():
            x = walk(ends[0], lambda x, level: mixture(x, level), None, n, peers._no_draws, levels)
        errors.append(float((x - ends[1]).norm()))
    return math.log2(errors[0] / errors[1])


def local_slope(walk: Callable[..., Tensor], kappa: int = 1) -> float:
    """Order of the error of the third of three steps where E[x0 | x] = lam^2, without its noise; 4 is third order."""
    errors = []

    def primitive(m: Tensor) -> Tensor:
        return m**2 - 2 * m / kappa + 2 / kappa**2

    for h in (0.2, 0.1):
        levels, seen = [Level.at(lam) for lam in 0.3 + h * torch.arange(4, dtype=torch.float64)], []

        def denoise(x: Tensor, level: Level, seen: list[Tensor] = seen) -> Tensor:
            seen.append(x / level.alpha)
            return level.lam**2 * torch.ones_like(x)

        x = torch.ones(1, 1, dtype=torch.float64)
        with in_double():
            end = walk(x, denoise, None, 3, lambda: torch.zeros(1, 1), levels)
        decay, m = math.exp(-kappa * h), [levels[2].lam, levels[3].lam]
        errors.append(abs(float(end - decay * seen[-1] - primitive(m[1]) + decay * primitive(m[0]))))
    return math.log2(errors[0] / errors[1])


def outcome(act: Callable[[], Any]) -> str:
    """The error that an act raises, or what it returns."""
    try:
        with in_double():
            return str(act())
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:90]}"


def reab() -> list[Row]:
    """One letter in azula's REAB."""
    rows = []
    source = inspect.getsource(peers.AZULA.REABSampler.__call__)
    for name in ("REAB-2", "REAB-3"):
        walk = find("azula", name).walk
        order = int(name[-1])
        rows.append((f"azula {name}: slope on Gaussian data", f"{order}", f"{global_slope(walk):.2f}"))
        right, namespace = inspect.cleandoc(source).replace("alpha_s**2 + sigma_t**2", "alpha_s**2 + sigma_s**2"), {}
        exec(right, vars(peers.AZULA), namespace)
        wrong = peers.AZULA.REABSampler.__call__
        peers.AZULA.REABSampler.__call__ = namespace["__call__"]
        rows.append((f"azula {name} with sigma_s for sigma_t in line 944", f"{order}", f"{global_slope(walk):.2f}"))
        peers.AZULA.REABSampler.__call__ = wrong
    return rows


def third_order() -> list[Row]:
    """Third-order multistep weights."""
    kind = "DPMSolverMultistepScheduler"
    rows = []
    for algorithm, kappa in (("dpmsolver++", 1), ("sde-dpmsolver++", 2)):
        walk = Scheduler(kind, "vp", {"algorithm_type": algorithm, "solver_order": 3}, NO_FINAL)
        got = f"{local_slope(walk, kappa):.2f}"
        rows.append((f"diffusers {algorithm} order 3: local slope where x0 = lam^2", "4", got))
    for eta in (0.0, 1.0):
        walk = KDiffusion("dpmpp_3m_sde", "", {"eta": eta, "noise": True})
        got = f"{local_slope(walk, 1 + int(eta)):.2f}"
        rows.append((f"k-diffusion dpmpp_3m_sde eta={eta:g}: local slope where x0 = lam^2", "4", got))
    for name in ("dpmsolver++ 3M", "dpmsolver 3M"):
        got = f"{global_slope(find('diffusers', name).walk):.2f}"
        rows.append((f"diffusers {name}: slope on Gaussian data", "3", got))
    got = f"{global_slope(find('k-diffusion', 'dpmpp_3m_sde eta=0').walk):.2f}"
    return [*rows, ("k-diffusion dpmpp_3m_sde eta=0: slope on Gaussian data", "3", got)]


def no_branch() -> list[Row]:
    """An order without a formula."""
    walk = Scheduler("DPMSolverMultistepScheduler", "vp", SIGMA_MIN, {})
    z, ring = torch.ones(2, 2, dtype=torch.float64), TARGETS["ring"]

    def act() -> str:
        return f"{walk(z, ring.denoise(2), SCHEDULES['vp-linear'], 20, lambda: z, None).shape}"

    return [("diffusers sde-dpmsolver order 3, 20 steps", "a sample, or refusal at construction", outcome(act))]


def ddim_linspace() -> list[Row]:
    """DDIM leaves its own grid."""
    rows, mixture, schedule = [], GAUSSIAN.mixture, SCHEDULES["scaled-linear"]
    for n in (5, 10, 20, 50):
        theirs = moments(find("diffusers", "DDIM", "linspace"), schedule, n)[1][1]
        ours = moments(Plan(DDIM(), Indexed("linspace")(schedule, n), n), schedule, n)[1][1]
        true = float(mixture.variances[0, 1].sqrt())
        what = f"diffusers DDIM linspace, scaled-linear, {n} steps: output std over the true 0.25"
        rows.append((what, f"{ours / true:.3f} (DDIM along that grid)", f"{theirs / true:.3f}"))
    return rows


def one_step() -> list[Row]:
    """K-diffusion's SDE samplers in one step."""
    z, rows = torch.ones(2, 2, dtype=torch.float64), []
    for name in ("dpmpp_2m_sde", "dpmpp_3m_sde"):
        walk = find("k-diffusion", name, "karras").walk

        def act(walk: Any = walk) -> str:
            return f"{walk(z, lambda x, level: x, None, 1, lambda: z, [Level(1, 20), Level(1, 0)]).shape}"

        rows.append((f"k-diffusion {name}, one step to sigma = 0", "the denoiser's answer", outcome(act)))
    return rows


def equal_steps() -> list[Row]:
    """Weights of equal steps on unequal ones (diff-sampler's iPNDM is not on PyPI; diffusers has the same)."""
    got = f"{global_slope(find('diffusers', 'IPNDM', 'its own').walk):.2f}"
    return [("diffusers IPNDM, called fourth-order, on equal steps in lam: slope on Gaussian data", "4", got)]


def repeated() -> list[Row]:
    """Timesteps that round to the same integer."""
    z, rows = torch.ones(2, 2, dtype=torch.float64), []
    for name in ("dpmsolver++ 2M", "UniPC-2 bh2", "DEIS-2", "dpmsolver++ 2S", "SASolver-2 tau=0"):
        case = find("diffusers", name, "karras")

        def act(case: Case = case) -> str:
            return "a sample" if case.run(z, lambda x, level: x, SCHEDULES["cosine"], 10) else ""

        rows.append((f"diffusers {name}, karras sigmas on the cosine schedule, 10 steps", "a sample", outcome(act)))

    def small() -> str:
        s = diffusers_class("DPMSolverMultistepScheduler")(10, use_karras_sigmas=True)
        s.set_timesteps(50)
        x = z
        for t in s.timesteps:
            x = s.step(x, t, x).prev_sample
        return "a sample"

    rows.append(("diffusers dpmsolver++ 2M, karras, table of 10, 50 steps", "a sample", outcome(small)))
    return rows


def state() -> list[Row]:
    """Schedulers change themselves."""
    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "use_dynamic_shifting": True}
    s = diffusers_class("DPMSolverMultistepScheduler")(**flow)
    before = s.config.flow_shift
    s.set_timesteps(10, mu=1.0)

    def act() -> str:
        shared, x = diffusers_class("DPMSolverMultistepScheduler")(), torch.ones(2, 2)
        shared.set_timesteps(4)
        both = [x, x]
        for t in shared.timesteps:
            both = [shared.step(0 * y, t, y).prev_sample for y in both]
        return "two samples"

    return [
        ("diffusers DPMSolverMultistep: config.flow_shift after set_timesteps(mu=1)", f"{before}",
         f"{float(s.config.flow_shift):.3f}"),
        ("diffusers DPMSolverMultistep shared by two interleaved runs", "two samples", outcome(act)),
    ]  # fmt: skip


def flow_ddpm() -> list[Row]:
    """Smalldiffusion's ancestral noise on a flow."""
    rows = []
    for n in (20, 50, 400):
        std = moments(find("smalldiffusion", "DDPM gam=1 mu=.5", "flow"), SCHEDULES["flow-1"], n)[1][0]
        rows.append((f"smalldiffusion DDPM on its flow schedule, {n} steps: std of data of std 1", "1", f"{std:.3f}"))
    return rows


def others() -> list[Row]:
    """Found by this benchmark."""
    z, rows = torch.ones(2, 2, dtype=torch.float64), []
    cases = [
        ("UniPC bh1 as shipped (final sigma 0), 10 steps", {"solver_type": "bh1"}, "UniPCMultistepScheduler", 10),
        ("dpmsolver 2 heun, exponential sigmas, 20 steps",
         {"algorithm_type": "dpmsolver", "solver_type": "heun", "final_sigmas_type": "sigma_min",
          "use_exponential_sigmas": True}, "DPMSolverMultistepScheduler", 20),
    ]  # fmt: skip
    for what, options, kind, n in cases:
        walk = Scheduler(kind, "vp", options, {})
        denoise = TARGETS["ring"].denoise(2)

        def act(walk: Scheduler = walk, n: int = n, denoise: Any = denoise) -> str:
            x = walk(z, denoise, SCHEDULES["vp-linear"], n, lambda: z, None)
            return "finite" if bool(torch.isfinite(x).all()) else "NaN"

        rows.append((f"diffusers {what}", "finite", outcome(act)))
    for name in ("DEIS-2", "SASolver-2 tau=0"):
        with in_double():
            s = find("diffusers", name, "flow").walk.prepare(SCHEDULES["flow-1"], 20, None)
        rows.append((f"diffusers {name}, flow sigmas, 20 steps: last sigma", "0", f"{float(s.sigmas[-1]):.4f}"))
    return rows


EXPERIMENTS = (
    reab, third_order, no_branch, ddim_linspace, one_step, equal_steps, repeated, state, flow_ddpm, others,
)  # fmt: skip


def main() -> None:
    torch.set_num_threads(1)
    rows = [list(row) for experiment in EXPERIMENTS for row in experiment()]
    versions = ", ".join(f"{k} {v}" for k, v in VERSIONS.items())
    text = f"{versions}\n\n"
    write("Defects of peers", "python benchmarks/solvers/defects.py", text + table(["what", "due", "got"], rows))


if __name__ == "__main__":
    main()
