"""Likelihoods of held-out data under a model: the variational bound and the probability flow, in bits per dimension."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from undiffuse.data import Data
from undiffuse.denoise import FixedRows
from undiffuse.evals.bound import Bound, bound, errors
from undiffuse.evals.likelihood import Likelihood, likelihood
from undiffuse.evaluation.drawn import Progress
from undiffuse.grid import UniformLam
from undiffuse.model import Model
from undiffuse.train import Processes
from undiffuse.types import InputError

LEVELS, STEPS, PROBES = 100, 24, 4  # of the bound; of the flow, and its probes
EXACT, MORE = 16, 120  # dimensions up to which the flow's trace is exact, and its steps there
TAU = 3.0  # quantised data are decoded from noise of half their step over tau
_MANY = 2**16  # values of quantised data


def spacing(x: Tensor) -> tuple[float, tuple[float, float]] | None:
    """(step, (lowest, highest)) of quantised data, None for continuous; values on the grid of [-1, 1] span all of it.

    >>> spacing(torch.arange(0, 256, 3) / 127.5 - 1)[1]
    (-1.0, 1.0)
    >>> spacing(torch.randn(100))
    """
    values = torch.unique(x.double())
    if len(values) < 2:
        return None
    low, high, step = float(values[0]), float(values[-1]), float(values.diff().min())
    count = (high - low) / step
    if count > _MANY or count < 0.5:
        return None
    step = (high - low) / round(count)

    def whole(k: Tensor) -> bool:
        return bool(((k - k.round()).abs() < 0.01).all())

    if not whole((values - low) / step):
        return None
    ends = torch.tensor([(low + 1) / step, (1 - high) / step])
    return (step, (-1.0, 1.0)) if bool((ends > -0.01).all()) and whole(ends) else (step, (low, high))


def quantisation(x: Tensor) -> tuple[float, tuple[float, float]] | None:
    """`spacing` of samples (n, channels, ...); InputError where each channel has another."""
    found = spacing(x)
    if found is None and x.shape[1] > 1 and all(spacing(x[:, c]) is not None for c in range(x.shape[1])):
        raise InputError(
            "the channels of these data are quantised in different steps, as data.normalize=channels makes them: "
            "their likelihood needs one step; train with data.normalize=range"
        )
    return found


def check_density(model: Model, train: Data, held_out: Data) -> None:
    """Raises InputError for a model of latents, whose density is not that of the data, and as `quantisation` does."""
    if model.decode is not None:
        raise InputError(
            "this model works on latents: their density is not that of the data, which the decoder spreads in a way "
            "that nobody knows; leave the likelihood out (--likelihood 0, or Choices(likelihood=0))"
        )
    quantisation(torch.cat([held_out.x[:2000], train.x[:2000]]))


def likelihoods(
    model: Model, train: Data, held_out: Data, n: int, seed: int, processes: Processes, progress: Progress
) -> dict[str, Any]:
    """Bits per dimension of n held-out samples and of n training ones, each process doing its part; {} for n = 0.

    Data are found to be quantised or continuous by their values, and what was done about it is said in `about`. Raises
    InputError for a model of latents, whose density is not that of the data.
    """
    if n == 0:
        return {}
    check_density(model, train, held_out)
    held, known = (part.rows(slice(n)) for part in (held_out, train))
    grid = quantisation(torch.cat([held_out.x[:2000], train.x[:2000]]))
    step, span = grid or (None, (-1.0, 1.0))
    end = 5.0 if step is None else math.log(2 * TAU / step)
    levels = UniformLam(min(-4.0, end - 4), end)(model.schedule, LEVELS)
    finite = [float(level.lam) for level in levels if float(level.alpha) > 0 and float(level.sigma) > 0]
    lam = finite[0], finite[-1]
    probes, steps = (0, MORE) if math.prod(model.shape) <= EXACT else (PROBES, STEPS)
    parts = _Parts(model, processes, seed, {"step": step, "span": span})
    progress("likelihood", 0, 3)
    variance: Any = "learned"
    if not getattr(model.denoiser, "learned_variance", False):
        variance = parts.of(errors, torch.cat, known, quantised=False, levels=levels).mean(0)
    bounds = [parts.of(bound, Bound.cat, data, levels=levels, variance=variance) for data in (held, known)]
    progress("likelihood", 2, 3)
    flow = parts.of(likelihood, Likelihood.cat, held, lam=lam, steps=steps, method="rk4", probes=probes, tau=TAU)
    progress("likelihood", 3, 3)
    how = {"step": step, "dequantise": flow.dequantise, "levels": LEVELS, "lam": list(lam)}
    shift, unit = (_stretch(model), bounds[0].unit) if step is None else (0.0, bounds[0].unit)
    settings = {**how, "samples": len(held.x), "variance": bounds[0].variance, "seed": seed}
    made = {**how, "samples": len(held.x), "steps": steps, "probes": probes, "seed": seed}
    integration = flow.integration or 0.0
    trace = f"Hutchinson's trace ± {flow.interval or 0.0:.2g} from {probes} probes" if probes else "exact trace"
    note = f"{trace}; integration ± {integration:.2g}"
    return {
        "about": _about(step, span, unit, flow, len(held.x), lam) + _given(model),
        "unit": unit,
        "bound": _entry("variational bound", bounds[0].mean, bounds[0].error, shift, "an upper bound", settings),
        "bound on training samples": _entry(
            "variational bound, training samples", bounds[1].mean, bounds[1].error, shift,
            _memorised(bounds), settings,
        ),
        "flow": _entry("probability flow", flow.mean, flow.error, shift, note, made),
        "terms": _terms(bounds[0], shift),
    }  # fmt: skip


def _given(model: Model) -> str:
    what = "class" if model.classes else "conditions"
    return f" It is that of the network without guidance, given each sample's {what}." if model.conditional else ""


def _terms(found: Bound, shift: float) -> list[dict[str, float | None]]:
    """The bound's terms; what the unit of a density adds belongs to the reconstruction."""
    *others, last = (term._asdict() for term in found.terms)
    return [{k: _figure(v) for k, v in term.items()} for term in (*others, {**last, "bits": last["bits"] + shift})]


