"""Scores: agreement with other libraries on the same features, how often intervals hold the truth, and time."""

from __future__ import annotations

import contextlib
import io
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import table, write
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.peers import load_torch_fidelity
from undiffuse import Gaussian, Mixture, Spectrum
from undiffuse.data import load_data
from undiffuse.evals import (
    coverage,
    density,
    extract,
    frechet,
    frechet_unbiased,
    kernel,
    kernel_estimate,
    open_features,
    precision,
    recall,
)
from undiffuse.evals.likelihood import likelihood


def peers() -> Any:
    """The same five scores by others: name -> (library, function of two sets)."""
    import prdc
    import torchmetrics.image as image

    class Through(torch.nn.Module):
        num_features = 64

        def forward(self, x: Tensor) -> Tensor:
            return x

    def of(metric: Any, a: Tensor, b: Tensor) -> float:
        metric.set_dtype(torch.float64)
        metric.update(a, real=True)
        metric.update(b, real=False)
        found = metric.compute()
        return float(found[0] if isinstance(found, tuple) else found)

    def fid(a: Tensor, b: Tensor) -> float:
        return of(image.FrechetInceptionDistance(feature=Through()), a, b)

    def kid(a: Tensor, b: Tensor) -> float:
        return of(image.KernelInceptionDistance(feature=Through(), subsets=1, subset_size=len(a)), a, b)

    def all_of_prdc(k: int) -> Callable[[Tensor, Tensor], dict[str, float]]:
        def compute(a: Tensor, b: Tensor) -> dict[str, float]:
            with contextlib.redirect_stdout(io.StringIO()):
                found: dict[str, float] = prdc.compute_prdc(a.numpy(), b.numpy(), k)
            return found

        return compute

    return fid, kid, all_of_prdc


def clock(work: Callable[[], Any], repeats: int = 5) -> float:
    """The median time of a call."""
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def agreement() -> str:
    """Differences from other libraries on features of the digits' classifier, and the times of both, interleaved."""
    pictures = load_data("digits").x
    (classifier,) = open_features("digits", pictures)
    features = extract(classifier, pictures)
    a, b = features[:800], features[800:1600]
    with load_torch_fidelity() as load:
        theirs = {name: load(f"metric_{name}") for name in ("fid", "kid", "prc")}
        fid, kid, prdc_of = peers()

        def fidelity_fid(x: Tensor, y: Tensor) -> float:
            moments = (theirs["fid"].fid_features_to_statistics(z) for z in (x, y))
            return float(theirs["fid"].fid_statistics_to_metric(*moments, False)["frechet_inception_distance"])

        def fidelity_kid(x: Tensor, y: Tensor) -> float:
            found = theirs["kid"].kid_features_to_metric(x, y, kid_subsets=1, kid_subset_size=len(x), verbose=False)
            return float(found["kernel_inception_distance_mean"])

        def supports(k: int, name: str) -> Callable[[Tensor, Tensor], float]:
            return lambda x, y: float(prdc_of(k)(x, y)[name])

        cases = [
            ("Fréchet", "torch-fidelity", frechet, fidelity_fid),
            ("Fréchet", "torchmetrics", frechet, fid),
            ("kernel", "torch-fidelity", kernel, fidelity_kid),
            ("kernel", "torchmetrics", kernel, kid),
            ("precision, k = 3", "prdc", lambda x, y: precision(x, y).value, supports(3, "precision")),
            ("recall, k = 3", "prdc", lambda x, y: recall(x, y).value, supports(3, "recall")),
            ("density, k = 5", "prdc", lambda x, y: density(x, y).value, supports(5, "density")),
            ("coverage, k = 5", "prdc", lambda x, y: coverage(x, y).value, supports(5, "coverage")),
        ]
        rows = []
        for name, library, ours, other in cases:
            with contextlib.redirect_stdout(io.StringIO()):
                values, pairs = (ours(a, b), other(a, b)), []
                for _ in range(5):
                    pairs.append([clock(lambda f=f: f(a, b), 1) for f in (ours, other)])
            mine, their = (statistics.median(column) for column in zip(*pairs, strict=True))
            gap = f"{abs(values[0] - values[1]):.1e}"
            rows.append([name, library, f"{values[0]:.6g}", gap, f"{1000 * mine:.0f} ms", f"{their / mine:.2f}"])
    header = ["score", "against", "value", "difference", "our time", "theirs / ours"]
    return "800 against 800 digits, 64 features of the built-in classifier, float64, one thread.\n\n" + table(
        header, rows
    )


