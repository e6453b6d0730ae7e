"""All solvers against the exact solution: `python benchmarks/solvers/run.py`; goes on where it stopped."""

from __future__ import annotations

import argparse
import fcntl
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parents[1])]

from ours import Ours, Plan, grids, solvers  # noqa: E402
from peers import ADAPTOR, PEERS, VERSIONS, Case  # noqa: E402
from reference import reference, unit_noise  # noqa: E402
from targets import BUDGETS, CACHE, GAUSSIAN, NFE, SCHEDULES, TARGETS, Target  # noqa: E402

from undiffuse import InputError, Level, trace  # noqa: E402
from undiffuse.schedule import Schedule  # noqa: E402

Record = dict[str, Any]
FEW = {"ours": {"uniform-lam 5", "karras"}, "diffusers": {"trailing", "karras", "shifted"}, "k-diffusion": {"karras"}}
DRAWS = {2: 2000}


class Store:
    """Results as JSON lines, by key; several processes may append."""

    def __init__(self, path: Path) -> None:
        self.path, self.known = path, {}
        path.parent.mkdir(exist_ok=True)
        if path.exists():
            for line in path.read_text().splitlines():
                record = json.loads(line)
                self.known[record["key"]] = record

    def get(self, key: str, make: Callable[[], Record]) -> Record:
        """The known record of this key, or a new one; what goes wrong is recorded, too."""
        if key not in self.known:
            start = time.perf_counter()
            try:
                record = make()
            except KeyboardInterrupt:
                raise
            except Exception as error:
                record = {"error": f"{type(error).__name__}: {str(error)[:200]}"}
            record = {"key": key, **record, "seconds": round(time.perf_counter() - start, 4)}
            with self.path.open("a") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                file.write(json.dumps(record) + "\n")
            self.known[key] = record
        return self.known[key]


def distance(x: Tensor, truth: Tensor) -> Record:
    """RMS and median over the seeds of |x - truth| / sqrt(dim)."""
    if not bool(torch.isfinite(x).all()):
        return {"error": "NaN or infinite result"}
    e = (x - truth).flatten(1).norm(dim=1) / math.sqrt(truth[0].numel())
    return {"rms": float(e.square().mean().sqrt()), "median": float(e.median())}


def energy(x: Tensor, y: Tensor) -> float:
    """2 E|x - y| - E|x - x'| - E|y - y'|, all pairs."""
    x, y = x.flatten(1), y.flatten(1)
    return float(2 * torch.cdist(x, y).mean() - torch.cdist(x, x).mean() - torch.cdist(y, y).mean())


def peer_key(target: Target, schedule: str, lib: str, case: Case, steps: int) -> str:
    """Everything that determines a peer's cell."""
    return f"{target.name}|{target.seeds}|{schedule}|{lib} {VERSIONS[lib]}|{case.name}|{case.spacing}|{steps}|{ADAPTOR}"


def labels(target: Target, schedule: str, lib: str, name: str, spacing: str, steps: int) -> Record:
    """The columns that name a cell."""
    return {
        "target": target.name, "schedule": schedule, "library": lib, "solver": name, "spacing": spacing, "steps": steps,
    }  # fmt: skip