class _Parts:
    """A likelihood by several processes: sample k draws the same noise in whichever of them it is."""

    def __init__(self, model: Model, processes: Processes, seed: int, settings: dict[str, Any]) -> None:
        self.model, self.processes, self.seed, self.settings = model, processes, seed, settings

    def of(
        self, compute: Callable[..., Any], cat: Callable[[Any], Any], data: Data, quantised: bool = True, **more: Any
    ) -> Any:
        """`compute` on all samples, joined by `cat`."""
        more |= self.settings if quantised else {}
        part = self.processes.part(len(data))
        x, told = data.x[part.start : part.stop], self.model.told(data)
        model, use = self.model, self.model.config.section("sample")
        denoiser = FixedRows(model.denoiser, use.rows) if use.rows else model.denoiser

        def work() -> Any:
            if not part:
                return None
            cond = None if told is None else told[part.start : part.stop]
            return compute(
                denoiser, x.to(model.device), cond=None if cond is None else cond.to(model.device),
                seed=self.seed, first=part.start, batch=use.batch, **more,
            )  # fmt: skip

        return cat([found for found in self.processes.each(work) if found is not None])


def _stretch(model: Model) -> float:
    """The bits a dimension that a density gains when samples are brought back to the data's own range."""
    zero = torch.zeros(1, *model.shape)
    return float((model.restore(zero + 1) - model.restore(zero)).abs().log2().mean())


def _memorised(bounds: list[Bound]) -> str:
    """What the bounds of held-out and training samples say when set beside each other."""
    gap = bounds[0].mean - bounds[1].mean
    half = 1.96 * math.hypot(*(found.error or math.nan for found in bounds))
    if gap > half:
        return f"lower by {gap:.3g} ± {half:.2g} than that of held-out ones, so training samples are remembered"
    return "not told apart from that of held-out ones"


def _figure(value: float | None) -> float | None:
    """Without the last digits, which are the rounding of sums over parts."""
    return None if value is None else float(f"{value:.11g}")


def _entry(
    title: str, mean: float, error: float | None, shift: float, note: str, settings: dict[str, Any]
) -> dict[str, Any]:
    value, half = mean + shift, 1.96 * (error if error is not None else math.nan)
    low, high = _figure(value - half), _figure(value + half)
    return {
        "title": title, "value": _figure(value), "low": low, "high": high, "note": note, "settings": settings
    }  # fmt: skip


def _about(
    step: float | None, span: tuple[float, float], unit: str, flow: Likelihood, n: int, lam: tuple[float, float]
) -> str:
    if step is None:
        data = "The data are continuous: the figures are of their density, depend on its unit and may be negative."
    else:
        data = (
            f"The data take {round((span[1] - span[0]) / step) + 1} values: the figures are bits of the discrete data. "
            f"The bound decodes by a softmax over the values; the flow dequantises by {flow.dequantise} noise, which "
            "makes it an upper bound as well."
        )
    return (
        f"{n} samples, in {unit}. {data} Intervals are those of the mean over samples. The bound has {LEVELS} levels "
        f"uniform in lam from {lam[0]:.3g} to {lam[1]:.3g}."
    )
