"""Time per step of `Tableau.run`, `trajectory` and other libraries' samplers beside hand-written loops."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import torch
from common import table, write

from undiffuse import DDIM, VP, DPMpp2M, UniformLam, UniPC, trace, trajectory

STEPS, ROUNDS = 50, 60


def hand_ddim(levels, denoise, x):  # type: ignore[no-untyped-def]
    """DDIM with its coefficients as numbers."""
    plan = []
    for now, then in pairwise(levels):
        ratio = float(then.sigma / now.sigma)
        plan.append((now, ratio, float(then.alpha) - ratio * float(now.alpha)))

    def run() -> torch.Tensor:
        y = x
        for level, a, b in plan:
            x0 = denoise(y, level)
            y = y.mul(a).add_(x0, alpha=b)
        return y

    return run


def hand_2m(levels, denoise, x):  # type: ignore[no-untyped-def]
    """DPM-Solver++(2M) with its coefficients as numbers."""
    plan = []
    for i, (now, then) in enumerate(pairwise(levels)):
        ratio, h = float(then.sigma / now.sigma), float(then.lam - now.lam)
        whole = float(then.alpha) - ratio * float(now.alpha)
        back = whole * h / float(now.lam - levels[i - 1].lam) / 2 if i and h != float("inf") else 0.0
        plan.append((now, ratio, whole + back, -back))

    def run() -> torch.Tensor:
        y = old = x
        for level, a, b, c in plan:
            x0 = denoise(y, level)
            y = y.mul(a).add_(x0, alpha=b)
            if c:
                y.add_(old, alpha=c)
            old = x0
        return y

    return run


def hand_terms(plan, denoise, x):  # type: ignore[no-untyped-def]
    """Any multistep solver's additions with their coefficients as numbers: the shortest loop for its table."""
    rows, before = [], plan.points[0]
    for i in range(plan.nfe):
        after = plan.points[i + 1] if i + 1 < plan.nfe else plan.out
        keep = float(after[0] / before[0])
        rest = after - keep * before
        terms = [(int(j) - 1, float(rest[j])) for j in (rest.abs() > 1e-12).nonzero()[:, 0]]
        rows.append((plan.levels[i], keep, terms))
        before = after

    def run() -> torch.Tensor:
        y, seen = x, []
        for level, keep, terms in rows:
            seen.append(denoise(y, level))
            y = y.mul(keep) if keep else torch.zeros_like(y)
            for j, c in terms:
                y.add_(seen[j], alpha=c)
        return y

    return run


def peers(shape: tuple[int, ...]) -> dict[str, Callable[[], object]]:
    """Other libraries' samplers as installed, in float32, with a constant for the network's answer."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler

    from tests.peers import load_k_diffusion

    x, constant, found = torch.randn(shape), torch.randn(shape), {}
    for name, kind, options in (
        ("diffusers DPM++2M", DPMSolverMultistepScheduler, {}),
        ("diffusers UniPC-3", UniPCMultistepScheduler, {"solver_order": 3}),
    ):

        def scheduled(kind=kind, options=options):  # type: ignore[no-untyped-def]
            scheduler, y = kind(prediction_type="sample", **options), x
            scheduler.set_timesteps(STEPS)
            for t in scheduler.timesteps:
                y = scheduler.step(constant, t, y, return_dict=False)[0]

        found[name] = scheduled
    k = load_k_diffusion()
    sigmas = k.get_sigmas_karras(STEPS, 0.02, 80.0)
    found["k-diffusion 2M"] = lambda: k.sample_dpmpp_2m(lambda x, sigma: constant, x, sigmas, disable=True)
    try:
        from azula.denoise import DiracPosterior
        from azula.noise import VPSchedule
        from azula.sample import DDIMSampler
    except ImportError:
        return found

    class Constant(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.schedule = VPSchedule()

        def forward(self, x: torch.Tensor, t: torch.Tensor) -> object:
            return DiracPosterior(mean=constant)

    sampler = DDIMSampler(Constant(), steps=STEPS, silent=True)
    found["azula DDIM"] = lambda: sampler(x)
    return found


def compare(runs: dict[str, Callable[[], object]]) -> tuple[dict[str, float], dict[str, float]]:
    """Median microseconds per step, and median ratio to `hand` over rounds in which all take turns."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(ROUNDS):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append((time.perf_counter() - start) / STEPS * 1e6)
    ratios = {n: statistics.median(a / b for a, b in zip(t, times["hand"], strict=True)) for n, t in times.items()}
    return {n: statistics.median(t) for n, t in times.items()}, ratios


def main() -> None:
    torch.set_num_threads(1)
    rows, others = [], []
    for shape in ((16, 3, 32, 32), (1, 4, 64, 64)):
        x, constant = torch.randn(shape), torch.randn(shape)
        levels = UniformLam()(VP(), STEPS)

        def denoise(x, level, constant=constant):  # type: ignore[no-untyped-def]
            return constant

        for name, solver, hand in (
            ("DDIM", DDIM(), hand_ddim),
            ("DPM-Solver++(2M)", DPMpp2M(), hand_2m),
            ("UniPC-3", UniPC(3), None),
        ):
            plan = trace(solver, levels)

            def drive(solver=solver, denoise=denoise, levels=levels, x=x):  # type: ignore[no-untyped-def]
                for _ in trajectory(denoise, x, levels, solver):
                    pass

            by_hand = hand(levels, denoise, x) if hand else hand_terms(plan, denoise, x)
            assert torch.allclose(by_hand(), plan.run(denoise, x), atol=1e-5)

            def run(plan=plan, x=x, denoise=denoise):  # type: ignore[no-untyped-def]
                return plan.run(denoise, x)

            runs = {"hand": by_hand, "tableau": run, "driver": drive}
            with torch.no_grad():
                micro, ratio = compare(runs)
            rows.append([name, str(shape), f"{micro['hand']:.1f}", f"{micro['tableau']:.1f}", f"{ratio['tableau']:.2f}",
                         f"{micro['driver']:.1f}", f"{ratio['driver']:.2f}"])  # fmt: skip
        with torch.no_grad():
            floor = hand_ddim(levels, denoise, x)
            micro, ratio = compare({"hand": floor, **peers(shape)})
        others += [[n, str(shape), f"{micro[n]:.0f}", f"{ratio[n]:.1f}"] for n in micro if n != "hand"]
    header = ["solver", "shape, float32", "hand, us/step", "Tableau.run", "ratio", "trajectory", "ratio"]
    text = f"{STEPS} steps, constant denoiser, one thread, medians of {ROUNDS} interleaved rounds.\n\n"
    text += table(header, rows) + "\n\nOther libraries, over DDIM's hand-written loop of two additions:\n\n"
    text += table(["sampler", "shape, float32", "us/step", "ratio"], others)
    write("Overhead per step", "python benchmarks/overhead.py", text)


if __name__ == "__main__":
    main()
