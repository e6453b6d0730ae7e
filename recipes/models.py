"""Trains the models that come with the package, `undiffuse sample NAME`, and puts them where it finds them.

    python recipes/models.py [digits] [mnist] [fashion]    # train, or go on where it stopped, and install
    python recipes/models.py mnist --path FOLDER           # where the data is not at its usual place
    python recipes/models.py --check [names...]            # how many samples of the shipped models are read as asked

A recipe is words for `undiffuse train`. The shipped weights are what OMP_NUM_THREADS=1 gave; another processor or
number of threads rounds otherwise. CPU seconds are those of the whole process, over all calls.
"""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import replace
from pathlib import Path

import torch
from arguments import given

from undiffuse.config import Config, parse_overrides
from undiffuse.evals.classifier import load_classifier
from undiffuse.fit import fit
from undiffuse.model import Model
from undiffuse.runfolder import SHIPPED

LARGEST = 10_000_000
RANK = 64  # directions of the data's spectrum that are shipped
COMMON = """
    levels.kind=uniform-lam levels.lam_min=-4 levels.lam_max=3 optimiser=muon train.lr=5e-3 train.warmup=40
    train.precision=bf16 train.snapshots=16 grid.lam_max=3 engine.device=cpu eval.every=0 track=none
"""
UNET = "net.kind=unet net.patch=2 net.width=48 net.mults=[1,2] net.depth=1"
RECIPES = {
    "digits": "data=digits net.kind=unet net.patch=2 net.width=64 net.mults=[1] train.steps=1500 train.batch=64",
    "mnist": f"data=mnist {UNET} train.steps=4000 train.batch=64",
    "fashion": f"data=fashion-mnist {UNET} train.steps=6500 train.batch=64",
}


def words(name: str) -> list[str]:
    """What a model is trained with, as words for `undiffuse train`."""
    return [*COMMON.split(), *RECIPES[name].split()]


def make(name: str, path: str | None, runs: Path = Path("runs/models")) -> None:
    """Train a model and install it in the package."""
    out = runs / name
    config = Config.resolve(
        parse_overrides(words(name)), {"out": str(out)}, {"data": {"path": path}} if path is not None else {}
    )
    clock, begun = out / "cpu.json", time.process_time()
    before = float(json.loads(clock.read_text())) if clock.is_file() else 0.0

    def progress(state: object, steps: int) -> None:
        step = state.step  # type: ignore[attr-defined]
        if step % 100 == 0 or step == steps:
            used = before + time.process_time() - begun
            clock.write_text(json.dumps(used))
            print(f"{name}: step {step} of {steps}, loss {state.loss:.4f}, {used:.0f} CPU s", flush=True)  # type: ignore[attr-defined]

    fit(config, progress)
    folder, model = SHIPPED / name / "model", Model.load(out)
    replace(model, spectrum=model.spectrum.leading(RANK)).save(folder)
    size = sum(file.stat().st_size for file in folder.iterdir())
    if size > LARGEST:
        shutil.rmtree(folder)
        raise SystemExit(f"{name}: {size:,} bytes; at most {LARGEST:,} may be shipped")
    print(f"{name}: {size:,} bytes in {folder}, {float(json.loads(clock.read_text())):.0f} CPU s")


def check(name: str, n: int = 1000) -> None:
    """Print the share of samples that the data's own classifier reads as the class asked for."""
    model = Model.load(SHIPPED / name)
    judge = load_classifier(model.config.values["data"]["name"])
    asked = torch.arange(n) % model.classes
    for w in (1.0, 2.0):
        begun = time.perf_counter()
        x = model.sample(n, asked, guidance=w)
        seconds = time.perf_counter() - begun
        with torch.no_grad():
            right = torch.cat([judge(part.clamp(-1, 1)).argmax(1) for part in x.split(500)]) == asked
        share = f"{100 * float(right.float().mean()):.1f} % of {n} samples are read as asked"
        print(f"{name}, w = {w:g}: {share}; {1000 * seconds / n:.1f} ms a sample", flush=True)


def main() -> None:
    asked, mistakes = given(__doc__, RECIPES, "measure the shipped models", "the folder of the data")
    for name in asked.names:
        with mistakes():
            check(name) if asked.check else make(name, asked.path)


if __name__ == "__main__":
    main()
