"""Samplers of few evaluations on trained networks: `python benchmarks/solvers/trained.py`; goes on where it stopped.

Stock solvers on the usual grids, `auto` and `tune` on the models that come with the package: the distance at the end
from the exact flow of the network, and how far the samples are from held-out data.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parents[1])]

from common import table, write  # noqa: E402
from run import Record, Store  # noqa: E402

from undiffuse import plot  # noqa: E402
from undiffuse.data import materialise, open_source, split  # noqa: E402
from undiffuse.evals.classifier import load_classifier  # noqa: E402
from undiffuse.evals.metrics import METRICS  # noqa: E402
from undiffuse.grid import Grid, Karras, UniformLam, UniformT  # noqa: E402
from undiffuse.level import Level  # noqa: E402
from undiffuse.modal import Modal, read_plan  # noqa: E402
from undiffuse.model import Model  # noqa: E402
from undiffuse.solvers import IPNDM, DPMpp2M, Solver, UniPC  # noqa: E402
from undiffuse.tableau import Tableau, trace  # noqa: E402
from undiffuse.tune import Ends, Report, reference  # noqa: E402

Plan = Tableau | Modal

CACHE = HERE / ".cache"
MODELS, WEIGHTS, NFE, LATER = ("digits", "fashion"), (1.0, 2.0), (5, 6, 8, 10), 15
SOLVERS: dict[str, Solver] = {"DPM-Solver++(2M)": DPMpp2M(), "UniPC": UniPC(2), "iPNDM": IPNDM(4)}
GRIDS: dict[str, Grid] = {"Karras": Karras(), "trailing": UniformT(), "uniform in lam": UniformLam()}
NOISES, FIRST = 64, 10_000  # of the errors, and the number of the first: none that tuning or choosing sees
SAMPLES = {"digits": 797, "fashion": 600}
COLUMNS = 10


def stocks(model: Model, nfe: int) -> dict[str, Plan]:
    """The stock samplers of so many evaluations."""
    return {
        f"{solver}, {grid}": trace(SOLVERS[solver], GRIDS[grid](model.schedule, nfe), f"{solver}, {grid}")
        for solver in SOLVERS
        for grid in GRIDS
    }


class Study:
    """One model at one guidance weight."""

    def __init__(self, store: Store, name: str, w: float, seconds: float, device: str) -> None:
        self.store, self.name, self.w, self.seconds = store, name, w, seconds
        self.model = Model.load(name)
        self.model.denoiser.to(device)
        self.ends: Ends | None = None

    def key(self, *parts: Any) -> str:
        return "|".join(map(str, ("trained", self.name, self.w, self.seconds, *parts)))

    def errors(self, plan: Plan) -> Record:
        """The plan's errors on noise of their own."""
        if self.ends is None:
            m = self.model
            exact = reference(m.schedule, 25, m.spectrum)
            labels = [k % m.classes for k in range(FIRST, FIRST + NOISES)]
            self.ends = Ends.draw(
                lambda indices: m.bind(labels, len(indices), self.w), range(FIRST, FIRST + NOISES), m.shape, exact.run,
                float(exact.start[1]), dtype=torch.float32, device=m.device,
            )  # fmt: skip
        return dict(self.ends.errors(plan.run, Level(*plan.start))._asdict())

    def stock(self, nfe: int) -> dict[str, Record]:
        """Errors of stock samplers."""
        return {
            name: self.store.get(self.key("stock", name, nfe), lambda plan=plan: self.errors(plan))
            for name, plan in stocks(self.model, nfe).items()
        }

    def tuned(self) -> dict[int, tuple[Plan, Plan]]:
        """The plans of `auto` and of `tune`, which are kept."""
        folder = CACHE / "plans"
        folder.mkdir(parents=True, exist_ok=True)
        files = {
            n: [folder / f"{self.name}-{self.w:g}-{self.seconds:g}-{n}-{kind}" for kind in ("auto", "tuned")]
            for n in NFE
        }
        if not all(path.exists() for pair in files.values() for path in pair):
            begun = time.process_time()
            report: Report = self.model.tune(
                NFE, guidance=self.w, seconds=self.seconds, progress=lambda n, result: print(result)
            )
            used = time.process_time() - begun
            for n, (auto_file, tuned_file) in files.items():
                report.results[n].first.save(auto_file)
                report.results[n].plan.save(tuned_file)
            self.store.get(
                self.key("cost"), lambda: {"cpu": used, "wall": report.seconds, "where": where(self.model.device)}
            )
        return {n: (read_plan(a), read_plan(b)) for n, (a, b) in files.items()}

    def distance(self, what: str, plan: Plan) -> Record:
        """FD to held-out data and the share that is read as asked."""

        def make() -> Record:
            x, asked = self.samples(plan, SAMPLES[self.name])
            judge = load_classifier(self.model.config.values["data"]["name"])
            with torch.no_grad():
                fake = judge.features(x)
                read = judge.head(fake).argmax(1)
            distance = METRICS["frechet"].measure(held_out(self.name), fake, 0).value
            return {"frechet": distance, "accuracy": float((read == asked).float().mean())}

        return self.store.get(self.key("scores", what, SAMPLES[self.name]), make)

    def samples(self, plan: Plan, n: int) -> tuple[Tensor, Tensor]:
        """Samples in [-1, 1] with their labels, the same noise for all plans."""
        asked = torch.arange(n) % self.model.classes
        x = self.model.sample(n, asked, plan=plan, guidance=self.w, seed=1)
        return x.clamp(-1, 1).cpu(), asked