class Bench:
    """The cells of one run, filtered."""

    def __init__(self, store: Store, budgets: tuple[int, ...], sides: set[str], quick: bool) -> None:
        self.store, self.budgets, self.sides, self.quick = store, budgets, sides, quick
        self._ours: dict[str, dict[str, Ours]] = {}

    def budgets_of(self, target: Target, name: str) -> tuple[int, ...]:
        """All budgets where they are plotted and cheap; the tables' elsewhere, without 50 for the costly targets."""
        cheap = target.name in ("ring", "digits")
        if self.quick or (name == "vp-linear" and (cheap or target.name == "digits-w3")):
            return self.budgets
        return NFE if cheap or name == "vp-linear" else NFE[:-1]

    def ours(self, name: str) -> dict[str, Ours]:
        """All our solvers on a schedule."""
        if name not in self._ours:
            found, few = solvers(SCHEDULES[name]), {"ddim", "dpmpp-2m", "unipc 3", "ddim 1"}
            self._ours[name] = {k: Ours(v, SCHEDULES[name]) for k, v in found.items() if k in few or not self.quick}
        return self._ours[name]

    def peers(self, schedule: Schedule, stochastic: bool) -> Iterator[tuple[str, Case]]:
        """The peers' cases that fit a schedule."""
        for lib, cases in PEERS.items():
            if lib in self.sides:
                for i, case in enumerate(c for c in cases if c.supports(schedule) and c.stochastic == stochastic):
                    if not self.quick or i % 12 == 0:
                        yield lib, case

    def our_cell(self, target: Target, name: str, pair: tuple[str, str], plan: Plan, truth: Tensor) -> None:
        """One of our cells."""

        def make() -> Record:
            x, nfe = plan.run(target.denoise(target.seeds), unit_noise(target))
            return labels(target, name, "ours", *pair, plan.steps) | {"nfe": nfe} | distance(x, truth)

        self.store.get(f"{target.name}|{target.seeds}|{name}|{'|'.join(pair)}|{plan.steps}|{plan.key}", make)

    def our_cells(self, target: Target, name: str) -> None:
        """All our deterministic cells of a target and schedule: every solver on every grid."""
        truth = reference(target, name, SCHEDULES[name])
        for solver, case in self.ours(name).items():
            for grid in grids(SCHEDULES[name]) if not case.stochastic else ():
                plans = [p for b in self.budgets_of(target, name) if (p := case.plan(grid, b)) is not None]
                for plan in {p.steps: p for p in plans}.values():
                    self.our_cell(target, name, (solver, grid), plan, truth)

    def peer_cells(self, target: Target, name: str) -> list[Record]:
        """The peers' deterministic cells of a target and schedule."""
        schedule, found = SCHEDULES[name], []
        truth, z, denoise = reference(target, name, schedule), unit_noise(target), target.denoise(target.seeds)
        for lib, case in self.peers(schedule, False):
            for steps in sorted({s for b in self.budgets_of(target, name) if (s := case.steps_for(b)) is not None}):

                def make(lib: str = lib, case: Case = case, steps: int = steps) -> Record:
                    named = labels(target, name, lib, case.name, case.spacing, steps)
                    try:
                        x, nfe = case.run(z, denoise, schedule, steps)
                    except Exception as error:
                        text = f"{type(error).__name__}: {str(error)[:200]}"
                        return named | {"nfe": case.nfe(steps), "error": text}
                    return named | {"nfe": nfe} | distance(x, truth)

                found.append(self.store.get(peer_key(target, name, lib, case, steps), make))
        return found

    def deterministic(self, target: Target, name: str) -> None:
        """All deterministic cells of a target and schedule."""
        self.peer_cells(target, name)
        if "ours" in self.sides:
            self.our_cells(target, name)

    def stochastic(self, name: str, budget: int) -> Iterator[tuple[str, str, str, int, Any]]:
        """(library, solver, spacing, steps, plan or case) of all stochastic samplers for a budget."""
        for lib, case in self.peers(SCHEDULES[name], True):
            steps = case.steps_for(budget)
            if steps is not None:
                yield lib, case.name, case.spacing, steps, case
        for solver, ours in self.ours(name).items() if "ours" in self.sides else ():
            for grid in grids(SCHEDULES[name]) if ours.stochastic else ():
                if (plan := ours.plan(grid, budget)) is not None:
                    yield "ours", solver, grid, plan.steps, plan

    def spread(self, name: str) -> None:
        """Exact output mean and std on Gaussian data of every stochastic sampler."""
        schedule = SCHEDULES[name]
        for budget in NFE:
            for lib, solver, spacing, steps, case in self.stochastic(name, budget):
                key = case.key if isinstance(case, Plan) else f"{VERSIONS[lib]}|{ADAPTOR}"

                def make(lib: str = lib, a: str = solver, b: str = spacing, n: int = steps, case: Any = case) -> Record:
                    named = labels(GAUSSIAN, name, lib, a, b, n) | {"kind": "std"}
                    try:
                        mean, std, nfe = moments(case, schedule, n)
                    except Exception as error:
                        return named | {"nfe": n, "error": f"{type(error).__name__}: {str(error)[:200]}"}
                    return named | {"nfe": nfe, "mean": mean, "std": std}

                self.store.get(f"std|{name}|{lib}|{solver}|{spacing}|{steps}|{key}", make)

    def draws(self, target: Target, name: str) -> None:
        """Energy distance of every stochastic sampler's draws to exact ones."""
        n_draws = DRAWS.get(target.dim, 400)
        schedule, denoise, exact = SCHEDULES[name], target.denoise(n_draws), target.samples(n_draws, 1)
        floor = f"energy|{target.name}|{n_draws}|floor"

        def between_exact() -> Record:
            pairs = [(target.samples(n_draws, 2 * i + 2), target.samples(n_draws, 2 * i + 3)) for i in range(5)]
            return {"kind": "floor", "target": target.name, "energy": sum(energy(*pair) for pair in pairs) / 5}

        self.store.get(floor, between_exact)
        for budget in NFE:
            for lib, solver, spacing, steps, case in self.stochastic(name, budget):
                if target.dim > 2 and spacing not in FEW.get(lib, {spacing}):
                    continue
                key = case.key if isinstance(case, Plan) else f"{VERSIONS[lib]}|{ADAPTOR}"

                def make(lib: str = lib, a: str = solver, b: str = spacing, n: int = steps, case: Any = case) -> Record:
                    named = labels(target, name, lib, a, b, n) | {"kind": "energy"}
                    g = torch.Generator().manual_seed(0)

                    def noise() -> Tensor:
                        return torch.randn(n_draws, *target.shape, generator=g, dtype=torch.float64)

                    z = noise()
                    try:
                        x, nfe = (
                            case.run(denoise, z, noise)
                            if isinstance(case, Plan)
                            else case.run(z, denoise, schedule, n, noise)
                        )
                    except Exception as error:
                        return named | {"nfe": n, "error": f"{type(error).__name__}: {str(error)[:200]}"}
                    if not bool(torch.isfinite(x).all()):
                        return named | {"nfe": nfe, "error": "NaN or infinite result"}
                    return named | {"nfe": nfe, "energy": energy(x, exact)}

                self.store.get(f"energy|{target.name}|{n_draws}|{name}|{lib}|{solver}|{spacing}|{steps}|{key}", make)


