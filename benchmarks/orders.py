"""Measured order of convergence of every deterministic solver on Gaussian data, against the closed-form flow."""

from __future__ import annotations

import math

import torch
from common import table, write

from undiffuse import SOLVERS, Gaussian, Level, Spectrum, trajectory

CASES = {
    "ddim": SOLVERS["ddim"](),
    "euler": SOLVERS["euler"](),
    "heun": SOLVERS["heun"](),
    "dpmpp-2m": SOLVERS["dpmpp-2m"](),
    "adams order=2": SOLVERS["adams"](order=2),
    "adams order=2 corrector=true": SOLVERS["adams"](order=2, corrector=True),
    "adams order=3": SOLVERS["adams"](order=3),
    "adams order=3 corrector=true": SOLVERS["adams"](order=3, corrector=True),
}
VARIANCE = torch.tensor([1.3, 0.05], dtype=torch.float64)


def error(solver, steps: int) -> float:  # type: ignore[no-untyped-def]
    """Distance to the flow at lam = 2.5, from lam = -2."""
    levels = [Level.at(lam) for lam in torch.linspace(-2, 2.5, steps + 1, dtype=torch.float64)]
    x = torch.tensor([[0.4, -1.1]], dtype=torch.float64)
    spread = [(level.alpha**2 * VARIANCE + level.sigma**2).sqrt() for level in (levels[0], levels[-1])]
    *_, last = trajectory(Gaussian(Spectrum(torch.zeros(2), VARIANCE)), x, levels, solver)
    return float((last.x - spread[1] / spread[0] * x).norm())


def main() -> None:
    rows = []
    for name, solver in CASES.items():
        errors = [error(solver, n) for n in (20, 40, 320, 640)]
        slope = math.log2(errors[2] / errors[3])
        rows.append(
            [name, str(solver.global_order), f"{slope:.2f}", f"{errors[0]:.1e}", f"{errors[1]:.1e}", f"{errors[3]:.1e}"]
        )
    header = ["solver", "order", "measured", "error, 20 steps", "40 steps", "640 steps"]
    write("Order of convergence", "python benchmarks/orders.py", table(header, rows))


if __name__ == "__main__":
    main()
