"""Time per step of `Tableau.run` and `trajectory` beside a hand-written loop of the same arithmetic."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from itertools import pairwise

import torch
from common import table, write

from undiffuse import DDIM, VP, DPMpp2M, UniformLam, trace, trajectory

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
    rows = []
    for shape in ((16, 3, 32, 32), (1, 4, 64, 64)):
        x, constant = torch.randn(shape), torch.randn(shape)
        levels = UniformLam()(VP(), STEPS)

        def denoise(x, level, constant=constant):  # type: ignore[no-untyped-def]
            return constant

        for name, solver, hand in (("DDIM", DDIM(), hand_ddim), ("DPM-Solver++(2M)", DPMpp2M(), hand_2m)):
            plan = trace(solver, levels)

            def drive(solver=solver, denoise=denoise, levels=levels, x=x):  # type: ignore[no-untyped-def]
                for _ in trajectory(denoise, x, levels, solver):
                    pass

            by_hand = hand(levels, denoise, x)
            assert torch.allclose(by_hand(), plan.run(denoise, x), atol=1e-5)

            def run(plan=plan, x=x, denoise=denoise):  # type: ignore[no-untyped-def]
                return plan.run(denoise, x)

            runs = {"hand": by_hand, "tableau": run, "driver": drive}
            with torch.no_grad():
                micro, ratio = compare(runs)
            rows.append([name, str(shape), f"{micro['hand']:.1f}", f"{micro['tableau']:.1f}", f"{ratio['tableau']:.2f}",
                         f"{micro['driver']:.1f}", f"{ratio['driver']:.2f}"])  # fmt: skip
    header = ["solver", "shape, float32", "hand, us/step", "Tableau.run", "ratio", "trajectory", "ratio"]
    text = f"{STEPS} steps, constant denoiser, one thread, medians of {ROUNDS} interleaved rounds.\n\n"
    write("Overhead per step", "python benchmarks/overhead.py", text + table(header, rows))


if __name__ == "__main__":
    main()