def moments(case: Plan | Case, schedule: Schedule, steps: int) -> tuple[list[float], list[float], int]:
    """(mean, std, evaluations) per element on Gaussian data, exactly: the chain is affine in its start and noise."""
    mixture = GAUSSIAN.mixture
    if isinstance(case, Plan):
        try:
            tableau = trace(case.solver, case.levels)
            mean, variance = tableau.gaussian(mixture.variances[0], mixture.means[0])
            return mean.tolist(), variance.sqrt().tolist(), tableau.nfe
        except InputError:
            pass
    rows = 3 * steps + 12
    column = iter(range(2, rows))

    def noise() -> Tensor:
        z = torch.zeros(rows, 3, dtype=torch.float64)
        z[next(column)] = 1
        return z

    z = torch.zeros(rows, 3, dtype=torch.float64)
    z[1] = 1

    def denoise(x: Tensor, level: Level, /) -> Tensor:
        return mixture(x, level)

    if isinstance(case, Plan):
        x, nfe = case.run(denoise, z, noise)
    else:
        x, nfe = case.run(z, denoise, schedule, steps, noise)
    return x[0].tolist(), (x[1:] - x[0]).square().sum(0).sqrt().tolist(), nfe


def orders(store: Store) -> None:
    """Error of every deterministic peer on Gaussian data at 80 and 160 equal steps in lam from -7 to 3.

    Methods that take their steps in threes have 81 and 162, or 80 and 161 where that keeps the last step's order.
    """
    mixture, z = GAUSSIAN.mixture, unit_noise(GAUSSIAN)
    mean, variance = mixture.means[0], mixture.variances[0]
    for lib, cases in PEERS.items():
        seen = set()
        for case in cases:
            if case.stochastic or case.name in seen or (lib == "azula" and "sigma 0" in case.spacing):
                continue
            seen.add(case.name)

            def make(lib: str = lib, case: Case = case) -> Record:
                errors, counts = [], {"dpmsolver++ 3S": (81, 162), "dpm_fast": (80, 161)}.get(case.name, (80, 160))
                for n in counts:
                    levels = [Level.at(lam) for lam in torch.linspace(-7, 3, n + 1, dtype=torch.float64)]
                    ends = [mean + (variance + torch.exp(-2 * levels[i].lam)).sqrt() * z for i in (0, -1)]
                    x = case.along(ends[0], lambda x, level: mixture(x, level), levels)
                    errors.append(float((x - ends[1]).square().mean().sqrt()))
                slope = math.log(errors[0] / errors[1]) / math.log(counts[1] / counts[0])
                named = {"kind": "order", "library": lib, "solver": case.name, "claimed": case.order}
                return named | {"errors": errors, "slope": slope}

            store.get(f"order|{lib} {VERSIONS[lib]}|{case.name}|{ADAPTOR}", make)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a smoke run of a minute: few cells, nothing written")
    parser.add_argument("--only", default="/", help="TARGET/SCHEDULE, either may be empty; nothing written")
    parser.add_argument("--sides", default="", help="comma-separated: ours, diffusers, k-diffusion, ...")
    parser.add_argument("--report", action="store_true", help="write tables, CSV and plot from what is there")
    args = parser.parse_args()
    torch.set_num_threads(1)
    store = Store(CACHE / ("quick.jsonl" if args.quick else "results.jsonl"))
    sides = set(args.sides.split(",")) if args.sides else {"ours", *PEERS}
    target_name, _, schedule_name = args.only.partition("/")
    if args.quick and not target_name:
        target_name = "ring"
    if not args.report:
        bench = Bench(store, (5, 10) if args.quick else BUDGETS, sides, args.quick)
        for name in SCHEDULES:
            if schedule_name not in ("", name):
                continue
            for target in TARGETS.values():
                if target_name in ("", target.name):
                    start = time.perf_counter()
                    bench.deterministic(target, name)
                    if name in ("vp-linear", "edm", "flow-1") and target.name in ("ring", "digits"):
                        if target.name == "ring":
                            bench.spread(name)
                        if target.name == "ring" or name == "vp-linear":
                            bench.draws(target, name)
                    print(f"{target.name} on {name}: {time.perf_counter() - start:.0f} s", flush=True)
        if not schedule_name and target_name in ("", "ring") and sides != {"ours"}:
            orders(store)
    from report import report

    whole = args.report or not (args.quick or args.sides or target_name or schedule_name)
    report(list(store.known.values()), publish=whole)


if __name__ == "__main__":
    main()
