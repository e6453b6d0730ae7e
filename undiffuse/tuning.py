"""Tuning a run: plans kept in its folder, and a report with curves and pictures from the same noise."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from undiffuse import plot
from undiffuse.config import Config
from undiffuse.evals import extract, open_features
from undiffuse.evals.distances import frechet
from undiffuse.evaluation.open import data_of_run
from undiffuse.evaluation.report import writable
from undiffuse.guide import CFG, Guidance
from undiffuse.level import Level
from undiffuse.modal import Modal
from undiffuse.model import Model
from undiffuse.plans import TUNED, keep, kept_plan, made_for, own, plan_name
from undiffuse.runfolder import run_folder
from undiffuse.solvers import DPMpp2M
from undiffuse.tableau import trace
from undiffuse.train import commit
from undiffuse.tune import STEPS, Errors, Report, Result, Scored, by_score, drawing, intervals, noisy, reference, ways
from undiffuse.tune.auto import Plan
from undiffuse.types import InputError

SHOWN, REPORT = 10, "report.json"  # pictures a row; the file of figures


@dataclass(frozen=True, eq=False)
class Tuned:
    """What `tune_run` found, and where it is kept: the plans by number of evaluations, and the report."""

    report: Report
    stock: dict[int, Errors]
    plans: dict[int, Path]
    page: Path
    decided: dict[int, Decision]

    @property
    def facts(self) -> dict[str, Any]:
        """The figures as plain data."""
        rows: dict[int, dict[str, Any]] = {}
        for n, result in self.report.results.items():
            errors = {"stock": self.stock[n], "before": result.start, "tuned": result.chosen}
            kept = self.decided[n].plan if n in self.decided else result.plan
            rows[n] = {"plan": kept.name, "before is": result.first.name, "file": str(self.plans[n])}
            rows[n] |= {name: error._asdict() for name, error in errors.items()}
            if n in self.decided:
                rows[n] |= {"by score": self.decided[n].scored.chosen, "words": self.decided[n].words}
        return {"results": rows, "seconds": round(self.report.seconds, 1), "report": str(self.page)}


def tune_run(
    model: Model,
    run: str | Path,
    config: Config,
    nfe: Sequence[int],
    labels: bool,
    *,
    seconds: float = 120.0,
    score: bool = False,
    out: Path | None = None,
    progress: Callable[[str], None] | None = None,
) -> Tuned:
    """Plans of `nfe` evaluations for a run sampled as `config` says, with labels or without, better on noise that was
    not used than those of `auto`, or these; kept in `out`, by default the run's own folder, where `sample` finds them.

    Each takes about `seconds` of gradient steps, and is kept as soon as it is found; a plan that was tuned before is to
    be beaten, and goes on. `score` then asks whether noise or a guidance interval is better for this model (see
    `decide`). The report is in a folder beside. Raises InputError for bad budgets, and for a folder that may not be
    written to or holds other files.
    """
    folder = Path(out) if out is not None else run_folder(run)
    if not nfe or len(set(nfe)) < len(nfe) or not all(1 <= n <= STEPS for n in nfe):
        raise InputError(
            f"numbers of evaluations must be from 1 to {STEPS}, each once, such as 4,6,8; got "
            f"{','.join(map(str, nfe)) or 'none'}"
        )
    if not 0 < seconds < math.inf:
        raise InputError(f"seconds of gradient steps must be > 0, got {seconds}")
    if out is None and not own(folder):
        raise InputError(f"{folder} is not yours to write to: give a folder of your own with --out")
    name = plan_name(model, config, 0, labels).removeprefix("plan-0").removesuffix(".safetensors")
    page = folder / f"tune{name}-nfe{'-'.join(map(str, nfe))}" / "report.html"
    writable(page.parent, "a tuning's report", REPORT)
    used, guidance = model.using(config), config.build("guidance") if labels else None
    about, plans = made_for(model, run, config, labels), {n: folder / plan_name(model, config, n, labels) for n in nfe}
    before = {
        n: kept_plan(model, run, config, n, labels, folder) or kept_plan(model, run, config, n, labels) for n in nfe
    }

    def tell(text: str) -> None:
        if progress is not None:
            progress(text)

    def first(n: int) -> Plan:
        kept = before[n]
        if kept is None or kept.plan.draws or kept.plan.tuned_on:
            tell(f"{n} evaluations: auto is choosing the plan to beat, which costs what about 800 samples do ...")
            return used.auto(n, guidance=guidance).plan
        tell(f"{n} evaluations: {kept.plan.name} is there and is to be beaten, in {seconds:g} s of gradient steps ...")
        return kept.plan

    def found_one(n: int, result: Result) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        keep(result.plan, plans[n], about)
        tell(str(result))

    tell("drawing the exact ends of the noises to tune on, to choose by and to measure on ...")
    report = used.tune(nfe, guidance=guidance, first=first, seconds=seconds, progress=found_one)
    decided = dict[int, Decision]()
    for n in nfe if score else ():
        tell(f"{n} evaluations: noise and guidance intervals, by distance to held-out data ...")
        decided[n] = decide(used, run_folder(run), report.results[n].plan, labels)
        plans[n] = folder / plan_name(model, decided[n].config, n, labels)
        keep(decided[n].plan, plans[n], made_for(model, run, decided[n].config, labels))
        tell(str(decided[n]))
    stocks = {n: stock(config, n) for n in nfe}
    off = {n: report.fresh.errors(plan.run, Level(*plan.start)) for n, plan in stocks.items()}
    found = Tuned(report, off, plans, page, decided)
    commit(page.parent, lambda aside: _write(found, used, stocks, guidance, aside))
    return found


@dataclass(frozen=True, eq=False)
class Decision:
    """What a held-out score says of noise and guidance intervals: the `plan` and the `config` to sample with."""

    scored: Scored
    plan: Plan
    config: Config
    features: str

    @property
    def words(self) -> str:
        """The settings of guidance to sample with, as words of the command line."""
        values = self.config.values["guidance"]
        return " ".join(f"guidance.{k}={v:.6g}" for k, v in values.items() if isinstance(v, float) and math.isfinite(v))

    def __str__(self) -> str:
        return f"Fréchet distance of {self.features} to held-out data\n{self.scored}\nsample with: {self.words}"


def decide(model: Model, run: Path, plan: Plan, labels: bool, batch: int = 64) -> Decision:
    """Whether stochastic plans of as many evaluations, or guidance in an interval of noise alone, bring a run's samples
    nearer to the data that it held out: the Fréchet distance of the first features of `evaluate`, on the same noise,
    and sure on fresh noise (see `undiffuse.tune.by_score`).

    A plan that is chosen so says that it was tuned on these features. Raises InputError where the data cannot be read.
    """
    train, held = data_of_run(model.config, run, 0)
    feature = open_features("auto", train.x, held.name.split(" (")[0])[0]
    real, config = extract(feature, held.x), model.config
    guidance: Guidance = model.guide() if labels else CFG()
    guided = {"guidance as it was": guidance}
    if type(guidance) is CFG and guidance.w not in (0, 1):
        others = intervals(guidance.w, model.spectrum.std, model.schedule)
        guided |= {name: other for name, other in others.items() if other != guidance}
    stochastic = noisy(model.schedule, plan.nfe, spectrum=model.spectrum, strengths=(0.3, 1.0))
    candidates = ways({"the plan": plan}, guided) | ways(stochastic, dict([next(iter(guided.items()))]))
    sampled = drawing(
        model.denoiser,
        model.shape,
        model.examples if labels else None,
        batch=batch,
        device=model.device,
    )
    found = by_score(
        candidates,
        lambda candidate, indices: extract(feature, model.restore(sampled(candidate, indices)).cpu()),
        lambda x: frechet(real, x),
    )
    best = candidates[found.chosen]
    chosen = best.plan if found.chosen == next(iter(candidates)) else judged_by(best.plan, feature.hash)
    if type(best.guidance) is CFG and labels:
        interval = {"lam_min": best.guidance.lam_min, "lam_max": best.guidance.lam_max}
        config = Config.resolve(config.values, {"guidance": {"kind": "cfg", "w": best.guidance.w} | interval})
    return Decision(found, chosen, config, feature.name)


def judged_by(plan: Plan, feature: str) -> Plan:
    """The plan, which says that it was tuned on features of this hash."""
    if isinstance(plan, Modal):
        return replace(plan, tables=tuple(replace(t, tuned_on=(*t.tuned_on, feature)) for t in plan.tables))
    return replace(plan, tuned_on=(*plan.tuned_on, feature))


def stock(config: Config, nfe: int) -> Plan:
    """The configured solver on the configured levels, or DPM-Solver++(2M) where a step of it takes several calls."""
    solver, schedule = config.build("solver"), config.build("schedule")
    several = solver.calls != 1 or getattr(solver, "adaptive", False)
    return trace(DPMpp2M() if several else solver, config.build("grid")(schedule, nfe), "stock")


def _write(found: Tuned, model: Model, stocks: dict[int, Plan], guidance: Any, aside: Path) -> None:
    results = found.report.results
    (aside / REPORT).write_text(json.dumps(found.facts, indent=1) + "\n")
    before = "before" if any(r.first.name.endswith(TUNED) for r in results.values()) else "auto"
    curves = {
        "stock": found.stock,
        before: {n: result.start for n, result in results.items()},
        "tuned": {n: result.chosen for n, result in results.items()},
    }
    plot.plot_errors(
        {k: {n: (e.median, e.high) for n, e in v.items()} for k, v in curves.items()}, aside / "errors.png"
    )
    body = [
        "<h1>A tuned sampler</h1><p class=lead>Samplers of few evaluations against the exact flow from the same "
        "noise: the distance at the end over the sample's size, on noise used neither to tune nor to choose.</p>",
        f'<figure><img src="{plot.data_uri(aside / "errors.png")}" alt="error over evaluations"></figure>',
    ]
    header = ["evaluations", "sampler", "median", "RMS", "of 90 %", "variance kept"]
    rows = [
        [str(n), name, *(f"{value:.4f}" for value in errors[n])] for n in results for name, errors in curves.items()
    ]
    body.append(plot.table_html(header, rows))
    if len(model.shape) == 3 and model.shape[0] in (1, 3):
        for n, result in results.items():
            told = None if guidance is None else model.examples(range(SHOWN))
            shown = {"stock": stocks[n], before: result.first, "tuned": result.plan}
            shown["exact"] = reference(model.schedule, n, model.spectrum)
            drawn: dict[str, Tensor] = {
                name: model.shown(model.sample(SHOWN, given=told, plan=plan, guidance=guidance))
                for name, plan in shown.items()
            }
            path = aside / f"samples-{n}.png"
            plot.plot_rows(drawn, path)
            what = "tuning found nothing better" if result.plan is result.first else result.plan.name
            caption = f"{n} evaluations: {what}; exact: {shown['exact'].nfe} evaluations."
            body.append(
                f'<figure><img src="{plot.data_uri(path)}" alt="samples"><figcaption>{caption}</figcaption></figure>'
            )
    rungs = html.escape(str(found.report))
    body.append(f"<h2>Rungs</h2><p>Errors: median, RMS, 90th percentile, variance kept.</p><pre>{rungs}</pre>")
    body += [
        f"<h2>Noise and guidance intervals, {n} evaluations</h2><pre>{html.escape(str(decision))}</pre>"
        for n, decision in found.decided.items()
    ]
    (aside / "report.html").write_text(plot.page("undiffuse: a tuned sampler", "".join(body)))