def shares(splits: int = 100) -> str:
    """How often 95 % intervals hold the truth, and what is left of the bias."""
    digits, rows = load_data("digits").x.flatten(1).double(), []

    def halves(n: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
        order = torch.randperm(len(digits), generator=draw)
        return digits[order[:n]], digits[order[n : 2 * n]]

    def normal(n: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
        x = torch.randn(2 * n, 64, generator=draw, dtype=torch.float64)
        return x[:n], x[n:]

    scale = torch.linspace(0.5, 1.5, 16).double()
    known = float((scale - 1).square().sum() + 0.01 * 16)

    def apart(n: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
        x = torch.randn(2 * n, 16, generator=draw, dtype=torch.float64)
        return x[:n], scale * x[n:] + 0.1

    for name, make, n, truth, which in (
        ("halves of the digits, Fréchet", halves, 400, 0.0, frechet_unbiased),
        ("halves of the digits, Fréchet", halves, 898, 0.0, frechet_unbiased),
        ("64-D Gaussian against itself, Fréchet", normal, 400, 0.0, frechet_unbiased),
        ("two Gaussians in 16-D, Fréchet", apart, 400, known, frechet_unbiased),
        ("halves of the digits, kernel", halves, 400, 0.0, lambda a, b, s: kernel_estimate(a, b)),
    ):
        found, plain = [], []
        for k in range(splits):
            a, b = make(n, torch.Generator().manual_seed(k))
            found.append(which(a, b, k))
            plain.append(frechet(a, b) if "Fréchet" in name else math.nan)
        held = sum(e.low <= truth <= e.high for e in found)
        half = statistics.mean((e.high - e.low) / 2 for e in found)
        mean = statistics.mean(e.value for e in found)
        bias = "–" if math.isnan(plain[0]) else f"{statistics.mean(plain) - truth:+.3f}"
        rows.append(
            [f"{name}, n = {n}", f"{truth:.3g}", f"{held} of {splits}", f"{mean - truth:+.4f}", bias, f"{half:.3g}"]
        )
    header = ["sets", "truth", "interval holds it", "mean error", "of the plain distance", "half width"]
    return table(header, rows)


def exactness(runs: int = 200) -> str:
    """The probability flow against exact densities, and how often Hutchinson's interval holds the exact trace's."""
    rows, draw = [], torch.Generator().manual_seed(0)
    log2 = math.log(2)
    for d in (1, 2, 8):
        q = torch.linalg.qr(torch.randn(d, d, generator=draw, dtype=torch.float64))[0]
        var, mean = torch.linspace(0.05, 1.0, d).double(), torch.full((d,), 0.3).double()
        one = torch.distributions.MultivariateNormal(mean, q.T @ torch.diag(var) @ q)
        two = torch.distributions.MultivariateNormal(-mean, q.T @ torch.diag(var.flip(0)) @ q)
        parts = Spectrum(mean, var, q), Spectrum(-mean, var.flip(0), q)
        x = torch.cat([one.sample((20,)), two.sample((20,))])
        mixed = torch.logaddexp(one.log_prob(x), two.log_prob(x)) - log2
        for name, model, exact in (
            ("Gaussian", Gaussian(parts[0]), one.log_prob(x)),
            ("mixture", Mixture(parts), mixed),
        ):
            bits = likelihood(model, x, lam=(-11.0, 7.0), steps=64).bits
            off = (bits + exact / d / log2).abs()
            rows.append(
                [
                    f"{name}, {d}-D, exact trace",
                    f"{float((bits + exact / d / log2).mean().abs()):.1e}",
                    f"{float(off.max()):.1e}",
                ]
            )
    text = table(["data", "error of the mean, bits/dim", "largest of 40 samples"], rows)
    few, held = x[:8], 0
    truth = likelihood(Mixture(parts), few, checked=0).mean
    for seed in range(runs):
        found = likelihood(Mixture(parts), few, probes=4, seed=seed, checked=0)
        assert found.interval is not None
        held += abs(found.mean - truth) <= found.interval
    return (
        text
        + f"\n\nHutchinson's 95 % interval (4 probes, 8 samples of the 8-D mixture) holds it in {held} of {runs} runs."
    )


def main() -> None:
    text = f"{agreement()}\n\n### Intervals\n\n{shares()}\n\n### Likelihoods\n\n{exactness()}"
    write("Scores and likelihoods", "make bench-evaluate", text)


if __name__ == "__main__":
    main()
