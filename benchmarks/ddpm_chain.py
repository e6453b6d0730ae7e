"""Exact output mean and standard deviation of DDPM's 1,000-step chain on Gaussian data: no sampling, no network."""

from __future__ import annotations

import torch
from common import table, write

from undiffuse import DDPM, Discrete, Gaussian, Spectrum, UniformT
from undiffuse.sample import moments

STD = torch.tensor([1.0, 0.5, 0.25, 0.1, 0.05], dtype=torch.float64)
MEAN = 0.5


def main() -> None:
    levels, rows = UniformT()(Discrete.linear(), 1000), []
    mean = torch.full_like(STD, MEAN)
    model = Gaussian(Spectrum(mean, STD**2))
    start = levels[0].alpha * mean, levels[0].alpha ** 2 * STD**2 + levels[0].sigma ** 2
    for variance in ("small", "large", "learned"):
        got_mean, got = moments(model, levels, DDPM(variance), 999, *start)
        bias = got.sqrt() - STD
        rows.append([variance, f"{float((got_mean - mean).abs().max()):.1e}", *(f"{float(b):+.5f}" for b in bias)])
    header = ["variance", "mean, largest error", *(f"std error at {float(s):g}" for s in STD)]
    text = (
        "Data N(0.5, std^2), DDPM's 1,000 linear betas, exact denoiser, started at the exact marginal. `small` "
        "(beta-tilde) narrows data, `large` (beta) widens it, `learned` (the exact posterior variance) is right.\n\n"
    )
    write("DDPM's chain on Gaussian data", "python benchmarks/ddpm_chain.py", text + table(header, rows))


if __name__ == "__main__":
    main()
