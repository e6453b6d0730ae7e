"""One training for a budget of CPU seconds: `python ours.py NAME SEED SECONDS` writes runs/quality/ours/*.json.

NAME is of SETTINGS below: words for `undiffuse train`, added to those of `base`. One thread; the rate's schedule goes
by the share of the budget that is used, so load on the machine changes the number of steps but not the schedule.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

from score import CLASSES, ROOT, accuracy, features, labels, scores

from undiffuse import Denoiser, Label, Spectrum
from undiffuse.config import Config, parse_overrides
from undiffuse.data import materialise, open_source
from undiffuse.fit import objective_of
from undiffuse.model import Model, assemble
from undiffuse.train import EMA, Plan, Power, train

LENGTHS = (0.05, 0.10, 0.15, 0.20)
SETTINGS: dict[str, str] = {
    "base": "net.kind=unet net.patch=2 net.width=48 net.mults=[1,2] net.depth=1 levels.kind=uniform-lam "
    "levels.lam_min=-4 levels.lam_max=3 optimiser=muon train.lr=5e-3 train.warmup=40 train.batch=64 "
    "train.precision=bf16",
    "best": "net.width=32 head=v weight=v train.decay=0.7 grid.lam_max=3",
    # what each option is worth
    "edm-levels": "levels=log-normal",
    "edm2-levels": "levels.kind=log-normal levels.mean=-0.4 levels.std=1.0",
    "wide": "levels.lam_max=4.5",
    "adamw": "optimiser=adamw train.lr=2e-3",
    "independent": "draws=independent",
    "adaptive": "draws=adaptive",
    "immiscible": "coupling=immiscible",
    "simple": "weight=simple",
    "min-snr": "weight=min-snr",
    "flip": "augment=flip",
    "v-head": "head=v weight=v",
    "classic": "ema.kind=classic ema.decay=0.999",
    # networks
    "flat": "net.width=64 net.mults=[1] net.depth=2",
    "narrow": "net.width=32",
    "deep": "net.width=40 net.depth=2",
    "attends": "net.attention=[0]",
    "pixels": "net.patch=1 net.width=24 net.mults=[1,2,4]",
    "patch-4": "net.patch=4 net.width=128 net.mults=[1] net.depth=2",
    "dit-2": "net.kind=dit net.patch=2 net.width=128 net.depth=4 train.lr=2e-3",
    "dit-2-fast": "net.kind=dit net.patch=2 net.width=128 net.depth=4",
    "dit-4": "net.kind=dit net.patch=4 net.width=192 net.depth=6 train.lr=2e-3",
    "dit-4-fast": "net.kind=dit net.patch=4 net.width=192 net.depth=6",
}


def config_of(name: str, seed: int) -> Config:
    """The configuration of a setting."""
    layers = [parse_overrides(SETTINGS[key].split()) for key in dict.fromkeys(("base", name))]
    return Config.resolve(*layers, {"data": "fashion-mnist", "seed": seed})


class Clock:
    """The plan's rate by the share of `seconds` that this process has used since `start`, as torch's scheduler."""

    def __init__(self, plan: Plan, seconds: float) -> None:
        self.plan, self.seconds, self.start = plan, seconds, time.process_time()

    @property
    def used(self) -> float:
        return time.process_time() - self.start

    def __call__(self, optimiser: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        def factor(done: int) -> float:
            steps = max(done + 1, round(done * self.seconds / max(self.used, 1e-3))) if done else 10**6
            return replace(self.plan, steps=steps).rate(done + 1) / self.plan.lr

        return torch.optim.lr_scheduler.LambdaLR(optimiser, factor)


def trained(config: Config, seconds: float) -> tuple[Model, EMA, dict[str, float]]:
    """The model after that many CPU seconds, its averages of all LENGTHS, and how far it came."""
    data = materialise(open_source("fashion-mnist"))
    spectrum = Spectrum.measure(data.x[:10_000])
    config = config.measured(spectrum.std, 10_000, config.section("train").batch)
    seed, plan = config.values["seed"], replace(config.section("train"), steps=10**6, every=0)
    torch.manual_seed(seed)
    model = assemble(config, spectrum, CLASSES)
    ema = EMA(model.denoiser, config.build("ema"), *map(Power, LENGTHS))
    clock, wall, step = Clock(plan, seconds), time.perf_counter(), 0
    for state in train(
        model.denoiser, data.x, objective_of(config, spectrum.std), plan, cond=Label(CLASSES)(data.labels), seed=seed,
        ema=ema, optimiser=config.build("optimiser"), augment=config.build("augment"), scheduler=clock,
    ):  # fmt: skip
        step = state.step
        if clock.used > seconds:
            break
    facts = {"steps": step, "pictures": step * plan.batch, "cpu_seconds": clock.used}
    facts |= {"wall_seconds": time.perf_counter() - wall, "parameters": model.parameters}
    return model, ema, facts


def drawn(model: Model, average: torch.nn.Module, n: int, w: float) -> torch.Tensor:
    """Samples of every class in turn, by the configuration's own solver, on the GPU where there is one."""
    assert isinstance(average, Denoiser)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.autocast(device, torch.bfloat16):
        model = replace(model, denoiser=average.to(device))
        return model.sample(n, labels(n), guidance=w, seed=7, batch=250, rows=0).cpu()


def main() -> None:
    name, seed, seconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
    file = ROOT / "ours" / f"{name}-{seed}-{seconds:g}.json"
    if file.is_file():
        return
    torch.set_num_threads(1)
    config = config_of(name, seed)
    model, ema, facts = trained(config, seconds)
    found = {"name": name, "seed": seed, "seconds": seconds, "words": SETTINGS[name], **facts}
    found["w1"] = scores(drawn(model, ema.average, 1000, 1.0), labels(1000))
    found["w2"] = accuracy(features(drawn(model, ema.average, 1000, 2.0)), labels(1000))
    if "ema" in sys.argv[4:]:
        for length, average in zip(LENGTHS, ema.averages[1:], strict=True):
            found[f"ema {length:g}"] = scores(drawn(model, average, 1000, 1.0), labels(1000))
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(found))
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