def where(device: torch.device) -> str:
    """The processor of a device in words."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"


def held_out(name: str) -> Tensor:
    """Features of the held-out data."""
    data = Model.load(name).config.values["data"]["name"]
    judge, source = load_classifier(data), open_source(data)
    x = split(source, SAMPLES[name])[1].x if source.test is None else materialise(source.test).x
    with torch.no_grad():
        return torch.cat([judge.features(part) for part in x.split(500)])


def best(found: dict[str, Record]) -> tuple[str, Record]:
    """The stock sampler of least median error."""
    return min(found.items(), key=lambda item: item[1].get("median", math.inf))


def study(one: Study) -> tuple[list[list[str]], list[list[str]], str]:
    """Rows of errors and of scores, and how the issue's comparison comes out."""
    errors, scores, plans = [], [], one.tuned()
    where = [one.name, f"{one.w:g}"]
    later_name, later = best(one.stock(LATER))
    exact = reference(one.model.schedule, 25, one.model.spectrum)
    exactly = one.samples(exact, COLUMNS)[0] if len(one.model.shape) == 3 else None
    for n, (auto_plan, tuned_plan) in plans.items():
        name, stock = best(one.stock(n))
        cells = {name: stock}
        cells["auto"] = one.store.get(one.key("auto", n), lambda plan=auto_plan: one.errors(plan))
        cells["tuned"] = one.store.get(one.key("tuned", n), lambda plan=tuned_plan: one.errors(plan))
        for what, cell in cells.items():
            label = f"best stock: {what}" if what == name else what
            errors.append([*where, str(n), label, *(f"{cell[k]:.4f}" for k in ("median", "rms", "high"))])
        drawn = {
            f"best stock: {name}": stocks(one.model, n)[name], "auto": auto_plan, "tuned": tuned_plan, "exact": exact
        }  # fmt: skip
        for what, plan in drawn.items():
            score = one.distance(what if what == "exact" else f"{what}|{n}", plan)
            scores.append([*where, str(n), what, f"{score['frechet']:.2f}", f"{100 * score['accuracy']:.1f} %"])
        if exactly is not None:
            some = {what.split(":")[0]: plan for what, plan in drawn.items() if what != "exact"}
            rows = {what: one.samples(plan, COLUMNS)[0] for what, plan in some.items()} | {"exact": exactly}
            plot.plot_rows(rows, CACHE / f"trained-{one.name}-w{one.w:g}-{n}.png")
    errors.append(
        [*where, str(LATER), f"best stock: {later_name}", *(f"{later[k]:.4f}" for k in ("median", "rms", "high"))]
    )
    six = one.store.known[one.key("tuned", 6)]["median"]
    cost = one.store.known.get(one.key("cost"))
    spent = "" if cost is None else f"; tuning {len(NFE)} budgets took {cost['cpu']:.0f} CPU s ({cost['where']})"
    verdict = f"{one.name} at w = {one.w:g}: tuned at 6 {six:.4f}, best stock at {LATER} {later['median']:.4f}{spent}"
    return errors, scores, verdict


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="MODEL or MODEL/W; nothing is written")
    parser.add_argument("--seconds", type=float, default=120.0, help="of gradient steps for each budget")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    store, errors, scores, verdicts = Store(CACHE / "results.jsonl"), [], [], []
    for name in MODELS:
        for w in WEIGHTS:
            if f"{name}/{w:g}".startswith(args.only):
                a, b, c = study(Study(store, name, w, args.seconds, args.device))
                errors, scores, verdicts = [*errors, *a], [*scores, *b], [*verdicts, c]
    text = "Distance at the end from the network's exact flow, over the sample's size, on 64 noises of their own:\n\n"
    text += table(["model", "w", "NFE", "sampler", "median", "RMS", "of 90 %"], errors)
    text += "\n\n" + "\n".join(f"* {line}" for line in verdicts)
    text += "\n\nFréchet distance to held-out data by the project's classifier, and samples read as asked "
    text += f"({', '.join(f'{k} {v}' for k, v in SAMPLES.items())} samples):\n\n"
    text += table(["model", "w", "NFE", "sampler", "FD", "read as asked"], scores)
    if args.only:
        print(text)
    else:
        write("Samplers of few evaluations on trained networks", "python benchmarks/solvers/trained.py", text)


if __name__ == "__main__":
    main()
